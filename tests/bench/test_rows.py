"""Errors, classes and what becomes a comparison."""

from __future__ import annotations

from typing import Any

import pytest

from bench.accuracy.cell import Cell
from bench.accuracy.cells import CELLS
from bench.accuracy.rows import (
    RESULTS,
    cell_comparisons,
    error_percent,
    kind_of,
    published_comparisons,
    read_json,
)
from tests.bench.evidence import FLAGS, row


@pytest.mark.parametrize(
    ("predicted", "low", "high", "error"),
    [(110, 100, 100, 10.0), (90, 100, 100, -10.0), (105, 100, 110, 0.0), (121, 100, 110, 10.0), (95, 100, 110, -5.0)],
)
def test_the_error_is_against_the_nearest_end(predicted: int, low: int, high: int, error: float) -> None:
    assert error_percent(predicted, low, high) == pytest.approx(error)


@pytest.mark.parametrize(
    ("strategy", "method", "kind"),
    [
        ("single", "full", "a"),
        ("single", "qlora", "b"),
        ("fsdp", "lora", "c"),
        ("hsdp", "full", "c"),
        ("zero3", "full", "d"),
        ("ddp", "lora", "d"),
    ],
)
def test_every_run_has_a_class(strategy: str, method: str, kind: str) -> None:
    assert kind_of(strategy=strategy, method=method) == kind


@pytest.mark.parametrize(
    "fields",
    [{"skipped": "loss: fused", "flags": {}}, {"metric": "outcome", "measured_bytes": 0}],
    ids=["no prediction", "no measured peak"],
)
def test_a_row_without_both_numbers_is_not_compared(fields: dict[str, Any]) -> None:
    assert published_comparisons([row(**fields)], {}) == ()


def test_a_published_row_takes_its_class_and_rivals_along() -> None:
    fsdp = row(id="one", flags=FLAGS | {"strategy": "fsdp"}, group="litgpt")
    (found,) = published_comparisons([fsdp], {"one": {"DeepSpeed": 7}, "two": {"DeepSpeed": 8}})
    assert (found.kind, found.rivals_bytes, found.like_with_like) == ("c", {"DeepSpeed": 7}, False)


def test_rivals_are_compared_with_the_steady_step_only() -> None:
    cells = (Cell(name="one", config={}), Cell(name="refused", config={}), Cell(name="absent", config={}))
    said = {"peak_bytes": 5, "stage": "optimizer"}
    results = {
        "one": {"measured": {"first": [4, 6], "steady": [8, 8]}, "predicted": {"first": said, "steady": said}},
        "refused": {"measured": {"first": [1, 1], "steady": [1, 1]}, "predicted": {"first": {"error": "no"}}},
    }
    first, steady = (
        cell_comparisons(results, cells, {"one": {"EleutherAI": 9}}, state=state) for state in ("first", "steady")
    )
    assert [(item.id, item.own_error_percent, item.rivals_bytes) for item in first] == [("one", 0.0, {})]
    assert [(item.id, item.own_error_percent, item.rivals_bytes) for item in steady] == [
        ("one", -37.5, {"EleutherAI": 9})
    ]


def test_what_was_measured_is_what_the_cells_say_today() -> None:
    """If this fails: python -m bench.accuracy.compare"""
    results = read_json(RESULTS)
    stale = [
        cell.name for cell in CELLS if cell.name in results and results[cell.name]["fingerprint"] != cell.fingerprint
    ]
    assert not stale
