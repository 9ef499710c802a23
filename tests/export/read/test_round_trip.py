"""What launchkit writes for a tool, it reads back: the same scenario, or a reason why the file cannot carry it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from launchkit.alloc_conf import EXPANDABLE
from launchkit.errors import IllegalScenarioError
from launchkit.export import config_files
from launchkit.export.lint import Tool
from launchkit.export.read import Place, parse_config, read_config
from launchkit.hardware import Cluster
from launchkit.plan import Candidate
from launchkit.planner.evaluate import Bench, judge
from launchkit.request import Request, default_prefetch
from launchkit.scenario import Method, Scenario, StrategyKind, Trainer
from tests.builders import cluster
from tests.export.cases import GOLDEN, Case, axolotl_cases, case
from tests.planner.sources import WrittenSource

CASES = [*axolotl_cases(), *GOLDEN]
FILES = {
    Tool.ACCELERATE: "accelerate.yaml",
    Tool.AXOLOTL: "axolotl.yaml",
    Tool.DEEPSPEED: "deepspeed.json",
    Tool.TRL: "trl.yaml",
}
# What the files of accelerate and DeepSpeed leave to the script, and a user to flags.
_SCRIPTS = (
    *("method", "lora_rank", "lora_targets", "lora_dropout", "lora_modules_to_save", "dora", "rslora", "optimizer"),
    *("attention", "loss", "packing", "trainer", "precision", "checkpointing", "compile"),
)
_ADAPTERS = _SCRIPTS[1:7]
# Differences between what was written and what is read, and why the file cannot carry it.
REASONS: Mapping[Tool, Mapping[str, str]] = {
    Tool.AXOLOTL: {
        "alloc_conf": "Axolotl tells torch's allocator itself, whoever's step was planned",
        "training.trainer": "the file is Axolotl's, whoever's step was planned",
        "training.padding": "Axolotl pads what it does not pack, whoever's step was planned",
        "training.precision": "Axolotl loads weights in bf16 where the plan counted fp32, which it says in the file",
        "strategy.fsdp.backward_prefetch": "Axolotl's FSDP1 prefetches nothing, which the file says",
        "strategy.fsdp.forward_prefetch": "Axolotl's FSDP1 prefetches nothing, which the file says",
        "training.loss": "the compiled chunked loss is not modelled; plain cross-entropy is counted",
        "training.checkpointing": "FSDP has no selective checkpointing, which planning refuses",
        "training.max_grad_norm": "DeepSpeed's file has the number of a plain loop, which clips nothing",
        "strategy.kind": "the file is for as many processes as there are GPUs",
    },
    Tool.TRL: {
        "training.trainer": "the file is TRL's, whoever's step was planned",
        "training.loss": "TRL has no plain loss",
        "training.precision": "all it says is the dtype of the weights: of adapters and unsharded ones two read alike",
        "training.checkpointing": "FSDP has no selective checkpointing, which planning refuses",
        "training.max_grad_norm": "DeepSpeed's file has the number of a plain loop, which clips nothing",
        "strategy.kind": "without accelerate's file beside it, as many processes as there are GPUs",
    },
    Tool.ACCELERATE: {
        **{
            f"strategy.ddp.{name}": "accelerate has no keys for it: the file's comments say what the script has to"
            for name in ("bucket_cap_bytes", "find_unused_parameters", "static_graph")
        },
        "training.max_grad_norm": "DeepSpeed's file has the number of a plain loop, which clips nothing",
    },
    Tool.DEEPSPEED: {
        "training.max_grad_norm": "it has the number of a plain loop, which clips nothing",
        "strategy.split.sp": "Ulysses is asked for in accelerate's file",
        "batch.gradient_accumulation_steps": "ranks that share a sequence are counted as having their own",
    },
}


def differences(one: Any, other: Any, path: str = "") -> set[str]:
    """Paths of the fields in which two dataclasses differ."""
    found: set[str] = set()
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if is_dataclass(left):
            found |= differences(left, right, f"{path}{field.name}.")
        elif left != right:
            found.add(f"{path}{field.name}")
    return found


def settled(scenario: Scenario) -> Scenario:
    """A scenario with what follows from the rest written out, so that two that are the same are equal."""
    strategy, training = scenario.strategy, scenario.training
    fsdp = replace(
        strategy.fsdp,
        offload_params=strategy.offloads_params and strategy.kind.is_fsdp,
        cpu_ram_efficient_loading=scenario.loads_on_first_rank,
        sharding=strategy.fsdp.sharding if strategy.kind is not StrategyKind.HSDP else "hybrid_shard",  # type: ignore[arg-type]
    )
    is_full = training.method is Method.FULL
    return replace(
        scenario,
        strategy=replace(strategy, fsdp=fsdp if strategy.kind.is_fsdp else type(fsdp)()),
        training=replace(training, lora_rank=16, lora_targets="") if is_full else training,
    )


def written(each: Case, tool: Tool) -> dict[str, str] | None:
    """The files of a case; None where the tool has none for it."""
    try:
        files = config_files(each.candidate, each.cluster, targets=(tool.value,))
    except IllegalScenarioError:
        return None
    texts = {file.name: file.text for file in files}
    return texts if FILES[tool] in texts else None


def processes(each: Case) -> Cluster:
    """The part of the cluster on which the file starts processes."""
    num_ranks = each.candidate.scenario.strategy.num_ranks(each.cluster.num_gpus)
    if num_ranks == each.cluster.num_gpus:
        return each.cluster
    return replace(each.cluster, num_nodes=1, node=replace(each.cluster.node, num_gpus=num_ranks))


def read_back(candidate: Candidate, texts: dict[str, str], tool: Tool, cluster: Cluster) -> Scenario:
    given = Request.from_flags(_flags(candidate.scenario, cluster) if tool in (Tool.ACCELERATE, Tool.DEEPSPEED) else {})
    config = dict(parse_config(texts[FILES[tool]], name="f"))
    if tool is Tool.TRL:
        config["accelerate_config"] = "accelerate.yaml"
    place = Place(file="f", cluster=cluster, given=given, open_file=texts.get)
    reading = read_config(config, tool=tool, place=place)
    assert reading.ignored == ()
    return reading.scenario(given, model=candidate.model, cluster=cluster).scenario


def _flags(scenario: Scenario, cluster: Cluster) -> dict[str, object]:
    training, batch = scenario.training, scenario.batch
    names = [name for name in _SCRIPTS if training.method is not Method.FULL or name not in _ADAPTERS]
    ranks = scenario.strategy.num_data_ranks(cluster.num_gpus)
    return {name: value for name in names if (value := getattr(training, name)) not in ("", None)} | {
        "micro_batch": batch.micro_batch,
        "seq_len": batch.seq_len,
        "global_batch": batch.global_batch(ranks),
    }


@pytest.mark.parametrize("tool", Tool)
def test_what_is_written_is_read_back(tool: Tool) -> None:
    seen: set[str] = set()
    num_read = 0
    for each in CASES:
        texts = written(each, tool)
        if texts is None:
            continue
        cluster = processes(each) if tool is Tool.ACCELERATE else each.cluster
        scenario = read_back(each.candidate, texts, tool, cluster)
        found = differences(settled(each.candidate.scenario), settled(scenario))
        assert found <= REASONS[tool].keys(), f"{each.name}: {found}"
        seen |= found
        num_read += 1
    assert seen == REASONS[tool].keys()  # no reason without a case
    assert num_read >= 60


# Every engine, with what the planner really writes: adapters on bf16 weights, a full fine-tune with fp32 somewhere.
_PLANNED = [
    case(f"{kind}-{offload}-{method}", strategy=kind, offload=offload, method=method, **values)
    for kind, offload, method, values in (
        ("ddp", "none", "lora", {"precision": "bf16-params"}),
        ("fsdp2", "none", "full", {}),
        ("fsdp2", "params", "full", {}),
        ("fsdp", "none", "full", {}),
        ("zero2", "optimizer", "full", {}),
        ("zero3", "none", "full", {}),
        ("zero3", "all", "full", {}),
    )
]


@pytest.mark.parametrize("each", _PLANNED, ids=lambda each: each.name)
@pytest.mark.parametrize("tool", [Tool.ACCELERATE, Tool.AXOLOTL])
def test_the_estimate_is_the_same_to_the_byte(tool: Tool, each: Case) -> None:
    source, gpus = WrittenSource(), cluster()
    scenario = replace(each.candidate.scenario, training=replace(each.candidate.scenario.training))
    if tool is Tool.AXOLOTL:
        training = replace(scenario.training, trainer=Trainer.AXOLOTL)
        fsdp = replace(scenario.strategy.fsdp, backward_prefetch=default_prefetch(Trainer.AXOLOTL))
        strategy = replace(scenario.strategy, fsdp=fsdp)
        scenario = replace(scenario, strategy=strategy, training=training, alloc_conf=EXPANDABLE)
    candidate = replace(each.candidate, model=source.profile, scenario=scenario)
    texts = written(Case(each.name, candidate, gpus), tool)
    assert texts is not None
    bench = Bench(source=source, cluster=gpus)
    before = judge(bench, scenario).estimate
    assert judge(bench, read_back(candidate, texts, tool, gpus)).estimate == before
