"""When ZeRO-3 gathers and releases weights: DeepSpeed's parameter coordinator, replayed over the modules of a step.

Source: DeepSpeed 0.19.8 ``deepspeed/runtime/zero/partitioned_param_coordinator.py`` (``fetch_sub_module``,
``release_sub_module``, ``__params_to_release``) and ``partition_parameters.py`` (``AllGatherCoalescedHandle``).

- A module gathers its own weights, then prefetches those of the modules to come, in the order of a recorded step, until
  ``stage3_prefetch_bucket_size`` elements are on their way or ``stage3_max_live_parameters`` are there.
- Weights gathered together arrive in one flat buffer; when the first of them is needed all are copied out, and the
  buffer lives until the last of them has been needed.
- A module's weights are released behind it unless they are needed again within ``stage3_max_reuse_distance`` elements.
- In a job's first step there is no recorded order: no prefetch, and every module releases its weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from launchkit.units import divide_up


class ModuleUse(NamedTuple):
    """A module that runs, in the forward or backward pass: which part of the step it belongs to, and its weights.

    ``place`` is any name of that part; weights are numbers that mean the same weight wherever they occur. ``kept``
    are elements of its weights that stay gathered for good. A module without weights prefetches like any other.
    """

    place: int
    weights: tuple[int, ...]
    kept: int = 0


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    prefetch_elements: int
    max_live_elements: int
    max_reuse_elements: int
    world_size: int
    itemsize: int = 1
    is_quantized: bool = False  # gathered as bytes, and cast when they are needed
    copies: int = 0  # that the backend makes of what it gathers, while it does
    from_host: bool = False  # parts are copied to the device before they are gathered


class ModuleReading(NamedTuple):
    """Elements in memory for a module: at the most while its weights arrive, while it computes, and behind it."""

    peak: int
    held: int
    after: int


class PlaceReading(NamedTuple):
    """A part of the step, in elements: what it finds gathered, what each of its modules sees, what it fetches."""

    before: int = 0
    modules: tuple[ModuleReading, ...] = ()
    fetched: int = 0


@dataclass
class _Gather:
    """Weights on their way together. ``waiting`` are those that no module has needed yet."""

    weights: tuple[int, ...]
    flat: int
    waiting: set[int]
    arrived: bool = False


@dataclass
class _State:
    """What is gathered, what is under way, and how far the recorded order has been prefetched."""

    available: dict[int, int] = field(default_factory=dict)  # weight -> elements of its storage
    inflight: dict[int, _Gather] = field(default_factory=dict)
    fetched_for: dict[int, int] = field(default_factory=dict)  # weight -> the last use that a fetch has covered
    live: int = 0  # elements that are here or under way, as the coordinator counts them
    held: int = 0  # elements in memory: copies and flat buffers
    peak: int = 0  # the most of ``held`` since the module's fetch began
    fetched: int = 0


def replay(
    uses: Sequence[ModuleUse], numels: Sequence[int], settings: FetchSettings, *, recorded: bool
) -> dict[int, PlaceReading]:
    """The reading of each place. ``numels[w]`` are the elements of weight ``w``; weights that stay gathered for good
    are not to be listed among a module's."""
    return _Replay(uses, numels, settings, recorded=recorded).run()


class _Replay:
    def __init__(
        self, uses: Sequence[ModuleUse], numels: Sequence[int], settings: FetchSettings, *, recorded: bool
    ) -> None:
        self.uses = uses
        self.numels = numels
        self.settings = settings
        self.recorded = recorded
        self.state = _State()
        self.traversed = [0]  # elements of all modules before each step
        self.uses_of: dict[int, list[int]] = {}
        order: list[tuple[int, int]] = []
        elements = 0
        for step, (_, weights, kept) in enumerate(uses):
            elements += kept
            for weight in weights:
                elements += numels[weight]
                order.append((weight, step))
                self.uses_of.setdefault(weight, []).append(step)
            self.traversed.append(elements)
        self.queue = deque(order if recorded else ())

    def run(self) -> dict[int, PlaceReading]:
        state = self.state
        places: dict[int, tuple[int, list[ModuleReading]]] = {}  # what each finds gathered, what its modules see
        fetched: dict[int, int] = {}
        still = ModuleReading(0, 0, 0)
        for step, use in enumerate(self.uses):
            place, weights, _ = use
            if place not in places:
                places[place] = (state.held, [])
                fetched[place] = 0
            modules = places[place][1]
            if not weights and not self._may_prefetch():
                if still.after != state.held:
                    still = ModuleReading(state.held, state.held, state.held)
                modules.append(still)
                continue
            before = state.fetched
            self._fetch(step, use)
            held = state.held
            self._release(step, use)
            modules.append(ModuleReading(state.peak, held, state.held))
            fetched[place] += state.fetched - before
        return {place: PlaceReading(held, tuple(seen), fetched[place]) for place, (held, seen) in places.items()}

    def _may_prefetch(self) -> bool:
        """Whether anything is left to be prefetched, and there is room."""
        return bool(self.queue) and self.state.live < self.settings.max_live_elements

    def _fetch(self, step: int, use: ModuleUse) -> None:
        """Gathers what the module needs, waits for it, prefetches."""
        self.state.peak = self.state.held
        self._gather([weight for weight in use.weights if not self._is_here(weight)])
        for weight in use.weights:
            self._wait(weight)
        if self.recorded:
            self._advance_queue(step, use)
            self._gather(self._to_prefetch())

    def _is_here(self, weight: int) -> bool:
        return weight in self.state.available or weight in self.state.inflight

    def _gather(self, weights: list[int]) -> None:
        """Starts one all-gather. A single weight is gathered in place, several into a flat buffer, and so are bytes."""
        if not weights:
            return
        world_size = self.settings.world_size
        elements = sum(divide_up(self.numels[weight], world_size) * world_size for weight in weights)
        if self.settings.is_quantized:
            elements = divide_up(elements, self.settings.itemsize)
        gather = _Gather(tuple(weights), elements, set(weights), arrived=self._lies_in_place(weights))
        self.state.held += elements
        passing = elements * self.settings.copies + (elements // world_size if self.settings.from_host else 0)
        self.state.peak = max(self.state.peak, self.state.held + passing)
        self.state.fetched += elements
        self.state.live += sum(self.numels[weight] for weight in weights)
        for weight in weights:
            self.state.inflight[weight] = gather

    def _lies_in_place(self, weights: Sequence[int]) -> bool:
        """Whether what is gathered is the weight itself, not a buffer that it is copied out of."""
        return len(weights) == 1 and not self.settings.is_quantized

    def _wait(self, weight: int) -> None:
        gather = self.state.inflight.pop(weight, None)
        if gather is None:
            return
        is_alone = self._lies_in_place(gather.weights)
        if not gather.arrived:
            self.state.held += sum(self.numels[other] for other in gather.weights)
            self.state.peak = max(self.state.peak, self.state.held)
            gather.arrived = True
        self.state.available[weight] = gather.flat if is_alone else self.numels[weight]
        gather.waiting.discard(weight)
        if not gather.waiting and not is_alone:
            self.state.held -= gather.flat

    def _advance_queue(self, step: int, use: ModuleUse) -> None:
        """Takes the module's own weights off the queue, unless an earlier prefetch did."""
        missing = {weight for weight in use.weights if self.state.fetched_for.get(weight, -1) < step}
        while self.queue and missing:
            weight, at = self.queue.popleft()
            self.state.fetched_for[weight] = at
            missing.discard(weight)

    def _to_prefetch(self) -> list[int]:
        room = min(self.settings.max_live_elements - self.state.live, self.settings.prefetch_elements)
        chosen: dict[int, None] = {}
        elements = 0
        while self.queue and elements < room:
            weight, at = self.queue.popleft()
            self.state.fetched_for[weight] = max(self.state.fetched_for.get(weight, -1), at)
            if weight not in chosen and not self._is_here(weight):
                chosen[weight] = None
                elements += self.numels[weight]
        return list(chosen)

    def _release(self, step: int, use: ModuleUse) -> None:
        for weight in use.weights:
            if weight in self.state.available and not (self.recorded and self._is_kept(weight, step)):
                self.state.held -= self.state.available.pop(weight)
                self.state.live -= self.numels[weight]

    def _is_kept(self, weight: int, step: int) -> bool:
        """Whether a prefetch has skipped over a later use, or the next use is near."""
        if self.state.fetched_for.get(weight, -1) > step:
            return True
        later = next((at for at in self.uses_of[weight] if at > step), None)
        if later is None:
            return False
        return self.traversed[later] - self.traversed[step + 1] < self.settings.max_reuse_elements
