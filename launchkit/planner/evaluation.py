"""The memory of an evaluation between two steps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from launchkit import strategies
from launchkit.planner.point import point_of
from launchkit.program import Phase, Section, Stage, StepProgram
from launchkit.scenario import Scenario, State, Trainer
from launchkit.simulate.memory import MemoryReading, read_memory
from launchkit.simulate.overheads import cublas_workspaces

if TYPE_CHECKING:
    from launchkit.planner.evaluate import Bench

# TrainingArguments' own per_device_eval_batch_size, which nothing that is exported changes. Source: transformers 5.23.
EVALUATION_MICRO_BATCH = 8


def evaluation_micro_batch(scenario: Scenario) -> int:
    """Sequences per device and forward pass of an evaluation: Axolotl's ``eval_batch_size`` is the micro-batch unless
    its file says another, the other trainers' is transformers' default."""
    return scenario.batch.micro_batch if scenario.training.trainer is Trainer.AXOLOTL else EVALUATION_MICRO_BATCH


def evaluated(scenario: Scenario, *, micro_batch: int) -> Scenario:
    """The scenario between two of whose steps ``micro_batch`` sequences are evaluated, with these for a batch."""
    batch = replace(scenario.batch, micro_batch=micro_batch, gradient_accumulation_steps=1)
    return replace(scenario, batch=batch, state=State.STEADY)


def evaluation_peak(bench: Bench, scenario: Scenario, *, micro_batch: int = EVALUATION_MICRO_BATCH) -> MemoryReading:
    """The memory of ``Trainer.evaluate`` between two steps of ``scenario``: weights, optimizer states and buffers lie
    there, and one batch after another goes forward, without gradients, for its loss alone.

    ``micro_batch`` is ``per_device_eval_batch_size``. Reserved is what is allocated: an evaluation fills what the step
    before it left cached, and no allocator is run for what lies beyond. Omits: the logits that ``compute_metrics`` asks
    the trainer to keep, of every batch until the evaluation ends. Raises ``TraceError`` where the evaluation cannot be
    traced.
    """
    scenario = evaluated(scenario, micro_batch=micro_batch)
    cluster = bench.cluster_of(scenario)
    key = bench.evaluation_key(scenario)
    program = bench.source.program(key)
    rewritten = strategies.rewrite(_with_idle_backward(program), scenario=scenario, cluster=cluster)
    forward = tuple(stage for stage in rewritten.stages if stage.phase in (Phase.FORWARD, Phase.LOSS))
    persistent = (*rewritten.persistent, *cublas_workspaces(cluster.gpu, transformer_engine=key.transformer_engine))
    return read_memory(replace(rewritten, stages=forward, persistent=persistent), point_of(scenario))


def _with_idle_backward(program: StepProgram) -> StepProgram:
    """``program``, which ends with its loss, with a backward pass that does nothing: strategies expect one."""
    numbers: dict[str, int] = {}
    sections = list(program.sections)
    stages = list(program.stages)
    for stage in reversed(program.stages):
        layers = []
        for layer in stage.layers:
            group = program.sections[layer].group
            if group not in numbers:
                numbers[group] = len(sections)
                sections.append(Section(events=(), group=group))
            layers.append(numbers[group])
        name = stage.name.replace("forward", "backward", 1)
        stages.append(
            Stage(name=name, phase=Phase.BACKWARD, layers=tuple(layers), stack=stage.stack, reverse=bool(stage.stack))
        )
    return replace(program, stages=tuple(stages), sections=tuple(sections))
