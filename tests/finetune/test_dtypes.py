"""The dtype that the built-in fine-tune loads weights in is the one that the strategies count them in."""

from __future__ import annotations

from itertools import product

import pytest

from launchkit import strategies
from launchkit.launch.job import weights_dtype_of
from launchkit.plan import Candidate
from launchkit.program import Owner
from launchkit.scenario import DeviceKind, Method, Precision, StrategyKind
from launchkit.strategies import Engine
from tests.builders import candidate, cluster
from tests.strategies import small

torch = pytest.importorskip("torch")
WEIGHT_DTYPE = pytest.importorskip("launchkit.trace.methods").WEIGHT_DTYPE

TWO_NODES = cluster(num_gpus=2, num_nodes=2)  # where every strategy makes sense


def cases(*methods: Method, trainer: str) -> list[Candidate]:
    """Every strategy and precision that goes with ``methods``. The built-in fine-tune has no fp8."""
    found = [
        candidate(method=method, strategy=kind, precision=precision, trainer=trainer, lora_rank=1)
        for method, kind, precision in product(methods, StrategyKind, Precision)
        if precision is not Precision.FP8
    ]
    return [each for each in found if not engine(each).refusal(each.scenario, each.model, TWO_NODES)]


def engine(chosen: Candidate) -> Engine:
    return strategies.engine(chosen.scenario.strategy.kind)


def name(chosen: Candidate) -> str:
    training = chosen.scenario.training
    return f"{training.method}-{chosen.scenario.strategy.kind}-{training.precision}"


def itemsize_computed_with(chosen: Candidate) -> int:
    """Bytes per element in the model that is traced for ``chosen``."""
    scenario = chosen.scenario
    key = engine(chosen).trace_key(scenario.training, scenario.strategy, DeviceKind.CUDA)
    return WEIGHT_DTYPE[key.canonical.compute].itemsize


def itemsize_counted(chosen: Candidate) -> int:
    """Bytes per element that the strategy's rewrite counts for weights; with adapters all but a few are frozen."""
    is_frozen = chosen.scenario.training.method is not Method.FULL
    program = small.program(itemsize=itemsize_computed_with(chosen), frozen=is_frozen)
    rewritten = engine(chosen).rewrite(program, scenario=chosen.scenario, cluster=small.ranks(1))
    return round(small.start(rewritten)[Owner.WEIGHTS] / small.NUM_ELEMENTS)


@pytest.mark.parametrize("chosen", cases(*Method, trainer="hf"), ids=name)
def test_weights_are_loaded_as_they_are_counted(chosen: Candidate) -> None:
    assert getattr(torch, weights_dtype_of(chosen)).itemsize == itemsize_counted(chosen)


@pytest.mark.parametrize("chosen", cases(Method.FULL, Method.LORA, trainer="loop"), ids=name)
def test_the_plain_loop_keeps_frozen_weights_as_wide_as_trained_ones(chosen: Candidate) -> None:
    assert getattr(torch, weights_dtype_of(chosen)).itemsize == itemsize_counted(chosen)
