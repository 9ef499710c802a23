"""Replay recorded CUDA allocator traces: is every segment right, and how many events a second?

    python bench/allocator.py [DIRECTORY] [--write]

A trace is a gzipped JSON document with ``initial_heap`` and ``events`` (``alloc id size stream``, ``free id``,
``segment_alloc size stream``, ``segment_free size``) and the peaks that the real allocator had. The directory
defaults to ``$LAUNCHKIT_GROUND_TRUTH/allocator``. ``--write`` keeps the result for the accuracy page, in
``bench/accuracy/traces.json``.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from launchkit.simulate.allocator import CachingAllocator

TRACES = Path(__file__).with_name("accuracy") / "traces.json"


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


def document(results: Mapping[str, Replay]) -> dict[str, Any]:
    """What the accuracy page needs of the replays: everything but the time, which differs from run to run."""
    return {
        name: {
            "is_exact": result.is_exact,
            "num_events": result.num_events,
            "num_segments": len(result.segments),
            "reserved_bytes": [result.expected_peak_reserved_bytes, result.peak_reserved_bytes],
            "allocated_bytes": [result.expected_peak_allocated_bytes, result.peak_allocated_bytes],
        }
        for name, result in results.items()
    }


def main() -> int:
    """Print one line per trace; 1 if any was not reproduced exactly."""
    default = Path(os.environ.get("LAUNCHKIT_GROUND_TRUTH", "ground_truth")) / "allocator"
    places = [argument for argument in sys.argv[1:] if argument != "--write"]
    directory = Path(places[0]) if places else default
    paths = sorted(directory.glob("*.json.gz"))
    num_events, seconds, num_exact = 0, 0.0, 0
    results: dict[str, Replay] = {}
    for path in paths:
        result = replay(json.loads(gzip.decompress(path.read_bytes())))
        results[path.name.removesuffix(".json.gz")] = result
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
    if "--write" in sys.argv:
        TRACES.write_text(json.dumps(document(results), indent=1) + "\n", encoding="utf-8")
    print(f"{num_exact} of {len(paths)} exact, {num_events:,} events, {num_events / seconds:,.0f} events/s")
    return 0 if num_exact == len(paths) else 1


if __name__ == "__main__":
    raise SystemExit(main())
