"""A step program written out at one point: every allocation and free of every layer, in order, as numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from launchkit.errors import ProgramError
from launchkit.program import Alloc, Anchor, Event, Free, FreeAll, Owner, Point, Stage, StepProgram, TensorRef

PERSISTENT_STAGE = -1  # the stage of what is there before the step begins


class MemoryEvent(NamedTuple):
    """Storage ``tensor`` comes into being (``delta_bytes`` > 0) or dies (< 0) in stage number ``stage``; ``stream`` and
    ``lag`` are its own (see ``Alloc``) at both."""

    tensor: int
    delta_bytes: int
    owner: Owner
    stage: int
    stream: int = 0
    lag: int = 0


_Key = tuple[int, int, int]  # the absolute name of a tensor: the stage's index, the layer, the slot


class _Passing(NamedTuple):
    """Birth or death of a storage that no other section sees; ``number`` counts the section's storages."""

    number: int
    delta_bytes: int
    owner: Owner
    stream: int
    lag: int


class _Birth(NamedTuple):
    """Birth of a storage that outlives the section."""

    number: int
    num_bytes: int
    owner: Owner
    stream: int
    lag: int
    slot: int


class _Death(NamedTuple):
    """Death of a storage that another section, or another layer, made: ``layer`` counts from the one that runs, or
    from the first."""

    num_bytes: int
    stage: int
    layer: int
    is_relative: bool
    slot: int


_Item = _Passing | _Birth | _Death | FreeAll


def expand(program: StepProgram, point: Point) -> Iterator[MemoryEvent]:
    """The persistent storages, then one step's events. Empty storages take no memory and are left out.

    Raises ``ProgramError`` where the program contradicts itself: a free of what is not live, a free of another size
    than its allocation's, a slot taken twice, a negative size.
    """
    return _Expansion(program, point).events()


def persistent_events(program: StepProgram, point: Point) -> Iterator[MemoryEvent]:
    """What is there before the step begins, one event per storage."""
    tensor = 0
    for size, owner, count in program.persistent:
        num_bytes = size.at(point)
        if num_bytes < 0:
            raise ProgramError(f"a persistent storage of {num_bytes} bytes at {_text(point)}; trace the model again")
        for _ in range(count if num_bytes else 0):
            yield MemoryEvent(tensor, num_bytes, owner, PERSISTENT_STAGE)
            tensor += 1


class _Expansion:
    """The state of one walk through a program."""

    def __init__(self, program: StepProgram, point: Point) -> None:
        self.program = program
        self.point = point
        self.indices = {stage.name: index for index, stage in enumerate(program.stages)}
        if len(self.indices) != len(program.stages):
            raise ProgramError("two stages of the program share a name; trace the model again")
        self.live: dict[_Key, MemoryEvent] = {}
        self.scripts: dict[tuple[int, int], tuple[list[_Item], int]] = {}  # by stage and section
        self.num_tensors = 0

    def events(self) -> Iterator[MemoryEvent]:
        for event in persistent_events(self.program, self.point):
            self.live[PERSISTENT_STAGE, event.tensor, 0] = event
            yield event
        self.num_tensors = len(self.live)
        for index, stage in enumerate(self.program.stages):
            for layer in stage.order():
                yield from self._layer(index, stage, layer)

    def _layer(self, index: int, stage: Stage, layer: int) -> list[MemoryEvent]:
        """One layer's events. The loop is written out: a long step has a hundred thousand of them."""
        found: list[MemoryEvent] = []
        live, first, new = self.live, self.num_tensors, tuple.__new__
        script, num_births = self._script(index, stage.layers[layer])
        for item in script:
            if isinstance(item, _Passing):
                number, num_bytes, owner, stream, lag = item
                found.append(new(MemoryEvent, (first + number, num_bytes, owner, index, stream, lag)))
            elif isinstance(item, _Birth):
                number, num_bytes, owner, stream, lag, slot = item
                key = (index, layer, slot)
                if key in live or num_bytes < 0:
                    raise self._refused(key, num_bytes)
                made = live[key] = MemoryEvent(first + number, num_bytes, owner, index, stream, lag)
                if num_bytes:
                    found.append(made)
            elif isinstance(item, _Death):
                num_bytes, source, distance, is_relative, slot = item
                key = (source, layer + distance if is_relative else distance, slot)
                freed = live.pop(key, None)
                if freed is None or freed.delta_bytes != num_bytes:
                    raise self._unfreed(key, freed, num_bytes, where=f"{stage.name}[{layer}]")
                if num_bytes:
                    found.append(freed._replace(delta_bytes=-num_bytes, stage=index))
            else:
                found += self._free_all(item.owner, stage=index)
        self.num_tensors += num_births
        return found

    def _script(self, index: int, number: int) -> tuple[list[_Item], int]:
        """Section ``number`` as stage ``index`` runs it, and how many storages it makes: worked out once for all
        layers, with what is born and dies within it told apart."""
        if (index, number) not in self.scripts:
            events = self.program.sections[number].events
            sizes = [_event_bytes(event, self.point) for event in events]
            births = dict(_own_pairs(self.program.stages[index].name, events, sizes))  # by the place of the death
            passing = {*births, *births.values()}
            numbers: dict[int, int] = {}  # of storages, by the place of their birth
            script: list[_Item] = []
            for place, (event, num_bytes) in enumerate(zip(events, sizes, strict=True)):
                if isinstance(event, Alloc):
                    numbers[place] = len(numbers)
                    made = (numbers[place], num_bytes, event.owner, event.stream, event.lag)
                    script.append(_Passing(*made) if place in passing else _Birth(*made, event.slot))
                elif isinstance(event, FreeAll):
                    script.append(event)
                elif place in births:
                    birth = events[births[place]]
                    assert isinstance(birth, Alloc)
                    script.append(_Passing(numbers[births[place]], -num_bytes, birth.owner, birth.stream, birth.lag))
                else:
                    script.append(self._death(event.ref, num_bytes))
            self.scripts[index, number] = script, len(numbers)
        return self.scripts[index, number]

    def _refused(self, key: _Key, num_bytes: int) -> ProgramError:
        """Why a storage cannot come into being."""
        if key in self.live:
            return ProgramError(f"{self._name(key)} is allocated while it is live; trace the model again")
        return ProgramError(f"{self._name(key)} has {num_bytes} bytes at {_text(self.point)}; plan a longer sequence")

    def _unfreed(self, key: _Key, found: MemoryEvent | None, num_bytes: int, *, where: str) -> ProgramError:
        """Why a storage cannot die."""
        if found is None:
            return ProgramError(f"{where} frees {self._name(key)}, which is not live there; trace the model again")
        return ProgramError(
            f"{where} frees {num_bytes} bytes of {self._name(key)}, which has {found.delta_bytes} at "
            f"{_text(self.point)}; trace the model again"
        )

    def _free_all(self, owner: Owner, *, stage: int) -> Iterator[MemoryEvent]:
        for key in [key for key, event in self.live.items() if event.owner is owner]:
            event = self.live.pop(key)
            if event.delta_bytes:
                yield event._replace(delta_bytes=-event.delta_bytes, stage=stage)

    def _death(self, ref: TensorRef, num_bytes: int) -> _Death:
        """What ``StepProgram.resolve`` says, for every layer."""
        stage, anchor, distance, slot = ref
        index = self.indices.get(stage)
        if index is None:
            raise ProgramError(f"the program has no stage {stage!r}; trace the model again")
        if anchor is Anchor.LAST:
            distance = len(self.program.stages[index].layers) - 1 - distance
        return _Death(num_bytes, index, distance, anchor is Anchor.RELATIVE, slot)

    def _name(self, key: _Key) -> str:
        stage, layer, slot = key
        return f"tensor {self.program.stages[stage].name}[{layer}].{slot}"


def _own_pairs(stage: str, events: Sequence[Event], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Deaths and births, by their places, of the storages that a section of ``stage`` makes and frees itself: nothing
    can go wrong with them in one layer that does not in all. None where all of an owner is freed on the way."""
    if any(isinstance(event, FreeAll) for event in events):
        return
    open_slots: dict[int, int] = {}
    for place, event in enumerate(events):
        if isinstance(event, Alloc):
            if event.slot in open_slots:
                return  # taken twice: an error, which the walk finds
            open_slots[event.slot] = place
        elif isinstance(event, Free) and event.ref[:3] == (stage, Anchor.RELATIVE, 0):
            birth = open_slots.pop(event.ref.slot, None)
            if birth is not None and sizes[birth] == sizes[place] > 0:
                yield place, birth


def _event_bytes(event: Event, point: Point) -> int:
    return 0 if isinstance(event, FreeAll) else event.size.at(point)


def _text(point: Point) -> str:
    return f"micro-batch {point.micro_batch} × {point.seq_len} tokens"
