"""Predicted beside measured for every cell: ``results.json`` here, and with it ``docs/accuracy.md``.

``python -m bench.accuracy.compare`` measures what ``results.json`` lacks, predicts anew and writes the page.
``--only TEXT`` restricts it to cells whose names contain TEXT, ``--measure`` measures those again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.accuracy import page
from bench.accuracy.cell import Cell
from bench.accuracy.cells import find
from bench.accuracy.measure import measure
from bench.accuracy.rows import RESULTS, STATES, error_percent, read_json
from launchkit.api import estimate
from launchkit.errors import LaunchkitError

FLAGS = ("method", "precision", "checkpointing", "attention", "optimizer", "trainer", "micro_batch", "seq_len")


def predict(cell: Cell, state: str) -> dict[str, Any]:
    """What ``launchkit estimate`` says: peak bytes and where, or the reason why it says nothing."""
    flags: dict[str, Any] = {name: value for name, value in asdict(cell).items() if name in FLAGS}
    flags |= {"strategy": cell.strategy, "state": state, "gpus": gpus(cell)}
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
            found = estimate(str(path), **flags).estimate
        except LaunchkitError as error:
            return {"error": str(error)}
    return {"peak_bytes": found.allocated_peak_bytes, "stage": found.peak_stage}


def gpus(cell: Cell) -> str:
    """The cell's processes as a GPU spec."""
    return "cpu" if cell.num_processes == 1 else f"{cell.num_processes}xcpu"


def measured(cell: Cell, *, repeats: int) -> dict[str, list[int]]:
    """The ranges of the first and of the steady peak."""
    found = measure(cell, repeats=repeats)
    return {state: found[f"{state}_peak_bytes"] for state in STATES}


def update(cells: Sequence[Cell], results: Mapping[str, Any], *, again: bool, repeats: int) -> dict[str, Any]:
    """``results`` with ``cells`` predicted, and measured where that is missing or asked for."""
    updated = dict(results)
    for cell in cells:
        old = {} if again else updated.get(cell.name, {})
        noisy = cell.strategy in ("fsdp2", "hsdp")
        entry = {
            "measured": old.get("measured") or measured(cell, repeats=repeats if noisy else 1),
            "predicted": {state: predict(cell, state) for state in STATES},
        }
        updated[cell.name] = entry
        print(cell.name, *(row_text(entry, state) for state in STATES), sep="  ", flush=True)
        RESULTS.write_text(json.dumps(updated, indent=1, sort_keys=True) + "\n")
    return updated


def row_error(entry: Mapping[str, Any], state: str) -> float | None:
    peak = entry["predicted"][state].get("peak_bytes")
    return None if peak is None else error_percent(peak, *entry["measured"][state])


def row_text(entry: Mapping[str, Any], state: str) -> str:
    error = row_error(entry, state)
    return entry["predicted"][state]["error"] if error is None else f"{state} {error:+.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="cells whose names contain this")
    parser.add_argument("--measure", action="store_true", help="measure again what was measured before")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a cell whose allocator is not deterministic")
    arguments = parser.parse_args()
    old = read_json(RESULTS)
    update(find(arguments.only), old, again=arguments.measure, repeats=arguments.repeats)
    page.write()


if __name__ == "__main__":
    main()
