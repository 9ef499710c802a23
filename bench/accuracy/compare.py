"""Predicted beside measured for every cell: ``results.json`` here, and the table of ``docs/accuracy.md``.

``python -m bench.accuracy.compare`` measures what ``results.json`` lacks, predicts anew and writes both.
``--only TEXT`` restricts it to cells whose names contain TEXT, ``--measure`` measures those again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.accuracy.cell import Cell
from bench.accuracy.cells import CELLS, find
from bench.accuracy.measure import ROOT, measure
from launchkit.api import estimate, find_cluster, find_source
from launchkit.errors import LaunchkitError
from launchkit.planner.evaluate import Bench, evaluation_peak
from launchkit.request import Request, resolve
from launchkit.simulate.memory import MemoryReading

RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "accuracy.md"
STATES = ("first", "steady", "evaluation")
FLAGS = (
    "method", "precision", "checkpointing", "attention", "optimizer", "trainer", "micro_batch", "seq_len", "packing",
)  # fmt: skip

INTRODUCTION = """# Predicted beside measured

Peak bytes of torch's own allocator, by `torch.profiler(profile_memory=True)`, in real training steps of small random
models on CPU (several processes over gloo), and what `launchkit estimate` says of the same scenario. *First* is the
first step, in which the optimizer's states come into being; *steady* the third; *evaluation* the trainer's
`evaluate()` behind it. Of several ranks the largest counts.
Under FSDP2 the profiler misses the freeing of some of gloo's buffers, which then stay in its counter: the range is what
that leaves open. The error is against the nearest end of it, and nothing where the prediction lies within.
Under ZeRO nearly all of these bytes are DeepSpeed's buckets, which have their full size whatever the model's: there a
small error says little.

The CPU runs say whether the sequence of allocations is right. They say nothing of what only CUDA has: the rounding and
caching of its allocator, flash attention, cuBLAS workspaces, the context.

Reproduce a row with `python -m bench.accuracy.compare --measure --only NAME`.
"""


def predict(cell: Cell, state: str) -> dict[str, Any]:
    """What ``launchkit estimate`` says: peak bytes and where, or the reason why it says nothing."""
    flags: dict[str, Any] = {name: value for name, value in asdict(cell).items() if name in FLAGS}
    flags |= {"strategy": cell.strategy, "gpus": gpus(cell)}
    if state != "evaluation":
        flags["state"] = state
    if cell.method == "lora":
        flags |= {"lora_rank": cell.lora_rank, "lora_targets": cell.lora_targets}
    if cell.strategy in ("fsdp2", "hsdp"):
        flags["fsdp_sharding"] = cell.sharding
    if cell.gradient_accumulation_steps > 1:
        flags["global_batch"] = cell.micro_batch * cell.gradient_accumulation_steps * cell.num_processes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(cell.config))
        try:
            if state == "evaluation":
                reading = evaluated(str(path), Request.from_flags(flags), micro_batch=cell.evaluation_micro_batch)
                return {"peak_bytes": reading.allocated_peak_bytes, "stage": reading.peak_stage}
            found = estimate(str(path), **flags).estimate
        except LaunchkitError as error:
            return {"error": str(error)}
    return {"peak_bytes": found.allocated_peak_bytes, "stage": found.peak_stage}


def evaluated(model: str, request: Request, *, micro_batch: int) -> MemoryReading:
    """What the planner says of an evaluation behind a step of the same scenario."""
    cluster = find_cluster(request.gpus)
    source = find_source(model, request)
    scenario = resolve(request, model=source.profile, cluster=cluster).scenario
    return evaluation_peak(Bench(source=source, cluster=cluster), scenario, micro_batch=micro_batch)


def states(cell: Cell) -> tuple[str, ...]:
    """What is measured of a cell."""
    return STATES if cell.evaluation_micro_batch else STATES[:2]


def gpus(cell: Cell) -> str:
    """The cell's processes as a GPU spec."""
    return "cpu" if cell.num_processes == 1 else f"{cell.num_processes}xcpu"


def measured(cell: Cell, *, repeats: int) -> dict[str, list[int]]:
    """The ranges of the first and of the steady peak."""
    found = measure(cell, repeats=repeats)
    return {state: found[f"{state}_peak_bytes"] for state in states(cell)}


def error_percent(predicted: int, low: int, high: int) -> float:
    """Signed distance of the prediction from the measured range, in per cent of its nearest end."""
    nearest = min(max(predicted, low), high)
    return 100.0 * (predicted - nearest) / nearest


def update(cells: Sequence[Cell], results: Mapping[str, Any], *, again: bool, repeats: int) -> dict[str, Any]:
    """``results`` with ``cells`` predicted, and measured where that is missing or asked for."""
    updated = dict(results)
    for cell in cells:
        old = {} if again else updated.get(cell.name, {})
        noisy = cell.strategy in ("fsdp2", "hsdp")
        entry = {
            "measured": old.get("measured") or measured(cell, repeats=repeats if noisy else 1),
            "predicted": {state: predict(cell, state) for state in states(cell)},
        }
        updated[cell.name] = entry
        print(cell.name, *(row_text(entry, state) for state in states(cell)), sep="  ", flush=True)
        RESULTS.write_text(json.dumps(updated, indent=1, sort_keys=True) + "\n")
    return updated


def row_error(entry: Mapping[str, Any], state: str) -> float | None:
    peak = entry["predicted"][state].get("peak_bytes")
    return None if peak is None else error_percent(peak, *entry["measured"][state])


def row_text(entry: Mapping[str, Any], state: str) -> str:
    error = row_error(entry, state)
    return entry["predicted"][state]["error"] if error is None else f"{state} {error:+.2f} %"


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f}"


def table(results: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """One line per cell and state."""
    lines = ["| cell | step | measured MiB | predicted MiB | error | peak in |", "|---|---|---|---|---|---|"]
    for cell in cells:
        if cell.name not in results:
            continue
        entry = results[cell.name]
        for state in states(cell):
            low, high = entry["measured"][state]
            span = mib(low) if mib(low) == mib(high) else f"{mib(low)} – {mib(high)}"
            predicted, error = entry["predicted"][state], row_error(entry, state)
            if error is None:
                lines.append(f"| {cell.name} | {state} | {span} | – | {predicted['error']} | |")
                continue
            lines.append(
                f"| {cell.name} | {state} | {span} | {mib(predicted['peak_bytes'])} | {error:+.2f} % "
                f"| {predicted['stage']} |"
            )
    return "\n".join(lines)


def summary(results: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """Median, 90th percentile and worst absolute error, by strategy and together."""
    lines = ["| strategy | rows | median | 90th percentile | worst |", "|---|---|---|---|---|"]
    by_strategy: dict[str, list[float]] = {}
    for cell in cells:
        for state in states(cell) if cell.name in results else ():
            error = row_error(results[cell.name], state)
            if error is not None:
                for name in (cell.strategy, "all"):
                    by_strategy.setdefault(name, []).append(abs(error))
    for name, errors in sorted(by_strategy.items(), key=lambda item: (item[0] == "all", item[0])):
        ordered = sorted(errors)
        ninetieth = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
        figures = " | ".join(f"{error:.2f} %" for error in (statistics.median(ordered), ninetieth, ordered[-1]))
        lines.append(f"| {name} | {len(ordered)} | {figures} |")
    return "\n".join(lines)


def page(results: Mapping[str, Any]) -> str:
    """The whole of ``docs/accuracy.md``."""
    return f"{INTRODUCTION}\n{summary(results, CELLS)}\n\n{table(results, CELLS)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="cells whose names contain this")
    parser.add_argument("--measure", action="store_true", help="measure again what was measured before")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a cell whose allocator is not deterministic")
    arguments = parser.parse_args()
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = update(find(arguments.only), old, again=arguments.measure, repeats=arguments.repeats)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
