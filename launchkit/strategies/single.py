"""One process, nothing sharded: the traced step with its weights, its optimizer and its accumulated gradients."""

from __future__ import annotations

from dataclasses import replace

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.optimizers import find
from launchkit.program import StepProgram
from launchkit.scenario import DeviceKind, Offload, Scenario, Strategy, TraceKey, Training
from launchkit.strategies.base import (
    AUTOCAST_COMPUTE,
    OptimizerStep,
    accumulate_gradients,
    accumulates,
    gradient_storages,
    make_trace_key,
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
    """The whole model, its gradients and its optimizer on one device."""
    persistent = program.persistent + weights(program, scenario=scenario)
    if find(scenario.training.optimizer).in_backward:
        return update_in_backward(
            replace(program, persistent=persistent), scenario=scenario, device=cluster.gpu.device_kind
        )
    step = OptimizerStep(tensors=whole_tensors(program, scenario=scenario))
    if accumulates(scenario):
        persistent += gradient_storages(program, scenario=scenario)
        program = accumulate_gradients(program)
    program = replace(program, persistent=persistent)
    return with_optimizer(program, step, scenario=scenario, device=cluster.gpu.device_kind)
