"""The caching allocator's rules one by one, its laws, and the recorded GPU traces."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchkit.errors import OutOfMemoryError, ProgramError, UsageError
from launchkit.simulate.allocator import AllocatorSettings, CachingAllocator, round_block
from launchkit.units import GIB, KIB, MIB

ROOT = Path(__file__).parents[2]
TRUTH = Path(os.environ.get("LAUNCHKIT_GROUND_TRUTH", ROOT.parent / "shared" / "ground_truth")) / "allocator"
TRACES = sorted(TRUTH.glob("*.json.gz"))


def parsed(text: str) -> CachingAllocator:
    return CachingAllocator(settings=AllocatorSettings.parse(text))


def limited(text: str, capacity_bytes: int) -> CachingAllocator:
    return CachingAllocator(settings=AllocatorSettings.parse(text), capacity_bytes=capacity_bytes)


@pytest.mark.parametrize(
    ("num_bytes", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # a remainder of 1 MiB is not split off
        (20 * MIB + 1, 20 * MIB + 512, 22 * MIB),
    ],
)
def test_one_request(num_bytes: int, allocated: int, reserved: int) -> None:
    """A request takes a block and a segment by its size class."""
    allocator = CachingAllocator()
    allocator.malloc(num_bytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_best_fit_prefers_the_smallest_then_the_lowest() -> None:
    """Of the free blocks that are large enough the smallest is taken; of equals the one at the lowest address."""
    allocator = CachingAllocator()
    handles = allocator.load_heap(
        [
            {"bytes": 40 * MIB, "stream": 0, "live": []},
            {"bytes": 24 * MIB, "stream": 0, "live": []},
            {"bytes": 24 * MIB, "stream": 0, "live": []},
        ]
    )
    assert handles == {}
    allocator.malloc(20 * MIB)
    assert [bool(segment.blocks[0][2]) for segment in allocator.snapshot()] == [False, True, False]


def test_free_neighbours_merge() -> None:
    """Three blocks of one segment, freed in any order, leave one free block."""
    allocator = CachingAllocator()
    handles = [allocator.malloc(size * KIB) for size in (100, 200, 300)]
    for handle in (handles[0], handles[2], handles[1]):
        allocator.free(handle)
    (segment,) = allocator.snapshot()
    assert segment.blocks == ((0, 2 * MIB, False),)
    assert (allocator.allocated_bytes, allocator.peak_allocated_bytes) == (0, 600 * KIB)


def test_streams_do_not_share_blocks() -> None:
    """What is free on one stream is not given to another."""
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(30 * MIB, 1))
    allocator.malloc(30 * MIB, 2)
    assert allocator.reserved_bytes == 60 * MIB


@pytest.mark.parametrize(("num_gathers", "reserved_mib"), [(0, 60), (1, 60), (2, 30)])
def test_a_block_that_another_stream_reads_is_handed_out_again_later(num_gathers: int, reserved_mib: int) -> None:
    """It counts as freed at once."""
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(30 * MIB), lag=2)
    assert allocator.allocated_bytes == 0
    for _ in range(num_gathers):
        allocator.begin_gather()
    allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == reserved_mib * MIB


def test_memory_that_runs_out_waits_for_the_other_streams() -> None:
    """Before it gives up, the allocator waits for all that is still read."""
    allocator = CachingAllocator(capacity_bytes=50 * MIB)
    allocator.free(allocator.malloc(30 * MIB), lag=2)
    allocator.malloc(40 * MIB)
    assert (allocator.reserved_bytes, allocator.num_retries) == (40 * MIB, 1)


def test_release_cached_gives_back_whole_segments_only() -> None:
    """A segment with one live block stays."""
    allocator = CachingAllocator()
    kept, dropped, whole = allocator.malloc(4 * MIB), allocator.malloc(4 * MIB), allocator.malloc(50 * MIB)
    allocator.free(dropped)
    allocator.free(whole)
    allocator.release_cached()
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (20 * MIB, 70 * MIB)
    allocator.free(kept)
    allocator.release_cached()
    assert allocator.reserved_bytes == 0


def test_cached_segments_are_released_before_out_of_memory() -> None:
    """At the capacity the cache is given back and the request repeated; only then it fails."""
    allocator = limited("", 100 * MIB)
    allocator.free(allocator.malloc(60 * MIB))
    allocator.malloc(90 * MIB)
    assert (allocator.reserved_bytes, allocator.num_retries) == (90 * MIB, 1)
    with pytest.raises(OutOfMemoryError, match=r"20 MiB do not fit beside 90 MiB reserved of 100 MiB; "):
        allocator.malloc(20 * MIB)


def test_max_split_size_keeps_large_blocks_whole() -> None:
    """A block above the limit serves only requests above it, within 20 MiB of its size, and is not split."""
    allocator = parsed("max_split_size_mb:64")
    allocator.free(allocator.malloc(100 * MIB))
    allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 130 * MIB
    allocator.malloc(70 * MIB)
    assert allocator.reserved_bytes == 200 * MIB
    allocator.malloc(82 * MIB)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (200 * MIB, 200 * MIB)


def test_max_split_size_releases_only_what_is_needed() -> None:
    """At the capacity the smallest sufficient oversize block goes, and the others stay cached."""
    allocator = limited("max_split_size_mb:64", 300 * MIB)
    handles = [allocator.malloc(size * MIB) for size in (90, 200)]
    for handle in handles:
        allocator.free(handle)
    allocator.malloc(120 * MIB)
    assert (allocator.reserved_bytes, allocator.num_retries) == (210 * MIB, 0)


def test_garbage_collection_releases_the_old() -> None:
    """Above the threshold the free segments of more than average age are released, the young ones stay."""
    allocator = limited("garbage_collection_threshold:0.5", 200 * MIB)
    old, young = allocator.malloc(60 * MIB), allocator.malloc(50 * MIB)
    allocator.free(old)
    for _ in range(5):
        allocator.free(allocator.malloc(MIB))
        allocator.free(allocator.malloc(2 * MIB))
    allocator.free(young)
    allocator.malloc(64 * MIB)
    assert sorted(segment.num_bytes // MIB for segment in allocator.snapshot()) == [2, 20, 50, 64]


def test_expandable_segments_grow_in_place() -> None:
    """Where the classic allocator needs a second segment, an expandable one maps only what is missing."""
    classic, expandable = CachingAllocator(), parsed("expandable_segments:True")
    for allocator in (classic, expandable):
        allocator.free(allocator.malloc(40 * MIB))
        allocator.malloc(60 * MIB)
    assert (classic.reserved_bytes, expandable.reserved_bytes) == (100 * MIB, 60 * MIB)


def test_expandable_segments_unmap_whole_units() -> None:
    """``empty_cache`` gives back the 20 MiB units that hold no live block; the hole is mapped again later."""
    allocator = parsed("expandable_segments:True")
    first, middle, _ = allocator.malloc(30 * MIB), allocator.malloc(60 * MIB), allocator.malloc(30 * MIB)
    allocator.free(middle)
    allocator.release_cached()
    assert allocator.reserved_bytes == (120 - 40) * MIB  # 40 to 80 MiB lie within the freed 30 to 90
    assert [segment.num_bytes // MIB for segment in allocator.snapshot()] == [40, 40]
    allocator.free(first)
    allocator.malloc(50 * MIB)
    assert allocator.reserved_bytes == 100 * MIB


def test_expandable_segments_split_small_remainders() -> None:
    """With expandable segments any remainder of 512 B is split off, in the large pool too."""
    allocator = parsed("expandable_segments:True")
    allocator.malloc(11 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (11 * MIB, 20 * MIB)


@pytest.mark.parametrize(
    ("text", "num_bytes", "rounded"),
    [
        ("", 1200 * KIB, 1200 * KIB),
        ("roundup_power2_divisions:4", 1200 * KIB, 1280 * KIB),
        ("roundup_power2_divisions:4", MIB, MIB),
        ("roundup_power2_divisions:4", 1100, 1536),  # at most 512 B × divisions: to 512 B
        ("roundup_power2_divisions:4", 2100, 2560),
        ("roundup_power2_divisions:[256:1,512:2,>:8]", 300 * MIB, 300 * MIB),
        ("roundup_power2_divisions:[256:1,512:2,>:8]", 600 * MIB, 768 * MIB),
        ("roundup_power2_divisions:[256:1,512:2,>:8]", 1100 * MIB, 1152 * MIB),
        ("roundup_power2_divisions:[256:4,512:2,>:8]", 3 * MIB + 1, 3584 * KIB),
    ],
)
def test_rounding(text: str, num_bytes: int, rounded: int) -> None:
    """``roundup_power2_divisions`` rounds within the power of two of the size."""
    assert AllocatorSettings.parse(text).round(num_bytes) == rounded


def test_parse_all_options() -> None:
    """Each option lands in its field; those that move no block are accepted."""
    text = (
        "expandable_segments:True, max_split_size_mb:128,garbage_collection_threshold:0.8,pinned_num_register_threads:8"
    )
    assert AllocatorSettings.parse(text) == AllocatorSettings(
        expandable_segments=True, max_split_size_bytes=128 * MIB, garbage_collection_threshold=0.8
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_split_size_mb:10", r"'max_split_size_mb:10'; write a number of MiB, at least 20"),
        ("expandable_segments:true", r"'expandable_segments:true'; write True or False"),
        ("garbage_collection_threshold:1.5", r"write a fraction between 0 and 1"),
        ("garbage_collection_threshold:much", r"write a fraction between 0 and 1"),
        ("roundup_power2_divisions:3", r"write powers of two"),
        ("roundup_power2_divisions:[100:2]", r"write powers of two"),
        ("backend:cudaMallocAsync", r"has an option 'backend' that is not modelled; use expandable_segments, "),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    """What PyTorch refuses, or what is not modelled, is one clear line."""
    with pytest.raises(UsageError, match=message):
        AllocatorSettings.parse(text)


def test_misuse_is_refused() -> None:
    """Freeing twice, a negative size and overlapping blocks of a heap are errors."""
    allocator = CachingAllocator()
    handle = allocator.malloc(1)
    allocator.free(handle)
    with pytest.raises(ProgramError, match=f"handle {handle} is not allocated"):
        allocator.free(handle)
    with pytest.raises(ProgramError, match="an allocation of -1 bytes"):
        allocator.malloc(-1)
    with pytest.raises(ProgramError, match="block 8 at 512 overlaps"):
        allocator.load_heap([{"bytes": 2 * MIB, "stream": 0, "live": [[0, 1024, 7], [512, 512, 8]]}])


def test_a_heaps_small_gap_belongs_to_the_block_below() -> None:
    """In a large segment a gap of at most 1 MiB was never free; a larger one is."""
    allocator = CachingAllocator()
    live = [[0, 11 * MIB, 1], [12 * MIB, 4 * MIB, 2]]
    handles = allocator.load_heap([{"bytes": 40 * MIB, "stream": 0, "live": live}])
    assert allocator.size_of(handles[1]) == 12 * MIB
    assert allocator.allocated_bytes == 16 * MIB
    allocator.malloc(24 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def check_consistent(allocator: CachingAllocator) -> None:
    """Segments add up to what is reserved, blocks tile them, and no two free blocks touch."""
    segments = allocator.snapshot()
    assert sum(segment.num_bytes for segment in segments) == allocator.reserved_bytes
    allocated = 0
    for segment in segments:
        end = 0
        for index, (offset, size, is_allocated) in enumerate(segment.blocks):
            assert offset == end and size > 0
            end += size
            allocated += size * is_allocated
            assert is_allocated or index == 0 or segment.blocks[index - 1][2]
        assert end == segment.num_bytes
    assert allocated == allocator.allocated_bytes <= allocator.reserved_bytes


CONFIGURATIONS = [
    "",
    "expandable_segments:True",
    "max_split_size_mb:32",
    "roundup_power2_divisions:8",
    "garbage_collection_threshold:0.6",
    "expandable_segments:True,garbage_collection_threshold:0.6",
]
REQUESTS = st.lists(
    st.tuples(st.one_of(st.integers(0, 4 * MIB), st.integers(4 * MIB, 90 * MIB)), st.integers(0, 1), st.integers(0, 9)),
    max_size=40,
)


@pytest.mark.parametrize("text", CONFIGURATIONS)
@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS)
def test_laws(text: str, requests: list[tuple[int, int, int]]) -> None:
    """Whatever is asked for: the books balance, peaks are never below, and all comes back in the end."""
    allocator = limited(text, GIB // 2)
    live: list[int] = []
    for num_bytes, stream, action in requests:
        try:
            live.append(allocator.malloc(num_bytes, stream))
        except OutOfMemoryError:
            assert allocator.reserved_bytes <= GIB // 2
        if live and action < 5:
            allocator.free(live.pop(action % len(live)))
        if action == 9:
            allocator.release_cached()
        check_consistent(allocator)
        assert allocator.peak_allocated_bytes >= allocator.allocated_bytes
        assert allocator.peak_reserved_bytes >= allocator.reserved_bytes
    for handle in live:
        allocator.free(handle)
    allocator.release_cached()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 64 * MIB), count=st.integers(0, 30))
def test_a_repeated_pass_reserves_nothing_more(size: int, count: int) -> None:
    """Requests of one size that were served once are served from the cache the second time."""
    allocator = CachingAllocator()
    for handle in [allocator.malloc(size) for _ in range(count)]:
        allocator.free(handle)
    reserved = allocator.reserved_bytes
    for _ in range(count):
        allocator.malloc(size)
    assert allocator.reserved_bytes == reserved
    assert allocator.peak_allocated_bytes >= count * round_block(size)


def test_a_repeated_pass_of_many_sizes_may_reserve_more() -> None:
    """Best fit: the second time the first 4 MiB come out of the freed 10 MiB, which the last request then lacks."""
    sizes = [4 * MIB, 6 * MIB + 512, 6 * MIB + 512, 10 * MIB]
    allocator = CachingAllocator()
    for handle in [allocator.malloc(size) for size in sizes]:
        allocator.free(handle)
    assert allocator.reserved_bytes == (20 + 10) * MIB
    for size in sizes:
        allocator.malloc(size)
    assert allocator.reserved_bytes == (20 + 10 + 10) * MIB


def bench_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_allocator", ROOT / "bench" / "allocator.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not TRACES, reason="the recorded GPU traces are not here")
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name.split(".")[0])
def test_recorded_traces(path: Path) -> None:
    """Every segment of a real GPU run, in order and to the byte, and its reserved peak."""
    result = bench_module().replay(json.loads(gzip.decompress(path.read_bytes())))
    assert result.segments == result.expected_segments
    assert result.peak_reserved_bytes == result.expected_peak_reserved_bytes
    assert 0 <= result.peak_allocated_bytes / result.expected_peak_allocated_bytes - 1 < 0.003  # remainders
