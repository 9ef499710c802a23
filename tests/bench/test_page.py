"""The accuracy page: is it what its numbers make, and does it hide nothing?"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from bench.accuracy import page
from bench.accuracy.cell import Cell
from bench.accuracy.rows import PUBLISHED, RESULTS, RIVALS, TRACES, Row
from tests.bench.evidence import FLAGS, GIB, row

LOCAL_PATH = re.compile(r"(?<![\w.~-])/(?:tmp|home|root|work|opt|var|usr|mnt|Users)/")


def evidence(*rows: Row, rivals: dict[str, dict[str, int]] | None = None) -> page.Evidence:
    return page.Evidence(results={}, rows=rows, rivals={"published": rivals or {}}, traces={}, cells=())


def test_the_page_and_its_picture_are_what_the_numbers_make() -> None:
    """If this fails: python -m bench.accuracy.page"""
    found = page.Evidence.read()
    assert page.PAGE.read_text(encoding="utf-8") == page.page(found)
    assert page.PICTURE.read_text(encoding="utf-8") == page.picture(found)


@pytest.mark.parametrize(
    "path", [PUBLISHED, RESULTS, RIVALS, TRACES, page.PAGE, page.PICTURE], ids=lambda path: path.name
)
def test_nothing_names_a_place_on_this_machine(path: page.Path) -> None:
    assert LOCAL_PATH.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([], ("0", "–", "–", "–")),
        ([-2.0], ("1", "2.0 %", "2.0 %", "2.0 %")),
        ([1.0, -3.0, 2.0, 4.0], ("4", "2.5 %", "4.0 %", "4.0 %")),
        ([float(error) for error in range(1, 21)], ("20", "10.5 %", "19.0 %", "20.0 %")),
    ],
)
def test_a_spread_is_of_absolute_errors(errors: Sequence[float], expected: tuple[str, ...]) -> None:
    assert page.spread(errors) == expected


def test_wrong_outcomes_are_listed_by_id() -> None:
    text = page.outcomes(
        [
            row(id="oom-fit", ran_out=True, measured_bytes=0),
            row(id="oom-may", ran_out=True, measured_bytes=0, fits=False),
            row(id="ran-misfit", measured_bytes=0, fits=False, may_fit=False),
            row(id="measured-fit"),
            row(id="measured-fit-device", metric="device"),
            row(id="skipped", skipped="loss: fused", ran_out=True),
        ]
    )
    assert "| ran out of memory | 2 | 1 | 1 | 0 |" in text
    assert "| ran, outcome only | 1 | 0 | 0 | 1 |" in text
    assert "| ran, peak measured | 1 | 1 | 0 | 0 |" in text
    assert "Ran out of memory, called a fit: oom-fit." in text
    assert "Ran, called a misfit: ran-misfit." in text


def test_the_range_is_checked_on_reserved_and_device_figures() -> None:
    text = page.range_check(
        [
            row(metric="device"),
            row(metric="device", measured_bytes=12 * GIB),
            row(metric="reserved", low_bytes=8 * GIB, high_bytes=12 * GIB),
            row(metric="allocated", measured_bytes=20 * GIB),
        ]
    )
    assert "| transformers | device | 2 | 1 (50 %) | ± 10.0 % | ± 10.0 % |" in text
    assert "| transformers | reserved | 1 | 1 (100 %) | ± 20.0 % | ± 20.0 % |" in text
    assert "allocated" not in text


@pytest.mark.parametrize(
    ("fields", "is_missed"),
    [
        ({"predicted_bytes": 10 * GIB}, False),
        ({"predicted_bytes": 11 * GIB}, True),
        ({"predicted_bytes": int(10.9 * GIB), "flags": FLAGS | {"strategy": "zero2"}}, False),
        ({"metric": "device", "predicted_bytes": 11 * GIB}, False),
        ({"metric": "device", "measured_bytes": 12 * GIB}, True),
    ],
)
def test_misses_are_listed_with_their_cause(fields: dict[str, object], is_missed: bool) -> None:
    text = page.misses(evidence(row(id="hfdoc-x", **fields)))
    assert ("hfdoc-x" in text) == is_missed
    assert ("torch 1" in text) == is_missed


def test_rows_without_a_prediction_are_counted_by_reason() -> None:
    skipped = [row(skipped="loss: fused"), row(skipped="loss: fused"), row(skipped="method: ia3"), row()]
    assert page.not_compared(skipped).splitlines()[2:] == ["| loss: fused | 2 |", "| method: ia3 | 1 |"]


def test_rivals_stand_beside_our_error_on_their_rows_only() -> None:
    far = row(id="far", predicted_bytes=20 * GIB)
    text = page.rivals_summary(evidence(row(id="near"), far, rivals={"near": {"DeepSpeed": 5 * GIB}}))
    assert "| DeepSpeed | published runs | 1 | 50.0 % | 50.0 % | 50.0 % | 1 | 0.0 % | 0.0 % | 0.0 % |" in text
    assert "| accelerate | published runs | 0 | – | – | – | 0 | – | – | – |" in text


def test_other_code_is_summarised_apart() -> None:
    text = page.published_summary(evidence(row(id="one"), row(id="two", group="litgpt", confidence="low")))
    assert "| like with like | a: one GPU, full fine-tune | allocated | high | 1 |" in text
    assert "| litgpt | a: one GPU, full fine-tune | allocated | medium, low | 1 |" in text


def test_a_refused_cell_keeps_its_measured_number_and_the_reason() -> None:
    cell = Cell(name="odd", config={})
    results = {"odd": {"measured": {"steady": [2**20, 2**21]}, "predicted": {"steady": {"error": "no such; do x"}}}}
    found = page.Evidence(results=results, rows=(), rivals={}, traces={}, cells=(cell,))
    assert page.cell_line(found, cell, "steady")[:3] == ("1.00 – 2.00", "–", "no such")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "single full bf16 adamw_torch 4×512 sdpa"),
        (
            {"method": "lora", "lora_rank": 8, "checkpointing": "full", "loss": "liger"},
            "single lora rank 8 bf16 adamw_torch 4×512 sdpa checkpointing full liger loss",
        ),
        ({"strategy": "zero3", "offload": "all"}, "zero3 full bf16 adamw_torch 4×512 sdpa offload all"),
    ],
)
def test_a_configuration_in_a_few_words(fields: dict[str, object], expected: str) -> None:
    assert page.configuration(FLAGS | fields) == expected
