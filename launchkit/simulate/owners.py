"""Whose the live bytes are at the peak, without writing a program's layers out.

As in ``reading``: over a run of layers alike, what each owner's live bytes change by is the same in every layer, and
the peak lies in the first or the last of them. This one reads a single point, and splits it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from launchkit.errors import ProgramError
from launchkit.program import (
    Alloc,
    Anchor,
    Event,
    Free,
    FreeAll,
    Owner,
    Point,
    Section,
    Stage,
    StepProgram,
    TensorRef,
)
from launchkit.simulate.reading import Peak

OWNERS = tuple(Owner)
_OWNER_INDEX: Mapping[Owner, int] = {owner: index for index, owner in enumerate(OWNERS)}


class OwnerReading(NamedTuple):
    """The peak with its live bytes of each of ``OWNERS``, and all that is live when the step ends."""

    peak: Peak
    at_peak: tuple[int, ...]
    end_bytes: int


def read_owners(program: StepProgram, point: Point) -> OwnerReading:
    """The peak of ``program`` at ``point``, by owner. Equal to what the events of ``expand`` add up to.

    Omits: the checks of ``expand``.
    """
    return _Walk(program, point).run()


_Origin = tuple[str, Anchor, int]  # a ``TensorRef`` without its slot


class _Piece(NamedTuple):
    """A section's events up to a ``FreeAll`` or its end: bytes and owner of each, and what they come to."""

    deltas: list[int]
    owners: list[int]
    rise: int
    change: int
    changes: list[int]  # of each owner
    frees_all: int  # index of the owner; -1 at the end of the section

    def until_peak(self, start: Sequence[int]) -> tuple[int, ...]:
        """What is live of each owner at the piece's highest moment, from what is live before it."""
        live = list(start)
        levels = list(accumulate(self.deltas))
        for delta, owner in zip(self.deltas[: levels.index(max(levels)) + 1], self.owners, strict=False):
            live[owner] += delta
        return tuple(live)


class _Draft(NamedTuple):
    """A piece whose frees of other sections' tensors have no owner yet: ``elsewhere`` are their places among the
    deltas, with where each points to."""

    piece: _Piece
    elsewhere: list[tuple[int, TensorRef]]

    def owned(self, owners: Mapping[TensorRef, int]) -> _Piece:
        """The piece with the owner of every delta."""
        piece = self.piece
        if not self.elsewhere:
            return piece
        filled, changes = list(piece.owners), list(piece.changes)
        for place, ref in self.elsewhere:
            filled[place] = owner = owners[ref]
            changes[owner] += piece.deltas[place]
        return piece._replace(owners=filled, changes=changes)


def _draft(deltas: list[int], owners: list[int], elsewhere: list[tuple[int, TensorRef]], frees_all: int) -> _Draft:
    changes = [0] * len(OWNERS)
    for delta, owner in zip(deltas, owners, strict=True):
        if owner >= 0:
            changes[owner] += delta
    rise = max(0, max(accumulate(deltas), default=0))
    return _Draft(_Piece(deltas, owners, rise, sum(deltas), changes, frees_all), elsewhere)


class _Walk:
    """Goes through a program's stages with the live bytes of every owner."""

    def __init__(self, program: StepProgram, point: Point) -> None:
        self.program = program
        self.point = point
        self.stages = {stage.name: stage for stage in program.stages}
        self.slots = [_slots(section) for section in program.sections]
        self.origins = [_origins(section) for section in program.sections]
        self.drafts: dict[tuple[str, int], tuple[_Draft, ...]] = {}
        self.owned: dict[tuple[str, int, tuple[int, ...]], tuple[_Piece, ...]] = {}  # by the owners of what is freed
        self.templates: dict[tuple[str, int, tuple[int, ...]], tuple[_Piece, ...]] = {}  # by the sections it is from
        self.sizes: dict[int, int] = {}  # by identity, which is cheaper than the hash of a polynomial

    def run(self) -> OwnerReading:
        live = [0] * len(OWNERS)
        for size, owner, count in self.program.persistent:
            live[_OWNER_INDEX[owner]] += size.at(self.point) * count
        peak, at_peak = Peak(sum(live), ""), tuple(live)
        for stage in self.program.stages:
            for pieces, num_layers in self._runs(stage):
                for piece in pieces:
                    before = num_layers - 1 if piece.change > 0 else 0  # layers ahead of the one that peaks
                    high = sum(live) + piece.rise + before * piece.change
                    if high > peak.num_bytes:
                        base = [old + before * change for old, change in zip(live, piece.changes, strict=True)]
                        peak, at_peak = Peak(high, stage.name), piece.until_peak(base)
                    live = [old + num_layers * change for old, change in zip(live, piece.changes, strict=True)]
                    if piece.frees_all >= 0:
                        live[piece.frees_all] = 0
        return OwnerReading(peak, at_peak, sum(live))

    def _runs(self, stage: Stage) -> Iterator[tuple[tuple[_Piece, ...], int]]:
        """The layers in execution order, those alike together. A ``FreeAll`` makes one layer unlike the next."""
        pieces: tuple[_Piece, ...] = ()
        num_layers = 0
        for layer in stage.order():
            following = self._pieces(stage, layer)
            if following is pieces and len(pieces) == 1:
                num_layers += 1
                continue
            if num_layers:
                yield pieces, num_layers
            pieces, num_layers = following, 1
        if num_layers:
            yield pieces, num_layers

    def _pieces(self, stage: Stage, layer: int) -> tuple[_Piece, ...]:
        """A layer's pieces, worked out once for all layers of its section that free from like owners."""
        number = stage.layers[layer]
        key = (stage.name, number, tuple([self._source(origin, layer) for origin in self.origins[number]]))
        if key not in self.templates:
            self.templates[key] = self._owned(stage, number, dict(zip(self.origins[number], key[2], strict=True)))
        return self.templates[key]

    def _owned(self, stage: Stage, number: int, freed_from: Mapping[_Origin, int]) -> tuple[_Piece, ...]:
        if (stage.name, number) not in self.drafts:
            self.drafts[stage.name, number] = tuple(self._cut(stage, self.program.sections[number].events))
        drafts = self.drafts[stage.name, number]
        refs = [ref for draft in drafts for _, ref in draft.elsewhere]
        owners = {ref: self._owner(ref, freed_from[ref[:3]]) for ref in refs}
        known = (stage.name, number, tuple(owners.values()))
        if known not in self.owned:
            self.owned[known] = tuple([draft.owned(owners) for draft in drafts])
        return self.owned[known]

    def _cut(self, stage: Stage, events: Sequence[Event]) -> Iterator[_Draft]:
        deltas: list[int] = []
        owners: list[int] = []
        elsewhere: list[tuple[int, TensorRef]] = []
        here: dict[int, int] = {}  # a slot may have several owners within one section, one after the other
        own = (stage.name, Anchor.RELATIVE, 0)
        num_bytes = self._bytes_of(events)
        for event in events:
            if isinstance(event, Free):
                ref, size = event
                deltas.append(-num_bytes[id(size)])
                if ref[3] in here and ref[:3] == own:
                    owners.append(here.pop(ref[3]))
                else:
                    elsewhere.append((len(owners), ref))
                    owners.append(-1)
            elif isinstance(event, Alloc):
                slot, size, owner = event[:3]
                deltas.append(num_bytes[id(size)])
                owners.append(here.setdefault(slot, _OWNER_INDEX[owner]))
            else:
                yield _draft(deltas, owners, elsewhere, _OWNER_INDEX[event.owner])
                deltas, owners, elsewhere = [], [], []
        yield _draft(deltas, owners, elsewhere, -1)

    def _bytes_of(self, events: Sequence[Event]) -> Mapping[int, int]:
        """The bytes of every size in ``events``, each distinct one worked out once."""
        sizes = {id(event.size): event.size for event in events if not isinstance(event, FreeAll)}
        for key in sizes.keys() - self.sizes.keys():
            self.sizes[key] = sizes[key].at(self.point)
        return self.sizes

    def _owner(self, ref: TensorRef, source: int) -> int:
        owner = self.slots[source].get(ref.slot) if source >= 0 else None
        if owner is None:
            raise ProgramError(f"{ref.stage} has no slot {ref.slot} where it is freed; trace the model again")
        return owner

    def _source(self, origin: _Origin, layer: int) -> int:
        """The section that made what a layer frees; -1 where there is none."""
        name, anchor, distance = origin
        if name not in self.stages:
            return -1
        layers = self.stages[name].layers
        if anchor is Anchor.RELATIVE:
            distance += layer
        elif anchor is Anchor.LAST:
            distance = len(layers) - 1 - distance
        return layers[distance] if 0 <= distance < len(layers) else -1


def _slots(section: Section) -> Mapping[int, int]:
    """The owner of each slot at the section's end."""
    return {event.slot: _OWNER_INDEX[event.owner] for event in section.events if isinstance(event, Alloc)}


def _origins(section: Section) -> tuple[_Origin, ...]:
    """Where a section's frees point to, each place once."""
    return tuple({event.ref[:3]: None for event in section.events if isinstance(event, Free)})
