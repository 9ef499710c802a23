"""ZeRO-1 and ZeRO-2: whole weights, and one rank's part of their fp32 copy, its states and (stage 2) its gradients.

Source: DeepSpeed 0.19.8 ``deepspeed/runtime/zero/stage_1_and_2.py``, confirmed on timelines of two gloo processes.

- Trainable weights lie in one flat buffer in the compute dtype, padded to twice the ranks. Each rank holds an fp32 copy
  of its partition of it (also when the compute dtype is fp32), and the optimizer's states of that.
- The first gradient of a step allocates the bucket, ``reduce_bucket_size`` elements whatever the model's size, and a
  second one with ``overlap_comm``. They die when the backward pass ends.
- Stage 2 copies each gradient into the bucket as it arrives, and the gradient dies. A bucket that is full is flattened,
  reduced, and what belongs to this rank is copied to a buffer that lives until the optimizer step. Stage 1 does the
  same once the backward pass is over, so that all gradients live until then.
- With ``overlap_comm`` a full bucket is flattened and reduced on a stream of its own, and what this rank keeps of it is
  allocated there; the buckets themselves where the backward pass runs.
- The step flattens that buffer, casts it to fp32, updates, copies the result into the flat weights and gathers them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from launchkit.optimizers import FP32_BYTES, LocalTensor
from launchkit.program import (
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
from launchkit.scenario import DeviceKind
from launchkit.strategies.base import (
    OPTIMIZER_STAGE,
    OptimizerStep,
    accumulate_gradients,
    accumulates,
    gradient_storages,
    map_layers,
    next_slot,
    persistent_run,
    with_optimizer,
    with_ready_gradients,
)
from launchkit.strategies.zero_job import (
    NORM_BYTES,
    REDUCE_STAGE,
    EventList,
    GradientRef,
    Job,
    ParameterKey,
    Placed,
    add_stage,
    frozen_weights,
    host_state_bytes_planned,
    host_state_events,
    last_alloc_freed,
)
from launchkit.units import round_up


class Span(NamedTuple):
    """A part of a parameter: the rank that owns it, and its elements."""

    owner: int
    numel: int


@dataclass(frozen=True, kw_only=True)
class Flat:
    """The flat buffers of trainable weights, one per group of the optimizer, and how ranks share them, in elements."""

    totals: tuple[int, ...]  # padded to twice the ranks
    spans: Mapping[ParameterKey, tuple[Span, ...]]
    world_size: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[Placed]], world_size: int) -> Flat:
        totals = []
        spans: dict[ParameterKey, tuple[Span, ...]] = {}
        for group in groups:
            total = round_up(sum(placed.numel for placed in group), 2 * world_size)
            start = 0
            for key, numel in group:
                spans[key] = tuple(_spans(start, numel, total // world_size))
                start += numel
            totals.append(total)
        return cls(totals=tuple(totals), spans=spans, world_size=world_size)

    @property
    def total(self) -> int:
        return sum(self.totals)

    @property
    def partitions(self) -> tuple[int, ...]:
        """One rank's part of each group."""
        return tuple(total // self.world_size for total in self.totals)

    @property
    def partition(self) -> int:
        return sum(self.partitions)

    def is_owned(self, key: ParameterKey, rank: int) -> bool:
        return any(span.owner == rank for span in self.spans[key])

    @cached_property
    def gradient_buffers(self) -> tuple[int, ...]:
        """By rank, the buffer of its gradients: parameters that reach into its partition, each whole."""
        whole = [0] * self.world_size
        for spans in self.spans.values():
            numel = sum([span.numel for span in spans])
            for span in spans:
                whole[span.owner] += numel
        return tuple(whole)

    @property
    def gradient_buffer(self) -> int:
        """The fullest rank's."""
        return max(self.gradient_buffers)

    @property
    def largest_slice(self) -> int:
        return max(span.numel for spans in self.spans.values() for span in spans)

    @property
    def largest_parameter(self) -> int:
        return max(sum([span.numel for span in spans]) for spans in self.spans.values())


def _spans(start: int, numel: int, partition: int) -> Iterator[Span]:
    """Who owns what of the elements from ``start`` on."""
    end = start + numel
    while start < end:
        owner = start // partition
        stop = min(end, (owner + 1) * partition)
        yield Span(owner, stop - start)
        start = stop


def round_robin(group: Sequence[Placed], world_size: int) -> tuple[Placed, ...]:
    """``round_robin_gradients``: every ``world_size``-th parameter together, so that ranks fill at the same pace."""
    return tuple(placed for first in range(world_size) for placed in group[first::world_size])


def reduce_copies(spans: Iterable[Span], capacity: int) -> tuple[int, ...]:
    """Elements of the flat copies that one flush makes of the bucket.

    Neighbours of one owner count as one slice. Slices are reduced together until they are more than the bucket holds,
    and only several of them are copied to lie flat (``allreduce_and_scatter``).
    """
    slices = [sum(span.numel for span in run) for _, run in groupby(spans, key=lambda span: span.owner)]
    copies, together = [], [0]
    for numel in slices:
        together.append(numel)
        if sum(together) > capacity:
            copies.append(together)
            together = [0]
    return tuple(sum(parts) for parts in (*copies, together) if len(parts) > 2)


def rewrite(job: Job) -> StepProgram:
    """The step of one rank under ZeRO-1 or ZeRO-2."""
    groups = job.optimizer_groups
    if job.settings.round_robin_gradients:
        groups = tuple(round_robin(group, job.world_size) for group in groups)
    flat = Flat.of(groups, job.world_size)
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


def _is_contiguous(job: Job) -> bool:
    """Whether gradients are copied into a bucket; an offloaded optimizer needs that."""
    return job.settings.contiguous_gradients or job.offloads_optimizer


def _bucket_bytes(job: Job) -> int:
    return job.settings.reduce_bucket_size * job.itemsize


def _num_buckets(job: Job) -> int:
    if not _is_contiguous(job):
        return 0
    return 2 if job.overlap_comm else 1


def _flat_storages(job: Job, flat: Flat) -> tuple[Persistent, ...]:
    storages = [Persistent(Size.constant(total * job.itemsize), Owner.WEIGHTS) for total in flat.totals]
    storages.extend(frozen_weights(job))
    if job.offloads_optimizer:
        storages.append(Persistent(Size.constant(flat.largest_parameter * job.itemsize), Owner.COMMUNICATION))
    else:
        sizes = (partition * job.master_itemsize for partition in flat.partitions)
        storages.extend(persistent_run(sizes, Owner.MASTER_WEIGHTS))
    if accumulates(job.scenario):
        storages.extend(_accumulated(job, flat))
    return tuple(storages)


def _accumulated(job: Job, flat: Flat) -> Iterator[Persistent]:
    """What earlier micro-batches leave: stage 2 the reduced gradients, stage 1 all of them and its bucket."""
    if not _is_eager(job):
        yield from gradient_storages(job.program, scenario=job.scenario)
        yield from persistent_run([_bucket_bytes(job)] * _num_buckets(job), Owner.COMMUNICATION)
    elif not job.offloads_optimizer:
        yield Persistent(Size.constant(flat.gradient_buffer * job.itemsize), Owner.GRADIENTS)


def _host_bytes(job: Job, flat: Flat) -> int:
    """Of an offloaded optimizer: master weights and gradients in fp32 and its states, the updated weights on their way
    back, one parameter's gradient; under accumulation the gradients of the partition as they came, too."""
    if not job.offloads_optimizer:
        return 0
    masters = 2 * sum(job.pinned_bytes(partition * FP32_BYTES) for partition in flat.partitions)
    ways_back = sum(job.pinned_bytes(partition * job.itemsize) for partition in flat.partitions)
    gradient = job.pinned_bytes(flat.largest_parameter * job.itemsize)
    kept = flat.gradient_buffer * job.itemsize if accumulates(job.scenario) else 0
    return masters + host_state_bytes_planned(job, flat.partition) + ways_back + gradient + kept


class FlatFlush(NamedTuple):
    """What one flush of stage 1 or 2 does: the elements it reduces and its flat copies of them, whether gradients of
    this rank are among them, and the gradients that die with it."""

    elements: int
    copies: tuple[int, ...]
    is_owned: bool
    dying: tuple[GradientRef, ...]


class FlatArrival(NamedTuple):
    """What a gradient does: the bucket is flushed before it where it is full; copied into it, the gradient dies."""

    flush: FlatFlush | None
    is_copied: bool


class FlatBucket:
    """The reduce bucket of one backward pass, as the rank sees it whose gradients come first: its buffer is there for
    the longest time. Where several share the first gradient, the one with the largest buffer.

    A gradient larger than the bucket is
    not copied: it stays until the next one comes, and is reduced by itself. Without ``contiguous_gradients`` none is
    copied, and those that the rank owns stay for the optimizer.
    """

    def __init__(self, job: Job, flat: Flat) -> None:
        self._job = job
        self._flat = flat
        first = next(job.gradients(), None)
        owners = [span.owner for span in flat.spans[first.key]] if first else [0]
        self.rank = max(owners, key=lambda rank: flat.gradient_buffers[rank])
        self._capacity = job.settings.reduce_bucket_size
        self._elements = 0
        self._waiting: list[GradientRef] = []

    def take(self, gradient: GradientRef) -> FlatArrival:
        """Adds a gradient, after a flush where it does not fit any more."""
        overflows = bool(self._waiting) and self._elements + gradient.numel > self._capacity
        flush = self.flush() if overflows else None
        self._elements += gradient.numel
        self._waiting.append(gradient)
        return FlatArrival(flush, self._is_copied(gradient))

    def flush(self) -> FlatFlush:
        """Empties the bucket."""
        owned = [gradient for gradient in self._waiting if self._flat.is_owned(gradient.key, self.rank)]
        dying = [gradient for gradient in self._waiting if not self._is_copied(gradient)]
        if not _is_contiguous(self._job):
            dying = [gradient for gradient in dying if gradient not in owned]
        if accumulates(self._job.scenario) and not _is_eager(self._job):
            dying = []  # they are no allocations of this step, and die all together behind it
        flush = FlatFlush(self._elements, self._copies(), bool(owned), tuple(dying))
        self._waiting.clear()
        self._elements = 0
        return flush

    def _is_copied(self, gradient: GradientRef) -> bool:
        return _is_contiguous(self._job) and gradient.numel <= self._capacity

    def _copies(self) -> tuple[int, ...]:
        if not _is_contiguous(self._job):
            return (self._elements,) if len(self._waiting) > 1 else ()
        if not self._job.settings.reduce_scatter:
            return ()  # the bucket itself is reduced
        spans = (span for gradient in self._waiting for span in self._flat.spans[gradient.key])
        return reduce_copies(spans, self._capacity)


class _Arrivals(NamedTuple):
    """What the gradients of one layer do. ``opens`` when the first of them allocates the bucket, ``collects`` when the
    first flush among theirs allocates the buffer of this rank's gradients."""

    arrivals: tuple[FlatArrival, ...]
    opens: bool
    collects: bool


class _Reduction:
    """The bucket and this rank's buffer as they come into being, wherever in the step that is."""

    def __init__(self, job: Job, flat: Flat) -> None:
        self.job = job
        self.flat = flat
        self.bucket = FlatBucket(job, flat)
        self.has_opened = self.has_collected = False
        self.opened: list[Free] = []
        self.collected: list[Free] = []

    def decide(self, stage: Stage, layer: int, section: Section) -> _Arrivals:
        arrivals = tuple([self.bucket.take(gradient) for gradient in self.job.arriving(stage, layer)])
        opens = bool(arrivals) and not self.has_opened
        collects = any(flush.is_owned for flush, _ in arrivals if flush) and not self.has_collected
        self.has_opened |= opens
        self.has_collected |= collects
        return _Arrivals(arrivals, opens, collects)

    def change(self, stage: Stage, layer: int, section: Section, decision: _Arrivals) -> Section:
        events = EventList(stage.name, slot=next_slot(section.events))
        arrivals = iter(decision.arrivals)
        for event, ready in with_ready_gradients(section.events):
            events.events.append(event)
            for alloc in ready:
                flush, is_copied = next(arrivals)
                self.open(events, stage=stage.name, layer=layer)
                if flush is not None:
                    self.flush(events, flush, stage=stage.name, layer=layer)
                if is_copied:
                    events.events.append(Free(local(stage.name, alloc.slot), alloc.size))
        return _with_reduction(self.job, replace(section, events=tuple(events.events)))

    def open(self, events: EventList, *, stage: str, layer: int) -> None:
        if not self.opened:
            buckets = [
                events.alloc(_bucket_bytes(self.job), Owner.COMMUNICATION) for _ in range(_num_buckets(self.job))
            ]
            self.opened.extend(_elsewhere(free, stage, layer) for free in buckets)

    def flush(self, events: EventList, flush: FlatFlush, *, stage: str, layer: int) -> None:
        """Reduces; then this rank's gradients go to a buffer of their own, made once, or, through fp32, to the host."""
        stream = self.job.reduce_stream
        for elements in flush.copies:
            copy = events.alloc(elements * self.job.itemsize, Owner.COMMUNICATION, stream=stream)
            self._widen(events, elements)
            events.events.append(copy)
        if not flush.copies:
            self._widen(events, flush.elements)
        if flush.is_owned and _is_contiguous(self.job):
            if self.job.offloads_optimizer:
                _to_host(self.job, self.flat, events)
            elif not self.collected:
                own = events.alloc(self._buffer_bytes(), Owner.GRADIENTS, stream=stream)
                self.collected.append(_elsewhere(own, stage, layer))
        events.events.extend(Free(gradient.ref, gradient.size) for gradient in flush.dying)

    def _widen(self, events: EventList, elements: int) -> None:
        """What is reduced in another dtype than it was computed in is a copy, while it is on its way."""
        if self.job.widens_sent:
            events.passing(elements * self.job.sent_itemsize, Owner.COMMUNICATION, stream=self.job.reduce_stream)

    def finish(self, events: EventList) -> None:
        """The last flush. Another rank's buffer may be larger by now than that of the rank which came first."""
        self.flush(events, self.bucket.flush(), stage=REDUCE_STAGE, layer=0)
        if self.collected:
            more = self.flat.gradient_buffer * self.job.itemsize - self._buffer_bytes()
            rest = events.alloc(more, Owner.GRADIENTS, stream=self.job.reduce_stream)
            self.collected.append(_elsewhere(rest, REDUCE_STAGE, 0))
        events.events.extend(self.opened)

    def _buffer_bytes(self) -> int:
        return self.flat.gradient_buffers[self.bucket.rank] * self.job.itemsize


def _to_host(job: Job, flat: Flat, events: EventList) -> None:
    """A gradient on its way: its norm in fp64, then its copy in fp32."""
    wide_bytes = flat.largest_slice * FP32_BYTES if job.itemsize != FP32_BYTES else 0
    events.passing(flat.largest_slice * NORM_BYTES, Owner.TEMPORARIES, stream=job.reduce_stream)
    events.passing(wide_bytes, Owner.COMMUNICATION, stream=job.reduce_stream)


def _reduced_as_it_arrives(job: Job, flat: Flat) -> StepProgram:
    reduction = _Reduction(job, flat)
    program = map_layers(job.program, Phase.BACKWARD, reduction.decide, reduction.change)
    events = EventList(REDUCE_STAGE)
    reduction.finish(events)
    if accumulates(job.scenario):
        events.events.extend(reduction.collected)
    return add_stage(program, REDUCE_STAGE, Section(events=tuple(events.events), copies=_gradients_to_host(job, flat)))


def _reduced_at_the_end(job: Job, flat: Flat) -> StepProgram:
    """Stage 1: the bucket is there from the first gradient on, but is filled after the last, in the model's order."""
    reduction = _Reduction(job, flat)
    program = accumulate_gradients(job.program) if accumulates(job.scenario) else _with_bucket_opened(job, reduction)
    events = EventList(REDUCE_STAGE)
    arrived = {gradient.key: gradient for gradient in job.gradients()}
    for placed in (placed for group in job.optimizer_groups for placed in group if placed.key in arrived):
        gradient = arrived[placed.key]
        flush, is_copied = reduction.bucket.take(gradient)
        if flush is not None:
            reduction.flush(events, flush, stage=REDUCE_STAGE, layer=0)
        if is_copied and not accumulates(job.scenario):
            events.events.append(Free(gradient.ref, gradient.size))
    reduction.finish(events)
    if accumulates(job.scenario):
        events.events.append(FreeAll(Owner.COMMUNICATION))
    section = Section(
        events=tuple(events.events),
        collectives=_all_reduce(job, sum(gradient.numel for gradient in arrived.values()), Moment.BLOCKING),
        copies=_gradients_to_host(job, flat),
    )
    return add_stage(program, REDUCE_STAGE, section)


def _with_bucket_opened(job: Job, reduction: _Reduction) -> StepProgram:
    """The program with the bucket allocated at the first gradient."""
    first = next((gradient.ref for gradient in job.gradients()), None)

    def opens(stage: Stage, layer: int, section: Section) -> bool:
        return first is not None and (stage.name, layer) == (first.stage, first.layer)

    def change(stage: Stage, layer: int, section: Section, is_first: bool) -> Section:
        if not is_first:
            return section
        events = EventList(stage.name, slot=next_slot(section.events))
        for event, ready in with_ready_gradients(section.events):
            events.events.append(event)
            if ready:
                reduction.open(events, stage=stage.name, layer=layer)
        return replace(section, events=tuple(events.events))

    return map_layers(job.program, Phase.BACKWARD, opens, change)


def _elsewhere(free: Free, stage: str, layer: int) -> Free:
    """``free``, made to mean the same tensor from any other stage."""
    return free._replace(ref=TensorRef(stage, Anchor.FIRST, layer, free.ref.slot))


def _with_reduction(job: Job, section: Section) -> Section:
    parameters = job.program.groups[section.group].parameters
    numel = sum(parameters[event.parameter].numel(job.rank) for event in section.gradients)
    return replace(section, collectives=section.collectives + _all_reduce(job, numel, Moment.AFTER))


def _all_reduce(job: Job, numel: int, moment: Moment) -> tuple[Collective, ...]:
    """Stages 1 and 2 reduce by all-reduce (``use_multi_rank_bucket_allreduce``, on by default)."""
    if not numel or job.world_size == 1:
        return ()
    return (Collective(CollectiveKind.ALL_REDUCE, Size.constant(numel * job.sent_itemsize), moment),)


def _gradients_to_host(job: Job, flat: Flat) -> tuple[Copy, ...]:
    if not job.offloads_optimizer:
        return ()
    return (Copy(False, Size.constant(flat.partition * FP32_BYTES), Moment.AFTER),)


def _flat_step(job: Job, flat: Flat) -> OptimizerStep:
    """The update of the fp32 partition, and the gathering of the new weights."""
    weight_bytes = Size.constant(flat.total * job.itemsize)
    gathers = (Collective(CollectiveKind.ALL_GATHER, weight_bytes, Moment.BLOCKING),) if job.world_size > 1 else ()
    if job.offloads_optimizer:
        states = host_state_events(job, flat.partition)
        return OptimizerStep(
            tensors=(),
            on_host=True,
            before=states,
            after=_gather_copies(job, flat, slot=next_slot(states)),
            collectives=gathers,
            copies=(Copy(True, Size.constant(flat.partition * job.itemsize), Moment.BLOCKING),),
        )
    before = _master_gradient_events(job, flat)
    return OptimizerStep(
        tensors=tuple(LocalTensor((partition,), job.master_itemsize) for partition in flat.partitions),
        before=before,
        after=(
            last_alloc_freed(before),
            FreeAll(Owner.GRADIENTS),
            *_gather_copies(job, flat, slot=next_slot(before)),
        ),
        collectives=gathers,
    )


def _master_gradient_events(job: Job, flat: Flat) -> tuple[Event, ...]:
    """The norm in fp64, slice by slice; the gradients flattened; the flat copy cast to the master weights' dtype, where
    it is not of it already. Then this rank's buffer dies, unless another group of the optimizer still waits in it.

    The last allocation is the gradient that the optimizer reads.

    Omits: that groups are updated one after the other; the second, of norms and biases, is small.
    """
    events = EventList(OPTIMIZER_STAGE)
    events.passing(flat.largest_slice * NORM_BYTES, Owner.TEMPORARIES)
    flattened = events.alloc(flat.partition * job.itemsize, Owner.TEMPORARIES)
    if job.itemsize != job.master_itemsize:
        events.alloc(flat.partition * job.master_itemsize, Owner.TEMPORARIES)
        events.events.append(flattened)
    if len(flat.totals) == 1:
        events.events.append(FreeAll(Owner.GRADIENTS))
    return tuple(events.events)


def _gather_copies(job: Job, flat: Flat, *, slot: int) -> tuple[Event, ...]:
    """NCCL gathers in place; gloo makes a copy of its input and one of its output."""
    if job.device is not DeviceKind.CPU or job.world_size == 1:
        return ()
    events = EventList(OPTIMIZER_STAGE, slot=slot)
    events.passing(max(flat.totals) * job.itemsize, Owner.COMMUNICATION)
    return tuple(events.events)
