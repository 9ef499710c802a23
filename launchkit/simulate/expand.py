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
        self.sizes: dict[int, Sequence[int]] = {}
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
        live = self.live
        number = stage.layers[layer]
        for event, num_bytes in zip(self.program.sections[number].events, self._sizes(number), strict=True):
            if isinstance(event, Alloc):
                key = (index, layer, event.slot)
                if key in live or num_bytes < 0:
                    raise self._refused(key, num_bytes)
                made = live[key] = MemoryEvent(self.num_tensors, num_bytes, event.owner, index, event.stream, event.lag)
                self.num_tensors += 1
                if num_bytes:
                    found.append(made)
            elif isinstance(event, Free):
                key = self._resolve(event.ref, layer)
                freed = live.pop(key, None)
                if freed is None or freed.delta_bytes != num_bytes:
                    raise self._unfreed(key, freed, num_bytes, where=f"{stage.name}[{layer}]")
                if num_bytes:
                    found.append(MemoryEvent(freed.tensor, -num_bytes, freed.owner, index, freed.stream, freed.lag))
            else:
                found += self._free_all(event.owner, stage=index)
        return found

    def _sizes(self, number: int) -> Sequence[int]:
        """The size of each event of a section, worked out once for all its layers."""
        if number not in self.sizes:
            self.sizes[number] = [_event_bytes(event, self.point) for event in self.program.sections[number].events]
        return self.sizes[number]

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

    def _resolve(self, ref: TensorRef, layer: int) -> _Key:
        """What ``StepProgram.resolve`` says, with the stage as its index."""
        stage, anchor, distance, slot = ref
        index = self.indices.get(stage)
        if index is None:
            raise ProgramError(f"the program has no stage {stage!r}; trace the model again")
        if anchor is Anchor.RELATIVE:
            return index, layer + distance, slot
        if anchor is Anchor.FIRST:
            return index, distance, slot
        return index, len(self.program.stages[index].layers) - 1 - distance, slot

    def _name(self, key: _Key) -> str:
        stage, layer, slot = key
        return f"tensor {self.program.stages[stage].name}[{layer}].{slot}"


def _event_bytes(event: Event, point: Point) -> int:
    return 0 if isinstance(event, FreeAll) else event.size.at(point)


def _text(point: Point) -> str:
    return f"micro-batch {point.micro_batch} × {point.seq_len} tokens"
