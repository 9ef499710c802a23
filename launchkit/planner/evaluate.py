"""Judges one scenario: exactly, through the simulators, or cheaply, by its live bytes alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from launchkit import strategies
from launchkit.errors import IllegalScenarioError
from launchkit.hardware import Cluster
from launchkit.model import ModelProfile, ModelSource
from launchkit.optimizers import FP32_BYTES, LocalTensor, find, traffic_bytes
from launchkit.plan import Candidate, Estimate, StepTime
from launchkit.planner.host import checkpoint_bytes, host_load_peak_bytes, host_peak_bytes
from launchkit.program import Owner, Phase, Point, Section, Stage, StepProgram
from launchkit.scenario import DeviceKind, Method, Scenario, State, StrategyKind, TraceKey
from launchkit.simulate.clock import Job, simulate_time
from launchkit.simulate.memory import MemoryReading, read_memory, simulate_memory
from launchkit.simulate.overheads import (
    ByteRange,
    communicator_buffers,
    cublas_workspaces,
    cuda_context,
    device_peak,
)
from launchkit.simulate.reading import CompiledProgram, compile_program
from launchkit.units import divide_up

# Allocations smaller than this are padded to it. Source: CUDACachingAllocator's kMinBlockSize.
CUDA_BLOCK_BYTES = 512


@dataclass(kw_only=True)
class Bench:
    """A model on a cluster, with the programs rewritten so far. Scenarios that differ in batch alone share one."""

    source: ModelSource
    cluster: Cluster
    _rewritten: dict[tuple[TraceKey, Scenario], StepProgram] = field(default_factory=dict)
    _compiled: dict[tuple[TraceKey, Scenario], CompiledProgram] = field(default_factory=dict)

    def cluster_of(self, scenario: Scenario) -> Cluster:
        """The part of the cluster that a scenario uses: one GPU for a single process, else all."""
        if scenario.strategy.kind is not StrategyKind.SINGLE or self.cluster.num_gpus == 1:
            return self.cluster
        return replace(self.cluster, num_nodes=1, node=replace(self.cluster.node, num_gpus=1))

    def key(self, scenario: Scenario) -> TraceKey:
        return program_key(scenario, self.source.profile, self.cluster.gpu.device_kind)

    def program(self, scenario: Scenario) -> StepProgram:
        """The step of the largest rank. Raises ``TraceError`` where the model's program cannot be had."""
        key, same = self._identity(scenario)
        if (key, same) not in self._rewritten:
            cluster = self.cluster_of(scenario)
            program = strategies.rewrite(self.source.program(key), scenario=scenario, cluster=cluster)
            workspaces = cublas_workspaces(cluster.gpu)
            self._rewritten[key, same] = replace(program, persistent=(*program.persistent, *workspaces))
        return self._rewritten[key, same]

    def live_peak_bytes(self, scenario: Scenario) -> int:
        """The allocated peak by the cheap reading."""
        identity = self._identity(scenario)
        if identity not in self._compiled:
            self._compiled[identity] = compile_program(self.program(scenario))
        granularity = 1 if self.cluster.gpu.device_kind is DeviceKind.CPU else CUDA_BLOCK_BYTES
        return self._compiled[identity].peak(point_of(scenario), granularity_bytes=granularity).num_bytes

    def _identity(self, scenario: Scenario) -> tuple[TraceKey, Scenario]:
        """The key, and the scenario without what a rewrite does not depend on: lengths, and how many micro-batches."""
        batch = scenario.batch
        steps = min(batch.gradient_accumulation_steps, 2)
        same = replace(
            scenario,
            batch=replace(batch, seq_len=1, gradient_accumulation_steps=steps, micro_batch=min(batch.micro_batch, 2)),
        )
        return self.key(scenario), same


def program_key(scenario: Scenario, profile: ModelProfile, device: DeviceKind) -> TraceKey:
    """Which of the model's programs the scenario starts from."""
    training, point = scenario.training, point_of(scenario)
    key = strategies.trace_key(training, scenario.strategy, device, single_sequence=point.micro_batch == 1)
    window = profile.sliding_window
    beyond_window = bool(window) and point.seq_len >= window
    return replace(key, beyond_window=beyond_window, packed=training.flattens_batch).canonical


def point_of(scenario: Scenario) -> Point:
    """Where the scenario evaluates its program."""
    batch = scenario.batch
    rank = 0 if scenario.training.method is Method.FULL else scenario.training.lora_rank
    if scenario.training.flattens_batch:
        return Point(1, batch.micro_batch * batch.seq_len, rank)
    return Point(batch.micro_batch, batch.seq_len, rank)


def estimate(source: ModelSource, *, cluster: Cluster, scenario: Scenario) -> Candidate:
    """Memory and speed of exactly this scenario.

    Raises ``IllegalScenarioError`` where the engine would refuse it, ``TraceError`` where the model's step cannot be
    had.
    """
    bench = Bench(source=source, cluster=cluster)
    reason = strategies.refusal(scenario, source.profile, bench.cluster_of(scenario))
    if reason is not None:
        raise IllegalScenarioError(reason)
    return judge(bench, scenario)


def judge(bench: Bench, scenario: Scenario) -> Candidate:
    """The candidate with its memory run through the allocator and its time through the clock."""
    cluster = bench.cluster_of(scenario)
    device_kind = cluster.gpu.device_kind
    outside = cuda_context(cluster.gpu).plus(communicators(cluster, scenario))
    reading = simulate_memory(
        bench.program(scenario),
        point_of(scenario),
        device_kind=device_kind,
        capacity_bytes=None if device_kind is DeviceKind.CPU else usable_bytes(cluster) - outside.typical,
        eager_optimizer_states=scenario.strategy.kind.zero_stage > 0,
    )
    return candidate_of(bench, scenario, reading)


# TrainingArguments' own per_device_eval_batch_size, which nothing that is exported changes. Source: transformers 5.23.
EVALUATION_MICRO_BATCH = 8


def evaluation_peak(bench: Bench, scenario: Scenario, *, micro_batch: int = EVALUATION_MICRO_BATCH) -> MemoryReading:
    """The memory of ``Trainer.evaluate`` between two steps of ``scenario``: weights, optimizer states and buffers lie
    there, and one batch after another goes forward, without gradients, for its loss alone.

    ``micro_batch`` is ``per_device_eval_batch_size``. The reserved figures are an evaluation's alone: after a training
    step it reuses what that one left cached. Omits: the logits that ``compute_metrics`` asks the trainer to keep, of
    every batch until the evaluation ends. Raises ``TraceError`` where the evaluation cannot be traced.
    """
    batch = replace(scenario.batch, micro_batch=micro_batch, gradient_accumulation_steps=1)
    scenario = replace(scenario, batch=batch, state=State.STEADY)
    cluster = bench.cluster_of(scenario)
    program = bench.source.program(replace(bench.key(scenario), evaluation=True).canonical)
    rewritten = strategies.rewrite(_with_idle_backward(program), scenario=scenario, cluster=cluster)
    forward = tuple(stage for stage in rewritten.stages if stage.phase in (Phase.FORWARD, Phase.LOSS))
    persistent = (*rewritten.persistent, *cublas_workspaces(cluster.gpu))
    return simulate_memory(
        replace(rewritten, stages=forward, persistent=persistent),
        point_of(scenario),
        device_kind=cluster.gpu.device_kind,
    )


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


def communicators(cluster: Cluster, scenario: Scenario) -> ByteRange:
    """The buffers of the process groups that a scenario makes: one, or two where shards and replicas are apart."""
    return communicator_buffers(cluster, num_communicators=_num_communicators(scenario))


def _num_communicators(scenario: Scenario) -> int:
    return 2 if scenario.strategy.kind is StrategyKind.HSDP or scenario.strategy.fsdp.sharding.is_hybrid else 1


def sketch(bench: Bench, scenario: Scenario) -> Candidate:
    """The candidate by its live bytes alone, for those that are shown beside the chosen one.

    Its reserved memory is the allocated with the share that the allocator run of the chosen one adds left out; the
    fragmentation it will have is within the error band of every estimate.
    """
    reading = read_memory(bench.program(scenario), point_of(scenario))
    return candidate_of(bench, scenario, reading)


def candidate_of(bench: Bench, scenario: Scenario, reading: MemoryReading) -> Candidate:
    """A candidate from a reading of its memory."""
    profile, cluster = bench.source.profile, bench.cluster_of(scenario)
    program = bench.program(scenario)
    rank = point_of(scenario).lora_rank
    num_trainable = program.num_parameters(rank, trainable=True)
    device = device_peak(reading, cluster, num_communicators=_num_communicators(scenario))
    at_peak: dict[str, int] = {str(owner): reading.at_peak[owner] for owner in Owner}
    at_peak |= {
        "cuda_context": device.cuda_context_bytes,
        "nccl": device.nccl_bytes,
        "fragmentation": device.fragmentation_bytes,
    }
    return Candidate(
        model=profile,
        num_parameters=profile.num_parameters,
        num_trainable=num_trainable,
        scenario=scenario,
        estimate=Estimate(
            allocated_peak_bytes=reading.allocated_peak_bytes,
            reserved_peak_bytes=reading.reserved_peak_bytes,
            device_peak_bytes=device.typical_bytes,
            device_peak_low_bytes=device.low_bytes,
            device_peak_high_bytes=device.high_bytes,
            device_usable_bytes=usable_bytes(cluster),
            peak_phase=str(reading.peak_phase),
            peak_stage=reading.peak_stage,
            at_peak=at_peak,
            steady_bytes=reading.steady_bytes,
            host_peak_bytes=host_peak_bytes(program, cluster=cluster),
            host_load_peak_bytes=host_load_peak_bytes(profile, scenario, cluster=cluster),
            checkpoint_bytes=checkpoint_bytes(profile, scenario, num_trainable=num_trainable),
        ),
        step=step_time(bench, scenario),
    )


def step_time(bench: Bench, scenario: Scenario) -> StepTime:
    """One optimizer step by the clock."""
    profile, cluster = bench.source.profile, bench.cluster_of(scenario)
    program = bench.program(scenario)
    point = point_of(scenario)
    num_trainable = program.num_parameters(point.lora_rank, trainable=True)
    job = Job(
        cluster=cluster,
        compute=bench.key(scenario).compute,
        gradient_accumulation_steps=scenario.batch.gradient_accumulation_steps,
        shard_group_size=cluster.node.num_gpus if scenario.strategy.kind is StrategyKind.HSDP else 0,
        reduces_every_micro_batch=scenario.strategy.kind is not StrategyKind.DDP,
        host_optimizer_bytes=_host_optimizer_bytes(num_trainable, scenario, cluster),
        is_compiled=scenario.training.compile,
        num_active_parameters=profile.num_active_parameters or profile.num_parameters,
        num_trainable=num_trainable,
        num_layers=profile.num_layers,
        hidden_size=profile.hidden_size,
    )
    return simulate_time(program, point, job=job)


def _host_optimizer_bytes(num_trainable: int, scenario: Scenario, cluster: Cluster) -> int:
    """Host memory traffic of one rank's optimizer, where the strategy keeps it on the CPU: its shard, in fp32."""
    strategy = scenario.strategy
    if not (strategy.offload.optimizer or (strategy.kind.is_fsdp and strategy.offload.params)):
        return 0
    shard = LocalTensor((divide_up(num_trainable, cluster.num_gpus),), FP32_BYTES)
    return traffic_bytes(find(scenario.training.optimizer), (shard,), device=DeviceKind.CPU)


def usable_bytes(cluster: Cluster) -> int:
    """Device memory that a process may take, in bytes: the driver's total less what torch does not see of it and what
    others hold. Of a CPU: the host's memory, shared equally among the processes of a node."""
    gpu = cluster.gpu
    if gpu.device_kind is DeviceKind.CPU:
        return (cluster.node.host_memory_bytes or gpu.memory_bytes) // cluster.node.num_gpus
    reserved = gpu.reserved_by_driver_bytes or round(gpu.memory_bytes * UNSEEN_SHARE)
    return gpu.memory_bytes - reserved - cluster.used_bytes


# What torch does not see of the driver's total where nobody measured it: 0.2 to 0.9 GiB on cards of 8 to 96 GiB,
# about 1.5 % of the total. Source: torch.cuda.get_device_properties beside nvidia-smi in public logs (profiles/gpus).
UNSEEN_SHARE = 0.015
