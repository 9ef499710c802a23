"""Measures one cell in fresh processes.

``python -m bench.accuracy.measure CELL.json [--repeats N] [--timeline] [--out FILE]`` prints one JSON document: the
largest rank's peaks, their range over ranks and repeats, and each rank's own numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.accuracy.cell import Cell

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """torchrun's variables, so that no launcher stands between."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if world_size > 1:
        variables |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return {**os.environ, **variables}


def run_once(cell: Cell, *, timeline: bool = False, timeout_seconds: float = 120.0) -> list[dict[str, Any]]:
    """One run of the cell: a dictionary per rank, in rank order. Raises RuntimeError with the worker's last lines."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "cell.json"
        path.write_text(cell.to_json())
        command = [sys.executable, "-m", "bench.accuracy.worker", str(path), name]
        command += ["--timeline"] if timeline else []
        port = free_port()
        logs = [(folder / f"log{rank}").open("w+") for rank in range(cell.num_processes)]
        workers = [
            subprocess.Popen(command, env=environment(rank, cell.num_processes, port), stdout=log, stderr=log, cwd=ROOT)
            for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + timeout_seconds
        try:
            for worker in workers:
                worker.wait(max(1.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.kill()
        results = [folder / f"rank{rank}.json" for rank in range(cell.num_processes)]
        # DeepSpeed over gloo now and then aborts while it shuts down, after its numbers were written.
        if not all(result.exists() for result in results):
            text = "\n".join((folder / f"log{rank}").read_text()[-2000:] for rank in range(cell.num_processes))
            raise RuntimeError(f"cell {cell.name} failed:\n{text}")
        return [json.loads(result.read_text()) for result in results]


def measure(cell: Cell, *, repeats: int = 1, timeline: bool = False) -> dict[str, Any]:
    """The largest rank's numbers over ``repeats`` runs, their range, and everything beneath."""
    runs = [run_once(cell, timeline=timeline) for _ in range(repeats)]
    ranks = [rank for run in runs for rank in run]
    steady = [rank["steady_peak_bytes"] for rank in ranks]
    first = [rank["first_peak_bytes"] for rank in ranks]
    # The largest rank is compared, but which of its repeats? The middle one: a single late free is no truth.
    middle = sorted(max(rank["steady_peak_bytes"] for rank in run) for run in runs)[len(runs) // 2]
    middle_first = sorted(max(rank["first_peak_bytes"] for rank in run) for run in runs)[len(runs) // 2]
    return {
        "name": cell.name,
        "steady_peak_bytes": middle,
        "steady_peak_range_bytes": [min(steady), max(steady)],
        "first_peak_bytes": middle_first,
        "first_peak_range_bytes": [min(first), max(first)],
        "live_between_steps_bytes": max(rank["live_between_steps_bytes"] for rank in ranks),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("cell", type=Path, help="a cell as JSON")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--timeline", action="store_true", help="add each allocation of the last step")
    parser.add_argument("--out", type=Path, help="write there instead of printing")
    arguments = parser.parse_args()
    cell = Cell.from_json(arguments.cell.read_text())
    text = json.dumps(measure(cell, repeats=arguments.repeats, timeline=arguments.timeline), indent=1)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
