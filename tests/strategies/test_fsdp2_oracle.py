"""The rewrite beside FSDP2 itself, which runs on fake tensors for any number of ranks."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest

from launchkit.program import Point
from launchkit.scenario import Compute, Method
from launchkit.simulate.expand import PERSISTENT_STAGE, expand
from launchkit.strategies import fsdp2
from launchkit.strategies.base import OPTIMIZER_STAGE
from tests.builders import cluster, scenario

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    pytest.skip("FSDP2 needs torch, and its models transformers", allow_module_level=True)

from launchkit.trace import trace_model
from tests.strategies.oracle import fsdp2_deltas, ranks
from tests.trace.models import GPT2, LLAMA, TIED, key

pytestmark = pytest.mark.filterwarnings("ignore")

long = pytest.mark.skipif(
    "LAUNCHKIT_LONG_TESTS" not in os.environ, reason="several seconds each; set LAUNCHKIT_LONG_TESTS"
)
POINT = Point(2, 16, 4)
LAYERS = {"num_hidden_layers": 3}
LLAMA3, TIED3, GPT23 = LLAMA | LAYERS, TIED | LAYERS, GPT2 | {"n_layer": 3}


@pytest.mark.parametrize(
    ("config", "num_nodes", "settings"),
    [
        (LLAMA3, 8, {"precision": "bf16"}),
        pytest.param(LLAMA3, 1, {}, marks=long),
        pytest.param(TIED3, 8, {}, marks=long),
        pytest.param(GPT23, 1, {"precision": "bf16"}, marks=long),
        pytest.param(LLAMA3, 1, {"precision": "bf16", "checkpointing": "full"}, marks=long),
        pytest.param(LLAMA3, 1, {"method": "lora", "lora_rank": 4}, marks=long),
        pytest.param(LLAMA3, 8, {"sharding": "hybrid_shard", "precision": "bf16"}, marks=long),
    ],
)
def test_the_rewrite_allocates_what_the_engine_does(
    config: dict[str, Any], num_nodes: int, settings: dict[str, Any]
) -> None:
    mixed = settings.get("precision") == "bf16"
    built = scenario(
        strategy="fsdp2", trainer="loop", optimizer="sgd", state="first", **({"precision": "fp32"} | settings)
    )
    hardware = cluster(num_gpus=8, num_nodes=num_nodes)
    traced_under = key(
        compute=Compute.BF16 if mixed else Compute.FP32,
        checkpointing=built.training.checkpointing,
        method=built.training.method,
        lora_targets="all-linear" if built.training.method is Method.LORA else "",
    )
    step = fsdp2.rewrite(trace_model(config, traced_under), scenario=built, cluster=hardware)
    mine = [
        event.delta_bytes
        for event in expand(step, POINT)
        if event.stage != PERSISTENT_STAGE and step.stages[event.stage].name != OPTIMIZER_STAGE
    ]
    whole = replace(traced_under, compute=Compute.FP32)  # the engine casts
    with ranks(8 * num_nodes, num_shards=8 if "sharding" in settings else 0) as mesh:
        engines = fsdp2_deltas(config, whole, mesh, mixed=mixed, point=POINT)
    # The same storages come and go; only the order in which small temporaries of one operator die may differ.
    assert max(accumulate(mine)) == max(accumulate(engines))
    assert sum(mine) == sum(engines)
    assert sorted(mine) == sorted(engines)
