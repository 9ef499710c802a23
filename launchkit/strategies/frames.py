"""How an engine that works unit by unit adds to a step: by frames around the traced sections.

A *visit* is one unit's way through the step: the places where its forward and its backward begin and end. A *frame* is
what the engine does at one place, before and behind what was traced there. An engine's rewriter walks the visits in the
order in which the engine meets them, fills frames, and assembles the program; layers whose section and frame are alike
share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

from launchkit.program import (
    Alloc,
    Anchor,
    Collective,
    Copy,
    Event,
    Free,
    Kernel,
    Owner,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    Stream,
    TensorRef,
)
from launchkit.strategies.base import ROOT_GROUP, compact, next_slot

_Unit = TypeVar("_Unit")

ACCUMULATED = "accumulated"


class Place(NamedTuple):
    stage: str
    layer: int


class Live(NamedTuple):
    """A storage of the rewrite's own that is to be freed later."""

    place: Place
    slot: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Visit(Generic[_Unit]):
    """A unit and where its forward and its backward begin and end."""

    unit: _Unit
    forward_begin: Place
    forward_end: Place
    backward_begin: Place
    backward_end: Place

    @classmethod
    def at(cls, unit: _Unit, forward: Place, backward: Place) -> Visit[_Unit]:
        """A unit that begins and ends within one section."""
        return cls(
            unit=unit,
            forward_begin=forward,
            forward_end=forward,
            backward_begin=backward,
            backward_end=backward,
        )


@dataclass
class Frame:
    """What the rewrite adds to one section: events before, after its last logits, and behind; and what the clock
    needs."""

    before: list[Event] = field(default_factory=list)
    after_logits: list[Event] = field(default_factory=list)
    behind: list[Event] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    @property
    def key(self) -> tuple[object, ...]:
        return (
            tuple(self.before),
            tuple(self.after_logits),
            tuple(self.behind),
            tuple(self.kernels),
            tuple(self.collectives),
            tuple(self.copies),
        )

    def around(self, section: Section) -> Section:
        """``section`` with the frame in place."""
        events = list(section.events)
        if self.after_logits:
            position = _after_logits(events)
            events[position:position] = self.after_logits
        return replace(
            section,
            events=(*self.before, *events, *self.behind),
            kernels=(*section.kernels, *self.kernels),
            collectives=(*section.collectives, *self.collectives),
            copies=(*section.copies, *self.copies),
        )


class FramedProgram:
    """A traced program with the frames and accumulated gradients that a rewrite has noted for it so far."""

    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self.frames: dict[Place, Frame] = {}
        self.accumulated: dict[Place, list[Alloc]] = {}
        self.first_slot = max((next_slot(section.events) for section in program.sections), default=0)
        self.forward = [stage for stage in program.stages if stage.phase in (Phase.FORWARD, Phase.LOSS)]
        self.backward = [stage for stage in program.stages if stage.phase is Phase.BACKWARD]

    @property
    def forward_begin(self) -> Place:
        return Place(self.forward[0].name, 0)

    @property
    def forward_end(self) -> Place:
        return Place(self.forward[-1].name, 0)

    @property
    def backward_begin(self) -> Place:
        return Place(self.backward[0].name, 0)

    @property
    def backward_end(self) -> Place:
        return Place(self.backward[-1].name, 0)

    def layers(self) -> Iterator[tuple[str, Place, Place]]:
        """The parameter group of each layer of each stack, in the order in which their forward ends, with the places of
        its forward and its backward."""
        for stage in self.forward:
            for layer in stage.order() if stage.stack else ():
                group = self.program.section_of(stage, layer).group
                yield group, Place(stage.name, layer), Place(f"backward.{stage.stack}", layer)

    def gradients(self, group: str, end: Place) -> Iterator[tuple[Place, Alloc]]:
        """The gradients of a group of parameters whose backward ends at ``end``, with the places where they arise."""
        is_root = group == ROOT_GROUP
        for stage in self.backward:
            if bool(stage.stack) == is_root or not (is_root or stage.name == end.stage):
                continue
            place = Place(stage.name, end.layer)
            for event in self.program.section_of(stage, place.layer).gradients:
                yield place, event

    def frame(self, place: Place) -> Frame:
        return self.frames.setdefault(place, Frame())

    def alloc(
        self,
        place: Place,
        slot: int,
        num_bytes: int,
        events: list[Event],
        owner: Owner = Owner.COMMUNICATION,
        *,
        stream: Stream = Stream.COMPUTE,
        lag: int = 0,
    ) -> Live:
        """Notes a storage in a slot that is counted from the first one the trace leaves free."""
        size = Size.constant(num_bytes)
        events.append(Alloc(self.first_slot + slot, size, owner, stream=stream, lag=lag))
        return Live(place, self.first_slot + slot, num_bytes)

    def free(self, live: Live, place: Place) -> Free:
        return Free(self.ref(live, place), Size.constant(live.num_bytes))

    def ref(self, live: Live, place: Place) -> TensorRef:
        """``live`` as a section at ``place`` names it: by distance along the same stack, so that layers share it."""
        born = live.place
        if born.stage.partition(".")[2] == place.stage.partition(".")[2]:
            return TensorRef(born.stage, Anchor.RELATIVE, born.layer - place.layer, live.slot)
        return TensorRef(born.stage, Anchor.FIRST, born.layer, live.slot)

    def pile(self, group: str, forward_begin: Place) -> Place:
        """Where the accumulated gradients of a unit that begins at ``forward_begin`` are said to come into being."""
        stack = ROOT_GROUP if group == ROOT_GROUP else forward_begin.stage.partition(".")[2]
        return Place(f"{ACCUMULATED}.{stack}", forward_begin.layer)

    def assemble(self) -> StepProgram:
        """The program with every frame in place; layers whose section and frame are alike share a section."""
        sections: list[Section] = []
        numbers: dict[tuple[object, ...], int] = {}
        stages = [*self._pile_stages(sections)]
        for stage in self.program.stages:
            layers = []
            for layer, original in enumerate(stage.layers):
                frame = self.frames.get(Place(stage.name, layer), Frame())
                key = (original, frame.key)
                if key not in numbers:
                    numbers[key] = len(sections)
                    sections.append(frame.around(self.program.sections[original]))
                layers.append(numbers[key])
            stages.append(replace(stage, layers=tuple(layers)))
        return compact(replace(self.program, stages=tuple(stages), sections=tuple(sections)))

    def _pile_stages(self, sections: list[Section]) -> Iterator[Stage]:
        names = dict.fromkeys(place.stage for place in self.accumulated)
        for name in names:
            layers = []
            for place in sorted(place for place in self.accumulated if place.stage == name):
                layers.append(len(sections))
                sections.append(Section(events=tuple(self.accumulated[place])))
            stack = name.partition(".")[2]
            yield Stage(
                name=name, phase=Phase.FORWARD, layers=tuple(layers), stack="" if stack == ROOT_GROUP else stack
            )


def _after_logits(events: Sequence[Event]) -> int:
    """The position at which the head's backward begins: after the gradient of its output, and what died with it."""
    position = 1 + max(
        (i for i, e in enumerate(events) if isinstance(e, Alloc) and e.owner is Owner.LOGITS), default=-1
    )
    while position < len(events) and isinstance(events[position], Free):
        position += 1
    return position
