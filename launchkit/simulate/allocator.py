"""PyTorch's CUDA caching allocator as a model: the same blocks and segments from the same requests.

Source: pytorch ``c10/cuda/CUDACachingAllocator.cpp`` and ``c10/core/AllocatorConfig.cpp``. Streams are kept apart as
there, and a block that a second stream still uses (``record_stream``) waits. Omits: private pools of CUDA graphs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from launchkit.alloc_conf import LARGE_SEGMENT_BYTES, MIN_BLOCK_BYTES, AllocatorSettings, round_block
from launchkit.errors import OutOfMemoryError, ProgramError
from launchkit.units import GIB, MIB, gib, round_up

SMALL_BYTES = MIB  # a request of at most this is small
SMALL_SEGMENT_BYTES = 2 * MIB
MIN_LARGE_BYTES = 10 * MIB  # a large request below this comes from a 20 MiB segment
LARGE_ROUNDING_BYTES = 2 * MIB
DEFAULT_ADDRESS_SPACE_BYTES = 1024 * GIB  # of an expandable segment where no capacity is given

_ADDRESS_BITS = 64


class Segment(NamedTuple):
    """One piece of device memory obtained from the driver, and its blocks as ``(offset, size, allocated)``."""

    num_bytes: int
    stream: int
    blocks: tuple[tuple[int, int, bool], ...]


class _Block:
    """A range of addresses, allocated, free or (in an expandable segment) not mapped; linked to its neighbours."""

    __slots__ = ("address", "allocated", "born", "expandable", "mapped", "next", "pool", "previous", "size")

    def __init__(self, address: int, size: int, pool: _Pool, expandable: bool = False) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.expandable = expandable
        self.mapped = True
        self.allocated = False
        self.born = 0
        self.previous: _Block | None = None
        self.next: _Block | None = None

    @property
    def is_whole_segment(self) -> bool:
        return self.previous is None and self.next is None

    @property
    def age(self) -> int:
        """Searches of the pool since this block came to lie in it."""
        return self.pool.num_searches - self.born

    def split(self, size: int) -> _Block:
        """Cut off all beyond ``size`` and return it. The lower part stays this object, here and in ``absorb``, so
        that a segment is known by its first block."""
        rest = _Block(self.address + size, self.size - size, self.pool, self.expandable)
        rest.mapped = self.mapped
        rest.previous, rest.next = self, self.next
        if self.next is not None:
            self.next.previous = rest
        self.next, self.size = rest, size
        return rest

    def absorb(self, upper: _Block) -> None:
        """Take in the neighbour above."""
        self.size += upper.size
        self.next = upper.next
        if upper.next is not None:
            upper.next.previous = self


class _Pool:
    """The free blocks of one stream and size class, ordered by (size, address)."""

    __slots__ = ("blocks", "is_small", "keys", "num_searches", "stream", "unmapped")

    def __init__(self, *, stream: int, is_small: bool) -> None:
        self.stream = stream
        self.is_small = is_small
        self.keys: list[int] = []
        self.blocks: dict[int, _Block] = {}
        self.unmapped: dict[int, _Block] = {}  # by address
        self.num_searches = 0  # the clock by which the garbage collection tells a block's age

    @property
    def segment_bytes(self) -> int:
        """The unit in which an expandable segment grows."""
        return SMALL_SEGMENT_BYTES if self.is_small else LARGE_SEGMENT_BYTES

    def add(self, block: _Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.blocks[key] = block
        block.born = self.num_searches

    def remove(self, block: _Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]

    def discard(self, block: _Block) -> None:
        """Take out a block, mapped or not."""
        if block.mapped:
            self.remove(block)
        else:
            del self.unmapped[block.address]

    def first_at_least(self, size: int) -> int:
        """The index of the smallest free block of at least ``size``; ``len(self.keys)`` if there is none."""
        return bisect_left(self.keys, size << _ADDRESS_BITS)

    def at(self, index: int) -> _Block:
        return self.blocks[self.keys[index]]


class Allocator(Protocol):
    """What a step's allocations and frees are replayed on: torch's on a GPU, glibc's on the host."""

    allocated_bytes: int
    peak_reserved_bytes: int
    num_retries: int

    def malloc(self, num_bytes: int, stream: int = 0) -> int: ...

    def free(self, handle: int, lag: int = 0) -> None: ...

    def begin_gather(self) -> None: ...

    def size_of(self, handle: int) -> int: ...


class CachingAllocator:
    """The allocator of one device. A handle is a positive integer, valid until freed; 0 stands for an empty request.

    ``allocated_bytes`` is what ``torch.cuda.memory_allocated`` counts: whole blocks, with the remainder that was too
    small to split off. ``reserved_bytes`` is the segments, as ``torch.cuda.memory_reserved``.
    """

    def __init__(self, *, settings: AllocatorSettings | None = None, capacity_bytes: int | None = None) -> None:
        self.settings = settings or AllocatorSettings()
        self.capacity_bytes = capacity_bytes
        self._round = self.settings.round if self.settings.roundup_power2_divisions else round_block
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.num_retries = 0
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._segments: dict[int, _Block] = {}  # first block by address
        self._live: dict[int, _Block] = {}
        self._lagging: list[tuple[int, _Block]] = []  # the gather at which it is handed out again, the block
        self._num_gathers = 0
        self._num_handles = 0
        self._next_address = LARGE_SEGMENT_BYTES
        self._takes_best_fit = not self.settings.expandable_segments and self.settings.max_split_size_bytes is None
        self._collects = self.settings.garbage_collection_threshold > 0 and capacity_bytes is not None

    def malloc(self, num_bytes: int, stream: int = 0) -> int:
        """Allocate, as ``torch.empty`` would on ``stream``; raises ``OutOfMemoryError`` beyond the capacity."""
        if num_bytes <= 0:
            if num_bytes:
                raise ProgramError(f"an allocation of {num_bytes} bytes; give a size of zero or more")
            return 0
        size = self._round(num_bytes)
        is_small = size <= SMALL_BYTES
        pool = self._pools.get((stream, is_small)) or self._pool(stream, is_small)
        block = self._find(pool, size) or self._obtain(pool, size, num_bytes)
        if block.size != size:
            self._split(block, size)
        block.allocated = True
        self.allocated_bytes = allocated_bytes = self.allocated_bytes + block.size
        if allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = allocated_bytes
        self._num_handles = handle = self._num_handles + 1
        self._live[handle] = block
        return handle

    def free(self, handle: int, lag: int = 0) -> None:
        """Return a block to its pool, merged with its free neighbours.

        With a ``lag`` another stream still uses it: it counts as freed, but is handed out again only once that many
        gathers have begun.
        """
        if handle == 0:
            return
        block = self._live.pop(handle, None)
        if block is None:
            raise ProgramError(f"handle {handle} is not allocated; free each handle of malloc once")
        self.allocated_bytes -= block.size
        if lag:
            self._lagging.append((self._num_gathers + lag, block))
        else:
            block.allocated = False
            self._insert_merged(block)

    def begin_gather(self) -> None:
        """The other streams have come as far as the blocks whose ``lag`` ends here."""
        self._num_gathers += 1
        self._settle(self._num_gathers)

    def size_of(self, handle: int) -> int:
        """What a live handle adds to ``allocated_bytes``."""
        return self._live[handle].size if handle else 0

    def release_cached(self) -> None:
        """Give every segment without a live block back to the driver, as ``torch.cuda.empty_cache`` does, once the
        other streams are done."""
        self._settle(max((gather for gather, _ in self._lagging), default=0))
        for pool in self._pools.values():
            for block in [pool.blocks[key] for key in pool.keys]:
                if block.expandable:
                    self._unmap(block)
                elif block.is_whole_segment:
                    self._release(block)

    def load_heap(self, heap: Iterable[Mapping[str, Any]]) -> dict[int, int]:
        """Start from a recorded heap: segments ``{bytes, stream, live: [[offset, size, id], …]}`` in address order.

        Returns the handle of each id. What a snapshot leaves open follows from the rules: a segment of 2 MiB is small,
        every other one large; a gap of at most 1 MiB above a live block of a large segment is that block's own
        remainder, since so little is never split off.
        """
        handles: dict[int, int] = {}
        for segment in heap:
            size = segment["bytes"]
            block = self._new_segment(self._pool(segment["stream"], size == SMALL_SEGMENT_BYTES), size)
            handles.update(self._fill(block, sorted(segment["live"])))
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return handles

    def snapshot(self) -> tuple[Segment, ...]:
        """The segments in address order. Of an expandable one, each mapped range counts as a segment."""
        segments: list[Segment] = []
        for first in sorted(self._segments.values(), key=lambda block: block.address):
            for run in _mapped_runs(first):
                start = run[0].address
                blocks = tuple((block.address - start, block.size, block.allocated) for block in run)
                segments.append(Segment(sum(block.size for block in run), first.pool.stream, blocks))
        return tuple(segments)

    def _pool(self, stream: int, is_small: bool) -> _Pool:
        pool = self._pools.get((stream, is_small))
        if pool is None:
            pool = self._pools[stream, is_small] = _Pool(stream=stream, is_small=is_small)
        return pool

    def _find(self, pool: _Pool, size: int) -> _Block | None:
        """The best fitting free block, taken out of its pool."""
        pool.num_searches += 1
        keys = pool.keys
        index = bisect_left(keys, size << _ADDRESS_BITS)
        if index == len(keys):
            return None
        if self._takes_best_fit:
            return pool.blocks.pop(keys.pop(index))
        block = pool.at(index)
        limit = self.settings.max_split_size_bytes
        if block.expandable:
            block = _least_expandable(pool, index)
        if limit is not None:
            if size < limit <= block.size:
                return None
            if size >= limit and block.size >= size + self.settings.max_non_split_rounding_bytes:
                return None
        pool.remove(block)
        return block

    def _split(self, block: _Block, size: int) -> None:
        """Return what ``block`` has beyond ``size`` to the pool, where that is worth a block."""
        remainder = block.size - size
        if block.pool.is_small or self.settings.expandable_segments:
            is_split = remainder >= MIN_BLOCK_BYTES
        else:
            limit = self.settings.max_split_size_bytes
            is_split = remainder > SMALL_BYTES and (limit is None or size < limit)
        if is_split:
            block.pool.add(block.split(size))

    def _obtain(self, pool: _Pool, size: int, num_bytes: int) -> _Block:
        """Memory from the driver: after the garbage collection, then once cached blocks are given back."""
        if self._collects:
            self._collect_garbage()
        block = self._from_driver(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._from_driver(pool, size)
        if block is None:
            self.release_cached()
            self.num_retries += 1
            block = self._from_driver(pool, size)
        if block is None:
            raise OutOfMemoryError(
                f"{gib(num_bytes)} do not fit beside {gib(self.reserved_bytes)} reserved of "
                f"{gib(self.capacity_bytes or 0)}; lower the micro-batch or shard more"
            )
        return block

    def _from_driver(self, pool: _Pool, size: int) -> _Block | None:
        if self.settings.expandable_segments:
            return self._expand(pool, size)
        num_bytes = _segment_bytes(size)
        return self._new_segment(pool, num_bytes) if self._has_room(num_bytes) else None

    def _has_room(self, num_bytes: int) -> bool:
        return self.capacity_bytes is None or self.reserved_bytes + num_bytes <= self.capacity_bytes

    def _new_segment(self, pool: _Pool, num_bytes: int) -> _Block:
        block = _Block(self._take_addresses(num_bytes), num_bytes, pool)
        self._segments[block.address] = block
        self._reserve(num_bytes)
        return block

    def _take_addresses(self, num_bytes: int) -> int:
        """Addresses never used before, a multiple of every unit in which segments grow."""
        address = self._next_address
        self._next_address += round_up(num_bytes, LARGE_SEGMENT_BYTES)
        return address

    def _reserve(self, num_bytes: int) -> None:
        self.reserved_bytes += num_bytes
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes

    def _settle(self, gather: int) -> None:
        """Put back what lags until ``gather``."""
        for due, block in self._lagging:
            if due <= gather:
                self._put_back(block)
        self._lagging = [(due, block) for due, block in self._lagging if due > gather]

    def _put_back(self, block: _Block) -> None:
        block.allocated = False
        self._insert_merged(block)

    def _insert_merged(self, block: _Block) -> None:
        """Merge ``block`` with its free neighbours in the same state and put the result where it belongs."""
        block = _merged(block)
        if block.mapped:
            block.pool.add(block)
        else:
            block.pool.unmapped[block.address] = block

    def _release(self, block: _Block) -> None:
        """Give a free block that is a whole segment back to the driver."""
        block.pool.remove(block)
        del self._segments[block.address]
        self.reserved_bytes -= block.size

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """With ``max_split_size_mb``, release just enough of the blocks that may not be split; whether it sufficed."""
        limit = self.settings.max_split_size_bytes
        if limit is None:
            return False
        wanted = max(size, limit)
        index = pool.first_at_least(wanted)
        if index < len(pool.keys) and not pool.at(index).expandable:
            self._release(pool.at(index))
            return True
        released = 0
        for block in [pool.blocks[key] for key in reversed(pool.keys[:index])]:
            if released >= wanted or block.size < limit:
                break
            if not block.expandable:
                self._release(block)
                released += block.size
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Release whole free segments of at least average age while the reserved memory is above the threshold. Age
        is counted in searches, on each stream by itself."""
        excess = self.reserved_bytes - int(self.settings.garbage_collection_threshold * (self.capacity_bytes or 0))
        large = [block for pool in self._pools.values() if not pool.is_small for block in pool.blocks.values()]
        candidates = [block for block in large if block.is_whole_segment and not block.expandable]
        while excess > 0 and candidates:
            average = sum(block.age for block in candidates) / len(candidates)
            old = [block for block in candidates if block.age >= average]
            candidates = [block for block in candidates if block.age < average]
            for block in old:
                self._release(block)
                excess -= block.size

    def _expand(self, pool: _Pool, size: int) -> _Block | None:
        """Map more of an expandable segment, from its lowest unmapped range that can hold ``size`` together with the
        free blocks beside it."""
        block = self._expandable_room(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            upper = block.next
            assert upper is not None
            if not self._map(upper, min(size - block.size, upper.size)):
                return None
        pool.remove(block)
        return block

    def _expandable_room(self, pool: _Pool, size: int) -> _Block:
        for address in sorted(pool.unmapped):
            block = pool.unmapped[address]
            if block.previous is not None and not block.previous.allocated:
                block = block.previous
            if _room_above(block, size) >= size:
                return block
        # 9/8 of the device's memory: pages unmapped at the start of a segment may be mapped again at its end.
        capacity = self.capacity_bytes or DEFAULT_ADDRESS_SPACE_BYTES
        num_bytes = round_up(max(capacity * 9 // 8, size), pool.segment_bytes)
        block = _Block(self._take_addresses(num_bytes), num_bytes, pool, expandable=True)
        block.mapped = False
        self._segments[block.address] = block
        pool.unmapped[block.address] = block
        return block

    def _map(self, block: _Block, size: int) -> bool:
        """Map the start of an unmapped block, in whole units; False when the capacity does not allow it."""
        num_bytes = round_up(size, block.pool.segment_bytes)
        if not self._has_room(num_bytes):
            return False
        del block.pool.unmapped[block.address]
        if num_bytes < block.size:
            rest = block.split(num_bytes)
            block.pool.unmapped[rest.address] = rest
        block.mapped = True
        self._reserve(num_bytes)
        self._insert_merged(block)
        return True

    def _unmap(self, block: _Block) -> None:
        """Give back the whole units that a free block of an expandable segment covers."""
        unit = block.pool.segment_bytes
        start = round_up(block.address, unit)
        end = (block.address + block.size) // unit * unit
        if start >= end:
            return
        block.pool.remove(block)
        if start > block.address:
            upper = block.split(start - block.address)
            block.pool.add(block)
            block = upper
        if end < block.address + block.size:
            block.pool.add(block.split(end - block.address))
        block.mapped = False
        self.reserved_bytes -= block.size
        self._insert_merged(block)

    def _fill(self, block: _Block, live: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Cut a new segment into its recorded live blocks, ``(offset, size, id)`` by offset, and the free rest."""
        for size, identifier in _pieces(block.size, live, least_remainder=0 if block.pool.is_small else SMALL_BYTES):
            rest = block.split(size) if size < block.size else None
            if identifier is None:
                block.pool.add(block)
            else:
                block.allocated = True
                self.allocated_bytes += size
                self._num_handles += 1
                self._live[self._num_handles] = block
                yield identifier, self._num_handles
            if rest is not None:
                block = rest


def _pieces(segment_bytes: int, live: Sequence[Sequence[int]], *, least_remainder: int) -> list[tuple[int, int | None]]:
    """A segment as ``(size, id)`` from its start to its end; the id of what is free is None."""
    pieces: list[tuple[int, int | None]] = []
    position = 0
    for offset, size, identifier in (*live, (segment_bytes, 0, -1)):
        gap = offset - position
        if gap < 0 or offset + size > segment_bytes:
            raise ProgramError(
                f"block {identifier} at {offset} overlaps another or leaves its segment; correct the heap"
            )
        if 0 < gap <= least_remainder and pieces and pieces[-1][1] is not None:
            pieces[-1] = (pieces[-1][0] + gap, pieces[-1][1])
        elif gap:
            pieces.append((gap, None))
        if size:
            pieces.append((size, identifier))
        position = offset + size
    return pieces


def _segment_bytes(size: int) -> int:
    """How much is asked of the driver for a block of ``size``."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return round_up(size, LARGE_ROUNDING_BYTES)


def _merged(block: _Block) -> _Block:
    """``block`` as one with its free neighbours that are mapped as it is; these leave their pool."""
    lower, upper = block.previous, block.next
    if upper is not None and not upper.allocated and upper.mapped is block.mapped:
        upper.pool.discard(upper)
        block.absorb(upper)
    if lower is not None and not lower.allocated and lower.mapped is block.mapped:
        lower.pool.discard(lower)
        lower.absorb(block)
        return lower
    return block


def _expandable_bytes(block: _Block) -> int:
    """How large a free block can get without moving: what is not mapped right above it counts."""
    upper = block.next
    return block.size + (upper.size if upper is not None and not upper.mapped else 0)


def _least_expandable(pool: _Pool, index: int) -> _Block:
    """From the best fit upwards, step on while the next larger block has less room to grow."""
    block = pool.at(index)
    for key in pool.keys[index + 1 :]:
        following = pool.blocks[key]
        if not block.expandable or _expandable_bytes(following) >= _expandable_bytes(block):
            break
        block = following
    return block


def _room_above(block: _Block, enough: int) -> int:
    """Bytes from ``block`` upwards until an allocated block, counted until they are ``enough``."""
    num_bytes = 0
    current: _Block | None = block
    while current is not None and not current.allocated and num_bytes < enough:
        num_bytes += current.size
        current = current.next
    return num_bytes


def _mapped_runs(first: _Block) -> Iterator[list[_Block]]:
    """The blocks from ``first`` upwards, in runs without a gap that is not mapped."""
    run: list[_Block] = []
    block: _Block | None = first
    while block is not None:
        if block.mapped:
            run.append(block)
        elif run:
            yield run
            run = []
        block = block.next
    if run:
        yield run
