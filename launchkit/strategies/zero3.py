"""DeepSpeed ZeRO-3: weights, gradients, master weights and states all partitioned, parameter by parameter.

Source: DeepSpeed 0.19.8 ``deepspeed/runtime/zero/stage3.py``, confirmed on timelines of two gloo processes.

- Each parameter is cut into equal parts; those of trainable ones lie in one flat buffer in the compute dtype. Beside it
  lie their fp32 copies in sub-groups of ``sub_group_size``, the states of these, a buffer for the partition's
  gradients, and the bucket of ``reduce_bucket_size`` elements, all from the start of the job to its end.
- Parameters of at most ``stage3_param_persistence_threshold`` elements are gathered after each step and stay.
- The others come and go as ``zero3_fetch`` says.
- Without ``memory_efficient_linear`` the linear layers are torch's, which keep the gathered weight until their backward
  where nothing is checkpointed, though DeepSpeed has let it go and gathers it again.
- A gradient is copied into the bucket and dies; a full bucket is flattened and reduce-scattered.
- The step goes over the sub-groups: gradients flattened, cast to fp32, update.
- With ``overlap_comm``, which is stage 3's default, what is gathered lies on one stream of its own, what a full bucket
  is flattened into on another. The bucket, weights that stay and the step's own lie where everything else does.

Omits: what ``record_stream`` keeps from being handed out again: a gathered weight until its module has computed, a
gradient until it is in the bucket. Both are a few weights at a time, since the processor waits for the third gather and
the third reduction behind it (``max_ongoing_fetch_events``, ``max_param_reduce_events``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from launchkit.optimizers import FP32_BYTES, LocalTensor
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
from launchkit.scenario import Checkpointing, DeviceKind, Offload
from launchkit.strategies.base import (
    OPTIMIZER_STAGE,
    OptimizerStep,
    map_layers,
    next_slot,
    persistent_run,
    with_optimizer,
    with_ready_gradients,
)
from launchkit.strategies.zero3_fetch import PlaceReading
from launchkit.strategies.zero3_gather import Gathered, GatheredEvents, gather_schedule, has_recorded, is_persistent
from launchkit.strategies.zero_job import (
    NORM_BYTES,
    REDUCE_STAGE,
    EventList,
    GradientRef,
    Job,
    add_stage,
    host_state_bytes_planned,
    host_state_events,
    last_alloc_freed,
)
from launchkit.units import divide_up

# DeepSpeed's defaults of the aio swap buffers of an NVMe offload: ``buffer_count`` of ``buffer_size`` elements for
# parameters (deepspeed/runtime/zero/offload_config.py), and as many optimizer buffers as one sub-group needs.
_NVME_PARAM_BUFFERS = 5
_NVME_PARAM_BUFFER_ELEMENTS = 100_000_000
_NVME_OPTIMIZER_BUFFERS = 4


def rewrite(job: Job) -> StepProgram:
    """The step of one rank under ZeRO-3."""
    gathered = gather_schedule(job)
    program = _reducing(job, gathered)
    for phase in (Phase.FORWARD, Phase.LOSS):
        program = map_layers(program, phase, gathered.of, lambda *layer: _gathering(job, gathered, *layer))
    if not job.settings.memory_efficient_linear:
        program = _keeping_weights(job, program)
    program = replace(
        program,
        persistent=program.persistent + tuple(_storages(job)),
        host_persistent_bytes=program.host_persistent_bytes + _host_bytes(job),
    )
    return with_optimizer(program, _step(job), scenario=job.scenario, device=job.device)


def _partition(job: Job, numel: int) -> int:
    return divide_up(numel, job.num_shards)


def sub_groups(job: Job) -> tuple[int, ...]:
    """Elements of each sub-group: parameters of an optimizer group together until ``sub_group_size`` is reached."""
    groups: list[int] = []
    for group in job.optimizer_groups:
        filled = 0
        for _, numel in group:
            filled += _partition(job, numel)
            if filled >= job.settings.sub_group_size:
                groups.append(filled)
                filled = 0
        groups.extend([filled] * bool(filled))
    return tuple(groups)


def _persistent_numels(job: Job) -> Iterator[int]:
    """Elements of each weight that stays gathered, padded to what ranks hold of it alike."""
    for trainable in (True, False):
        for numel in job.numels(trainable=trainable):
            if is_persistent(job, numel):
                yield _partition(job, numel) * job.num_shards


def _storages(job: Job) -> Iterator[Persistent]:
    """What the device holds between steps."""
    partition = sum(job.partitions)
    if not job.scenario.strategy.offload.params:
        yield Persistent(Size.constant(partition * job.itemsize), Owner.WEIGHTS)
        frozen = (_partition(job, numel) * job.itemsize for numel in job.numels(trainable=False))
        yield from persistent_run(frozen, Owner.WEIGHTS)
    secondary = _secondary_bytes(job)
    if secondary:
        yield Persistent(Size.constant(secondary), Owner.WEIGHTS)
    if has_recorded(job):
        gathered = (numel * job.itemsize for numel in _persistent_numels(job))
        yield from persistent_run(gathered, Owner.GATHERED_WEIGHTS)
    if job.settings.contiguous_gradients:
        yield Persistent(Size.constant(job.settings.reduce_bucket_size * job.sent_itemsize), Owner.COMMUNICATION)
    if not job.offloads_optimizer:
        yield Persistent(Size.constant(partition * job.itemsize), Owner.GRADIENTS)
        yield from persistent_run((numel * job.master_itemsize for numel in sub_groups(job)), Owner.MASTER_WEIGHTS)


def _secondary_bytes(job: Job) -> int:
    """ZeRO++'s second copy of the weights, shared among few ranks, from which the backward pass gathers.

    Omits: that it is made in the forward pass and dropped behind the step.
    """
    group_size = job.settings.zero_hpz_partition_size
    if group_size == 1:
        return 0
    numels = (numel for trainable in (True, False) for numel in job.numels(trainable=trainable))
    return sum(divide_up(numel, group_size) for numel in numels) * job.itemsize


def _host_bytes(job: Job) -> int:
    """Offloaded optimizer and parameters; under NVMe only the buffers that they pass through.

    Page-locked are the gradients (in fp32 by sub-group, and as they came), the flat weights, and the parts of the
    weights that lay there before these were made flat, which torch's host allocator keeps for later.
    """
    partition = sum(job.partitions)
    if job.scenario.strategy.offload is Offload.NVME:
        parameters = job.pinned_bytes(_NVME_PARAM_BUFFERS * _NVME_PARAM_BUFFER_ELEMENTS * job.itemsize)
        states = _NVME_OPTIMIZER_BUFFERS * job.pinned_bytes(max(sub_groups(job)) * FP32_BYTES)
        return parameters + states + job.pinned_bytes(partition * job.itemsize)
    total = 0
    if job.offloads_optimizer:
        gradients = sum(job.pinned_bytes(numel * FP32_BYTES) for numel in sub_groups(job))
        as_they_came = job.pinned_bytes(partition * job.itemsize)
        total += partition * FP32_BYTES + gradients + as_they_came + host_state_bytes_planned(job, partition)
    if job.scenario.strategy.offload.params:
        frozen = [_partition(job, numel) for numel in job.numels(trainable=False)]
        total += job.pinned_bytes(partition * job.itemsize) + sum(job.pinned_bytes(n * job.itemsize) for n in frozen)
        if job.pins_memory:
            total += sum(job.pinned_bytes(part * job.itemsize) for part in job.partitions)
    return total


def _gathering(
    job: Job, gathered: Gathered, stage: Stage, layer: int, section: Section, reading: PlaceReading
) -> Section:
    """A section of the forward pass with its gathered weights."""
    events = GatheredEvents(job, stage, section, gathered.modules[stage.name, layer], reading)
    for event in section.events:
        events.append(event)
    return replace(section, events=events.end(), collectives=section.collectives + _all_gather(job, reading.fetched))


def _keeping_weights(job: Job, program: StepProgram) -> StepProgram:
    """``program`` whose linear layers hold their gathered weights from their forward to their backward."""
    slot = max(next_slot(section.events) for section in program.sections)
    kept: dict[tuple[str, int], int] = {}

    def decide(stage: Stage, layer: int, section: Section) -> int:
        if stage.phase is Phase.BACKWARD:
            return kept.get((stage.name.replace("backward", "forward", 1), layer), 0)
        num_bytes = kept[stage.name, layer] = _saved_elements(job, stage, section) * job.itemsize
        return num_bytes

    def change(stage: Stage, layer: int, section: Section, num_bytes: int) -> Section:
        if not num_bytes:
            return section
        size = Size.constant(num_bytes)
        forward = stage.name.replace("backward", "forward", 1)
        event: Event = Alloc(slot, size, Owner.GATHERED_WEIGHTS, stream=job.gather_stream)
        if stage.phase is Phase.BACKWARD:
            event = Free(TensorRef(forward, Anchor.RELATIVE if stage.stack else Anchor.FIRST, 0, slot), size)
        return replace(section, events=(*section.events, event))

    for phase in (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD):
        program = map_layers(program, phase, decide, change)
    return program


def _saved_elements(job: Job, stage: Stage, section: Section) -> int:
    """Elements of the weights that a forward section's linear layers save: matrices that come and go, but for the
    embeddings'. What checkpointing computes again saves nothing before that.

    Omits: what a block's recomputation saves, until its own backward.
    """
    checkpointed = stage.stack and job.scenario.training.checkpointing is not Checkpointing.NONE
    if checkpointed or not (stage.stack or stage.phase is Phase.LOSS):
        return 0
    parameters = job.program.groups[section.group].parameters
    numels = (parameters[index].numel(job.rank) for index in section.uses if len(parameters[index].shape) == 2)
    return sum(numel for numel in numels if not is_persistent(job, numel))


def _all_gather(job: Job, fetched: int) -> tuple[Collective, ...]:
    if not fetched or job.world_size == 1:
        return ()
    return (Collective(CollectiveKind.ALL_GATHER, Size.constant(fetched * job.itemsize), Moment.BEFORE),)


class ScatterFlush(NamedTuple):
    """What one flush reduces, in elements, whether it is copied to lie flat before, and what dies with it."""

    elements: int
    is_flattened: bool
    dying: tuple[GradientRef, ...]


class ScatterArrival(NamedTuple):
    """What a gradient does: the bucket is flushed before it where it is full; copied into it, the gradient dies."""

    flush: ScatterFlush | None
    is_copied: bool


class ScatterBucket:
    """The reduce bucket of one backward pass.

    A gradient larger than the bucket is not copied: it stays until the next one comes, and is reduced by itself, where
    it lies if it divides evenly. Without ``contiguous_gradients`` none is copied.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._capacity = job.settings.reduce_bucket_size
        self._waiting: list[GradientRef] = []
        self._elements = 0

    def take(self, gradient: GradientRef) -> ScatterArrival:
        """Adds a gradient, after a flush where it does not fit any more."""
        overflows = bool(self._waiting) and self._elements + gradient.numel > self._capacity
        flush = self.flush() if overflows else None
        self._waiting.append(gradient)
        self._elements += gradient.numel
        return ScatterArrival(flush, self._is_copied(gradient))

    def flush(self) -> ScatterFlush:
        """Empties the bucket."""
        dying = tuple(gradient for gradient in self._waiting if not self._is_copied(gradient))
        elements = self._elements
        lies_flat = len(self._waiting) == 1 and elements % self._job.num_shards == 0
        if not self._job.settings.reduce_scatter and self._job.settings.contiguous_gradients:
            lies_flat = lies_flat and elements > self._capacity  # an all-reduce scales a copy of the bucket
        self._waiting.clear()
        self._elements = 0
        return ScatterFlush(elements, not lies_flat, dying)

    def _is_copied(self, gradient: GradientRef) -> bool:
        return self._job.settings.contiguous_gradients and gradient.numel <= self._capacity


def _write_flush(job: Job, events: EventList, flush: ScatterFlush) -> None:
    """The flat copy, and gloo's own of what it scatters; then gradients on their way to the host.

    Reduced in another dtype than they were computed in, partitions are cast back while the flat copy is there.
    """
    copies = flush.is_flattened + (job.device is DeviceKind.CPU and job.settings.reduce_scatter)
    frees = [
        events.alloc(flush.elements * job.sent_itemsize, Owner.COMMUNICATION, stream=job.reduce_stream)
        for _ in range(copies)
    ]
    events.events.extend(reversed(frees[1:]))
    if job.widens_sent:
        events.passing(
            divide_up(flush.elements, job.num_shards) * job.itemsize, Owner.COMMUNICATION, stream=job.reduce_stream
        )
    events.events.extend(frees[:1])
    if job.offloads_optimizer:
        _to_host(job, events)
    events.events.extend(Free(gradient.ref, gradient.size) for gradient in flush.dying)


def _to_host(job: Job, events: EventList) -> None:
    """A part of a gradient is copied back from the host's buffer, its norm taken in fp64, and cast to fp32."""
    part, stream = max(job.partitions), job.reduce_stream
    back = (
        [events.alloc(part * job.itemsize, Owner.COMMUNICATION, stream=stream)]
        if job.device is not DeviceKind.CPU
        else []
    )
    events.passing(part * NORM_BYTES, Owner.TEMPORARIES, stream=stream)
    events.passing(part * FP32_BYTES if job.itemsize != FP32_BYTES else 0, Owner.COMMUNICATION, stream=stream)
    events.events.extend(back)


class _Decision(NamedTuple):
    """What makes one layer's backward pass differ from another's."""

    arrivals: tuple[ScatterArrival, ...]
    numel: int
    reading: PlaceReading


def _reducing(job: Job, gathered: Gathered) -> StepProgram:
    """The backward pass: gathered weights, gradients into the bucket, full buckets scattered."""
    bucket = ScatterBucket(job)

    def decide(stage: Stage, layer: int, section: Section) -> _Decision:
        gradients = job.arriving(stage, layer)
        numel = sum([gradient.numel for gradient in gradients])
        arrivals = tuple([bucket.take(gradient) for gradient in gradients])
        return _Decision(arrivals, numel, gathered.at(stage.name, layer))

    def change(stage: Stage, layer: int, section: Section, decision: _Decision) -> Section:
        events = GatheredEvents(job, stage, section, gathered.modules[stage.name, layer], decision.reading)
        return replace(
            section,
            events=_bucketed(job, stage, section, decision.arrivals, events),
            collectives=section.collectives
            + _reduce_scatter(job, decision.numel)
            + _all_gather(job, decision.reading.fetched),
            copies=section.copies + _gradients_to_host(job, decision.numel),
        )

    program = map_layers(job.program, Phase.BACKWARD, decide, change)
    events = EventList(REDUCE_STAGE)
    # The last hook flushes the bucket while the weights of the last module are still there.
    num_bytes = gathered.last.modules[-1].held * job.itemsize
    held = events.alloc(num_bytes, Owner.GATHERED_WEIGHTS, stream=job.gather_stream)
    _write_flush(job, events, bucket.flush())
    events.events.append(held)
    return add_stage(program, REDUCE_STAGE, Section(events=tuple(events.events)))


def _bucketed(
    job: Job, stage: Stage, section: Section, arrivals: Iterable[ScatterArrival], events: GatheredEvents
) -> tuple[Event, ...]:
    """The events of ``section`` with what its gradients do as they arrive."""
    following = iter(arrivals)
    for event, ready in with_ready_gradients(section.events):
        events.append(event)
        for alloc in ready:
            flush, is_copied = next(following)
            if flush is not None:
                _write_flush(job, events.list, flush)
            if is_copied:
                events.list.events.append(Free(local(stage.name, alloc.slot), alloc.size))
            events.complete(alloc.parameter)
    return events.end()


def _reduce_scatter(job: Job, numel: int) -> tuple[Collective, ...]:
    if not numel or job.world_size == 1:
        return ()
    return (Collective(CollectiveKind.REDUCE_SCATTER, Size.constant(numel * job.sent_itemsize), Moment.AFTER),)


def _gradients_to_host(job: Job, numel: int) -> tuple[Copy, ...]:
    if not numel or not job.offloads_optimizer:
        return ()
    return (Copy(False, Size.constant(_partition(job, numel) * FP32_BYTES), Moment.AFTER),)


def _step(job: Job) -> OptimizerStep:
    """The update, sub-group by sub-group, and the gathering of what stays gathered."""
    persistent = tuple(_persistent_numels(job))
    gathers = _blocking_gather(job, sum(persistent))
    if job.offloads_optimizer:
        partition_bytes = Size.constant(sum(job.partitions) * job.itemsize)
        copies = () if job.scenario.strategy.offload.params else (Copy(True, partition_bytes, Moment.BLOCKING),)
        states = host_state_events(job, sum(job.partitions))
        return OptimizerStep(tensors=(), on_host=True, before=states, collectives=gathers, copies=copies)
    before = _fp32_gradients(job)
    return OptimizerStep(
        tensors=tuple(LocalTensor((numel,), job.master_itemsize) for numel in sub_groups(job)),
        before=before,
        after=(last_alloc_freed(before), *_regathered(job, persistent, slot=next_slot(before))),
        collectives=gathers,
        zeroes_gradients=False,
    )


def _fp32_gradients(job: Job) -> tuple[Event, ...]:
    """Persistent weights are let go; norms are taken in fp64; the largest sub-group's gradients are flattened and cast.

    Omits: sub-groups follow one another, so that fewer than all of them are cast at a time; the largest one is here.
    """
    events = EventList(OPTIMIZER_STAGE)
    events.events.append(FreeAll(Owner.GATHERED_WEIGHTS))
    events.passing(max(job.partitions) * NORM_BYTES, Owner.TEMPORARIES)
    numel = max(sub_groups(job))
    flat = events.alloc(numel * job.itemsize, Owner.TEMPORARIES)
    if job.itemsize != job.master_itemsize:
        events.alloc(numel * job.master_itemsize, Owner.TEMPORARIES)
        events.events.append(flat)
    return tuple(events.events)


def _regathered(job: Job, numels: Iterable[int], *, slot: int) -> tuple[Event, ...]:
    events = EventList(OPTIMIZER_STAGE, slot=slot)
    for numel in numels:
        events.alloc(numel * job.itemsize, Owner.GATHERED_WEIGHTS)
    return tuple(events.events)


def _blocking_gather(job: Job, numel: int) -> tuple[Collective, ...]:
    if not numel or job.world_size == 1:
        return ()
    return (Collective(CollectiveKind.ALL_GATHER, Size.constant(numel * job.itemsize), Moment.BLOCKING),)
