"""Judges one scenario: exactly, through the simulators, or cheaply, by its live bytes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from launchkit import strategies
from launchkit.alloc_conf import AllocatorSettings
from launchkit.errors import MissingExtraError, TraceError
from launchkit.hardware import Cluster
from launchkit.images import OF_ANY_SIZE
from launchkit.model import ModelProfile, ModelSource
from launchkit.optimizers import FP32_BYTES, LocalTensor, find, traffic_bytes
from launchkit.plan import Candidate, Estimate, RunPhase, StepTime
from launchkit.planner.axolotl import as_axolotl
from launchkit.planner.disk import checkpoint_files
from launchkit.planner.evaluation import evaluated, evaluation_micro_batch, evaluation_peak
from launchkit.planner.host import HostNeed, greatest_need, known_host_bytes, rare_host_bytes, unfilled_bytes
from launchkit.planner.phases import Run, StepPeak, phase_peaks
from launchkit.planner.point import point_of
from launchkit.planner.sizes import ModelSizes
from launchkit.program import Owner, Phase, StepProgram
from launchkit.scenario import (
    Batch,
    Checkpointing,
    DeviceKind,
    Method,
    Precision,
    Scenario,
    State,
    StrategyKind,
    TraceKey,
    Trainer,
)
from launchkit.simulate.clock import Job, simulate_time
from launchkit.simulate.loading import left_by_loading
from launchkit.simulate.memory import MemoryReading, read_memory, simulate_memory
from launchkit.simulate.overheads import (
    ByteRange,
    DevicePeak,
    communicator_buffers,
    cublas_workspaces,
    cuda_context,
    device_peak,
    reservable_bytes,
    unsimulated_peak,
)
from launchkit.simulate.reading import CompiledProgram, compile_program
from launchkit.strategies.base import compact
from launchkit.strategies.fsdp2 import is_hybrid, shard_group_size
from launchkit.strategies.weights import loaded_itemsize
from launchkit.units import divide_up, gib, gigabytes

# What one sequence's own program holds in the forward pass, at least, of what that of several sequences says of one:
# 0.995 to 1.03 in the 560 pairs of the catalogue.
_SINGLE_OF_SEVERAL = 0.98

# Allocations smaller than this are padded to it. Source: CUDACachingAllocator's kMinBlockSize.
CUDA_BLOCK_BYTES = 512


@dataclass(kw_only=True)
class Bench:
    """A model on a cluster, with the programs rewritten so far. Scenarios that differ in batch alone share one.

    Where it ``asks_kernels``, a single CPU process has a program for each batch, with what this machine's kernels take.
    """

    source: ModelSource
    cluster: Cluster
    asks_kernels: bool = False
    _rewritten: dict[tuple[TraceKey, Scenario], StepProgram] = field(default_factory=dict)
    _compiled: dict[tuple[TraceKey, Scenario], CompiledProgram] = field(default_factory=dict)
    _forward_passes: dict[TraceKey, CompiledProgram] = field(default_factory=dict)
    step_times: dict[Scenario, StepTime] = field(default_factory=dict)
    stands_in: bool = False  # whether some program is another trainer's
    _sizes: dict[Scenario, ModelSizes] = field(default_factory=dict)
    _host_needs: dict[Scenario, HostNeed] = field(default_factory=dict)

    def cluster_of(self, scenario: Scenario) -> Cluster:
        """The part of the cluster that a scenario uses: all, or the GPUs of a single copy of the model, one or those
        that share it."""
        num_ranks = scenario.strategy.num_ranks(self.cluster.num_gpus)
        in_node = min(num_ranks, self.cluster.node.num_gpus)
        if num_ranks >= self.cluster.num_gpus or num_ranks % in_node:
            return self.cluster
        return replace(self.cluster, num_nodes=num_ranks // in_node, node=replace(self.cluster.node, num_gpus=in_node))

    def key(self, scenario: Scenario) -> TraceKey:
        gpu = self.cluster.gpu
        device = gpu.device_kind
        key = program_key(scenario, self.source.profile, device, transposes_float8=gpu.transposes_float8)
        asks = self.asks_kernels and device is DeviceKind.CPU and scenario.strategy.kind is StrategyKind.SINGLE
        is_alone = asks or (key.images and self.source.profile.model_type in OF_ANY_SIZE)
        return replace(key, at=point_of(scenario) if is_alone else None, asks_kernels=asks)

    def evaluation_key(self, scenario: Scenario) -> TraceKey:
        """Of the program of an evaluation with the scenario's batch."""
        key = self.key(scenario)
        return replace(key, evaluation=True, at=None if key.asks_kernels else key.at, asks_kernels=False).canonical

    def traced(self, key: TraceKey) -> StepProgram:
        """The program of ``key``; where it would have to be traced and what traces it is not installed, the usual
        trainer's."""
        try:
            return self.source.program(key)
        except MissingExtraError:
            if (usual := key.of_usual_trainer) == key:
                raise
            self.stands_in = True
            return self.source.program(usual)

    def program(self, scenario: Scenario) -> StepProgram:
        """The step of the largest rank. Raises ``TraceError`` where the model's program cannot be had."""
        return strategies.with_batches_ahead(self._shared(scenario), scenario, self.cluster.gpu.device_kind)

    def _shared(self, scenario: Scenario) -> StepProgram:
        """The same but for the batches that the Trainer holds ahead."""
        key, same = self._identity(scenario)
        if (key, same) not in self._rewritten:
            cluster = self.cluster_of(scenario)
            program = strategies.rewrite(self.traced(key), scenario=scenario, cluster=cluster)
            workspaces = cublas_workspaces(cluster.gpu, transformer_engine=key.transformer_engine)
            self._rewritten[key, same] = replace(program, persistent=(*program.persistent, *workspaces))
        return self._rewritten[key, same]

    def live_peak_bytes(self, scenario: Scenario) -> int:
        """The allocated peak by the cheap reading."""
        identity = self._identity(scenario)
        if identity not in self._compiled:
            self._compiled[identity] = compile_program(self._shared(scenario))
        granularity = 1 if self.cluster.gpu.device_kind is DeviceKind.CPU else CUDA_BLOCK_BYTES
        return self._compiled[identity].peak(point_of(scenario), granularity_bytes=granularity).num_bytes

    def least_live_bytes(self, scenario: Scenario) -> int:
        """A lower bound of ``live_peak_bytes`` that takes no rewrite: the forward pass and the rank's share of the
        weights. No strategy holds less, whatever it does to gradients and states."""
        weights = least_weight_bytes(self.source.profile, scenario, num_ranks=self.cluster_of(scenario).num_gpus)
        return weights + self._forward_bytes(scenario)

    def _forward_bytes(self, scenario: Scenario) -> int:
        """The peak of the forward pass without weights, or a little less.

        One sequence is read off the program of several where that has been read, which saves a trace.
        """
        key = self.key(scenario)
        several = replace(key, single_sequence=False)
        if key != several and several in self._forward_passes:
            return int(_SINGLE_OF_SEVERAL * self._forward_passes[several].peak(point_of(scenario)).num_bytes)
        if key not in self._forward_passes:
            program = self.traced(key)
            stages = tuple(stage for stage in program.stages if stage.phase in (Phase.FORWARD, Phase.LOSS))
            self._forward_passes[key] = compile_program(compact(replace(program, stages=stages)))
        return self._forward_passes[key].peak(point_of(scenario)).num_bytes

    def sizes(self, scenario: Scenario) -> ModelSizes:
        """The model's weights and states as the scenario loads, holds and saves them."""
        same = _of_any_batch(scenario)
        if same not in self._sizes:
            program = self.program(_with_whole_matrices(scenario))
            self._sizes[same] = ModelSizes.of(program, self.source.profile, scenario=scenario)
        return self._sizes[same]

    def host_need(self, scenario: Scenario) -> HostNeed:
        """What the scenario needs of each node's memory, at the moment that needs most."""
        same = scenario
        if scenario.training.checkpointing is not Checkpointing.OFFLOAD:  # whose activations wait on the host
            same = _of_any_batch(scenario)
        if same not in self._host_needs:
            self._host_needs[same] = greatest_need(run_of(self, scenario).hosts())
        return self._host_needs[same]

    def host_shortage(self, scenario: Scenario) -> HostNeed | None:
        """Where the scenario needs more of its host than a node has. Memory that nobody knows is taken to be enough."""
        memory_bytes = known_host_bytes(self.cluster_of(scenario))
        if not memory_bytes:
            return None
        need = self.host_need(scenario)
        return need if need.needed_bytes > memory_bytes else None

    def asks_rare_host(self, scenario: Scenario) -> bool:
        """Whether the scenario needs more than a host of unknown memory is likely to have."""
        rare_bytes = rare_host_bytes(self.cluster_of(scenario))
        return rare_bytes > 0 and self.host_need(scenario).needed_bytes > rare_bytes

    def _identity(self, scenario: Scenario) -> tuple[TraceKey, Scenario]:
        """The key, and the scenario without what a rewrite does not depend on: lengths, how many micro-batches, and the
        allocator."""
        batch = scenario.batch
        steps = min(batch.gradient_accumulation_steps, 2)
        same = replace(
            scenario,
            batch=replace(batch, seq_len=1, gradient_accumulation_steps=steps, micro_batch=min(batch.micro_batch, 2)),
            alloc_conf="",
        )
        return self.key(scenario), same


def _of_any_batch(scenario: Scenario) -> Scenario:
    """The scenario without what neither the host nor a checkpoint depends on."""
    training = replace(scenario.training, checkpointing=Checkpointing.NONE)
    return replace(scenario, training=training, batch=Batch(), state=State.STEADY, alloc_conf="")


def least_weight_bytes(profile: ModelProfile, scenario: Scenario, *, num_ranks: int) -> int:
    """What a rank holds of the weights at least: all of them, in equal shares where they are sharded."""
    strategy = scenario.strategy
    if strategy.offloads_params:
        return 0
    num_bytes = profile.num_parameters * loaded_itemsize(scenario)
    if scenario.training.method is Method.QLORA:
        num_bytes //= 4  # 4 bits of 16
    is_sharded = strategy.kind.is_fsdp or strategy.kind is StrategyKind.ZERO3
    return num_bytes // num_ranks if is_sharded or strategy.split.num_ranks > 1 else num_bytes


def _with_whole_matrices(scenario: Scenario) -> Scenario:
    """The scenario without tensor parallelism, whose programs hold the parameters as they are loaded and saved."""
    strategy = scenario.strategy
    return replace(scenario, strategy=replace(strategy, split=replace(strategy.split, tp=1)))


def program_key(
    scenario: Scenario, profile: ModelProfile, device: DeviceKind, *, transposes_float8: bool = True
) -> TraceKey:
    """Which of the model's programs the scenario starts from. ``transposes_float8`` is the GPU's."""
    training, point = scenario.training, point_of(scenario)
    key = strategies.trace_key(training, scenario.strategy, device, single_sequence=point.micro_batch == 1)
    window = profile.sliding_window
    beyond_window = bool(window) and point.seq_len >= window
    key = replace(
        key,
        beyond_window=beyond_window,
        packed=training.masks_packing,
        transposes_float8=key.transformer_engine and transposes_float8,
    )
    return (as_axolotl(key, training, profile) if training.trainer is Trainer.AXOLOTL else key).canonical


def judge(bench: Bench, scenario: Scenario) -> Candidate:
    """The candidate with its memory run through the allocator and its time through the clock."""
    reading, candidate = _read_fully(bench, scenario)
    steps = _steps(bench, scenario, reading)
    phases = phase_peaks(run_of(bench, scenario, reading.steady_bytes), reading, steps)
    candidate = replace(candidate, estimate=replace(candidate.estimate, phases=phases))
    return replace(
        candidate,
        estimate=replace(candidate.estimate, device_peak_low_bytes=_low_bytes(bench, candidate)),
        notes=(*candidate.notes, *_compile_notes(scenario), *_float8_notes(scenario), *_warnings(bench, candidate))
        + (STANDS_IN,) * bench.stands_in,
    )


def _read_fully(bench: Bench, scenario: Scenario) -> tuple[MemoryReading, Candidate]:
    """The reading and the candidate. Where the cache alone is too large for the device, those of an allocator that is
    given no more than fits: it gives back what is cached before it runs out, which costs time where every step asks for
    it, and such a step counts as too large."""
    cluster = bench.cluster_of(scenario)
    outside = cuda_context(cluster.gpu).plus(communicators(cluster, scenario))
    reading, candidate = _simulated(bench, scenario, capacity_bytes=usable_bytes(cluster) - outside.typical)
    if candidate.estimate.step_fits or reading.exceeds_capacity or cluster.gpu.device_kind is DeviceKind.CPU:
        return reading, candidate
    room_bytes = reservable_bytes(usable_bytes(cluster), outside)
    within, fitting = _simulated(bench, scenario, capacity_bytes=max(room_bytes, 1))
    if within.exceeds_capacity or within.num_late_retries or not fitting.estimate.step_fits:
        return reading, candidate
    return within, replace(fitting, notes=(GIVEN_BACK,))


def _simulated(bench: Bench, scenario: Scenario, *, capacity_bytes: int) -> tuple[MemoryReading, Candidate]:
    cluster = bench.cluster_of(scenario)
    program, device_kind = bench.program(scenario), cluster.gpu.device_kind
    has_cache = device_kind is DeviceKind.CUDA
    limit = capacity_bytes if has_cache else None
    reading = simulate_memory(
        program,
        point_of(scenario),
        device_kind=device_kind,
        settings=AllocatorSettings.parse(scenario.alloc_conf),
        capacity_bytes=limit,
    )
    device = device_peak(reading, cluster, num_communicators=_num_communicators(scenario))
    notes = _cache_notes(program) if has_cache else ()
    return reading, replace(candidate_of(bench, scenario, reading, device), notes=notes)


def _cache_notes(program: StepProgram) -> tuple[str, ...]:
    """What of the reserved memory is left of weights that were whole on every device before they were sharded."""
    left = left_by_loading(program)
    if left <= 0:
        return ()
    return (
        f"4-bit weights are made whole on every GPU, then sharded: {gib(left)} of them stay in torch's cache, to be "
        "given back when memory runs short",
    )


def _low_bytes(bench: Bench, candidate: Candidate) -> int:
    """The lower end of the device's peak; of a compiled step that of the same step under full checkpointing.

    inductor's partitioner computes again what is cheap and keeps what products need, which is more than the inputs of
    blocks. Its upper end is the eager step, from which fusion only takes temporaries away.
    """
    scenario, estimate = candidate.scenario, candidate.estimate
    if not scenario.training.compile or scenario.training.checkpointing is not Checkpointing.NONE:
        return estimate.device_peak_low_bytes
    least = replace(scenario, training=replace(scenario.training, checkpointing=Checkpointing.FULL))
    saved = estimate.allocated_peak_bytes - bench.live_peak_bytes(least)
    return estimate.device_peak_low_bytes - max(saved, 0)


def _compile_notes(scenario: Scenario) -> tuple[str, ...]:
    if not scenario.training.compile:
        return ()
    return (
        "torch.compile: the peak is the eager step's, which a compiled one stays below; the low end of the range is "
        "what full checkpointing would take",
    )


STANDS_IN = (
    "counted as transformers' Trainer runs it, without padding and what Axolotl holds in fp32, which takes less: that "
    "would have to be traced, and torch or transformers are not installed (pip install 'launchkit-planner[trace]')"
)
GIVEN_BACK = "torch's cache is given back once, since it would not fit: the first steps take longer"


_TRANSFORMER_ENGINE = (
    "fp8: Transformer Engine's layers as its source has them, checked against no GPU's memory or speed yet; it takes "
    "batches padded to a multiple of 16 tokens (pad_to_multiple_of) and stops at others"
)


def _float8_notes(scenario: Scenario) -> tuple[str, ...]:
    if scenario.training.precision is not Precision.FP8:
        return ()
    if scenario.training.uses_transformer_engine:
        return (_TRANSFORMER_ENGINE,)
    told = "fp8: traced through torchao's own layers, and checked against no GPU's memory or speed yet"
    if scenario.training.compile:
        return (f"{told}; the clock counts its casts as passes of their own, which --compile fuses",)
    return (f"{told}; without --compile every cast makes copies in fp32 on its way",)


def _warnings(bench: Bench, candidate: Candidate) -> Iterator[str]:
    """What a run would fail by besides the device's memory, where the machine is known."""
    cluster = bench.cluster_of(candidate.scenario)
    node, checkpoint = cluster.node, candidate.estimate.checkpoint
    if lack := bench.host_shortage(candidate.scenario):
        yield (
            f"{gib(lack.needed_bytes)} of host memory are needed {lack.doing} and a node has "
            f"{gib(node.host_memory_bytes)}: the kernel would kill the processes (exit code −9)"
        )
    if bench.asks_rare_host(candidate.scenario):
        need = bench.host_need(candidate.scenario)
        yield (
            f"{gib(need.needed_bytes)} of host memory are needed {need.doing}, and nodes of these GPUs seldom have "
            f"more than {gib(rare_host_bytes(cluster))}; --host-memory says what yours have"
        )
    for peak in candidate.estimate.phases:
        if peak.phase is RunPhase.EVALUATION and peak.device_peak_high_bytes > candidate.estimate.device_usable_bytes:
            yield (
                f"an evaluation of {evaluation_micro_batch(candidate.scenario)} sequences at a time needs "
                f"{gib(peak.device_peak_bytes)}; set per_device_eval_batch_size lower if the run evaluates"
            )
    if checkpoint and checkpoint.disk_peak_bytes > node.disk_free_bytes > 0:
        yield (
            f"checkpoints take up to {gigabytes(checkpoint.disk_peak_bytes)} of disk ({checkpoint.num_kept} kept, one "
            f"being written, the final model), {gigabytes(node.disk_free_bytes)} are free"
        )


def _steps(bench: Bench, scenario: Scenario, reading: MemoryReading) -> tuple[StepPeak, ...]:
    """The first step, a steady one, one of the longest batch, which every batch is planned as, and an evaluation.

    ``reading`` is of one of the two states, run through the allocator; of the other the allocated peak is read, and its
    reserved memory is what the cache held after the first step, or at least that.
    """
    other = State.FIRST if scenario.state is State.STEADY else State.STEADY
    live = bench.live_peak_bytes(replace(scenario, state=other))
    cached = reading.reserved_first_step_bytes if bench.cluster.gpu.device_kind is DeviceKind.CUDA else 0
    peaks = {
        scenario.state: (reading.allocated_peak_bytes, reading.reserved_peak_bytes),
        other: (live, max(live, cached)),
    }
    resident = _resident_bytes(bench, scenario, reading)
    phases = {
        RunPhase.FIRST_STEP: State.FIRST,
        RunPhase.STEADY_STEP: State.STEADY,
        RunPhase.LONGEST_BATCH: State.STEADY,
    }
    steps = [
        StepPeak(
            phase=phase,
            allocated_bytes=peaks[state][0],
            reserved_bytes=peaks[state][1],
            resident_bytes=resident if state is scenario.state else min(live, resident),
        )
        for phase, state in phases.items()
    ]
    kept = reading.reserved_peak_bytes if cached else 0
    return (*steps, *_evaluation(bench, scenario, cached_bytes=kept, resident_bytes=resident))


def _resident_bytes(bench: Bench, scenario: Scenario, reading: MemoryReading) -> int:
    """What a step leaves resident of a process on the host, where buckets that never fill up take less."""
    unfilled = unfilled_bytes(bench.sizes(scenario), scenario)
    return reading.resident_peak_bytes - min(unfilled, reading.at_peak[Owner.COMMUNICATION])


def _evaluation(bench: Bench, scenario: Scenario, *, cached_bytes: int, resident_bytes: int) -> Iterator[StepPeak]:
    """An evaluation, where the trainer has one and its program is at hand: a trace of its own is not worth waiting for.

    What a step left cached, or resident, is there still, and is taken again.
    """
    micro_batch = evaluation_micro_batch(scenario)
    key = bench.evaluation_key(evaluated(scenario, micro_batch=micro_batch))
    if scenario.training.trainer is Trainer.LOOP or not bench.source.has_program(key):
        return
    try:
        peak = evaluation_peak(bench, scenario, micro_batch=micro_batch)
    except TraceError:
        return
    reserved = max(peak.reserved_peak_bytes, cached_bytes)
    yield StepPeak(
        phase=RunPhase.EVALUATION,
        allocated_bytes=peak.allocated_peak_bytes,
        reserved_bytes=reserved,
        resident_bytes=max(peak.allocated_peak_bytes, resident_bytes),
    )


def run_of(bench: Bench, scenario: Scenario, steady_bytes: int = 0) -> Run:
    """The whole run whose devices hold ``steady_bytes`` between steps."""
    cluster, program = bench.cluster_of(scenario), bench.program(scenario)
    profile = bench.source.profile
    return Run(
        program=program,
        point=point_of(scenario),
        sizes=bench.sizes(scenario),
        scenario=scenario,
        cluster=cluster,
        checkpoint_itemsize=profile.checkpoint_itemsize,
        steady_bytes=steady_bytes,
        room_bytes=usable_bytes(cluster) - cuda_context(cluster.gpu).plus(communicators(cluster, scenario)).typical,
        num_communicators=_num_communicators(scenario),
    )


def communicators(cluster: Cluster, scenario: Scenario) -> ByteRange:
    """The buffers of the process groups that a scenario makes."""
    return communicator_buffers(cluster, num_communicators=_num_communicators(scenario))


def _num_communicators(scenario: Scenario) -> int:
    """One for all ranks or for those that shard, one for replicas, one for those that share a step."""
    strategy = scenario.strategy
    is_shared = strategy.split.num_ranks > 1 and strategy.kind is not StrategyKind.SINGLE
    return 1 + is_hybrid(strategy) + is_shared


def sketch(bench: Bench, scenario: Scenario) -> Candidate:
    """The candidate by its live bytes alone, in a twentieth of the time of ``judge``.

    What is allocated is at most 0.2 % below what ``judge`` says, of small models 2 %. Its device peak is a range that
    holds ``judge``'s, and ``Estimate.is_simulated`` says so.
    """
    cluster = bench.cluster_of(scenario)
    program = bench.program(scenario)
    reading = read_memory(program, point_of(scenario))
    device = unsimulated_peak(
        reading,
        scenario,
        cluster,
        left_bytes=left_by_loading(program),
        num_communicators=_num_communicators(scenario),
    )
    reserved = reading.allocated_peak_bytes + device.fragmentation_bytes
    candidate = candidate_of(bench, scenario, replace(reading, reserved_peak_bytes=reserved), device)
    return replace(candidate, estimate=replace(candidate.estimate, is_simulated=False))


def candidate_of(bench: Bench, scenario: Scenario, reading: MemoryReading, device: DevicePeak) -> Candidate:
    """A candidate from a reading of its memory and what that is on the device."""
    profile, cluster = bench.source.profile, bench.cluster_of(scenario)
    run = run_of(bench, scenario, reading.steady_bytes)
    checkpoint = checkpoint_files(run.sizes, scenario, num_ranks=cluster.num_gpus)
    at_peak: dict[str, int] = {str(owner): reading.at_peak[owner] for owner in Owner}
    at_peak |= {
        "cuda_context": device.cuda_context_bytes,
        "nccl": device.nccl_bytes,
        "fragmentation": device.fragmentation_bytes,
    }
    return Candidate(
        model=profile,
        num_parameters=profile.num_parameters,
        num_trainable=run.sizes.num_trained,
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
            host_peak_bytes=run.host_training(_resident_bytes(bench, scenario, reading)).resident_bytes,
            host_load_peak_bytes=run.host_loading().resident_bytes,
            checkpoint_bytes=checkpoint.weights_bytes or checkpoint.total_bytes,
            checkpoint=checkpoint,
        ),
        step=step_time(bench, scenario),
    )


def step_time(bench: Bench, scenario: Scenario) -> StepTime:
    """One optimizer step by the clock."""
    if scenario not in bench.step_times:
        bench.step_times[scenario] = _clocked(bench, scenario)
    return bench.step_times[scenario]


def _clocked(bench: Bench, scenario: Scenario) -> StepTime:
    profile, cluster = bench.source.profile, bench.cluster_of(scenario)
    program = bench.program(scenario)
    point = point_of(scenario)
    strategy = scenario.strategy
    num_trainable = bench.sizes(scenario).num_trained
    job = Job(
        cluster=cluster,
        compute=bench.key(scenario).compute,
        gradient_accumulation_steps=scenario.batch.gradient_accumulation_steps,
        shard_group_size=shard_group_size(strategy, cluster) if is_hybrid(strategy) or strategy.split.tp > 1 else 0,
        split=strategy.split,
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
