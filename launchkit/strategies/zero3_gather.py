"""Where in a step ZeRO-3's gathered weights come and go: the modules that each section runs, the replay of the
coordinator over them, and the events that it makes.

Source: DeepSpeed 0.19.8 ``deepspeed/runtime/zero/parameter_offload.py``, whose hooks run around every module.

- The order of modules is read off the gradients: a backward pass completes them in reverse. What has no gradient runs
  where its name stands.
- A backward pass lets a module's weights go when its gradients are complete. Inside a forward pass a program does not
  say where modules end, so the most that any of them sees is held throughout, except that the head's weight is let go
  behind the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from launchkit.program import Alloc, Event, Free, Owner, Phase, Section, Stage, Stream
from launchkit.scenario import Checkpointing, DeviceKind, Method, State
from launchkit.strategies.base import accumulates, is_gradient, next_slot
from launchkit.strategies.zero3_fetch import FetchSettings, ModuleUse, PlaceReading, replay
from launchkit.strategies.zero_job import REDUCE_STAGE, EventList, Job, ParameterKey, parameter_key

LOGITS = -1  # among the parameters that end a segment: the logits do


class Module(NamedTuple):
    """A module: its own weights as indices of the section's group, those that come and go, with their elements, and
    those that stay."""

    fetched: tuple[int, ...] = ()
    numels: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    kept_elements: int = 0


class Segment(NamedTuple):
    """A part of a section, in elements: held while it runs, at the most as it begins. It ends with the gradients of
    ``ends_with``, or with the section where there are none."""

    held: int
    peak: int
    ends_with: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What each (stage, layer) runs, and what it finds and holds gathered meanwhile."""

    readings: dict[int, PlaceReading]
    places: dict[tuple[str, int], int]
    modules: dict[tuple[str, int], tuple[Module, ...]]

    def at(self, stage: str, layer: int) -> PlaceReading:
        return self.readings[self.places[stage, layer]]

    @property
    def last(self) -> PlaceReading:
        """The last part of the backward pass."""
        return self.readings[max(self.readings)]

    def of(self, stage: Stage, layer: int, section: Section) -> PlaceReading:
        """``at``, as ``map_layers`` asks for it."""
        return self.at(stage.name, layer)


def has_recorded(job: Job) -> bool:
    """Whether an earlier pass has told the coordinator the order of modules; until then it keeps nothing gathered."""
    return job.scenario.state is State.STEADY or accumulates(job.scenario)


def is_persistent(job: Job, numel: int) -> bool:
    return numel <= job.settings.stage3_param_persistence_threshold


def gather_schedule(job: Job) -> Gathered:
    """Replays the coordinator over the step's modules, in the order in which they run."""
    weights: dict[ParameterKey, int] = {}
    numels: list[int] = []
    uses: list[ModuleUse] = []
    places: dict[tuple[str, int], int] = {}
    modules: dict[tuple[str, int], tuple[Module, ...]] = {}
    alike: dict[tuple[str, int], tuple[Module, ...]] = {}  # by stage and section
    entered: set[tuple[bool, str]] = set()
    for stage in job.program.stages:
        for layer in stage.order():
            place = places[stage.name, layer] = len(places)
            number = (stage.name, stage.layers[layer])
            if number not in alike:
                alike[number] = tuple(_modules(job, stage, layer, entered)) or (Module(),)
            modules[stage.name, layer] = alike[number]
            for module in alike[number]:
                if not module.fetched:
                    uses.append(ModuleUse(place, (), module.kept_elements))
                    continue
                fetched = []
                for index, numel in zip(module.fetched, module.numels, strict=True):
                    weight = weights.setdefault(parameter_key(stage, layer, index), len(numels))
                    if weight == len(numels):
                        numels.append(numel)
                    fetched.append(weight)
                uses.append(ModuleUse(place, tuple(fetched), module.kept_elements))
    if _requires_input_gradients(job):
        inputs = len(places)
        uses.extend([use._replace(place=inputs) for use in uses if use.place == 0])
        places[REDUCE_STAGE, 0] = inputs
    readings = replay(uses, numels, _fetch_settings(job), recorded=has_recorded(job))
    return Gathered(readings=readings, places=places, modules=modules)


def _requires_input_gradients(job: Job) -> bool:
    """Whether the embedding, frozen as it is, runs in the backward pass too: under checkpointing PEFT and transformers
    make its output require a gradient (``enable_input_require_grads``)."""
    training = job.scenario.training
    return training.method is not Method.FULL and training.checkpointing is not Checkpointing.NONE


def _fetch_settings(job: Job) -> FetchSettings:
    return FetchSettings(
        prefetch_elements=job.settings.stage3_prefetch_bucket_size,
        max_live_elements=job.settings.stage3_max_live_parameters,
        max_reuse_elements=job.settings.stage3_max_reuse_distance,
        world_size=job.num_shards,
        is_quantized=job.settings.zero_quantized_weights,
        itemsize=job.itemsize,
        copies=1 if job.device is DeviceKind.CPU else 0,  # gloo's own of the result
        from_host=job.scenario.strategy.offload.params and job.device is not DeviceKind.CPU,
    )


def _modules(job: Job, stage: Stage, layer: int, entered: set[tuple[bool, str]]) -> Iterator[Module]:
    """The modules that a layer's section runs, containers without weights of their own among them.

    A backward pass runs them in reverse, after a forward pass again where activations are checkpointed. Containers
    outside the stacks are entered once per pass, which ``entered`` remembers.
    """
    names = _ordered_names(job, stage, layer)
    is_backward = stage.phase is Phase.BACKWARD
    passes = [names[::-1] if is_backward else names]
    if is_backward and stage.stack and job.scenario.training.checkpointing is not Checkpointing.NONE:
        passes.insert(0, names)
    for order in passes:
        known = set() if stage.stack else entered
        for name, module in order:
            for container in _containers(name):
                if (is_backward, container) not in known:
                    known.add((is_backward, container))
                    yield Module()
            yield module


def _ordered_names(job: Job, stage: Stage, layer: int) -> list[tuple[str, Module]]:
    """Names and weights of the modules of a layer, in the order of its forward pass."""
    forward = _forward_section(job, stage, layer)
    parameters = job.program.groups[forward.group].parameters
    indices: dict[str, list[int]] = {}
    for index in forward.uses:
        indices.setdefault(parameters[index].name.rpartition(".")[0], []).append(index)
    ends = _gradient_places(job, stage, layer)
    behind, moments = float("inf"), {}
    for name in reversed(indices):
        known = [ends[index] for index in indices[name] if index in ends]
        behind = moments[name] = -max(known) if known else behind
    order = sorted(indices, key=lambda name: moments[name])
    numels = [parameter.numel(job.rank) for parameter in parameters]
    return [(name, _module(job, [(index, numels[index]) for index in indices[name]])) for name in order]


def _module(job: Job, weights: Sequence[tuple[int, int]]) -> Module:
    """In a job's first pass what is persistent comes and goes like the rest."""
    stays = dict(weight for weight in weights if has_recorded(job) and is_persistent(job, weight[1]))
    comes = dict(weight for weight in weights if weight[0] not in stays)
    return Module(tuple(comes), tuple(comes.values()), tuple(stays), sum(stays.values()))


def _forward_section(job: Job, stage: Stage, layer: int) -> Section:
    """The section whose weights a layer uses: the forward pass's, which names them."""
    name = stage.name.replace("backward", "forward", 1)
    forward = next((other for other in job.program.stages if other.name == name), stage)
    return job.program.section_of(forward, min(layer, len(forward.layers) - 1))


def _gradient_places(job: Job, stage: Stage, layer: int) -> dict[int, int]:
    """Where in its backward section each parameter's gradient is, by index."""
    name = stage.name.replace("forward", "backward", 1)
    backward = next((other for other in job.program.stages if other.name == name), None)
    if backward is None:
        return {}
    section = job.program.section_of(backward, min(layer, len(backward.layers) - 1))
    return {gradient.parameter: place for place, gradient in enumerate(section.gradients)}


def _containers(name: str) -> Iterator[str]:
    """The modules around the module ``name``, from the outermost: of ``mlp.up_proj``, the whole and ``mlp``."""
    parts = name.split(".") if name else []
    return (".".join(parts[:depth]) for depth in range(len(parts)))


def segments(stage: Stage, section: Section, modules: Sequence[Module], reading: PlaceReading) -> Iterator[Segment]:
    """The parts of a section between which gathered weights change."""
    seen = list(zip(modules, reading.modules, strict=True))
    last = reading.modules[-1].after
    before = reading.before
    if num_logits_events(stage, section.events):
        # The whole model's own hook prefetches ahead of the loss's backward pass, the head's behind it.
        ahead = seen if stage.phase is Phase.LOSS else list(takewhile(lambda pair: pair[0] == Module(), seen))
        held = [before, *(found.held for _, found in ahead)]
        yield Segment(max(held), max(held + [found.peak for _, found in ahead]), frozenset({LOGITS}))
        seen, before = seen[len(ahead) :], 0
    held_now = peak = before
    arriving = {gradient.parameter for gradient in section.gradients} if stage.phase is Phase.BACKWARD else set()
    for module, found in seen:
        held_now, peak = max(held_now, found.held), max(peak, found.peak)
        ends_with = arriving.intersection((*module.fetched, *module.kept))
        if ends_with:
            yield Segment(held_now, peak, frozenset(ends_with))
            held_now = peak = 0
    yield Segment(max(held_now, last), max(peak, last))


def num_logits_events(stage: Stage, events: Sequence[Event]) -> int:
    """Events up to the logits' end: of the loss stage those up to the first logits, of its backward pass those before
    the gradient of the head's input. Elsewhere none."""
    places = [place for place, event in enumerate(events) if isinstance(event, Alloc) and event.owner is Owner.LOGITS]
    if stage.stack or not places:
        return 0
    behind = places[0] + 1
    return behind if stage.phase is Phase.LOSS else behind + len(list(takewhile(_is_of_loss, events[behind:])))


def _is_of_loss(event: Event) -> bool:
    return not isinstance(event, Alloc) or (event.owner is Owner.LOGITS and not is_gradient(event))


class Level:
    """Gathered weights of a section in the making, as pieces of one size and a rest, so that a change of what is held
    leaves most of it where it is, as an allocator sees it when weights alike come and go."""

    def __init__(self, events: EventList, *, itemsize: int, piece_elements: int, stream: Stream) -> None:
        self._events = events
        self._stream = stream
        self._itemsize = itemsize
        self._piece = max(1, piece_elements)
        self._live: list[tuple[int, Free]] = []

    @property
    def elements(self) -> int:
        return sum(elements for elements, _ in self._live)

    def set(self, elements: int, *, peak: int = 0) -> None:
        """Changes what is held, with ``peak`` elements for a moment: beside the more of what was held and what will be,
        since what arrives comes in pieces too."""
        if elements < self.elements:
            self._pass(peak)
            self._change(elements)
        else:
            self._change(elements)
            self._pass(peak)

    def _pass(self, peak: int) -> None:
        num_bytes = max(0, peak - self.elements) * self._itemsize
        self._events.passing(num_bytes, Owner.GATHERED_WEIGHTS, stream=self._stream)

    def _change(self, elements: int) -> None:
        whole, rest = divmod(elements, self._piece)
        wanted = [self._piece] * whole + [rest] * bool(rest)
        same = len(list(takewhile(lambda pair: pair[0] == pair[1][0], zip(wanted, self._live, strict=False))))
        while len(self._live) > same:
            self._events.events.append(self._live.pop()[1])
        for size in wanted[same:]:
            free = self._events.alloc(size * self._itemsize, Owner.GATHERED_WEIGHTS, stream=self._stream)
            self._live.append((size, free))


class GatheredEvents:
    """A section's events in the making, with its gathered weights among them."""

    def __init__(
        self, job: Job, stage: Stage, section: Section, modules: Sequence[Module], reading: PlaceReading
    ) -> None:
        self.list = EventList(stage.name, slot=next_slot(section.events))
        self._level = Level(
            self.list,
            itemsize=job.itemsize,
            piece_elements=job.largest_block_weight,
            stream=job.gather_stream,
        )
        self._following = segments(stage, section, modules, reading)
        self._waiting: set[int] = set()
        self._num_logits_events = num_logits_events(stage, section.events)
        self._num_events = 0
        self._begin_next()

    def append(self, event: Event) -> None:
        """One of the section's own."""
        self.list.events.append(event)
        self._num_events += 1
        if self._num_events == self._num_logits_events:
            self.complete(LOGITS)

    def complete(self, parameter: int) -> None:
        """A gradient has come, and has been dealt with."""
        self._waiting.discard(parameter)
        if not self._waiting:
            self._begin_next()

    def end(self) -> tuple[Event, ...]:
        self._level.set(0)
        return tuple(self.list.events)

    def _begin_next(self) -> None:
        segment = next(self._following, None)
        if segment is not None:
            self._level.set(segment.held, peak=segment.peak)
            self._waiting = set(segment.ends_with)
