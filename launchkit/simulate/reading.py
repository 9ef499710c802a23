"""The cheap reading of a step program: the peak of its live bytes, without writing its layers out.

What a section adds to the live bytes, and how far it rises above its start, do not depend on the layer that runs it.
So over a run of ``n`` equal layers that starts at ``L`` live bytes, with a rise ``h`` and a net change ``d`` per layer,

    peak = L + h + max(0, (n - 1) × d)        end = L + n × d

and a program is read in the time of its templates, whatever its depth. The one event that looks at the state, the
freeing of all of an owner, makes that owner's live bytes a second such sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from launchkit.errors import ProgramError
from launchkit.program import Alloc, Anchor, Free, FreeAll, Owner, Point, Size, StepProgram, TensorRef, Tiles
from launchkit.units import round_up


class Peak(NamedTuple):
    """The highest live bytes of a step and the stage that first reaches them; no stage if it is the step's start."""

    num_bytes: int
    stage: str


class _Piece(NamedTuple):
    """A section's events up to a ``FreeAll`` or its end, as indices into the signed sizes of a point.

    ``tracked`` holds the events that concern each owner of which some ``FreeAll`` disposes.
    """

    deltas: tuple[int, ...]
    tracked: tuple[tuple[int, ...], ...]
    frees_all: int  # index of the owner, in the order of ``tracked``; -1 at the end of the section


class _Reading(NamedTuple):
    """A piece at one point, in bytes."""

    rise: int
    change: int
    tracked_changes: tuple[int, ...]
    frees_all: int


class _Run(NamedTuple):
    stage: str
    template: int
    num_layers: int


class _Polynomial(NamedTuple):
    """A ``Size`` over the program's table of monomials."""

    terms: tuple[tuple[int, int], ...]  # coefficient, index of the monomial
    denominator: int
    tiles: Tiles | None


@dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """A program prepared for many points; made by ``compile_program``."""

    monomials: tuple[tuple[int, int, int], ...]
    simple_sizes: tuple[tuple[int, int], ...]  # coefficient and monomial of the sizes with one term
    other_sizes: tuple[_Polynomial, ...]
    templates: tuple[tuple[_Piece, ...], ...]
    runs: tuple[_Run, ...]
    persistent: tuple[tuple[int, int, int], ...]  # size, number of storages, index of the tracked owner or -1
    num_tracked: int

    def peak(self, point: Point, *, granularity_bytes: int = 1) -> Peak:
        """The peak of the live bytes at ``point``, each storage rounded up to ``granularity_bytes``.

        Equal to what the events of ``expand`` add up to. A few hundredths of a percent below what the CUDA allocator
        would report with 512: it leaves out the remainders that are too small to split off.
        """
        sizes = self._sizes(point, granularity_bytes)
        signed = [*sizes, *[-size for size in sizes]]
        templates = [[_read(piece, signed) for piece in pieces] for pieces in self.templates]
        tracked = [0] * self.num_tracked
        live = 0
        for size, count, owner in self.persistent:
            live += sizes[size] * count
            if owner >= 0:
                tracked[owner] += sizes[size] * count
        peak = Peak(live, "")
        for stage, template, num_layers in self.runs:
            high, live = _walk(templates[template], num_layers, live, tracked)
            if high > peak.num_bytes:
                peak = Peak(high, stage)
        return peak

    def _sizes(self, point: Point, granularity_bytes: int) -> list[int]:
        batch, length, rank = point
        monomials = [batch**i * length**j * rank**k for i, j, k in self.monomials]
        sizes = [coefficient * monomials[index] for coefficient, index in self.simple_sizes]
        for terms, denominator, tiles in self.other_sizes:
            total = sum([coefficient * monomials[index] for coefficient, index in terms])
            sizes.append(tiles.row_bytes * tiles.rows(total) if tiles else -(-total // denominator))
        if granularity_bytes > 1:
            return [round_up(size, granularity_bytes) for size in sizes]
        return sizes


def _read(piece: _Piece, signed: Sequence[int]) -> _Reading:
    levels = list(accumulate([signed[index] for index in piece.deltas]))
    changes = tuple([sum([signed[index] for index in deltas]) for deltas in piece.tracked])
    if not levels:
        return _Reading(0, 0, changes, piece.frees_all)
    return _Reading(max(0, max(levels)), levels[-1], changes, piece.frees_all)


def _walk(template: list[_Reading], num_layers: int, live: int, tracked: list[int]) -> tuple[int, int]:
    """The highest live bytes over a run of equal layers, and those at its end. Brings ``tracked`` up to date."""
    if len(template) == 1:
        rise, change, tracked_changes, _ = template[0]
        for owner, tracked_change in enumerate(tracked_changes):
            tracked[owner] += tracked_change * num_layers
        return live + rise + max(0, (num_layers - 1) * change), live + num_layers * change
    high = live
    for _ in range(num_layers):
        for rise, change, tracked_changes, frees_all in template:
            high, live = max(high, live + rise), live + change
            for owner, tracked_change in enumerate(tracked_changes):
                tracked[owner] += tracked_change
            if frees_all >= 0:
                live, tracked[frees_all] = live - tracked[frees_all], 0
    return high, live


def compile_program(program: StepProgram) -> CompiledProgram:
    """Prepare ``program`` for reading at many points. What it refers to is checked by ``expand``, not here."""
    return _Compiler(program).compile()


class _Compiler:
    """Gathers the distinct sizes and templates of a program."""

    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self.stages = {stage.name: stage for stage in program.stages}
        events = [event for section in program.sections for event in section.events]
        self.tracked = sorted({event.owner for event in events if isinstance(event, FreeAll)})
        self.slots: dict[int, Mapping[int, Owner]] = {}  # by section: the owner of each slot
        self.frees: dict[int, tuple[TensorRef, ...]] = {}  # by section: what it frees of tracked slots
        self.tracked_slots = self._find_tracked_slots()
        sizes = [persistent.size for persistent in program.persistent]
        sizes += [event.size for event in events if not isinstance(event, FreeAll)]
        objects = {id(size): size for size in sizes}  # a program has few; hashing the polynomial of each event is slow
        distinct = dict.fromkeys(objects.values())
        simple = [size for size in distinct if len(size.terms) == 1 and size.denominator == 1 and not size.tiles]
        self.other = [size for size in distinct if len(size.terms) != 1 or size.denominator != 1 or size.tiles]
        self.simple = simple
        indices = {size: index for index, size in enumerate([*simple, *self.other])}
        self.indices = {key: indices[size] for key, size in objects.items()}
        self.num_sizes = len(indices)

    def compile(self) -> CompiledProgram:
        powers = dict.fromkeys(term[1:] for size in (*self.simple, *self.other) for term in size.terms)
        monomials = {key: index for index, key in enumerate(powers)}
        templates: dict[tuple[int, tuple[int, ...]], int] = {}
        runs = tuple(self._runs(templates))
        return CompiledProgram(
            monomials=tuple(monomials),
            simple_sizes=tuple((size.terms[0].coefficient, monomials[size.terms[0][1:]]) for size in self.simple),
            other_sizes=tuple(_polynomial(size, monomials) for size in self.other),
            templates=tuple(tuple(self._pieces(*key)) for key in templates),
            runs=runs,
            persistent=tuple(
                (self.indices[id(size)], count, self._tracked_index(owner))
                for size, owner, count in self.program.persistent
            ),
            num_tracked=len(self.tracked),
        )

    def _runs(self, templates: dict[tuple[int, tuple[int, ...]], int]) -> Iterator[_Run]:
        """Each stage as runs of equal layers in execution order; fills ``templates`` with what they run."""
        for stage in self.program.stages:
            run: _Run | None = None
            for layer in stage.order():
                number = stage.layers[layer]
                key = (number, tuple([self._owner_index(ref, layer) for ref in self._tracked_frees(number)]))
                template = templates.setdefault(key, len(templates))
                if run is not None and run.template == template:
                    run = run._replace(num_layers=run.num_layers + 1)
                    continue
                if run is not None:
                    yield run
                run = _Run(stage.name, template, 1)
            if run is not None:
                yield run

    def _pieces(self, number: int, owners: tuple[int, ...]) -> Iterator[_Piece]:
        """Section ``number`` with ``owners`` for those of its frees that may concern a tracked owner."""
        freed = iter(owners)
        num_sizes = self.num_sizes
        tracked_index = {owner: index for index, owner in enumerate(self.tracked)}
        deltas: list[int] = []
        tracked: list[list[int]] = [[] for _ in self.tracked]
        for event in self.program.sections[number].events:
            if isinstance(event, FreeAll):
                yield _Piece(tuple(deltas), tuple(map(tuple, tracked)), self._tracked_index(event.owner))
                deltas, tracked = [], [[] for _ in self.tracked]
                continue
            delta, owner = self.indices[id(event.size)], -1
            if isinstance(event, Alloc):
                owner = tracked_index.get(event.owner, -1)
            else:
                delta += num_sizes
                if owners and (event.ref.stage, event.ref.slot) in self.tracked_slots:
                    owner = next(freed)
            deltas.append(delta)
            if owner >= 0:
                tracked[owner].append(delta)
        yield _Piece(tuple(deltas), tuple(map(tuple, tracked)), -1)

    def _find_tracked_slots(self) -> frozenset[tuple[str, int]]:
        """The ``(stage, slot)`` that hold a tracked owner's tensor in some layer; few, and none without ``FreeAll``."""
        tracked = set(self.tracked)
        for number, section in enumerate(self.program.sections if tracked else ()):
            self.slots[number] = {event.slot: event.owner for event in section.events if isinstance(event, Alloc)}
        return frozenset(
            (stage.name, slot)
            for stage in self.program.stages
            for number in set(stage.layers)
            for slot, owner in self.slots.get(number, {}).items()
            if owner in tracked
        )

    def _tracked_frees(self, number: int) -> tuple[TensorRef, ...]:
        if number not in self.frees:
            events = self.program.sections[number].events if self.tracked_slots else ()
            refs = [event.ref for event in events if isinstance(event, Free)]
            self.frees[number] = tuple([ref for ref in refs if (ref.stage, ref.slot) in self.tracked_slots])
        return self.frees[number]

    def _owner_index(self, ref: TensorRef, layer: int) -> int:
        """The tracked owner of what ``ref`` means in ``layer``; -1 for another owner's."""
        layers = self.stages[ref.stage].layers
        absolute = ref.layer
        if ref.anchor is Anchor.RELATIVE:
            absolute += layer
        elif ref.anchor is Anchor.LAST:
            absolute = len(layers) - 1 - absolute
        owner = self.slots[layers[absolute]].get(ref.slot) if 0 <= absolute < len(layers) else None
        if owner is None:
            raise ProgramError(f"no layer {absolute} of {ref.stage} has a slot {ref.slot}; trace the model again")
        return self._tracked_index(owner)

    def _tracked_index(self, owner: Owner) -> int:
        return self.tracked.index(owner) if owner in self.tracked else -1


def _polynomial(size: Size, monomials: Mapping[tuple[int, int, int], int]) -> _Polynomial:
    terms = tuple((term.coefficient, monomials[term[1:]]) for term in size.terms)
    return _Polynomial(terms, size.denominator, size.tiles)
