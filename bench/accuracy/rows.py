"""What was measured beside what is said of it, read from the JSON files that the measuring programs leave here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.accuracy.cell import Cell

FOLDER = Path(__file__).parent
RESULTS, PUBLISHED, RIVALS, TRACES = (FOLDER / f"{name}.json" for name in ("results", "published", "rivals", "traces"))
STATES = ("first", "steady", "evaluation")
DEVICE_SUFFIX = "-device"  # of a row that says what the driver showed of the run of another row
CLASSES = {
    "a": "one GPU, full fine-tune",
    "b": "one GPU, LoRA or QLoRA",
    "c": "FSDP",
    "d": "ZeRO, offload, DDP",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published run and its prediction, in bytes; ``published.json`` is a list of these.

    ``measured_bytes`` is 0 where only the outcome is known. ``skipped`` is ``kind: value``, or empty where the run was
    predicted. ``group`` is ``transformers`` where the run executed the code that is traced, else what it executed.
    """

    id: str
    source: str
    group: str
    bench: str
    confidence: str
    metric: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    measured_bytes: int = 0
    ran_out: bool = False
    predicted_bytes: int = 0
    low_bytes: int = 0
    high_bytes: int = 0
    fits: bool = False
    may_fit: bool = False
    skipped: str = ""
    habits: Sequence[str] = ()  # what the run's code did in a step that today's does not, by ``past.Past``'s names

    @property
    def is_measured(self) -> bool:
        return bool(self.measured_bytes) and not self.skipped

    @property
    def verdict(self) -> str:
        """``fits``, ``may fit`` where the range holds both, or ``does not fit``."""
        return "fits" if self.fits else "may fit" if self.may_fit else "does not fit"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A measured peak, ours and the rivals' answers, in bytes. What was measured is a range where it varied.

    ``like_with_like`` is false where the run did not execute the code that is traced.
    """

    id: str
    kind: str
    measured_low_bytes: int
    measured_high_bytes: int
    predicted_bytes: int
    rivals_bytes: Mapping[str, int] = field(default_factory=dict)
    like_with_like: bool = True

    def error_percent(self, said_bytes: int) -> float:
        """Signed distance of an answer from what was measured, in per cent of its nearest end."""
        return error_percent(said_bytes, self.measured_low_bytes, self.measured_high_bytes)

    @property
    def own_error_percent(self) -> float:
        return self.error_percent(self.predicted_bytes)


def error_percent(predicted: int, low: int, high: int) -> float:
    """Signed distance of the prediction from the measured range, in per cent of its nearest end."""
    nearest = min(max(predicted, low), high)
    return 100.0 * (predicted - nearest) / nearest


def kind_of(*, strategy: str, method: str) -> str:
    """The class of a run, one of ``CLASSES``."""
    if strategy in ("fsdp", "fsdp2", "hsdp"):
        return "c"
    if strategy != "single":
        return "d"
    return "a" if method == "full" else "b"


def read_json(path: Path) -> Any:
    """The document in ``path``, and an empty one where it has not been made yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def published_rows(documents: Iterable[Mapping[str, Any]]) -> tuple[Row, ...]:
    """The rows of ``published.json``."""
    return tuple(Row(**document) for document in documents)


def published_comparisons(rows: Sequence[Row], rivals: Mapping[str, Mapping[str, int]]) -> tuple[Comparison, ...]:
    """The published rows that have both a measured peak and a prediction."""
    return tuple(
        Comparison(
            id=row.id,
            kind=kind_of(strategy=row.flags["strategy"], method=row.flags["method"]),
            measured_low_bytes=row.measured_bytes,
            measured_high_bytes=row.measured_bytes,
            predicted_bytes=row.predicted_bytes,
            rivals_bytes=rivals.get(row.id, {}),
            like_with_like=row.group == "transformers",
        )
        for row in rows
        if row.is_measured
    )


def cell_comparisons(
    results: Mapping[str, Any], cells: Sequence[Cell], rivals: Mapping[str, Mapping[str, int]], *, state: str
) -> tuple[Comparison, ...]:
    """The CPU cells that were measured and predicted, in one of ``STATES``. Rivals know of steady steps only."""
    return tuple(
        Comparison(
            id=cell.name,
            kind=kind_of(strategy=cell.strategy, method=cell.method),
            measured_low_bytes=results[cell.name]["measured"][state][0],
            measured_high_bytes=results[cell.name]["measured"][state][1],
            predicted_bytes=results[cell.name]["predicted"][state]["peak_bytes"],
            rivals_bytes=rivals.get(cell.name, {}) if state == "steady" else {},
        )
        for cell in cells
        if "peak_bytes" in results.get(cell.name, {}).get("predicted", {}).get(state, {})
    )
