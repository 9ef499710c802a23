"""How weights come onto the device before training: what the allocator has cached when the first step begins.

An engine that shards what it loads leaves free blocks behind: of whole weights, and of buffers that they were sent in.
Small tensors of the step find room there, large ones do not.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

from launchkit.program import Arrival, Owner, StepProgram
from launchkit.simulate.allocator import Allocator
from launchkit.simulate.expand import MemoryEvent

SENT_AT_A_TIME = 2  # buffers of a broadcast. Source: torch ``broadcast_coalesced`` (``max_in_flight``)


def load(
    allocator: Allocator, handles: dict[int, int], storages: Sequence[MemoryEvent], arrivals: Sequence[Arrival]
) -> None:
    """Allocate the persistent ``storages``, the weights first, those of ``arrivals`` as these tell, and enter them in
    ``handles``."""
    weights = [storage for storage in storages if storage.owner is Owner.WEIGHTS]
    kept = _kept(weights, arrivals)
    arriving = {storage.tensor for storage in kept if storage}
    loading = _Loading(allocator, handles)
    loading.keep(*(storage for storage in weights if storage.tensor not in arriving))
    loading.run(arrivals, kept)
    loading.keep(*(storage for storage in storages if storage.owner is not Owner.WEIGHTS))


def left_by_loading(program: StepProgram) -> int:
    """Bytes of weights that were whole on every device before they were sharded, and lie free in the cache since."""
    return sum(sum(arrival.pieces) - arrival.kept for arrival in program.arrivals if arrival.waits)


def _kept(weights: Iterable[MemoryEvent], arrivals: Iterable[Arrival]) -> list[MemoryEvent | None]:
    """The storage that each arrival leaves: the next one of its size, where there is one."""
    by_size: dict[int, deque[MemoryEvent]] = defaultdict(deque)
    for storage in weights:
        by_size[storage.delta_bytes].append(storage)
    return [by_size[arrival.kept].popleft() if by_size[arrival.kept] else None for arrival in arrivals]


class _Loading:
    """Loads into ``allocator``. ``handles`` are those of the storages that stay."""

    def __init__(self, allocator: Allocator, handles: dict[int, int]) -> None:
        self.allocator = allocator
        self.handles = handles

    def keep(self, *storages: MemoryEvent) -> None:
        for storage in storages:
            self.handles[storage.tensor] = self.allocator.malloc(storage.delta_bytes, storage.stream)

    def run(self, arrivals: Sequence[Arrival], kept: Iterable[MemoryEvent | None]) -> None:
        waiting = [self._malloc(*arrival.pieces) if arrival.waits else [] for arrival in arrivals]
        lingering: list[int] = []
        narrow: list[tuple[int, MemoryEvent]] = []
        for arrival, storage, there in zip(arrivals, kept, waiting, strict=True):
            pieces = there or self._malloc(*arrival.pieces)
            self._free(*lingering)
            self._pass(arrival.passing)
            joined = self._malloc(arrival.joined) if arrival.joined else []
            if storage and arrival.narrow:
                narrow += [(handle, storage) for handle in self._malloc(arrival.narrow)]
            elif storage:
                self.keep(storage)
            self._free(*joined)
            lingering = pieces if arrival.lingers else []
            self._free(*([] if arrival.lingers else pieces))
        self._free(*lingering)
        for handle, storage in narrow:
            self.keep(storage)
            self._free(handle)

    def _pass(self, sizes: Iterable[int]) -> None:
        sent: deque[int] = deque()
        for size in sizes:
            if len(sent) == SENT_AT_A_TIME:
                self._free(sent.popleft())
            sent += self._malloc(size)
        self._free(*sent)

    def _malloc(self, *sizes: int) -> list[int]:
        return [self.allocator.malloc(size) for size in sizes]

    def _free(self, *handles: int) -> None:
        for handle in handles:
            self.allocator.free(handle)
