"""DeepSpeed ZeRO: which program it starts from, what it refuses, and which rewrite each stage has."""

from __future__ import annotations

from dataclasses import replace

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.program import Owner, Persistent, Size, StepProgram
from launchkit.scenario import (
    Checkpointing,
    Compute,
    DeviceKind,
    Method,
    Offload,
    Precision,
    Scenario,
    Strategy,
    TraceKey,
    Training,
)
from launchkit.strategies import zero3, zero_flat
from launchkit.strategies.base import make_trace_key
from launchkit.strategies.zero_job import Job

# The engine casts the module, so nothing is left for autocast to do; accelerate leaves it off under DeepSpeed.
COMPUTE = {
    Precision.FP32: Compute.FP32,
    Precision.FP16: Compute.FP16,
    Precision.BF16: Compute.BF16,
    Precision.BF16_PARAMS: Compute.BF16,
    Precision.BF16_PURE: Compute.BF16,
}

ALL_LINEAR = "all-linear"
_REENTERED = (Checkpointing.FULL, Checkpointing.REENTRANT)

# torch optimizers that accelerate swaps for DeepSpeed's own CPU kernels when the optimizer is offloaded
_HOST_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad", "lion_32bit")


def trace_key(training: Training, strategy: Strategy, device: DeviceKind, *, single_sequence: bool = False) -> TraceKey:
    """The whole module runs in the engine's dtype, adapters included.

    Stage 3 keeps the input of every linear layer, unless told to leave them torch's. Where all of them have adapters
    these keep it anyway, but for the head's, which is small; so a program of its own is traced only for other targets,
    and where parts of a full fine-tune are frozen.
    """
    key = make_trace_key(training, COMPUTE[training.precision], device, single_sequence=single_sequence)
    casts = training.method is not Method.FULL and key.compute is not Compute.FP32
    some_adapted = training.method is Method.LORA and training.lora_targets != ALL_LINEAR
    own_linear = strategy.kind.zero_stage == 3 and strategy.zero.memory_efficient_linear
    if training.must_reenter(strategy.kind):
        key = replace(key, checkpointing=Checkpointing.REENTRANT)
    return replace(key, cast_adapters=casts, keeps_linear_inputs=own_linear and (some_adapted or bool(key.freeze)))


def refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What DeepSpeed's configuration checks reject, with what to type instead."""
    stage, offload = scenario.strategy.kind.zero_stage, scenario.strategy.offload
    optimizer = scenario.training.optimizer
    grouped = _group_refusal(scenario, stage, num_ranks=cluster.num_gpus)
    if grouped is not None:
        return grouped
    training = scenario.training
    if training.must_reenter(scenario.strategy.kind) and training.checkpointing not in _REENTERED:
        whose = "4-bit weights" if training.method is Method.QLORA else "TRL's adapters"
        return (
            f"under ZeRO-3 the checkpoints of {whose} are re-entered, and --checkpointing {training.checkpointing} "
            "cannot be; use --checkpointing full"
        )
    if offload.params and stage != 3:
        return f"--offload {offload} moves parameters, which ZeRO-{stage} does not shard; use --strategy zero3"
    if offload is Offload.PARAMS:
        return "DeepSpeed moves parameters only together with the optimizer; use --offload all"
    if offload is Offload.NVME and not scenario.strategy.zero.nvme_path:
        return "--offload nvme needs a directory on a local disk; add --zero-settings nvme_path=/local_nvme"
    if offload.optimizer and scenario.training.has_bf16_masters:
        return f"DeepSpeed offloads no bf16 optimizer states; use --precision bf16 with --offload {offload}"
    if offload.optimizer and optimizer not in _HOST_OPTIMIZERS:
        return (
            f"--optimizer {optimizer} has no CPU kernel in DeepSpeed, which --offload {offload} needs; "
            "use --optimizer adamw_torch_fused"
        )
    return None


def _group_refusal(scenario: Scenario, stage: int, *, num_ranks: int) -> str | None:
    """ZeRO++ and MiCS are stage 3's, and their groups of ranks are all alike."""
    zero = scenario.strategy.zero
    sizes = {"zero_hpz_partition_size": zero.zero_hpz_partition_size, "mics_shard_size": zero.mics_shard_size or 1}
    for key, size in sizes.items():
        if size > 1 and stage != 3:
            return f"{key}={size} needs sharded weights, which ZeRO-{stage} has not; use --strategy zero3"
        if size > 1 and num_ranks % size:
            return f"{key}={size} does not divide {num_ranks} GPUs; use a divisor of {num_ranks}"
    return None


def rewrite(program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> StepProgram:
    """The step of one rank of a ZeRO job."""
    job = Job.of(program, scenario=scenario, cluster=cluster)
    rewritten = zero3.rewrite(job) if scenario.strategy.kind.zero_stage == 3 else zero_flat.rewrite(job)
    return _on_one_memory(rewritten) if job.device is DeviceKind.CPU else rewritten


def _on_one_memory(program: StepProgram) -> StepProgram:
    """Where the device is the CPU, what is offloaded stays in the same memory."""
    host = Persistent(Size.constant(program.host_persistent_bytes), Owner.OPTIMIZER_STATES)
    return replace(program, persistent=(*program.persistent, host), host_persistent_bytes=0)
