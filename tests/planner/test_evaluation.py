"""An evaluation between two steps: what lies there anyway, and a forward pass without gradients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from launchkit.hardware import Backend
from launchkit.model import ModelProfile
from launchkit.plan import RunPhase
from launchkit.planner import evaluation
from launchkit.planner.evaluate import Bench, judge
from launchkit.planner.evaluation import EVALUATION_MICRO_BATCH, evaluation_peak
from launchkit.program import Owner, StepProgram
from launchkit.request import Request, resolve
from launchkit.scenario import Scenario, TraceKey
from launchkit.simulate.memory import MemoryReading
from tests.builders import cluster

pytest.importorskip("transformers")
from launchkit.trace import profile_model, trace_model
from tests.trace.models import LLAMA

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Traced:
    """A small model that traces what it is asked for, once."""

    programs: dict[TraceKey, StepProgram] = field(default_factory=dict)
    profile: ModelProfile = field(default_factory=lambda: profile_model(LLAMA, name="it"))

    def program(self, key: TraceKey) -> StepProgram:
        if key not in self.programs:
            self.programs[key] = trace_model(LLAMA, key)
        return self.programs[key]

    def has_program(self, key: TraceKey) -> bool:
        return True


SOURCE = Traced()


def bench_and_scenario(**flags: Any) -> tuple[Bench, Scenario]:
    num_gpus = 1 if flags.get("strategy", "single") == "single" else 2
    hardware = cluster(num_gpus=num_gpus, backend=Backend.CPU)
    bench = Bench(source=SOURCE, cluster=hardware)
    defaults = {"precision": "fp32", "micro_batch": 8, "seq_len": 64, "checkpointing": "none"}
    return bench, resolve(Request.from_flags(defaults | flags), model=SOURCE.profile, cluster=hardware).scenario


def evaluated(num_sequences: int = 8, **flags: Any) -> MemoryReading:
    bench, scenario = bench_and_scenario(**flags)
    return evaluation_peak(bench, scenario, micro_batch=num_sequences)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2", "zero3"])
def test_it_takes_less_than_the_step_and_no_gradients(strategy: str) -> None:
    bench, scenario = bench_and_scenario(strategy=strategy)
    reading = evaluation_peak(bench, scenario, micro_batch=8)
    assert reading.allocated_peak_bytes < judge(bench, scenario).estimate.allocated_peak_bytes
    assert reading.at_peak[Owner.OPTIMIZER_STATES] > 0
    if not strategy.startswith("zero"):  # whose gradient buffers stay
        assert reading.at_peak[Owner.GRADIENTS] == 0


def test_it_grows_with_its_own_batch_and_not_with_the_steps() -> None:
    small, large = evaluated(8), evaluated(16)
    assert small.allocated_peak_bytes < large.allocated_peak_bytes
    assert evaluated(8, micro_batch=2, global_batch=8) == small


def test_checkpointing_makes_no_difference() -> None:
    assert evaluated(checkpointing="full") == evaluated(checkpointing="none")


@pytest.mark.parametrize(
    ("trainer", "num_sequences"), [("hf", EVALUATION_MICRO_BATCH), ("trl", EVALUATION_MICRO_BATCH), ("axolotl", 2)]
)
def test_it_is_a_phase_of_the_run_before_the_last(trainer: str, num_sequences: int) -> None:
    bench, scenario = bench_and_scenario(trainer=trainer, micro_batch=2)
    estimate = judge(bench, scenario).estimate
    *_, phase, _ = estimate.phases
    assert phase.phase is RunPhase.EVALUATION
    assert (
        phase.allocated_peak_bytes == evaluation_peak(bench, scenario, micro_batch=num_sequences).allocated_peak_bytes
    )
    assert phase not in estimate.certain_phases


def test_the_plain_loop_has_none() -> None:
    phases = judge(*bench_and_scenario(trainer="loop")).estimate.phases
    assert RunPhase.EVALUATION not in [phase.phase for phase in phases]


def test_a_run_that_evaluates_nothing_fits_whatever_an_evaluation_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_MICRO_BATCH", 64)
    bench, scenario = bench_and_scenario(micro_batch=1, trainer="hf")
    usable = judge(bench, scenario).estimate.device_peak_high_bytes
    node = replace(bench.cluster.node, host_memory_bytes=usable)
    candidate = judge(replace(bench, cluster=replace(bench.cluster, node=node)), scenario)
    assert candidate.estimate.fits
    assert candidate.estimate.worst_phase is not RunPhase.EVALUATION
    (note,) = [note for note in candidate.notes if "evaluation" in note]
    assert note.startswith("an evaluation of 64 sequences at a time needs")
    assert "set per_device_eval_batch_size lower" in note
