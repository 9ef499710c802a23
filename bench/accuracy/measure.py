"""Measures one cell in fresh processes.

``python -m bench.accuracy.measure CELL.json [--repeats N] [--timeline] [--out FILE]`` prints one JSON document: the
largest rank's peaks, their range over ranks and repeats, and each rank's own numbers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from multiprocessing.context import ForkServerContext
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
    if world_size == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@lru_cache(maxsize=1)
def process_factory() -> ForkServerContext:
    """Forks each rank from a server that has imported the libraries and done nothing else: fresh, and soon there."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "transformers", "peft", "bench.accuracy.worker"])
    return context


def run_once(cell: Cell, *, timeline: bool = False, timeout_seconds: float = 600.0) -> list[dict[str, Any]]:
    """One run of the cell: a dictionary per rank, in rank order. Raises RuntimeError with the workers' last lines."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = free_port()
        workers = [
            process_factory().Process(
                target=run_rank, args=(cell, folder, environment(rank, cell.num_processes, port), timeline)
            )
            for rank in range(cell.num_processes)
        ]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + timeout_seconds
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        for worker in workers:
            worker.kill()
            worker.join()
        results = [folder / f"rank{rank}.json" for rank in range(cell.num_processes)]
        # DeepSpeed over gloo now and then aborts while it shuts down, after its numbers were written.
        if not all(result.exists() for result in results):
            logs = [(folder / f"log{rank}").read_text()[-2000:] for rank in range(cell.num_processes)]
            raise RuntimeError("\n".join((f"cell {cell.name} failed", *logs)))
        return [json.loads(result.read_text()) for result in results]


def run_rank(cell: Cell, folder: Path, variables: dict[str, str], timeline: bool) -> None:
    """One rank, in its own process: its output goes to a log, its result to a file."""
    os.environ |= variables
    log = os.open(folder / f"log{variables.get('RANK', '0')}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from bench.accuracy import worker  # imports torch, which only the ranks need

    worker.run(cell, folder, timeline=timeline)


def measure(cell: Cell, *, repeats: int = 1, timeline: bool = False) -> dict[str, Any]:
    """The largest rank's peaks of the first and of the last step, as ranges over ghosts (see the worker) and
    ``repeats``, and everything beneath."""
    runs = [run_once(cell, timeline=timeline) for _ in range(repeats)]
    evaluations = [max(rank["evaluation_peak_bytes"] for rank in run) for run in runs if cell.evaluation_micro_batch]
    return {
        "name": cell.name,
        "first_peak_bytes": peak_range(runs, step=0),
        "steady_peak_bytes": peak_range(runs, step=-1),
        "evaluation_peak_bytes": [min(evaluations, default=0), max(evaluations, default=0)],
        "live_between_steps_bytes": max(rank["live_between_steps_bytes"] for run in runs for rank in run),
        "runs": runs,
    }


def peak_range(runs: Sequence[Sequence[Mapping[str, Any]]], *, step: int) -> list[int]:
    """The lowest floor and the highest peak that a run's largest rank shows in ``step``."""
    floors = [max(rank["step_floors_bytes"][step] for rank in run) for run in runs]
    peaks = [max(rank["step_peaks_bytes"][step] for rank in run) for run in runs]
    return [min(floors), max(peaks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("cell", type=Path, help="a cell as JSON")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--timeline", action="store_true", help="add each allocation of every step")
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
