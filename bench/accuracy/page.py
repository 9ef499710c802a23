"""Writes ``docs/accuracy.md`` and ``docs/accuracy.svg`` from the JSON files here: ``python -m bench.accuracy.page``.

Nothing is measured or predicted here. ``compare`` and ``published`` call this when they have written their results.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.accuracy import plot
from bench.accuracy.cell import Cell
from bench.accuracy.cells import CELLS
from bench.accuracy.rows import (
    CLASSES,
    DEVICE_SUFFIX,
    PUBLISHED,
    RESULTS,
    RIVALS,
    STATES,
    TRACES,
    Comparison,
    Row,
    cell_comparisons,
    error_percent,
    published_comparisons,
    published_rows,
    read_json,
)
from launchkit.units import GIB, MIB

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, PICTURE = DOCS / "accuracy.md", DOCS / "accuracy.svg"
TOOLS = ("accelerate", "DeepSpeed", "EleutherAI", "llm-analysis")
RANGED = ("reserved", "device")  # metrics that the printed range is about
CELL_MISS_PERCENT = 0.5
MISS_PERCENT = {"a": 5.0, "b": 5.0, "c": 10.0, "d": 10.0}
SPREAD_HEADERS = ("rows", "median", "90th percentile", "worst")

# Why rows miss, by the beginning of their id, as far as it is known.
CAUSES = {
    "sp-zero3-checkpointing": "gloo's copy within one gather (172 KiB), and what the profiler misses of it",
    "zero3-lora-checkpointing-bf16": "DeepSpeed's linear layer keeps the head's input (32 KiB), which the program of "
    "adapters on all layers leaves out",
    "zero3-lora-attention-bf16": "64 KiB of weights that DeepSpeed gathers later than predicted: one block's queries, "
    "keys and values; why is not known",
    "images-fsdp2-qwen2_5_vl": "120 KiB, as much as fp32 copies of the vision tower's rotary tables, which FSDP2 "
    "casts to bf16 at each block's door and the block widens; not confirmed",
    "images-zero3-lora-smolvlm": "64 KiB, as much as in zero3-lora-attention-bf16",
    "hfdoc-": "torch 1: zeroed gradients stay allocated (1.2 GiB in fp32), the context holds every kernel (1.3 GiB, "
    "not 0.4); together 2.1 of the 3.4 GiB that hfdoc-bertl-bs4 lacks, the rest not known",
}
UNEXPLAINED = "not known"
FUSED_LOSS = (
    "the Triton loss and norms of others, imitated: about one more block as large as the fp32 logits is reserved"
)

INTRODUCTION = """\
# Predicted beside measured

![Predicted against measured memory](accuracy.svg)

Peak memory of real training steps, and what `launchkit estimate` says of the same scenario. No number here is fitted to
a row. The dashed line is equality, the band ten per cent around it; a rival beyond the axes is drawn on the edge.

**CPU cells** are small random models, trained here with torch's own allocator watched by
`torch.profiler(profile_memory=True)`, several processes over gloo. *First* is the first step, in which the optimizer's
states come into being; *steady* the third. Of several ranks the largest counts. Under FSDP2 the profiler misses the
freeing of some of gloo's buffers, which then stay in its counter: the range is what that leaves open, and the error is
against the nearest end of it. Under ZeRO nearly all of these bytes are DeepSpeed's buckets, which have their full size
whatever the model's: there a small error says little. oneDNN is off (`torch.backends.mkldnn.enabled = False`) but in
cells named `onednn-`: within one bf16 product or convolution it takes and returns scratch that CUDA has no part in, up
to 26 % of a tiny model's peak (`arch-vit-fp32`). `estimate --gpus cpu` runs each product once to see what it takes
(`launchkit/trace/asking.py`), which holds for the machine it runs on: on another one the `onednn-` rows differ. Cells
named `combined-` are those that a random grid over everything that a cell can say found wrong. The cells say whether
the sequence of allocations is right. They say nothing of what only CUDA has: the rounding and caching of its allocator,
flash attention, cuBLAS workspaces, the context.

**Published runs** are GPU runs that others measured and described. Like is compared with like: *allocated* and
*reserved* are torch's counters, *device* is what the driver counts, context included. A run is *like with like* where
it executed the code that is traced, which is transformers' under torch 2. Where that was an older version or came with
kernels of its own, the step is traced with the habits of that code, each read in its source (`bench/accuracy/past.py`;
`habits` of a row); today's versions have most of them no more. Where the loss was a Triton kernel, what the
driver showed is told apart: the tensors are those of the kernel, the order of its blocks is not known. Apart from these
stand

- other implementations of the same models (litgpt and others): the kernels of their steps differ;
- runs under torch 1 (the transformers documentation's on a V100): it set gradients to zero between steps instead of
  freeing them (`zero_grad` without `set_to_none`), and its context held every kernel, 1.3 GiB, loaded eagerly.

Reproduce a cell with `python -m bench.accuracy.compare --measure --only NAME`. The `flags` of a published row in
`bench/accuracy/published.json` are the flags of `launchkit estimate`, which knows no `habits`. The numbers of this page
are in that file and in `results.json`, `rivals.json` and `traces.json` beside it.
"""

RIVALS_INTRODUCTION = """\
## Other tools on the same rows

Each with the settings that serve it best and on the rows that it can say something of; none knows LoRA. *Too low*
counts answers more than a tenth below what was measured. The last three columns are launchkit's on those rows. Cells
are steady steps.

| tool | what is asked | what it includes |
| --- | --- | --- |
| accelerate | `accelerate estimate-memory`, *Training using Adam* | weights, gradients, Adam's states; batch of one |
| DeepSpeed | `estimate_zero2_` and `estimate_zero3_model_states_mem_needs` | sharded states; no activations, buckets |
| EleutherAI | `calc_transformer_mem.py`, by its formulas | states, DeepSpeed's buckets, activations; no logits |
| llm-analysis | `LLMAnalysis.training` | states, activations, one copy of the logits |
"""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything the page is made of, as the JSON files hold it."""

    results: Mapping[str, Any]
    rows: tuple[Row, ...]
    rivals: Mapping[str, Any]
    traces: Mapping[str, Any]
    cells: tuple[Cell, ...] = CELLS

    @classmethod
    def read(cls) -> Evidence:
        return cls(
            results=read_json(RESULTS),
            rows=published_rows(read_json(PUBLISHED)),
            rivals=read_json(RIVALS),
            traces=read_json(TRACES),
        )

    @cached_property
    def by_state(self) -> Mapping[str, tuple[Comparison, ...]]:
        """The cells' comparisons in each of ``STATES``."""
        said = self.rivals.get("cells", {})
        return {state: cell_comparisons(self.results, self.cells, said, state=state) for state in STATES}

    @cached_property
    def published(self) -> tuple[Comparison, ...]:
        return published_comparisons(self.rows, self.rivals.get("published", {}))

    @cached_property
    def row_by_id(self) -> Mapping[str, Row]:
        return {row.id: row for row in self.rows}


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(errors: Iterable[float], *, digits: int = 1) -> tuple[str, ...]:
    """Count, median, 90th percentile and worst of absolute errors in per cent."""
    ordered = sorted(abs(error) for error in errors)
    if not ordered:
        return ("0", "–", "–", "–")
    ninetieth = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return (str(len(ordered)), *(f"{e:.{digits}f} %" for e in (statistics.median(ordered), ninetieth, ordered[-1])))


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """The items by key, keys in order."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return dict(sorted(groups.items()))


def cell_summary(evidence: Evidence) -> str:
    """The cells' errors by strategy, first and steady steps together."""
    strategies = {cell.name: cell.strategy for cell in evidence.cells}
    compared = [comparison for state in STATES for comparison in evidence.by_state[state]]
    lines = [
        (name, *spread((item.own_error_percent for item in items), digits=2))
        for name, items in grouped(compared, lambda item: strategies[item.id]).items()
    ]
    lines.append(("all", *spread((item.own_error_percent for item in compared), digits=2)))
    return table(("strategy", *SPREAD_HEADERS), lines)


def published_summary(evidence: Evidence) -> str:
    """The published runs' errors by class, metric and trust in the row, each kind of other code by itself."""

    def key(item: Comparison) -> tuple[str, str, str, str]:
        row = evidence.row_by_id[item.id]
        group = "" if item.like_with_like else row.group
        return group, item.kind, row.metric, "high" if row.confidence == "high" else "medium, low"

    lines = [
        (
            *(group or "like with like", f"{kind}: {CLASSES[kind]}", metric, confidence),
            *spread(item.own_error_percent for item in items),
        )
        for (group, kind, metric, confidence), items in grouped(evidence.published, key).items()
    ]
    return table(("runs", "class", "metric", "confidence", *SPREAD_HEADERS), lines)


def outcomes(rows: Sequence[Row]) -> str:
    """What was said of runs that ran out of memory and of runs that ran, with the ids of what was said wrongly."""
    judged = [row for row in rows if not row.skipped and not row.id.endswith(DEVICE_SUFFIX)]
    groups = {
        "ran out of memory": [row for row in judged if row.ran_out],
        "ran, outcome only": [row for row in judged if not row.ran_out and not row.measured_bytes],
        "ran, peak measured": [row for row in judged if not row.ran_out and row.measured_bytes],
    }
    verdicts = ("fits", "may fit", "does not fit")
    lines = []
    for name, members in groups.items():
        counts = Counter(row.verdict for row in members)
        lines.append((name, str(len(members)), *(str(counts[verdict]) for verdict in verdicts)))
    wrong = {
        "Ran out of memory, called a fit": [row.id for row in judged if row.ran_out and row.verdict == "fits"],
        "Ran, called a misfit": [row.id for row in judged if not row.ran_out and row.verdict == "does not fit"],
    }
    listed = "".join(f"\n{name}: {', '.join(ids) or 'none'}.\n" for name, ids in wrong.items())
    return table(("run", "runs", *(f"called: {verdict}" for verdict in verdicts)), lines) + listed


def range_check(rows: Sequence[Row]) -> str:
    """How many reserved and device figures lie inside the printed range, and how wide it is."""
    ranged = [row for row in rows if row.is_measured and row.metric in RANGED]
    lines = []
    for (group, metric), members in grouped(ranged, lambda row: (kernels_of(row), row.metric)).items():
        inside = sum(is_inside(row) for row in members)
        widths = [100 * (row.high_bytes - row.low_bytes) / (2 * row.predicted_bytes) for row in members]
        width = f"± {statistics.median(widths):.1f} %", f"± {max(widths):.1f} %"
        lines.append((group, metric, str(len(members)), f"{inside} ({100 * inside / len(members):.0f} %)", *width))
    return table(("runs", "metric", "rows", "inside the range", "median width", "widest"), lines)


def kernels_of(row: Row) -> str:
    """The code that a row's run executed, and whether its loss was a kernel of others, which is imitated here."""
    return f"{row.group}, a fused loss imitated" if "fused_loss" in row.habits else row.group


def is_inside(row: Row) -> bool:
    return row.low_bytes <= row.measured_bytes <= row.high_bytes


def traces(found: Mapping[str, Any]) -> str:
    """The allocator on recorded traces, in a sentence."""
    exact = sum(trace["is_exact"] for trace in found.values())
    events = sum(trace["num_events"] for trace in found.values())
    return (
        f"{exact} of {len(found)} recorded CUDA traces replayed exactly, every segment and the reserved peak to the "
        f"byte, over {events:,} requests: `python -m bench.allocator FOLDER --write`.\n"
    )


def rivals_summary(evidence: Evidence) -> str:
    """Errors of each tool, and ours on the same rows."""
    sources = {"CPU cells": evidence.by_state["steady"], "published runs": evidence.published}
    lines = []
    for source, comparisons in sources.items():
        for tool in TOOLS:
            known = [item for item in comparisons if tool in item.rivals_bytes]
            theirs = [item.error_percent(item.rivals_bytes[tool]) for item in known]
            too_low = str(sum(error < -10 for error in theirs))
            ours = spread(item.own_error_percent for item in known)[1:]
            lines.append((tool, source, *spread(theirs), too_low, *ours))
    return table(("tool", "rows of", *SPREAD_HEADERS, "too low", "our median", "our 90th", "our worst"), lines)


def misses(evidence: Evidence) -> str:
    """Every row that misses: cells by half a per cent, published runs by their class's limit or outside their range."""
    lines = [
        (f"{item.id}, {state}", f"{item.own_error_percent:+.2f} %", cause(item.id))
        for state in STATES
        for item in evidence.by_state[state]
        if abs(item.own_error_percent) > CELL_MISS_PERCENT
    ]
    lines += [
        (item.id, f"{item.own_error_percent:+.1f} %", cause_of_run(evidence.row_by_id[item.id]))
        for item in evidence.published
        if is_miss(item, evidence.row_by_id[item.id])
    ]
    return table(("row", "error", "cause"), lines)


def is_miss(item: Comparison, row: Row) -> bool:
    """A figure that has a range misses outside it, another one beyond its class's limit."""
    return not is_inside(row) if row.metric in RANGED else abs(item.own_error_percent) > MISS_PERCENT[item.kind]


def cause(name: str) -> str:
    return next((text for prefix, text in CAUSES.items() if name.startswith(prefix)), UNEXPLAINED)


def cause_of_run(row: Row) -> str:
    return FUSED_LOSS if row.metric in RANGED and "fused_loss" in row.habits else cause(row.id)


def not_compared(rows: Sequence[Row]) -> str:
    """How many rows have no prediction, by reason."""
    counts = Counter(row.skipped for row in rows if row.skipped)
    return table(("reason", "rows"), ((reason, str(num)) for reason, num in sorted(counts.items())))


def cell_table(evidence: Evidence) -> str:
    """One line per cell and state."""
    lines = []
    for cell in evidence.cells:
        if cell.name not in evidence.results:
            continue
        for state in evidence.results[cell.name]["measured"]:
            lines.append((cell.name, state, *cell_line(evidence, cell, state)))
    headers = ("cell", "step", "measured MiB", "predicted MiB", "error", "peak in", *TOOLS)
    return table(headers, lines)


def cell_line(evidence: Evidence, cell: Cell, state: str) -> tuple[str, ...]:
    """Measured, predicted, error, where, and the rivals' answers to the steady step."""
    entry = evidence.results[cell.name]
    low, high = (f"{num_bytes / MIB:.2f}" for num_bytes in entry["measured"][state])
    measured = low if low == high else f"{low} – {high}"
    predicted = entry["predicted"][state]
    if "peak_bytes" not in predicted:
        return (measured, "–", predicted["error"].partition(";")[0], "", *[""] * len(TOOLS))
    error = error_percent(predicted["peak_bytes"], *entry["measured"][state])
    said = evidence.rivals.get("cells", {}).get(cell.name, {}) if state == "steady" else {}
    answers = (f"{said[tool] / MIB:.2f}" if tool in said else "" for tool in TOOLS)
    return (measured, f"{predicted['peak_bytes'] / MIB:.2f}", f"{error:+.2f} %", predicted["stage"], *answers)


def published_table(evidence: Evidence, *, like_with_like: bool) -> str:
    """One line per published run with a measured peak."""
    headers = (
        "id",
        "model",
        "GPUs",
        "configuration",
        "metric",
        "measured GiB",
        "predicted GiB",
        "range",
        "error",
        *TOOLS,
    )
    return table(
        (*headers, *TOOLS),
        (
            published_line(item, evidence.row_by_id[item.id])
            for item in evidence.published
            if item.like_with_like == like_with_like
        ),
    )


def published_line(item: Comparison, row: Row) -> tuple[str, ...]:
    low, high = row.low_bytes / GIB, row.high_bytes / GIB
    answers = (f"{item.rivals_bytes[tool] / GIB:.1f}" if tool in item.rivals_bytes else "" for tool in TOOLS)
    return (
        *(row.id, row.flags["model"], row.flags["gpus"], configuration(row.flags), row.metric),
        *(f"{row.measured_bytes / GIB:.2f}", f"{row.predicted_bytes / GIB:.2f}", f"{low:.2f} – {high:.2f}"),
        f"{item.own_error_percent:+.1f} %",
        *answers,
    )


def configuration(flags: Mapping[str, Any]) -> str:
    """A scenario in a few words: how it is spread, what is trained, batch × length."""
    method = flags["method"] if flags["method"] == "full" else f"{flags['method']} rank {flags['lora_rank']}"
    words = [flags["strategy"], method, flags["precision"], flags["optimizer"]]
    words += [f"{flags['micro_batch']}×{flags['seq_len']}", flags["attention"]]
    if flags["offload"] != "none":
        words.append(f"offload {flags['offload']}")
    if flags["checkpointing"] != "none":
        words.append(f"checkpointing {flags['checkpointing']}")
    if flags["loss"] != "plain":
        words.append(f"{flags['loss']} loss")
    return " ".join(words)


def outcome_table(rows: Sequence[Row]) -> str:
    """One line per run of which only the outcome is known."""
    return table(
        ("id", "model", "GPUs", "configuration", "outcome", "called", "range GiB"),
        (
            (
                *(row.id, row.flags["model"], row.flags["gpus"], configuration(row.flags)),
                "ran out" if row.ran_out else "ran",
                row.verdict,
                f"{row.low_bytes / GIB:.2f} – {row.high_bytes / GIB:.2f}",
            )
            for row in rows
            if not row.skipped and not row.measured_bytes
        ),
    )


def page(evidence: Evidence) -> str:
    """The whole of ``docs/accuracy.md``."""
    skipped = sum(bool(row.skipped) for row in evidence.rows)
    parts = [
        INTRODUCTION,
        "## CPU cells, by strategy\n",
        cell_summary(evidence),
        "## Published runs, by class\n",
        published_summary(evidence),
        "## Fits or not\n",
        outcomes(evidence.rows),
        "## Inside the printed range\n",
        range_check(evidence.rows),
        "## Allocator\n",
        traces(evidence.traces),
        RIVALS_INTRODUCTION,
        rivals_summary(evidence),
        "## Misses\n",
        "Cells beyond 0.5 %; allocated figures of published runs beyond 5 % in classes a and b and 10 % in c and d; "
        "reserved and device figures outside their range.\n",
        misses(evidence),
        "## Not compared\n",
        f"{skipped} of {len(evidence.rows)} published rows have no prediction.\n",
        not_compared(evidence.rows),
        "## Every CPU cell\n",
        cell_table(evidence),
        "## Every published run, like with like\n",
        published_table(evidence, like_with_like=True),
        "## Every published run of other code\n",
        published_table(evidence, like_with_like=False),
        "## Every outcome\n",
        outcome_table(evidence.rows),
    ]
    return "\n".join(parts)


def picture(evidence: Evidence) -> str:
    """The whole of ``docs/accuracy.svg``."""
    return plot.svg(
        (
            plot.Panel(title="CPU cells, steady step", unit="MiB", unit_bytes=MIB, points=evidence.by_state["steady"]),
            plot.Panel(title="Published GPU runs", unit="GiB", unit_bytes=GIB, points=evidence.published),
        )
    )


def write() -> None:
    """Both files anew."""
    evidence = Evidence.read()
    PAGE.write_text(page(evidence), encoding="utf-8")
    PICTURE.write_text(picture(evidence), encoding="utf-8")


if __name__ == "__main__":
    write()
