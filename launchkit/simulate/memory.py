"""What one step takes of the device's memory: peaks, by owner, and when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

from launchkit.alloc_conf import AllocatorSettings
from launchkit.errors import OutOfMemoryError
from launchkit.program import Owner, Phase, Point, StepProgram, Stream
from launchkit.scenario import DeviceKind
from launchkit.simulate.allocator import Allocator, CachingAllocator
from launchkit.simulate.expand import PERSISTENT_STAGE, MemoryEvent, expand
from launchkit.simulate.heap import Heap
from launchkit.simulate.loading import load
from launchkit.simulate.owners import OWNERS, read_owners

MOST_STEPS = 4  # by when a cache that is released from time to time has taken its final shape, if it ever does


class TimelinePoint(NamedTuple):
    """Live bytes of each of ``OWNERS`` after event number ``event`` of the step, which is in stage ``stage``."""

    event: int
    stage: str
    live_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """A steady step's memory on one device, in bytes.

    ``allocated_peak_bytes`` is what ``torch.cuda.max_memory_allocated`` reports; ``at_peak`` splits it over every
    ``Owner`` and sums to it exactly. ``reserved_peak_bytes`` is ``max_memory_reserved`` after ``num_steps`` steps;
    ``reserved_first_step_bytes`` after the first: where the two differ, the warm-up step alone is no measure.
    ``resident_peak_bytes`` is what a process keeps of its memory where that is the host's: glibc holds on to much of
    what is freed. ``steady_bytes`` is live at the step's end. ``num_retries`` counts how often the cache had to be
    released to stay within the capacity given, ``num_late_retries`` how often in the last step of several;
    ``exceeds_capacity`` says that even so it does not run, and then the other figures are those without that limit.
    """

    allocated_peak_bytes: int
    reserved_peak_bytes: int
    reserved_first_step_bytes: int
    resident_peak_bytes: int
    at_peak: Mapping[Owner, int]
    peak_stage: str
    peak_phase: Phase
    steady_bytes: int
    num_steps: int
    num_retries: int = 0
    num_late_retries: int = 0
    exceeds_capacity: bool = False
    timeline: tuple[TimelinePoint, ...] = ()


class _Changes(NamedTuple):
    """What each event of the step that is read did to the allocated bytes, from nothing: the event, and the change."""

    events: Sequence[MemoryEvent]
    deltas: list[int]


class _Record(NamedTuple):
    """The changes of the step that is read, from nothing, and what was reserved."""

    changes: _Changes
    reserved_peak_bytes: int
    reserved_first_step_bytes: int
    num_steps: int
    num_retries: int
    num_late_retries: int = 0


def simulate_memory(
    program: StepProgram,
    point: Point,
    *,
    device_kind: DeviceKind,
    settings: AllocatorSettings | None = None,
    capacity_bytes: int | None = None,
    num_timeline_points: int = 0,
) -> MemoryReading:
    """Run ``program`` at ``point`` through the allocator of the device.

    On CUDA two steps are run where the program ends as it began. In the first the optimizer states come into being
    when its optimizer stage is reached, as torch's optimizers create them, under DeepSpeed too, among the cached blocks
    of the backward. The second is the one that is read; while the cache still has to be released in it, the next, up to
    ``MOST_STEPS``. A program that leaves more behind than it found (a first step
    that builds its states) is run once.

    On CPU nothing is rounded or cached: reserved equals allocated. What stays resident is read off glibc's heap.
    """
    events = list(expand(program, point))
    num_persistent = sum(event.stage == PERSISTENT_STAGE for event in events)
    exceeds_capacity = False
    run = _Run(program, events, num_persistent=num_persistent)
    if device_kind is DeviceKind.CPU:
        record = _count(events)
        resident_bytes = run.record(Heap()).reserved_peak_bytes
    else:
        resident_bytes = 0
        try:
            record = run.record(CachingAllocator(settings=settings, capacity_bytes=capacity_bytes))
        except OutOfMemoryError:
            exceeds_capacity = True
            record = run.record(CachingAllocator(settings=settings))
    timeline = _timeline(program, record.changes, num_persistent=num_persistent, num_points=num_timeline_points)
    return replace(
        _summary(program, record),
        resident_peak_bytes=resident_bytes,
        exceeds_capacity=exceeds_capacity,
        timeline=timeline,
    )


def read_memory(program: StepProgram, point: Point) -> MemoryReading:
    """What ``simulate_memory`` says of ``program`` on a CPU, in the time of its templates.

    Omits: the checks of ``expand``, what glibc's heap keeps.
    """
    (peak, stage), at_peak, end_bytes = read_owners(program, point)
    return MemoryReading(
        allocated_peak_bytes=peak,
        reserved_peak_bytes=peak,
        reserved_first_step_bytes=peak,
        resident_peak_bytes=peak,
        at_peak=dict(zip(OWNERS, at_peak, strict=True)),
        peak_stage=stage,
        peak_phase=program.stage(stage).phase if stage else Phase.FORWARD,
        steady_bytes=end_bytes,
        num_steps=1,
    )


def _count(events: Sequence[MemoryEvent]) -> _Record:
    """The record of an allocator that neither rounds nor caches."""
    deltas = [event.delta_bytes for event in events]
    peak = max(accumulate(deltas), default=0)
    return _Record(_Changes(events, deltas), peak, peak, num_steps=1, num_retries=0)


class _Run:
    """A program's events and how they repeat."""

    def __init__(self, program: StepProgram, events: Sequence[MemoryEvent], *, num_persistent: int) -> None:
        self.events = events
        self.persistent = persistent = events[:num_persistent]
        self.step = step = events[num_persistent:]
        self.is_repeatable = sum([event.delta_bytes for event in step if event.tensor >= num_persistent]) == 0
        self.optimizer_stages = frozenset(
            index for index, stage in enumerate(program.stages) if stage.phase is Phase.OPTIMIZER
        )
        late = {Owner.OPTIMIZER_STATES} if self.is_repeatable else set()
        self.arrivals = program.arrivals
        self.early = [event for event in persistent if event.owner not in late]
        self.late = [event for event in persistent if event.owner in late]

    def record(self, allocator: Allocator) -> _Record:
        handles: dict[int, int] = {}
        load(allocator, handles, self.early, self.arrivals)
        if not self.is_repeatable:
            changes = self._read(allocator, handles)
            reserved = allocator.peak_reserved_bytes
            return _Record(changes, reserved, reserved, num_steps=1, num_retries=allocator.num_retries)
        self._warm_up(allocator, handles)
        reserved_first_step_bytes = allocator.peak_reserved_bytes
        num_steps, num_late_retries = 1, 1
        while num_late_retries and num_steps < MOST_STEPS:
            num_retries = allocator.num_retries
            _replay(allocator, handles, [event for event in self.persistent if event.tensor not in handles])
            changes = self._read(allocator, handles)
            num_steps, num_late_retries = num_steps + 1, allocator.num_retries - num_retries
        return _Record(
            changes,
            allocator.peak_reserved_bytes,
            reserved_first_step_bytes,
            num_steps=num_steps,
            num_retries=allocator.num_retries,
            num_late_retries=num_late_retries,
        )

    def _warm_up(self, allocator: Allocator, handles: dict[int, int]) -> None:
        """The first step, in which the optimizer creates its states."""
        optimizer = (i for i, event in enumerate(self.step) if event.stage in self.optimizer_stages)
        start = next(optimizer, len(self.step))
        _replay(allocator, handles, self.step[:start])
        _replay(allocator, handles, self.late)
        _replay(allocator, handles, self.step[start:])

    def _read(self, allocator: Allocator, handles: dict[int, int]) -> _Changes:
        """A step, with what it and the persistent storages take of the allocator."""
        deltas = [allocator.size_of(handles[event.tensor]) for event in self.persistent]
        levels = [allocator.allocated_bytes, *_replay(allocator, handles, self.step)]
        deltas += [after - before for before, after in pairwise(levels)]
        return _Changes(self.events, deltas)


def _replay(allocator: Allocator, handles: dict[int, int], events: Iterable[MemoryEvent]) -> list[int]:
    """The allocated bytes after each of ``events``."""
    levels: list[int] = []
    malloc, free, note = allocator.malloc, allocator.free, levels.append
    for tensor, delta_bytes, _, _, stream, lag in events:
        if delta_bytes > 0:
            if lag and stream == Stream.GATHER:
                allocator.begin_gather()
            handles[tensor] = malloc(delta_bytes, stream)
        else:
            free(handles.pop(tensor), lag)
        note(allocator.allocated_bytes)
    return levels


def _summary(program: StepProgram, record: _Record) -> MemoryReading:
    events, deltas = record.changes
    levels = list(accumulate(deltas))
    peak = max(levels, default=0)
    last = levels.index(peak) if levels else -1
    at_peak = dict.fromkeys(OWNERS, 0)
    for event, delta_bytes in zip(events[: last + 1], deltas, strict=False):
        at_peak[event.owner] += delta_bytes
    stage = events[last].stage if levels else PERSISTENT_STAGE
    return MemoryReading(
        allocated_peak_bytes=peak,
        reserved_peak_bytes=record.reserved_peak_bytes,
        reserved_first_step_bytes=record.reserved_first_step_bytes,
        resident_peak_bytes=0,
        at_peak=at_peak,
        peak_stage=_stage_name(program, stage),
        peak_phase=Phase.FORWARD if stage == PERSISTENT_STAGE else program.stages[stage].phase,
        steady_bytes=levels[-1] if levels else 0,
        num_steps=record.num_steps,
        num_retries=record.num_retries,
        num_late_retries=record.num_late_retries,
    )


def _stage_name(program: StepProgram, stage: int) -> str:
    return "" if stage == PERSISTENT_STAGE else program.stages[stage].name


def _timeline(
    program: StepProgram, changes: _Changes, *, num_persistent: int, num_points: int
) -> tuple[TimelinePoint, ...]:
    """At most ``num_points`` moments of the step: of each stretch of equally many events the highest."""
    if num_points <= 0:
        return ()
    num_events = len(changes.events)
    levels = list(accumulate(changes.deltas))
    stretch = max(1, -(-(num_events - num_persistent) // num_points))
    chosen = {
        max(range(first, min(first + stretch, num_events)), key=levels.__getitem__)
        for first in range(num_persistent, num_events, stretch)
    }
    live = dict.fromkeys(OWNERS, 0)
    timeline: list[TimelinePoint] = []
    for index, (event, delta_bytes) in enumerate(zip(*changes, strict=True)):
        live[event.owner] += delta_bytes
        if index in chosen:
            name = _stage_name(program, event.stage)
            timeline.append(TimelinePoint(index - num_persistent, name, tuple(live.values())))
    return tuple(timeline)
