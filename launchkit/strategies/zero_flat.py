"""ZeRO-1 and ZeRO-2: whole weights, and one rank's part of their fp32 copy, its states and (stage 2) its gradients.

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
from dataclasses import replace
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
    with_optimizer,
    with_ready_gradients,
)
from launchkit.strategies.zero_job import (
    NORM_BYTES,
    REDUCE_STAGE,
    Arrival,
    Bucket,
    EventList,
    Flush,
    Job,
    add_stage,
    frozen_weights,
    host_optimizer_bytes,
    host_state_events,
    last_alloc_freed,
    write_flush,
)
from launchkit.units import round_up


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


def rewrite(job: Job) -> StepProgram:
    """The step of one rank under ZeRO-1 or ZeRO-2."""
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


def _host_bytes(job: Job, flat: Flat) -> int:
    """Beside the optimizer's own: the updated weights on their way back, and one parameter's gradient."""
    if not job.offloads_optimizer:
        return 0
    return host_optimizer_bytes(job, flat.partition) + (flat.partition + flat.largest_parameter) * job.itemsize


class _Arrivals(NamedTuple):
    """What the gradients of one layer do. ``opens`` when the first of them allocates the bucket, ``collects`` when the
    first flush among theirs allocates the buffer of this rank's gradients."""

    arrivals: tuple[Arrival, ...]
    opens: bool
    collects: bool


class _EagerReduction:
    """Stage 2: each gradient goes into the bucket and dies; full buckets are flushed on the way."""

    def __init__(self, job: Job, flat: Flat) -> None:
        self.job = job
        self.flat = flat
        self.bucket = Bucket(job.settings.reduce_bucket_size)
        self.has_opened = self.has_collected = False
        self.opened: list[Free] = []
        self.collected: list[Free] = []

    def decide(self, stage: Stage, layer: int, section: Section) -> _Arrivals:
        arrivals = tuple([self.bucket.take(gradient) for gradient in self.job.arriving(stage, layer)])
        opens = bool(arrivals) and not self.has_opened
        collects = any(arrival.flush for arrival in arrivals) and not self.has_collected
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
                if not self.opened:
                    self.opened.extend(_elsewhere(free, stage.name, layer) for free in _open_buckets(self.job, events))
                if flush is not None:
                    self.flush(events, flush, stage=stage.name, layer=layer)
                if is_copied:
                    events.events.append(Free(local(stage.name, alloc.slot), alloc.size))
        return _with_reduction(self.job, replace(section, events=tuple(events.events)))

    def flush(self, events: EventList, flush: Flush, *, stage: str, layer: int) -> None:
        write_flush(events, flush, itemsize=self.job.itemsize)
        buffers = _collect(self.job, self.flat, events, self.collected)
        self.collected.extend(_elsewhere(free, stage, layer) for free in buffers)


def _reduced_as_it_arrives(job: Job, flat: Flat) -> StepProgram:
    reduction = _EagerReduction(job, flat)
    program = map_layers(job.program, Phase.BACKWARD, reduction.decide, reduction.change)
    events = EventList(REDUCE_STAGE)
    reduction.flush(events, reduction.bucket.flush(), stage=REDUCE_STAGE, layer=0)
    events.events.extend(reduction.opened)
    if accumulates(job.scenario):
        events.events.extend(reduction.collected)
    return add_stage(program, REDUCE_STAGE, Section(events=tuple(events.events), copies=_gradients_to_host(job, flat)))


def _reduced_at_the_end(job: Job, flat: Flat) -> StepProgram:
    """Stage 1: the bucket is there from the first gradient on, but is filled after the last."""
    events = EventList(REDUCE_STAGE)
    bucket = Bucket(job.settings.reduce_bucket_size)
    gradients = tuple(job.gradients())
    if accumulates(job.scenario):
        program = accumulate_gradients(job.program)
        full = Flush(min(bucket.capacity, flat.total), ())
        write_flush(events, full, itemsize=job.itemsize)
        _collect(job, flat, events, ())
        events.events.append(FreeAll(Owner.COMMUNICATION))
    else:
        program, opened = _with_bucket_opened(job)
        collected: list[Free] = []
        for gradient in gradients:
            flush, is_copied = bucket.take(gradient)
            if flush is not None:
                write_flush(events, flush, itemsize=job.itemsize)
                collected.extend(_collect(job, flat, events, collected))
            if is_copied:
                events.events.append(Free(gradient.ref, gradient.size))
        write_flush(events, bucket.flush(), itemsize=job.itemsize)
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
    first = next((gradient.ref for gradient in job.gradients()), None)

    def opens(stage: Stage, layer: int, section: Section) -> bool:
        return first is not None and (stage.name, layer) == (first.stage, first.layer)

    def change(stage: Stage, layer: int, section: Section, is_first: bool) -> Section:
        if not is_first:
            return section
        events = EventList(stage.name, slot=next_slot(section.events))
        for event, ready in with_ready_gradients(section.events):
            events.events.append(event)
            if ready and not opened:
                opened.extend(_elsewhere(free, stage.name, layer) for free in _open_buckets(job, events))
        return replace(section, events=tuple(events.events))

    return map_layers(job.program, Phase.BACKWARD, opens, change), opened


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
    numel = sum(parameters[event.parameter].numel(job.rank) for event in section.gradients)
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
    before = fp32_gradient_events(job, flat.partition, largest_slice=flat.largest_slice)
    return OptimizerStep(
        tensors=(LocalTensor((flat.partition,), FP32_BYTES),),
        before=before,
        after=(last_alloc_freed(before), *_gather_copies(job, flat, slot=next_slot(before))),
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


def _gather_copies(job: Job, flat: Flat, *, slot: int) -> tuple[Event, ...]:
    """NCCL gathers in place; gloo makes a copy of its input and one of its output."""
    if job.device is not DeviceKind.CPU or job.world_size == 1:
        return ()
    events = EventList(OPTIMIZER_STAGE, slot=slot)
    events.passing(flat.total * job.itemsize, Owner.COMMUNICATION)
    return tuple(events.events)
