"""One copy of the model, on one rank or on several that share its step: the traced step with its weights, its
optimizer and its accumulated gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.optimizers import LocalTensor, find
from launchkit.program import (
    Alloc,
    Collective,
    CollectiveKind,
    Free,
    Moment,
    Owner,
    Size,
    StepProgram,
    local,
)
from launchkit.scenario import DeviceKind, Offload, Scenario, Strategy, TraceKey, Trainer, Training
from launchkit.strategies.base import (
    AUTOCAST_COMPUTE,
    OPTIMIZER_STAGE,
    OptimizerStep,
    accumulate_gradients,
    accumulates,
    gradient_storages,
    located_parameters,
    lora_rank,
    make_trace_key,
    narrowed_bytes,
    update_in_backward,
    weights,
    whole_tensors,
    with_optimizer,
)


def trace_key(training: Training, strategy: Strategy, device: DeviceKind, *, single_sequence: bool = False) -> TraceKey:
    """Weights in the dtype they are stored in, autocast around the forward pass where the precision is mixed."""
    return make_trace_key(training, AUTOCAST_COMPUTE[training.precision], device, single_sequence=single_sequence)


def refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """Nothing but DeepSpeed and FSDP moves anything to the host."""
    if scenario.strategy.offload is not Offload.NONE:
        return (
            f"--offload {scenario.strategy.offload} needs an engine that moves tensors, and --strategy "
            f"{scenario.strategy.kind} has none; use --strategy zero2, zero3 or fsdp2"
        )
    return None


def rewrite(program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> StepProgram:
    """The whole model, or this rank's part of it, its gradients and its optimizer on one device."""
    persistent = program.persistent + weights(program, scenario=scenario)
    if find(scenario.training.optimizer).in_backward:
        return update_in_backward(
            replace(program, persistent=persistent), scenario=scenario, device=cluster.gpu.device_kind
        )
    step = _optimizer_step(program, scenario)
    if accumulates(scenario):
        persistent += gradient_storages(program, scenario=scenario)
        program = accumulate_gradients(program)
    program = replace(program, persistent=persistent)
    return with_optimizer(program, step, scenario=scenario, device=cluster.gpu.device_kind)


def _optimizer_step(program: StepProgram, scenario: Scenario) -> OptimizerStep:
    """What this rank's optimizer updates. What is split is a kernel call of its own, ahead of what every rank holds. A
    kernel that reads a gradient wider than its parameter reads a copy of this rank's
    part, while all states exist and none of the update's other temporaries do.

    Source: transformers 5.23 ``Trainer.create_optimizer`` (a group per device mesh); DTensor's redistribution of the
    arguments of an operator, seen in the timeline.
    """
    tensors = whole_tensors(program, scenario=scenario)
    if scenario.strategy.split.tp == 1:
        return OptimizerStep(tensors=tensors)
    copied = Size.constant(narrowed_bytes(located_parameters(program, trainable=True), rank=lora_rank(scenario)))
    passing = (Alloc(0, copied, Owner.TEMPORARIES), Free(local(OPTIMIZER_STAGE, 0), copied))
    return OptimizerStep(
        tensors=tuple(sorted(tensors, key=lambda tensor: not tensor.is_split)),
        after=passing if copied.terms else (),
        collectives=() if scenario.training.trainer is Trainer.LOOP else _averages(tensors),
    )


def _averages(tensors: Sequence[LocalTensor]) -> tuple[Collective, ...]:
    """The Trainer averages over all ranks the gradients of what is not split (norms, one matrix of each adapter), one
    by one and once a step, though they are the same already.

    Source: transformers 5.23 ``Trainer._sync_replicated_trainable_parameters``. Each is sent when it is complete, which
    all that follows waits for: here at the end.
    """
    return tuple(
        Collective(CollectiveKind.ALL_REDUCE, Size.constant(tensor.num_bytes), Moment.BLOCKING)
        for tensor in tensors
        if not tensor.is_split
    )
