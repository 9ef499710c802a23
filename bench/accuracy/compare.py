"""Predicted beside measured for every cell: ``results.json`` here, and with it ``docs/accuracy.md``.

``python -m bench.accuracy.compare`` measures what ``results.json`` lacks, or has of a cell as it was before a change,
predicts anew and writes the page.
``--only TEXT`` restricts it to cells whose names contain TEXT, ``--measure`` measures those again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.accuracy import page
from bench.accuracy.cell import Cell
from bench.accuracy.cells import find
from bench.accuracy.measure import measure
from bench.accuracy.rows import RESULTS, STATES, error_percent, read_json
from launchkit import planner
from launchkit.api import find_cluster, find_source
from launchkit.errors import LaunchkitError
from launchkit.plan import Estimate
from launchkit.planner.evaluate import Bench
from launchkit.planner.evaluation import evaluation_peak
from launchkit.request import Request, resolve
from launchkit.simulate.memory import MemoryReading

FSDP = ("fsdp", "fsdp2", "hsdp")
FLAGS = (
    "method", "precision", "checkpointing", "attention", "optimizer", "trainer", "micro_batch", "seq_len", "packing",
    "padding", "images", "freeze",
)  # fmt: skip
ADAPTER_FLAGS = ("lora_rank", "lora_targets", "dora", "rslora", "lora_dropout", "lora_modules_to_save")


def predict(cell: Cell, state: str) -> dict[str, Any]:
    """What ``launchkit estimate`` says: peak bytes and where, or the reason why it says nothing."""
    flags: dict[str, Any] = {name: value for name, value in asdict(cell).items() if name in FLAGS and value != ""}
    flags |= {"strategy": cell.strategy, "gpus": gpus(cell)}
    if state != "evaluation":
        flags["state"] = state
    if cell.image_size:
        flags["image_size"] = cell.image_size
    if cell.method != "full":
        flags |= {name: getattr(cell, name) for name in ADAPTER_FLAGS if getattr(cell, name)}
    if cell.tp * cell.sp > 1:
        flags |= {"tp": cell.tp, "sp": cell.sp}
    if cell.strategy in FSDP:
        flags["fsdp_sharding"] = cell.sharding
        flags["fsdp_settings"] = _settings(cell.fsdp)
    if cell.strategy == "ddp":
        flags["ddp_settings"] = _settings(cell.ddp)
    if cell.strategy.startswith("zero"):
        flags["offload"] = cell.offload
        flags["zero_settings"] = _settings(cell.zero)
    if cell.gradient_accumulation_steps > 1:
        num_groups = cell.num_processes // (cell.tp * cell.sp)
        flags["global_batch"] = cell.micro_batch * cell.gradient_accumulation_steps * num_groups
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(cell.config))
        try:
            found = predicted(str(path), Request.from_flags(flags), cell, state=state)
        except LaunchkitError as error:
            return {"error": str(error)}
    return {"peak_bytes": found.allocated_peak_bytes, "stage": found.peak_stage}


def predicted(model: str, request: Request, cell: Cell, *, state: str) -> Estimate | MemoryReading:
    """What the planner says of a step of the request, or of an evaluation behind it, with the cell's own settings of
    the engine, which no flag says."""
    cluster = find_cluster(request.gpus)
    torch.set_num_threads(1)  # as the worker has it
    torch.backends.mkldnn.enabled = cell.onednn
    source = find_source(model, request)
    scenario = resolve(request, model=source.profile, cluster=cluster).scenario
    fsdp = replace(
        scenario.strategy.fsdp,
        use_orig_params=cell.use_orig_params,
        shard_group_size=cell.shard_group_size,
        float8_all_gather=cell.float8_all_gather,
    )
    scenario = replace(scenario, strategy=replace(scenario.strategy, fsdp=fsdp))
    if state == "evaluation":
        bench = Bench(source=source, cluster=cluster)
        return evaluation_peak(bench, scenario, micro_batch=cell.evaluation_micro_batch)
    return planner.estimate(source, cluster=cluster, scenario=scenario).estimate


def _settings(values: Mapping[str, Any]) -> str | None:
    """An engine's settings as they are typed."""
    return ",".join(f"{key}={value}" for key, value in values.items()) or None


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


def update(cells: Sequence[Cell], results: Mapping[str, Any], *, again: bool, repeats: int) -> dict[str, Any]:
    """``results`` with ``cells`` predicted, and measured where that is missing or asked for."""
    updated = dict(results)
    for cell in cells:
        old = updated.get(cell.name, {})
        if again or old.get("fingerprint") != cell.fingerprint:
            old = {}
        noisy = cell.strategy in (*FSDP, "ddp")  # gloo's thread may free what the profiler then takes to be live
        entry = {
            "fingerprint": cell.fingerprint,
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
