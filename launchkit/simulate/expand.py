"""A step program written out at one point: every allocation and free of every layer, in order, as numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from launchkit.errors import ProgramError
from launchkit.program import Alloc, Anchor, Event, Free, FreeAll, Owner, Point, Stage, StepProgram, TensorRef

PERSISTENT_STAGE = -1  # the stage of what is there before the step begins


class MemoryEvent(NamedTuple):
    """Storage ``tensor`` comes into being (``delta_bytes`` > 0) or dies (< 0) in stage number ``stage``."""

    tensor: int
    delta_bytes: int
    owner: Owner
    stage: int


class _Key(NamedTuple):
    """The absolute name of a tensor: the stage's index, the layer, the slot."""

    stage: int
    layer: int
    slot: int


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
            self.live[_Key(PERSISTENT_STAGE, event.tensor, 0)] = event
            yield event
        self.num_tensors = len(self.live)
        for index, stage in enumerate(self.program.stages):
            for layer in stage.order():
                yield from self._layer(index, stage, layer)

    def _layer(self, index: int, stage: Stage, layer: int) -> Iterator[MemoryEvent]:
        number = stage.layers[layer]
        for event, num_bytes in zip(self.program.sections[number].events, self._sizes(number), strict=True):
            if isinstance(event, Alloc):
                allocated = self._allocate(_Key(index, layer, event.slot), num_bytes, event.owner)
                if num_bytes:
                    yield allocated
            elif isinstance(event, Free):
                freed = self._free(event.ref, num_bytes, stage=index, layer=layer)
                if num_bytes:
                    yield freed
            else:
                yield from self._free_all(event.owner, stage=index)

    def _sizes(self, number: int) -> Sequence[int]:
        """The size of each event of a section, worked out once for all its layers."""
        if number not in self.sizes:
            self.sizes[number] = [_event_bytes(event, self.point) for event in self.program.sections[number].events]
        return self.sizes[number]

    def _allocate(self, key: _Key, num_bytes: int, owner: Owner) -> MemoryEvent:
        if key in self.live:
            raise ProgramError(f"{self._name(key)} is allocated while it is live; trace the model again")
        if num_bytes < 0:
            raise ProgramError(f"{self._name(key)} has {num_bytes} bytes at {_text(self.point)}; trace the model again")
        event = MemoryEvent(self.num_tensors, num_bytes, owner, key.stage)
        self.num_tensors += 1
        self.live[key] = event
        return event

    def _free(self, ref: TensorRef, num_bytes: int, *, stage: int, layer: int) -> MemoryEvent:
        key = self._resolve(ref, layer)
        event = self.live.pop(key, None)
        if event is None:
            where = f"{self.program.stages[stage].name}[{layer}]"
            raise ProgramError(f"{where} frees {self._name(key)}, which is not live there; trace the model again")
        if event.delta_bytes != num_bytes:
            raise ProgramError(
                f"{self.program.stages[stage].name}[{layer}] frees {num_bytes} bytes of {self._name(key)}, which has "
                f"{event.delta_bytes} at {_text(self.point)}; trace the model again"
            )
        return MemoryEvent(event.tensor, -num_bytes, event.owner, stage)

    def _free_all(self, owner: Owner, *, stage: int) -> Iterator[MemoryEvent]:
        for key in [key for key, event in self.live.items() if event.owner is owner]:
            event = self.live.pop(key)
            if event.delta_bytes:
                yield MemoryEvent(event.tensor, -event.delta_bytes, owner, stage)

    def _resolve(self, ref: TensorRef, layer: int) -> _Key:
        """What ``StepProgram.resolve`` says, with the stage as its index."""
        index = self.indices.get(ref.stage)
        if index is None:
            raise ProgramError(f"the program has no stage {ref.stage!r}; trace the model again")
        if ref.anchor is Anchor.RELATIVE:
            return _Key(index, layer + ref.layer, ref.slot)
        if ref.anchor is Anchor.FIRST:
            return _Key(index, ref.layer, ref.slot)
        return _Key(index, len(self.program.stages[index].layers) - 1 - ref.layer, ref.slot)

    def _name(self, key: _Key) -> str:
        return f"tensor {self.program.stages[key.stage].name}[{key.layer}].{key.slot}"


def _event_bytes(event: Event, point: Point) -> int:
    return 0 if isinstance(event, FreeAll) else event.size.at(point)


def _text(point: Point) -> str:
    return f"micro-batch {point.micro_batch} × {point.seq_len} tokens"
