"""A model of glibc's malloc, from which a CPU build of torch takes its tensors: what of a process stays resident.

Source: glibc 2.36 ``malloc/malloc.c`` (``sysmalloc``, ``_int_malloc``, ``_int_free``, ``_int_memalign``, ``systrim``).

- A request of at least the mmap threshold that no free chunk holds is a mapping of its own, which a free gives back at
  once. The threshold begins at 128 KiB and rises to the size of every mapping that is freed, up to 32 MiB.
- Anything else is cut from the heap: the smallest free chunk that holds it, else the heap's top, which grows. Free
  neighbours merge.
- The heap shrinks only at its top, when twice the mmap threshold lies free there. What is free below stays resident.
- torch asks for addresses that are multiples of 64 (``c10/core/impl/alloc_cpu.cpp``). malloc looks for a chunk that
  much larger and frees what it cuts off at both ends. So a hole takes in no tensor of its own size until the cuttings
  beside it are free again.

The small objects that come with every tensor lie in such cuttings: here in those of the tensor before, for as long as
their own tensor lives. The real malloc, called so with two dozen small objects a tensor, holds as much to 0.3 %.

Omits: that glibc 2.38 and later look among chunks for one that is aligned already; threads' own arenas, of which a
training step on the CPU makes next to no use.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

from launchkit.units import KIB, MIB, round_up

PAGE_BYTES = 4 * KIB
FIRST_MMAP_THRESHOLD_BYTES = 128 * KIB
MOST_MMAP_THRESHOLD_BYTES = 32 * MIB
TOP_PAD_BYTES = 128 * KIB
LEAST_TRIMMED_FREE_BYTES = 64 * KIB  # a smaller free does not look at the top
HEADER_BYTES = 8  # of a chunk in use
UNIT_BYTES = 16
LEAST_CHUNK_BYTES = 32
ALIGNMENT_BYTES = 64


class _Chunk:
    """A range of the heap's addresses, linked to its neighbours."""

    __slots__ = ("address", "is_free", "lower", "size", "upper")

    def __init__(self, address: int, size: int, lower: _Chunk | None) -> None:
        self.address = address
        self.size = size
        self.lower = lower
        self.upper: _Chunk | None = None
        self.is_free = False


class _Live(NamedTuple):
    """A request: ``chunk`` where it lies in the heap, else the bytes of its mapping."""

    num_bytes: int
    chunk: _Chunk | None
    mapped_bytes: int


class Heap:
    """One process's heap and mappings, as an ``Allocator``; ``reserved`` is what stays resident, in bytes."""

    num_retries = 0

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.mmap_threshold_bytes = FIRST_MMAP_THRESHOLD_BYTES
        self._trim_threshold_bytes = FIRST_MMAP_THRESHOLD_BYTES
        self._mapped_bytes = 0
        self._end = 0  # of what the heap got from the kernel
        self._top = 0  # from here on it is free
        self._last: _Chunk | None = None
        self._free: list[tuple[int, int]] = []  # size and address
        self._at: dict[int, _Chunk] = {}  # by address
        self._live: dict[int, _Live] = {}
        self._cuttings: dict[int, list[_Chunk]] = {}  # by the handle whose small objects lie in them
        self._num_handles = 0

    @property
    def reserved_bytes(self) -> int:
        return self._end + self._mapped_bytes

    def malloc(self, num_bytes: int, stream: int = 0) -> int:
        self._num_handles += 1
        self._live[self._num_handles] = self._obtain(num_bytes)
        self.allocated_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return self._num_handles

    def free(self, handle: int, lag: int = 0) -> None:
        num_bytes, chunk, mapped_bytes = self._live.pop(handle)
        self.allocated_bytes -= num_bytes
        for cutting in self._cuttings.pop(handle, ()):
            self._release(cutting)
        if chunk is not None:
            self._trim(self._release(chunk))
            return
        self._mapped_bytes -= mapped_bytes
        if self.mmap_threshold_bytes < mapped_bytes <= MOST_MMAP_THRESHOLD_BYTES:
            self.mmap_threshold_bytes = mapped_bytes
            self._trim_threshold_bytes = 2 * mapped_bytes

    def begin_gather(self) -> None:
        """Nothing: the host has no streams."""

    def size_of(self, handle: int) -> int:
        return self._live[handle].num_bytes

    def _obtain(self, num_bytes: int) -> _Live:
        size = max(LEAST_CHUNK_BYTES, round_up(num_bytes + HEADER_BYTES, UNIT_BYTES))
        wanted = size + ALIGNMENT_BYTES + LEAST_CHUNK_BYTES + UNIT_BYTES
        chunk = self._best_fit(wanted)
        if chunk is None and self._end - self._top < wanted + LEAST_CHUNK_BYTES:
            if wanted >= self.mmap_threshold_bytes:
                mapped_bytes = round_up(wanted + UNIT_BYTES, PAGE_BYTES)
                self._mapped_bytes += mapped_bytes
                return _Live(num_bytes, None, mapped_bytes)
            self._end = round_up(self._top + wanted + TOP_PAD_BYTES + LEAST_CHUNK_BYTES, PAGE_BYTES)
        return _Live(num_bytes, self._aligned(chunk or self._from_top(wanted), size), 0)

    def _best_fit(self, wanted: int) -> _Chunk | None:
        place = bisect_left(self._free, (wanted, 0))
        if place == len(self._free):
            return None
        chunk = self._at[self._free.pop(place)[1]]
        chunk.is_free = False
        if chunk.size - wanted >= LEAST_CHUNK_BYTES:
            self._release(self._split(chunk, wanted))
        return chunk

    def _from_top(self, size: int) -> _Chunk:
        chunk = self._at[self._top] = _Chunk(self._top, size, self._last)
        if self._last is not None:
            self._last.upper = chunk
        self._last = chunk
        self._top += size
        return chunk

    def _aligned(self, chunk: _Chunk, size: int) -> _Chunk:
        """``size`` bytes of ``chunk`` at an aligned address; the rest goes to the next tensor's small objects."""
        before = -(chunk.address + UNIT_BYTES) % ALIGNMENT_BYTES
        if 0 < before < LEAST_CHUNK_BYTES:
            before += ALIGNMENT_BYTES
        cuttings = []
        if before:
            cuttings.append(chunk)
            chunk = self._split(chunk, before)
        if chunk.size - size >= LEAST_CHUNK_BYTES:
            cuttings.append(self._split(chunk, size))
        self._cuttings[self._num_handles + 1] = cuttings
        return chunk

    def _split(self, chunk: _Chunk, size: int) -> _Chunk:
        """Cut off all beyond ``size`` and return it."""
        rest = self._at[chunk.address + size] = _Chunk(chunk.address + size, chunk.size - size, chunk)
        rest.upper = chunk.upper
        self._link_back(rest)
        chunk.upper, chunk.size = rest, size
        return rest

    def _release(self, chunk: _Chunk) -> int:
        """Merge with what is free beside it. Returns the bytes that lie free there now."""
        if chunk.upper is not None and chunk.upper.is_free:
            self._unlist(chunk.upper)
            self._absorb_upper(chunk)
        if chunk.lower is not None and chunk.lower.is_free:
            chunk = chunk.lower
            self._unlist(chunk)
            self._absorb_upper(chunk)
        if chunk.upper is not None:
            chunk.is_free = True
            insort(self._free, (chunk.size, chunk.address))
            return chunk.size
        del self._at[chunk.address]
        self._last, self._top = chunk.lower, chunk.address
        if self._last is not None:
            self._last.upper = None
        return self._end - self._top

    def _trim(self, freed_bytes: int) -> None:
        if freed_bytes >= LEAST_TRIMMED_FREE_BYTES and self._end - self._top >= self._trim_threshold_bytes:
            self._end = round_up(self._top + TOP_PAD_BYTES, PAGE_BYTES)

    def _unlist(self, chunk: _Chunk) -> None:
        del self._free[bisect_left(self._free, (chunk.size, chunk.address))]

    def _absorb_upper(self, chunk: _Chunk) -> None:
        upper = chunk.upper
        assert upper is not None
        del self._at[upper.address]
        chunk.size += upper.size
        chunk.upper = upper.upper
        self._link_back(chunk)

    def _link_back(self, chunk: _Chunk) -> None:
        """Tell the neighbour above ``chunk``, or the heap, that it is the one below."""
        if chunk.upper is not None:
            chunk.upper.lower = chunk
        else:
            self._last = chunk
