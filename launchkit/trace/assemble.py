"""From the logs of one step at several points to a ``StepProgram`` of the whole model.

The logs must tell the same story at every point: the same allocations, frees and kernels in the same order.
Layers that were cut away get the section of a traced layer between the same neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from launchkit.errors import TraceError
from launchkit.program import (
    Alloc,
    Anchor,
    Collective,
    Copy,
    Event,
    Free,
    Group,
    Kernel,
    Moment,
    Owner,
    Parameter,
    ParameterGroup,
    Persistent,
    Phase,
    Point,
    Section,
    Size,
    Stage,
    StepProgram,
    TensorRef,
    Tiles,
)
from launchkit.trace.build import Stack, surroundings
from launchkit.trace.fit import Fitter
from launchkit.trace.heads import VOCABULARY_TILE
from launchkit.trace.kernels import SCALED_PRODUCT
from launchkit.trace.loops import fold, fold_kernels
from launchkit.trace.recorder import AllocRecord, KernelRecord, Log, Place


class UnlikeLayersError(TraceError):
    """Layers of one kind, between neighbours of one kind, that ask the allocator for different things."""


@dataclass(frozen=True, kw_only=True)
class TracedModel:
    """What assembling needs to know of the model: its stacks, and each parameter's group.

    ``owners`` maps a parameter's name to its group and its index there; ``group_of_layer`` maps a stack's path to the
    group of each of its full-depth layers.
    """

    stacks: tuple[Stack, ...]
    groups: Mapping[str, ParameterGroup]
    owners: Mapping[str, tuple[str, int]]
    parameter_names: tuple[str, ...]
    group_of_layer: Mapping[str, tuple[str, ...]]
    buffer_bytes: tuple[int, ...]
    vocab_size: int


@dataclass
class _Tensor:
    """A storage's life: where it was born, its slot there, its size, and what it is for."""

    place: Place
    slot: int
    size: Size
    op: str
    last_dim: int
    gradient_of: str | None
    freed_in: Place | None = None


@dataclass
class _Story:
    """The step at all points at once: tensors by number, and the events of each place in order."""

    tensors: dict[int, _Tensor] = field(default_factory=dict)
    events: dict[Place, list[tuple[bool, int]]] = field(default_factory=dict)  # (is_alloc, tensor number)
    order: list[str] = field(default_factory=list)


def assemble(model: TracedModel, logs: Sequence[Log], points: Sequence[Point]) -> StepProgram:
    """The program that explains ``logs``, seen at ``points`` (the last one is held back for checking)."""
    model = with_idle_layers_apart(model, logs[0])
    fitter = Fitter(points)
    numbered, kernels_seen = _told_alike(logs)
    story = _read(numbered, logs[0].gradients, fitter)
    kernels = _read_kernels(kernels_seen, fitter)
    builder = _Builder(model, story, kernels, _read_copies(logs, fitter), _read_collectives(logs, fitter), logs[0].uses)
    inputs = tuple(
        Persistent(fitter.fit([log.inputs[i] for log in logs], what="an input"), Owner.INPUTS)
        for i in range(len(logs[0].inputs))
    )
    buffers = tuple(Persistent(Size.constant(size), Owner.WEIGHTS) for size in model.buffer_bytes if size)
    counts: dict[str, int] = {name: 0 for name in model.groups}
    counts["root"] = 1
    for groups in model.group_of_layer.values():
        for name in groups:
            counts[name] += 1
    stages = builder.stages()
    return StepProgram(
        stages=stages,
        sections=tuple(builder.sections),
        groups=_with_gradients(model, logs[0]) if logs[0].gradients else model.groups,
        group_counts=counts,
        persistent=inputs + buffers,
        minimum_micro_batch=min(point.micro_batch for point in points),
    )


def with_idle_layers_apart(model: TracedModel, log: Log) -> TracedModel:
    """The model with a group of their own for trained layers whose weights no loss depends on, among others of their
    kind: what lies behind the layer of a vision tower whose output is read."""
    owners, groups, of_layer = dict(model.owners), dict(model.groups), dict(model.group_of_layer)
    used = {model.owners[name][0] for name in log.gradients.values()}
    for stack in model.stacks:
        substitutes = stand_ins(stack)
        for j, layer in enumerate(stack.kept):
            own = [name for name in owners if f".{stack.path}.{j}." in f".{name}"]
            group = model.group_of_layer[stack.path][layer]
            if group not in used or not own or not set(own).isdisjoint(log.gradients.values()):
                continue
            idle = f"{group}.idle"
            groups[idle] = replace(groups[group], name=idle)
            owners |= {name: (idle, model.owners[name][1]) for name in own}
            layers = zip(of_layer[stack.path], substitutes, strict=True)
            of_layer[stack.path] = tuple(idle if standing == j else name for name, standing in layers)
    return replace(model, groups=groups, owners=owners, group_of_layer=of_layer)


def _with_gradients(model: TracedModel, log: Log) -> dict[str, ParameterGroup]:
    """The model's groups, with those of their parameters marked that have no gradient in any traced layer, or one of
    more elements than their own."""
    found = {model.owners[name] for name in log.gradients.values()}
    wide = {model.owners[name]: numel for name, numel in log.wide_gradients.items()}
    return {
        name: replace(
            group,
            parameters=tuple(
                replace(
                    p,
                    has_gradient=(name, index) in found or not p.trainable,
                    gradient_numel=wide.get((name, index), 0),
                )
                for index, p in enumerate(group.parameters)
            ),
        )
        for name, group in model.groups.items()
    }


def _told_alike(logs: Sequence[Log]) -> tuple[list[_Numbered], list[list[KernelRecord]]]:
    """The stories and the kernels of all logs; where they differ, with the loops over the sequence folded."""
    stories = [_Numbered.of(log) for log in logs]
    kernels = [log.kernels for log in logs]
    if any(story.events != stories[0].events for story in stories):
        stories = [_Numbered(*fold(story.events, story.records)) for story in stories]
        kernels = [fold_kernels(log.kernels) for log in logs]
    return stories, kernels


def _first_difference(a: _Numbered, b: _Numbered) -> str:
    for (is_alloc, place, number), event in zip(a.events, b.events, strict=False):
        if (is_alloc, place, number) != event:
            what = "the output" if is_alloc else "the end of the output"
            return f"at {what} of {a.records[number].op} in {place.stage}"
    return "at its end"


def _read(stories: Sequence[_Numbered], gradients: Mapping[int, str], fitter: Fitter) -> _Story:
    first = stories[0]
    for other in stories[1:]:
        if other.events != first.events:
            raise TraceError(f"the step differs between batch sizes or lengths {_first_difference(first, other)}")
    story = _Story()
    slots: dict[Place, int] = {}
    for is_alloc, place, number in first.events:
        if place.stage not in story.order:
            story.order.append(place.stage)
        events = story.events.setdefault(place, [])
        if is_alloc:
            record = first.records[number]
            slots[place] = slots.get(place, -1) + 1
            story.tensors[number] = _Tensor(
                place=place,
                slot=slots[place],
                size=_size([s.records[number] for s in stories], fitter),
                op=record.op,
                last_dim=record.last_dim,
                gradient_of=gradients.get(record.storage),
            )
        else:
            story.tensors[number].freed_in = place
        events.append((is_alloc, number))
    return story


def _size(records: Sequence[AllocRecord], fitter: Fitter) -> Size:
    """What fits the bytes at all points: a polynomial, or one of the rows that a loop cuts into tiles."""
    what = f"the output of {records[0].op} in {records[0].place.stage}"
    tiles = [record.tile for record in records if record.tile]
    per_row = {record.num_bytes / tile.rows for record, tile in zip(records, tiles, strict=False)}
    if len(tiles) < len(records) or len(per_row) != 1:
        return fitter.fit([record.num_bytes for record in records], what=what)
    num_rows = fitter.fit([tile.num_rows for tile in tiles], what=f"the rows of {what}")
    return Size(num_rows.terms, tiles=Tiles(int(per_row.pop()), tiles[0].most, tiles[0].parts))


@dataclass
class _Numbered:
    """One log with its storages numbered in order of birth, so that logs can be compared.

    Deaths with no birth between are put in that order too: autocast's cache, for one, lets go of its weights in the
    order of a hash table. What was there before the step (a cache renewed in it, say) is left out.
    """

    events: list[tuple[bool, Place, int]]
    records: list[AllocRecord]

    @classmethod
    def of(cls, log: Log) -> _Numbered:
        events: list[tuple[bool, Place, int]] = []
        records: list[AllocRecord] = []
        numbers: dict[int, int] = {}
        deaths: list[tuple[Place, int]] = []

        def flush() -> None:
            events.extend((False, place, number) for place, number in sorted(deaths, key=lambda d: d[1]))
            deaths.clear()

        for record in log.memory:
            if isinstance(record, AllocRecord):
                flush()
                numbers[record.storage] = len(records)
                events.append((True, record.place, len(records)))
                records.append(record)
                continue
            if deaths and deaths[-1][0] != record.place:
                flush()
            if record.storage in numbers:
                deaths.append((record.place, numbers[record.storage]))
        flush()
        return cls(events, records)


def _read_kernels(logs: Sequence[Sequence[KernelRecord]], fitter: Fitter) -> dict[Place, tuple[Kernel, ...]]:
    counted: dict[Place, dict[tuple[Size, Size, bool, bool], int]] = {}
    if len({len(records) for records in logs}) > 1:
        raise TraceError("the number of kernels differs between batch sizes or lengths")
    for records in zip(*logs, strict=True):
        first = records[0]
        if any(r.op != first.op or r.place != first.place for r in records):
            raise TraceError(f"the kernels differ between batch sizes or lengths in {first.place.stage}")
        flops = fitter.fit([r.flops for r in records], what=f"the FLOPs of {first.op}")
        moved = fitter.fit_traffic([r.num_bytes for r in records])
        key = (flops, moved, bool(flops.terms), first.op == SCALED_PRODUCT)
        place = counted.setdefault(first.place, {})
        place[key] = place.get(key, 0) + 1
    return {place: tuple(Kernel(count, *kind) for kind, count in kernels.items()) for place, kernels in counted.items()}


def _read_copies(logs: Sequence[Log], fitter: Fitter) -> dict[Place, tuple[Copy, ...]]:
    """Copies over the host link. They run on the stream that computes, so all later work waits for them."""
    if len({tuple((copy.place, copy.to_device) for copy in log.copies) for log in logs}) > 1:
        raise TraceError("the copies to and from the host differ between batch sizes or lengths")
    copies: dict[Place, tuple[Copy, ...]] = {}
    for records in zip(*(log.copies for log in logs), strict=True):
        first = records[0]
        size = fitter.fit([record.num_bytes for record in records], what="a copy to or from the host")
        copies[first.place] = (*copies.get(first.place, ()), Copy(first.to_device, size, Moment.BLOCKING))
    return copies


def _read_collectives(logs: Sequence[Log], fitter: Fitter) -> dict[Place, tuple[Collective, ...]]:
    """Messages among the ranks that share the step. What follows works on what they bring."""
    if len({tuple((record.place, record.kind) for record in log.collectives) for log in logs}) > 1:
        raise TraceError("the messages between ranks differ between batch sizes or lengths")
    found: dict[Place, tuple[Collective, ...]] = {}
    for records in zip(*(log.collectives for log in logs), strict=True):
        first = records[0]
        size = fitter.fit([record.num_bytes for record in records], what="a message between ranks")
        message = Collective(first.kind, size, Moment.BLOCKING, Group.COPY)
        found[first.place] = (*found.get(first.place, ()), message)
    return found


class _Builder:
    """Turns the story into sections and stages."""

    def __init__(
        self,
        model: TracedModel,
        story: _Story,
        kernels: Mapping[Place, tuple[Kernel, ...]],
        copies: Mapping[Place, tuple[Copy, ...]],
        collectives: Mapping[Place, tuple[Collective, ...]],
        uses: Mapping[Place, set[int]],
    ) -> None:
        self.model = model
        self.story = story
        self.kernels = kernels
        self.copies = copies
        self.collectives = collectives
        self.uses = uses
        self.stacks = {stack.path: stack for stack in model.stacks}
        self.last_stage = next(name for name in reversed(story.order) if name != "end")
        self.sections: list[Section] = []
        self._numbers: dict[Section, int] = {}
        self._dying: dict[Place, Mapping[tuple[str, int], set[int]]] = {}

    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stage(name) for name in self.story.order if name != "end")

    def _stage(self, name: str) -> Stage:
        direction, _, path = name.partition(".")
        stack = self.stacks.get(path)
        if stack is None:
            last_forward = max((s for s in self.story.order if s.startswith("forward.")), key=self.story.order.index)
            phase = Phase.BACKWARD if direction == "backward" else Phase.LOSS if name == last_forward else Phase.FORWARD
            return Stage(name=name, phase=phase, layers=(self._number(self._section(name, 0, "root")),))
        groups = self.model.group_of_layer[path]
        traced = [self._section(name, j, groups[layer]) for j, layer in enumerate(stack.kept)]
        layers = tuple(self._number(traced[j]) for j in stand_ins(stack))
        self._check_stand_ins(name, stack, traced)
        return Stage(name=name, phase=Phase(direction), layers=layers, stack=path, reverse=direction == "backward")

    def _check_stand_ins(self, name: str, stack: Stack, traced: Sequence[Section]) -> None:
        """Two traced layers between equal neighbours must have come out equal, or depth cannot be left out."""
        if len(stack.kinds) == len(stack.kept):
            return
        seen: dict[tuple[object, ...], int] = {}
        for j, case in _inner(stack).items():
            twin = seen.setdefault(case, j)
            if traced[twin] != traced[j]:
                raise UnlikeLayersError(
                    f"layers {stack.kept[twin]} and {stack.kept[j]} of {name} are alike but differ in a step"
                )

    def _number(self, section: Section) -> int:
        number = self._numbers.get(section)
        if number is None:
            number = self._numbers[section] = len(self.sections)
            self.sections.append(section)
        return number

    def _section(self, name: str, layer: int, group: str) -> Section:
        place = Place(name, layer)
        events: list[Event] = []
        for is_alloc, number in self.story.events.get(place, ()):
            tensor = self.story.tensors[number]
            if not tensor.size.terms:
                continue
            if is_alloc:
                events.append(Alloc(tensor.slot, tensor.size, self._owner(tensor), self._gradient_index(tensor, group)))
            elif tensor.gradient_of is None:
                events.extend(Free(ref, tensor.size) for ref in self._refs(tensor, place))
        if name == self.last_stage:
            events.extend(self._leftovers(place))
        names = self.model.parameter_names
        used = sorted(
            index for owner, index in (self.model.owners[names[i]] for i in self.uses.get(place, ())) if owner == group
        )
        return Section(
            events=tuple(events),
            group=group,
            uses=tuple(used),
            kernels=self.kernels.get(place, ()),
            collectives=self.collectives.get(place, ()),
            copies=self.copies.get(place, ()),
        )

    def _leftovers(self, place: Place) -> list[Event]:
        """What only the garbage collector frees goes with the end of the backward pass."""
        return [
            Free(ref, tensor.size)
            for is_alloc, number in self.story.events.get(Place("end", 0), ())
            if not is_alloc
            for tensor in (self.story.tensors[number],)
            if tensor.gradient_of is None and tensor.size.terms and tensor.place.stage != "end"
            for ref in self._refs(tensor, place)
        ]

    def _gradient_index(self, tensor: _Tensor, group: str) -> int:
        if tensor.gradient_of is None:
            return -1
        owner, index = self.model.owners[tensor.gradient_of]
        return index if owner == group else -1

    def _owner(self, tensor: _Tensor) -> Owner:
        if tensor.gradient_of is not None:
            return Owner.GRADIENTS
        backward = tensor.place.stage.startswith("backward")
        single = tensor.place.stage.partition(".")[2] not in self.stacks
        if single and self.model.vocab_size and tensor.last_dim in (self.model.vocab_size, VOCABULARY_TILE):
            return Owner.LOGITS
        if backward or tensor.freed_in == tensor.place:
            return Owner.TEMPORARIES
        return Owner.ACTIVATIONS

    def _refs(self, tensor: _Tensor, freed: Place) -> list[TensorRef]:
        """What one death in the trace stands for: itself, or that of the same tensor in every layer like its own.

        Autocast's copies of the weights of all layers, for one, die together when the forward pass leaves it.
        """
        born = tensor.place
        stack = self.stacks.get(born.stage.partition(".")[2])
        if stack is None or freed.stage.partition(".")[2] == stack.path or len(stack.kinds) == len(stack.kept):
            return [self._ref(born, tensor.slot, freed)]
        substitutes = stand_ins(stack)
        stood_for = [layer for layer, j in enumerate(substitutes) if j == born.layer]
        twin = self._twin(stack, born, tensor.slot, freed)
        if twin is not None and twin != born.layer:
            return []  # spoken for by the layer that stands in for this one
        if twin is None or len(stood_for) == 1:
            return [self._ref(born, tensor.slot, freed)]
        return [TensorRef(born.stage, Anchor.FIRST, layer, tensor.slot) for layer in stood_for]

    def _twin(self, stack: Stack, born: Place, slot: int, freed: Place) -> int | None:
        """The first traced layer of the same surroundings, if the same slot of all of them dies in ``freed``."""
        cases = _inner(stack)
        if born.layer not in cases:
            return born.layer
        alike = [j for j, case in cases.items() if case == cases[born.layer]]
        dying = self._layers_dying(freed).get((born.stage, slot), set())
        return alike[0] if dying.issuperset(alike) else None

    def _layers_dying(self, freed: Place) -> Mapping[tuple[str, int], set[int]]:
        """The traced layers of which each slot dies in ``freed`` or at the step's end, by stage and slot."""
        if freed not in self._dying:
            dying: dict[tuple[str, int], set[int]] = {}
            for is_alloc, number in (*self.story.events.get(freed, ()), *self.story.events.get(Place("end", 0), ())):
                if not is_alloc:
                    tensor = self.story.tensors[number]
                    dying.setdefault((tensor.place.stage, tensor.slot), set()).add(tensor.place.layer)
            self._dying[freed] = dying
        return self._dying[freed]

    def _ref(self, born: Place, slot: int, freed: Place) -> TensorRef:
        stack = self.stacks.get(born.stage.partition(".")[2])
        if stack is None:
            return TensorRef(born.stage, Anchor.RELATIVE if born == freed else Anchor.FIRST, 0, slot)
        same_stack = freed.stage.partition(".")[2] == stack.path
        if same_stack and abs(born.layer - freed.layer) <= 1:
            return TensorRef(born.stage, Anchor.RELATIVE, born.layer - freed.layer, slot)
        if born.layer <= 1 or len(set(stack.kinds)) > 1:
            return TensorRef(born.stage, Anchor.FIRST, stack.kept[born.layer], slot)
        return TensorRef(born.stage, Anchor.LAST, len(stack.kept) - 1 - born.layer, slot)


def stand_ins(stack: Stack) -> tuple[int, ...]:
    """For each full-depth layer the index, among the kept ones, of the layer that stands for it."""
    kept, kinds = stack.kept, stack.kinds
    if len(kinds) == len(kept):
        return tuple(range(len(kept)))
    if len(set(kinds)) == 1:
        return (0, *[1] * (len(kinds) - 2), len(kept) - 1)
    cases = surroundings(kinds)
    return tuple(kept.index(cases.index(case)) for case in cases)


def _inner(stack: Stack) -> dict[int, tuple[object, ...]]:
    """The surroundings of those kept layers that were traced in their own, by index among the kept."""
    cases, traced = surroundings(stack.kinds), surroundings([stack.kinds[i] for i in stack.kept])
    return {j: cases[i] for j, i in enumerate(stack.kept[1:-1], start=1) if traced[j] == cases[i]}


def parameter(name: str, shape: Sequence[int], itemsize: int, *, trainable: bool, lora_rank: int) -> Parameter:
    """A parameter's row; an adapter's dimension that goes with the LoRA rank is given for rank 1.

    PEFT's A matrices have the rank first, its B matrices second: of fused experts, times how many there are.
    """
    dims, axis = list(shape), None
    if lora_rank and (matrix := re.search(r"\blora_(?:embedding_)?([AB])\b", name)):
        axis = "AB".index(matrix[1])
        dims[axis] //= lora_rank
    return Parameter(name=name, shape=tuple(dims), itemsize=itemsize, trainable=trainable, lora_rank_axis=axis)
