"""DeepSpeed ZeRO: what the three stages share, and stages 1 and 2.

Source: DeepSpeed 0.19.8 ``deepspeed/runtime/zero/stage_1_and_2.py``, confirmed on timelines of two gloo processes.

- Trainable weights lie in one flat buffer in the compute dtype, padded to twice the ranks. Each rank holds an fp32 copy
  of its partition of it (also when the compute dtype is fp32), and the optimizer's states of that.
- The first gradient of a step allocates the bucket, ``reduce_bucket_size`` elements whatever the model's size, and a
  second one with ``overlap_comm``. They die when the backward pass ends.
- Stage 2 copies each gradient into the bucket as it arrives, and the gradient dies. A bucket that is full is flattened,
  reduced, and what belongs to this rank is copied to a buffer that lives until the optimizer step. Stage 1 does the
  same once the backward pass is over, so that all gradients live until then.
- The step flattens that buffer, casts it to fp32, updates, copies the result into the flat weights and gathers them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.optimizers import FP32_BYTES, LocalTensor, find
from launchkit.program import (
    Alloc,
    Anchor,
    Collective,
    CollectiveKind,
    Copy,
    Event,
    Free,
    FreeAll,
    Moment,
    Owner,
    Persistent,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    TensorRef,
    local,
)
from launchkit.scenario import (
    Compute,
    DeviceKind,
    Offload,
    Precision,
    Scenario,
    Strategy,
    TraceKey,
    Training,
    ZeroSettings,
)
from launchkit.strategies.base import (
    OPTIMIZER_STAGE,
    OptimizerStep,
    accumulate_gradients,
    accumulates,
    gradient_storages,
    is_gradient,
    located_parameters,
    lora_rank,
    make_trace_key,
    map_layers,
    next_slot,
    with_optimizer,
    with_ready_gradients,
)
from launchkit.units import round_up

REDUCE_STAGE = "backward.reduce"
NORM_BYTES = 8  # gradient norms are taken in fp64

# The engine casts the module, so nothing is left for autocast to do; accelerate leaves it off under DeepSpeed.
COMPUTE = {
    Precision.FP32: Compute.FP32,
    Precision.FP16: Compute.FP16,
    Precision.BF16: Compute.BF16,
    Precision.BF16_PARAMS: Compute.BF16,
    Precision.BF16_PURE: Compute.BF16,
    Precision.FP8: Compute.BF16,
}

# torch optimizers that accelerate swaps for DeepSpeed's own CPU kernels when the optimizer is offloaded
_HOST_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad", "lion_32bit")


def trace_key(training: Training, strategy: Strategy, device: DeviceKind, *, single_sequence: bool = False) -> TraceKey:
    """The whole module runs in the engine's dtype."""
    return make_trace_key(training, COMPUTE[training.precision], device, single_sequence=single_sequence)


def refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What DeepSpeed's configuration checks reject, with what to type instead."""
    stage, offload = scenario.strategy.kind.zero_stage, scenario.strategy.offload
    optimizer = scenario.training.optimizer
    if offload.params and stage != 3:
        return f"--offload {offload} moves parameters, which ZeRO-{stage} does not shard; use --strategy zero3"
    if offload is Offload.PARAMS:
        return "DeepSpeed moves parameters only together with the optimizer; use --offload all"
    if offload is Offload.NVME and not scenario.strategy.zero.nvme_path:
        return "--offload nvme needs a directory on a local disk; set nvme_path in launchkit.toml"
    if offload.optimizer and optimizer not in _HOST_OPTIMIZERS:
        return (
            f"--optimizer {optimizer} has no CPU kernel in DeepSpeed, which --offload {offload} needs; "
            "use --optimizer adamw_torch_fused"
        )
    return None


def rewrite(program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> StepProgram:
    """The step of one rank of a ZeRO job."""
    from launchkit.strategies import zero3  # its module builds on this one

    job = Job.of(program, scenario=scenario, cluster=cluster)
    return zero3.rewrite(job) if scenario.strategy.kind.zero_stage == 3 else _rewrite_flat(job)


class GradientRef(NamedTuple):
    """A parameter's gradient: where it is allocated, its size, its elements."""

    ref: TensorRef
    size: Size
    numel: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program with the numbers that every step of its rewrite needs."""

    program: StepProgram
    scenario: Scenario
    world_size: int
    device: DeviceKind

    @classmethod
    def of(cls, program: StepProgram, *, scenario: Scenario, cluster: Cluster) -> Job:
        return cls(program=program, scenario=scenario, world_size=cluster.num_gpus, device=cluster.gpu.device_kind)

    @property
    def settings(self) -> ZeroSettings:
        return self.scenario.strategy.zero

    @property
    def rank(self) -> int:
        return lora_rank(self.scenario)

    @property
    def itemsize(self) -> int:
        """Bytes per element of weights, gradients and buckets: the compute dtype's."""
        return FP32_BYTES if self.scenario.training.precision is Precision.FP32 else 2

    @property
    def offloads_optimizer(self) -> bool:
        return self.scenario.strategy.offload.optimizer

    @property
    def overlap_comm(self) -> bool:
        """DeepSpeed's own default is on at stage 3 and off below."""
        chosen = self.settings.overlap_comm
        return self.scenario.strategy.kind.zero_stage == 3 if chosen is None else chosen

    def numels(self, *, trainable: bool) -> Iterator[int]:
        """Elements of each parameter of every layer."""
        for place in located_parameters(self.program, trainable=trainable):
            for _ in range(place.copies):
                yield place.parameter.numel(self.rank)

    def gradients(self) -> Iterator[GradientRef]:
        """Every parameter's gradient in the order in which the backward pass completes them."""
        for stage in self.program.stages:
            if stage.phase is Phase.BACKWARD:
                for layer in stage.order():
                    section = self.program.section_of(stage, layer)
                    for event in filter(is_gradient, section.events):
                        yield gradient_ref(self, stage, layer, section, event)


def gradient_ref(job: Job, stage: Stage, layer: int, section: Section, event: Alloc) -> GradientRef:
    parameter = job.program.groups[section.group].parameters[event.parameter]
    ref = TensorRef(stage.name, Anchor.FIRST, layer, event.slot)
    return GradientRef(ref, event.size, parameter.numel(job.rank))


class EventList:
    """Events of one section in the making, with slots given out from ``slot`` on."""

    def __init__(self, stage: str, *, slot: int = 0) -> None:
        self.events: list[Event] = []
        self._stage = stage
        self._slot = slot

    def alloc(self, num_bytes: int, owner: Owner) -> Free:
        """Allocates, and returns the event that frees it again in this section."""
        size = Size.constant(num_bytes)
        self.events.append(Alloc(self._slot, size, owner))
        self._slot += 1
        return Free(local(self._stage, self._slot - 1), size)

    def passing(self, num_bytes: int, owner: Owner) -> None:
        """Allocates and frees at once."""
        if num_bytes:
            self.events.append(self.alloc(num_bytes, owner))

    @property
    def last_slot(self) -> int:
        return self._slot - 1


class Bucket:
    """The reduce bucket of one backward pass: which gradients fit, and when it is flushed.

    A gradient larger than the bucket is not copied: it stays until the next one comes, and is reduced by itself.
    """

    def __init__(self, capacity: int, *, itemsize: int) -> None:
        self.capacity = capacity
        self.itemsize = itemsize
        self.elements = 0
        self.oversized: list[GradientRef] = []

    def flushes_before(self, numel: int) -> bool:
        return self.elements > 0 and self.elements + numel > self.capacity

    def take(self, gradient: GradientRef) -> bool:
        """Adds a gradient; false when it is too large to be copied, so that it stays."""
        self.elements += gradient.numel
        if gradient.numel > self.capacity:
            self.oversized.append(gradient)
            return False
        return True

    def flush(self, events: EventList, *, copies: int = 1) -> None:
        """Reduces what there is: a flat copy of it (``copies`` of them where the backend makes its own)."""
        frees = [events.alloc(self.elements * self.itemsize, Owner.COMMUNICATION) for _ in range(copies)]
        events.events.extend(reversed(frees))
        events.events.extend(Free(gradient.ref, gradient.size) for gradient in self.oversized)
        self.oversized.clear()
        self.elements = 0


class Flat(NamedTuple):
    """The flat buffer of trainable weights and one rank's part of it, in elements."""

    total: int
    partition: int
    gradient_buffer: int  # of the fullest rank: parameters that reach into its partition, each whole
    largest_slice: int
    largest_parameter: int

    @classmethod
    def of(cls, numels: Sequence[int], world_size: int) -> Flat:
        total = round_up(sum(numels), 2 * world_size)
        partition = total // world_size
        whole = [0] * world_size
        start = largest_slice = 0
        for numel in numels:
            first, last = start // partition, (start + numel - 1) // partition
            for owner in range(first, last + 1):
                whole[owner] += numel
                overlap = min(start + numel, (owner + 1) * partition) - max(start, owner * partition)
                largest_slice = max(largest_slice, overlap)
            start += numel
        return cls(total, partition, max(whole), largest_slice, max(numels))


def _rewrite_flat(job: Job) -> StepProgram:
    flat = Flat.of(tuple(job.numels(trainable=True)), job.world_size)
    program = _reduced_as_it_arrives(job, flat) if _is_eager(job) else _reduced_at_the_end(job, flat)
    program = replace(
        program,
        persistent=program.persistent + _flat_storages(job, flat),
        host_persistent_bytes=program.host_persistent_bytes + _host_bytes(job, flat),
    )
    return with_optimizer(program, _flat_step(job, flat), scenario=job.scenario, device=job.device)


def _is_eager(job: Job) -> bool:
    """Whether gradients are reduced while the backward pass runs."""
    return job.scenario.strategy.kind.zero_stage == 2 or job.overlap_comm


def _bucket_bytes(job: Job) -> int:
    return job.settings.reduce_bucket_size * job.itemsize


def _num_buckets(job: Job) -> int:
    return 2 if job.overlap_comm else 1


def frozen_weights(job: Job) -> Iterator[Persistent]:
    """Weights that are not trained stay as they are, with the scales of 4-bit ones."""
    for place in located_parameters(job.program, trainable=False):
        parameter = place.parameter
        num_bytes = parameter.packed_bytes or parameter.numel(job.rank) * job.itemsize
        yield Persistent(Size.constant(num_bytes), Owner.WEIGHTS, place.copies)
        if parameter.extra_bytes:
            yield Persistent(Size.constant(parameter.extra_bytes), Owner.WEIGHTS, place.copies)


def _flat_storages(job: Job, flat: Flat) -> tuple[Persistent, ...]:
    storages = [Persistent(Size.constant(flat.total * job.itemsize), Owner.WEIGHTS), *frozen_weights(job)]
    if job.offloads_optimizer:
        storages.append(Persistent(Size.constant(flat.largest_parameter * job.itemsize), Owner.COMMUNICATION))
    else:
        storages.append(Persistent(Size.constant(flat.partition * FP32_BYTES), Owner.MASTER_WEIGHTS))
    if accumulates(job.scenario):
        storages.extend(_accumulated(job, flat))
    return tuple(storages)


def _accumulated(job: Job, flat: Flat) -> Iterator[Persistent]:
    """What earlier micro-batches leave: stage 2 the reduced gradients, stage 1 all of them and its bucket."""
    if not _is_eager(job):
        yield from gradient_storages(job.program, scenario=job.scenario)
        yield Persistent(Size.constant(_bucket_bytes(job)), Owner.COMMUNICATION, _num_buckets(job))
    elif not job.offloads_optimizer:
        yield Persistent(Size.constant(flat.gradient_buffer * job.itemsize), Owner.GRADIENTS)


def host_optimizer_bytes(job: Job, numel: int) -> int:
    """Pinned host memory of an offloaded optimizer over ``numel`` elements: master weights, gradients and states in
    fp32."""
    tensor = LocalTensor((numel,), FP32_BYTES)
    states = sum(find(job.scenario.training.optimizer).state_bytes(tensor, device=DeviceKind.CPU))
    return 2 * tensor.num_bytes + states


def _host_bytes(job: Job, flat: Flat) -> int:
    """Beside the optimizer's own: the updated weights on their way back, and one parameter's gradient."""
    if not job.offloads_optimizer:
        return 0
    return host_optimizer_bytes(job, flat.partition) + (flat.partition + flat.largest_parameter) * job.itemsize


def _reduced_as_it_arrives(job: Job, flat: Flat) -> StepProgram:
    """Stage 2: each gradient goes into the bucket and dies; full buckets are flushed on the way."""
    bucket = Bucket(job.settings.reduce_bucket_size, itemsize=job.itemsize)
    opened: list[Free] = []
    collected: list[Free] = []

    def changed(stage: Stage, layer: int, section: Section) -> Section:
        events = EventList(stage.name, slot=next_slot(section.events))
        for event, ready in with_ready_gradients(section.events):
            events.events.append(event)
            for alloc in ready:
                gradient = gradient_ref(job, stage, layer, section, alloc)
                if not opened:
                    opened.extend(_elsewhere(free, stage.name, layer) for free in _open_buckets(job, events))
                if bucket.flushes_before(gradient.numel):
                    bucket.flush(events)
                    buffers = _collect(job, flat, events, collected)
                    collected.extend(_elsewhere(free, stage.name, layer) for free in buffers)
                if bucket.take(gradient):
                    events.events.append(Free(local(stage.name, alloc.slot), alloc.size))
        return _with_reduction(job, replace(section, events=tuple(events.events)))

    program = map_layers(job.program, Phase.BACKWARD, changed)
    events = EventList(REDUCE_STAGE)
    bucket.flush(events)
    collected.extend(_collect(job, flat, events, collected))
    events.events.extend(opened)
    if accumulates(job.scenario):
        events.events.extend(collected)
    return add_stage(program, REDUCE_STAGE, Section(events=tuple(events.events), copies=_gradients_to_host(job, flat)))


def _reduced_at_the_end(job: Job, flat: Flat) -> StepProgram:
    """Stage 1: the bucket is there from the first gradient on, but is filled after the last."""
    events = EventList(REDUCE_STAGE)
    bucket = Bucket(job.settings.reduce_bucket_size, itemsize=job.itemsize)
    gradients = tuple(job.gradients())
    if accumulates(job.scenario):
        program = accumulate_gradients(job.program)
        bucket.elements = min(bucket.capacity, flat.total)
        bucket.flush(events)
        _collect(job, flat, events, ())
        events.events.append(FreeAll(Owner.COMMUNICATION))
    else:
        program, opened = _with_bucket_opened(job)
        collected: list[Free] = []
        for gradient in gradients:
            if bucket.flushes_before(gradient.numel):
                bucket.flush(events)
                collected.extend(_collect(job, flat, events, collected))
            if bucket.take(gradient):
                events.events.append(Free(gradient.ref, gradient.size))
        bucket.flush(events)
        _collect(job, flat, events, collected)
        events.events.extend(opened)
    section = Section(
        events=tuple(events.events),
        collectives=_all_reduce(job, sum(gradient.numel for gradient in gradients), Moment.BLOCKING),
        copies=_gradients_to_host(job, flat),
    )
    return add_stage(program, REDUCE_STAGE, section)


def _with_bucket_opened(job: Job) -> tuple[StepProgram, list[Free]]:
    """The program with the bucket allocated at the first gradient, and the events that free it."""
    opened: list[Free] = []

    def changed(stage: Stage, layer: int, section: Section) -> Section:
        if opened or not any(map(is_gradient, section.events)):
            return section
        events = EventList(stage.name, slot=next_slot(section.events))
        for event, ready in with_ready_gradients(section.events):
            events.events.append(event)
            if ready and not opened:
                opened.extend(_elsewhere(free, stage.name, layer) for free in _open_buckets(job, events))
        return replace(section, events=tuple(events.events))

    return map_layers(job.program, Phase.BACKWARD, changed), opened


def _open_buckets(job: Job, events: EventList) -> list[Free]:
    return [events.alloc(_bucket_bytes(job), Owner.COMMUNICATION) for _ in range(_num_buckets(job))]


def _collect(job: Job, flat: Flat, events: EventList, collected: Sequence[Free]) -> list[Free]:
    """After a flush, this rank's gradients go to a buffer of their own, made once; or, through fp32, to the host."""
    if job.offloads_optimizer:
        events.passing(flat.largest_slice * FP32_BYTES if job.itemsize != FP32_BYTES else 0, Owner.COMMUNICATION)
        return []
    return [] if collected else [events.alloc(flat.gradient_buffer * job.itemsize, Owner.GRADIENTS)]


def _elsewhere(free: Free, stage: str, layer: int) -> Free:
    """``free``, made to mean the same tensor from any other stage."""
    return free._replace(ref=TensorRef(stage, Anchor.FIRST, layer, free.ref.slot))


def _with_reduction(job: Job, section: Section) -> Section:
    parameters = job.program.groups[section.group].parameters
    numel = sum(parameters[event.parameter].numel(job.rank) for event in section.events if is_gradient(event))
    return replace(section, collectives=section.collectives + _all_reduce(job, numel, Moment.AFTER))


def _all_reduce(job: Job, numel: int, moment: Moment) -> tuple[Collective, ...]:
    """Stages 1 and 2 reduce by all-reduce (``use_multi_rank_bucket_allreduce``, on by default)."""
    if not numel or job.world_size == 1:
        return ()
    return (Collective(CollectiveKind.ALL_REDUCE, Size.constant(numel * job.itemsize), moment),)


def _gradients_to_host(job: Job, flat: Flat) -> tuple[Copy, ...]:
    if not job.offloads_optimizer:
        return ()
    return (Copy(False, Size.constant(flat.partition * FP32_BYTES), Moment.AFTER),)


def add_stage(program: StepProgram, name: str, section: Section) -> StepProgram:
    """``program`` with one more stage of the backward phase behind it."""
    stage = Stage(name=name, phase=Phase.BACKWARD, layers=(len(program.sections),))
    return replace(program, stages=(*program.stages, stage), sections=(*program.sections, section))


def _flat_step(job: Job, flat: Flat) -> OptimizerStep:
    """The update of the fp32 partition, and the gathering of the new weights."""
    weight_bytes = Size.constant(flat.total * job.itemsize)
    gathers = (Collective(CollectiveKind.ALL_GATHER, weight_bytes, Moment.BLOCKING),) if job.world_size > 1 else ()
    if job.offloads_optimizer:
        copies = (Copy(True, Size.constant(flat.partition * job.itemsize), Moment.BLOCKING),)
        return OptimizerStep(
            tensors=(), on_host=True, after=_gather_copies(job, flat), collectives=gathers, copies=copies
        )
    before = fp32_gradient_events(job, flat.partition, largest_slice=flat.largest_slice)
    return OptimizerStep(
        tensors=(LocalTensor((flat.partition,), FP32_BYTES),),
        before=before,
        after=(last_alloc_freed(before), *_gather_copies(job, flat)),
        collectives=gathers,
    )


def fp32_gradient_events(job: Job, numel: int, *, largest_slice: int) -> tuple[Event, ...]:
    """The norm in fp64, slice by slice; the gradients flattened; the flat copy cast to fp32, where it is not already.

    The last allocation is the gradient that the optimizer reads.
    """
    events = EventList(OPTIMIZER_STAGE)
    events.passing(largest_slice * NORM_BYTES, Owner.TEMPORARIES)
    flat = events.alloc(numel * job.itemsize, Owner.TEMPORARIES)
    if job.itemsize != FP32_BYTES:
        events.alloc(numel * FP32_BYTES, Owner.TEMPORARIES)
        events.events.append(flat)
    events.events.append(FreeAll(Owner.GRADIENTS))
    return tuple(events.events)


def last_alloc_freed(events: Sequence[Event]) -> Free:
    alloc = next(event for event in reversed(events) if isinstance(event, Alloc))
    return Free(local(OPTIMIZER_STAGE, alloc.slot), alloc.size)


def _gather_copies(job: Job, flat: Flat) -> tuple[Event, ...]:
    """NCCL gathers in place; gloo makes a copy of its input and one of its output."""
    if job.device is not DeviceKind.CPU or job.world_size == 1:
        return ()
    events = EventList(OPTIMIZER_STAGE, slot=_GATHER_SLOT)
    events.passing(flat.total * job.itemsize, Owner.COMMUNICATION)
    return tuple(events.events)


_GATHER_SLOT = 1_000_000  # behind every slot that an update takes
