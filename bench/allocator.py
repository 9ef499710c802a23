"""Replay recorded CUDA allocator traces: is every segment right, and how many events a second?

    python bench/allocator.py [DIRECTORY]

A trace is a gzipped JSON document with ``initial_heap`` and ``events`` (``alloc id size stream``, ``free id``,
``segment_alloc size stream``, ``segment_free size``) and the peaks that the real allocator had. The directory
defaults to ``$LAUNCHKIT_GROUND_TRUTH/allocator``.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from launchkit.simulate.allocator import CachingAllocator


class Replay(NamedTuple):
    """What the model did with one trace, beside what the real allocator had done."""

    num_events: int
    seconds: float
    segments: list[int]
    expected_segments: list[int]
    peak_reserved_bytes: int
    expected_peak_reserved_bytes: int
    peak_allocated_bytes: int
    expected_peak_allocated_bytes: int

    @property
    def is_exact(self) -> bool:
        return self.segments == self.expected_segments and self.peak_reserved_bytes == self.expected_peak_reserved_bytes


def replay(trace: dict[str, Any]) -> Replay:
    """Run the requests of ``trace`` through the model; growth of the reserved memory is a new segment."""
    allocator = CachingAllocator()
    handles = allocator.load_heap(trace["initial_heap"])
    requests = [event for event in trace["events"] if event[0] in ("alloc", "free")]
    segments: list[int] = []
    start = time.perf_counter()
    for event in requests:
        if event[0] == "free":
            allocator.free(handles.pop(event[1]))
            continue
        before = allocator.reserved_bytes
        handles[event[1]] = allocator.malloc(event[2], event[3])
        if allocator.reserved_bytes != before:
            segments.append(allocator.reserved_bytes - before)
    return Replay(
        num_events=len(requests),
        seconds=time.perf_counter() - start,
        segments=segments,
        expected_segments=[event[1] for event in trace["events"] if event[0] == "segment_alloc"],
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        expected_peak_reserved_bytes=trace["reserved_peak_bytes"],
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        expected_peak_allocated_bytes=trace["allocated_peak_bytes_512_rounded"],
    )


def main() -> int:
    """Print one line per trace; 1 if any was not reproduced exactly."""
    default = Path(os.environ.get("LAUNCHKIT_GROUND_TRUTH", "ground_truth")) / "allocator"
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    paths = sorted(directory.glob("*.json.gz"))
    num_events, seconds, num_exact = 0, 0.0, 0
    for path in paths:
        result = replay(json.loads(gzip.decompress(path.read_bytes())))
        num_events, seconds = num_events + result.num_events, seconds + result.seconds
        num_exact += result.is_exact
        print(
            f"{'exact' if result.is_exact else 'WRONG':6}{result.num_events / result.seconds:12,.0f} events/s "
            f"reserved {result.peak_reserved_bytes:>14,} of {result.expected_peak_reserved_bytes:>14,}  "
            f"allocated {result.peak_allocated_bytes / result.expected_peak_allocated_bytes - 1:+.4%}  {path.name}"
        )
    if not paths:
        print(f"no traces in {directory}; give their directory")
        return 2
    print(f"{num_exact} of {len(paths)} exact, {num_events:,} events, {num_events / seconds:,.0f} events/s")
    return 0 if num_exact == len(paths) else 1


if __name__ == "__main__":
    raise SystemExit(main())
