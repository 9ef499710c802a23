"""Every allocation of torch's CPU allocator, in order, read from its profiler."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable
from itertools import accumulate

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


class AllocationTimeline:
    """Live bytes of torch's CPU allocator over time, from ``start`` to ``stop``.

    Files that torch maps into memory are in it, whole, until ``leave_out_mappings``. Memory that was allocated before,
    or by others (numpy), is not. Timestamps are those of ``time.time_ns()``. Nothing else may profile meanwhile: torch
    has one profiler.

    The profiler sees one thread. A collective's buffer whose last reference a gloo thread drops is freed unseen, and
    would count for good. Such a *ghost* shows when its address is given out again, or when nobody holds it at the end
    (``lay_ghosts``). It is taken off every peak after the interval that it arose in, where it may have been alive.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._times_ns: list[int] = []
        self._live_bytes: list[int] = []
        self._left: list[tuple[int, int]] = []  # address and size of what is still live at the end
        self._ghosts: list[tuple[int, int]] = []  # time of allocation and size
        self._born_ns: dict[int, int] = {}  # by address, of what is still live at the end
        self.is_running = False

    def start(self) -> None:
        self._profile.start()
        self.is_running = True

    def stop(self) -> None:
        """Ends the recording and reads it."""
        self._profile.stop()
        self.is_running = False
        events = sorted(self._allocations())
        self._times_ns = [time_ns for time_ns, _, _ in events]
        self._live_bytes = list(accumulate(size for _, size, _ in events))
        live: dict[int, tuple[int, int]] = {}
        for time_ns, size, address in events:
            unseen = live.pop(address, None)
            if size > 0:
                self._ghosts += [unseen] if unseen else []
                live[address] = (time_ns, size)
        self._left = sorted((address, size) for address, (_, size) in live.items())
        self._born_ns = {address: time_ns for address, (time_ns, _) in live.items()}

    def lay_ghosts(self, held_addresses: Iterable[int]) -> None:
        """Tells which addresses somebody still holds at the end; a block without any is a ghost."""
        held = sorted(held_addresses)
        for address, size in self._left:
            place = bisect.bisect_left(held, address)
            if place == len(held) or held[place] >= address + size:
                self._ghosts.append((self._born_ns[address], size))

    def holds(self, address: int) -> bool:
        """Whether a block that was still live at the end begins at ``address``."""
        return address in self._born_ns

    def leave_out_mappings(self, addresses: Collection[int]) -> None:
        """Forgets the blocks that ``addresses`` lie within: files, of which a model may use the smaller part."""
        for block, size in self._left:
            if any(block < address < block + size for address in addresses):
                self._ghosts.append((self._born_ns[block], size))

    def ghost_bytes(self, begin_ns: int, end_ns: int) -> int:
        """Bytes that arose in the interval and were freed unseen: so much less its peak may have been."""
        return sum(size for time_ns, size in self._ghosts if begin_ns <= time_ns < end_ns)

    def peak_bytes(self, begin_ns: int, end_ns: int) -> int:
        """The most that was live at any moment of the interval, ghosts of earlier ones left out."""
        first = bisect.bisect_left(self._times_ns, begin_ns)
        last = bisect.bisect_right(self._times_ns, end_ns)
        at_begin = self._live_bytes[first - 1] if first else 0
        return max(self._live_bytes[first:last], default=at_begin) - self.ghost_bytes(0, begin_ns)

    def _allocations(self) -> list[tuple[int, int, int]]:
        """Time, signed size and address of every allocation and free on the CPU."""
        found = []
        pending = list(self._profile.profiler.kineto_results.experimental_event_tree())
        while pending:
            event = pending.pop()
            pending += event.children
            tag, fields = event.typed
            if tag == _EventType.Allocation and fields.device.type == "cpu":
                found.append((event.start_time_ns, fields.alloc_size, fields.ptr))
        return found
