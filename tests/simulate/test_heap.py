"""The model of glibc's malloc: its rules one by one, and beside the real one."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from random import Random

import pytest

from launchkit.simulate.heap import Heap
from launchkit.units import KIB, MIB

# What the real malloc holds at most, its heap and its mappings, where each tensor brings small objects along that die
# with it, as torch's do. Run in a process of its own.
REAL = """
import ctypes, json, sys

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
calls = json.load(sys.stdin)
live, small, most = {}, {}, 0
first = libc.mallinfo2()
for name, size in calls:
    if size:
        live[name] = ctypes.c_void_p()
        libc.posix_memalign(ctypes.byref(live[name]), 64, size)
        small[name] = [libc.malloc(size) for size in 4 * (24, 40, 56, 72, 88, 104)]
    else:
        libc.free(live.pop(name))
        for pointer in small.pop(name):
            libc.free(pointer)
    now = libc.mallinfo2()
    most = max(most, now.arena + now.hblkhd - first.arena - first.hblkhd)
print(most)
"""


LIBC, VERSION = platform.libc_ver()


def steps(seed: int, *, num_steps: int = 3) -> list[tuple[int, int]]:
    """Calls of a process that trains: some tensors stay, each step makes others and frees them in reverse."""
    random = Random(seed)
    sizes = [random.choice((200 * KIB, MIB, 3 * MIB, 20 * MIB, 40 * MIB)) for _ in range(60)]
    calls = [(name, MIB) for name in range(1000, 1010)]
    for step in range(num_steps):
        names = range(len(sizes))
        calls += [(name, sizes[name]) for name in names]
        calls += [(name, 0) for name in reversed(names) if step or name % 4]
        calls += [(name, 0) for name in names if not step and not name % 4]
    return calls


def most_held(calls: list[tuple[int, int]]) -> int:
    heap, handles = Heap(), dict[int, int]()
    for name, size in calls:
        if size:
            handles[name] = heap.malloc(size)
        else:
            heap.free(handles.pop(name))
    return heap.peak_reserved_bytes


@pytest.mark.skipif((LIBC, VERSION[:3]) != ("glibc", "2.3") or VERSION > "2.37", reason="glibc up to 2.37")
@pytest.mark.parametrize("seed", range(4))
def test_as_much_is_held_as_the_real_malloc_holds(seed: int) -> None:
    """Later ones look for aligned chunks in another way."""
    calls = steps(seed)
    answer = subprocess.run(
        [sys.executable, "-c", REAL], input=json.dumps(calls), capture_output=True, text=True, check=True
    )
    assert most_held(calls) == pytest.approx(int(answer.stdout), rel=0.005)


def test_a_large_request_is_a_mapping_that_goes_when_it_is_freed() -> None:
    heap = Heap()
    handle = heap.malloc(40 * MIB)
    assert heap.reserved_bytes == pytest.approx(40 * MIB, abs=8 * KIB)
    heap.free(handle)
    assert (heap.reserved_bytes, heap.allocated_bytes) == (0, 0)


def test_a_freed_mapping_raises_the_threshold_up_to_32_mib() -> None:
    heap = Heap()
    for size in (20 * MIB, 40 * MIB):
        heap.free(heap.malloc(size))
    assert 20 * MIB < heap.mmap_threshold_bytes < 21 * MIB


def test_what_is_free_below_the_top_stays() -> None:
    heap = Heap()
    heap.free(heap.malloc(31 * MIB))  # from here on smaller tensors lie in the heap
    below, top = heap.malloc(20 * MIB), heap.malloc(MIB)
    heap.free(below)
    assert heap.reserved_bytes > 21 * MIB
    heap.free(top)
    assert heap.reserved_bytes < 63 * MIB


def test_a_hole_takes_in_no_tensor_of_its_own_size_while_small_objects_lie_beside_it() -> None:
    heap = Heap()
    heap.free(heap.malloc(31 * MIB))
    first, second = heap.malloc(8 * MIB), heap.malloc(8 * MIB)
    heap.free(first)
    heap.malloc(8 * MIB)
    assert heap.reserved_bytes > 24 * MIB
    heap.malloc(7 * MIB)
    assert heap.reserved_bytes < 25 * MIB
    heap.free(second)
