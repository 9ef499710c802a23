"""Loops over the sequence, such as the steps of a state-space scan or the chunks of linear attention.

A model that loops in Python over its tokens has as many allocations as the sequence has steps, so no two lengths tell
the same story. What its loop does to memory is simple all the same: every iteration does the same, so the level rises
or falls by the same amount from one to the next, and it is highest in the first iteration or in the last. Those two are
kept as they are; of the iterations between, what lives on counts as one storage of their sum, whose size is again a
polynomial in the length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from launchkit.trace.recorder import AllocRecord, KernelRecord, Place

Event = tuple[bool, Place, int]  # is it an allocation, where, and of which storage

_FEWEST_ITERATIONS = 3  # the first, the last, and one between


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """A stretch of equal iterations: where in the list of events it starts, events per iteration, iterations."""

    start: int
    period: int
    count: int

    @property
    def between(self) -> range:
        """The events of all iterations but the first and the last."""
        return range(self.start + self.period, self.start + (self.count - 1) * self.period)


@dataclass
class _Life:
    """Where among the loops a storage is born and dies: (loop, position in the body), or None outside of them."""

    birth: tuple[int, int] | None = None
    death: tuple[int, int] | None = None
    dies: bool = False


@dataclass
class _Folded:
    """The shorter story, as it is being written."""

    events: list[Event] = field(default_factory=list)
    records: list[AllocRecord] = field(default_factory=list)
    numbers: dict[Hashable, int] = field(default_factory=dict)

    def alloc(self, key: Hashable, record: AllocRecord) -> None:
        self.numbers[key] = len(self.records)
        self.events.append((True, record.place, len(self.records)))
        self.records.append(record)

    def free(self, key: Hashable, place: Place) -> None:
        if key in self.numbers:
            self.events.append((False, place, self.numbers.pop(key)))


def fold(events: Sequence[Event], records: Sequence[AllocRecord]) -> tuple[list[Event], list[AllocRecord]]:
    """The same story with each loop told by its first iteration, its last one, and what those between add up to."""
    loops = _find_loops(events, records)
    inside = {i: (n, (i - loop.start) % loop.period) for n, loop in enumerate(loops) for i in loop.between}
    lives = _lives(events, inside)
    keys = {number: _key(number, life) for number, life in lives.items()}
    folded = _Folded()
    for i, (is_alloc, place, number) in enumerate(events):
        if i not in inside:
            if is_alloc:
                folded.alloc(keys[number], records[number])
            else:
                folded.free(keys[number], place)
        elif i == loops[inside[i][0]].between.start:
            _tell_at_once(folded, [events[j] for j in loops[inside[i][0]].between], records, keys)
    return folded.events, folded.records


def _tell_at_once(
    folded: _Folded, events: Sequence[Event], records: Sequence[AllocRecord], keys: dict[int, Hashable | None]
) -> None:
    """The iterations between: deaths first, since the level has no peak here, then births summed up by their fate."""
    place = events[0][1]
    for key in _in_order(keys[number] for is_alloc, _, number in events if not is_alloc):
        folded.free(key, place)
    born = [number for is_alloc, _, number in events if is_alloc]
    for key in _in_order(keys[number] for number in born):
        mine = [records[number] for number in born if keys[number] == key]
        folded.alloc(key, mine[0]._replace(num_bytes=sum(record.num_bytes for record in mine)))


def _in_order(keys: Iterable[Hashable | None]) -> list[Hashable]:
    """Each key once: the sums by where in the body they are born, then single storages in the order of their birth;
    those without a key live and die within the loop. Which comes first in time depends on the number of iterations."""
    told = {key for key in keys if key is not None}
    return sorted(told, key=lambda key: (isinstance(key, int), key if isinstance(key, int) else repr(key)))


def _key(number: int, life: _Life) -> Hashable | None:
    """What tells apart the storages of the shorter story: None for those that do not outlive their loop."""
    birth, death = life.birth, life.death
    if birth is not None and death is not None and birth[0] == death[0]:
        return None
    in_loops_only = birth is not None and (death is not None or not life.dies)
    return (birth, death) if in_loops_only else number


def _lives(events: Sequence[Event], inside: dict[int, tuple[int, int]]) -> dict[int, _Life]:
    lives: dict[int, _Life] = {}
    for i, (is_alloc, _, number) in enumerate(events):
        life = lives.setdefault(number, _Life())
        if is_alloc:
            life.birth = inside.get(i)
        else:
            life.death, life.dies = inside.get(i), True
    return lives


def _find_loops(events: Sequence[Event], records: Sequence[AllocRecord]) -> list[_Loop]:
    loops: list[_Loop] = []
    start = 0
    for _, run in groupby(events, key=lambda event: event[1]):
        tokens = [_token(event, records) for event in run]
        loops += _repeats(tokens, start)
        start += len(tokens)
    return loops


def _token(event: Event, records: Sequence[AllocRecord]) -> Hashable:
    """What an event has in common with its like in another iteration."""
    is_alloc, _, number = event
    record = records[number]
    return is_alloc, record.op, record.num_bytes, record.place


def _repeats(tokens: Sequence[Hashable], offset: int) -> list[_Loop]:
    """From left to right, at each place the repetition that covers most, by the shortest body that does."""
    best: dict[int, tuple[int, int]] = {}  # index -> (events covered, minus the period)
    for period in _periods(tokens):
        for i, matching in enumerate(_matches(tokens, period)):
            count = 1 + matching // period
            if count >= _FEWEST_ITERATIONS:
                best[i] = max(best.get(i, (0, 0)), (count * period, -period))
    loops, at = [], 0
    while at < len(tokens):
        covered, period = best.get(at, (1, 0))
        if period:
            loops.append(_Loop(start=offset + at, period=-period, count=covered // -period))
        at += covered
    return loops


def _periods(tokens: Sequence[Hashable]) -> list[int]:
    """Lengths that a body may have: distances at which tokens recur, often enough. A body has some event that it has
    only once."""
    seen: dict[Hashable, int] = {}
    distances: Counter[int] = Counter()
    for i, token in enumerate(tokens):
        if token in seen:
            distances[i - seen[token]] += 1
        seen[token] = i
    return [distance for distance, count in distances.items() if count >= _FEWEST_ITERATIONS - 1]


def _matches(tokens: Sequence[Hashable], period: int) -> list[int]:
    """For each index, how many tokens from there on equal the one ``period`` later."""
    found = [0] * (len(tokens) - period)
    ahead = 0
    for i in range(len(found) - 1, -1, -1):
        ahead = ahead + 1 if tokens[i] == tokens[i + period] else 0
        found[i] = ahead
    return found


def fold_kernels(kernels: Sequence[KernelRecord]) -> list[KernelRecord]:
    """One kernel for all of an operator's at a place, since a loop launches as many as it has iterations."""
    totals: dict[tuple[Place, str], KernelRecord] = {}
    for kernel in kernels:
        key = (kernel.place, kernel.op)
        so_far = totals.get(key)
        totals[key] = (
            kernel
            if so_far is None
            else kernel._replace(flops=so_far.flops + kernel.flops, num_bytes=so_far.num_bytes + kernel.num_bytes)
        )
    return list(totals.values())
