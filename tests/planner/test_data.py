"""What a data set decides of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchkit import planner
from launchkit.lengths import COUNTED_BY_TOKENIZER, Lengths
from launchkit.planner.data import FASTER, SLOWER, fit_to_data
from launchkit.report.plan import render_plan
from launchkit.report.text import Canvas
from launchkit.request import Request
from launchkit.serialize import document_text, plan_document, plan_from_text
from tests.builders import cluster, profile, scenario
from tests.planner.sources import WrittenSource


def lengths(*values: int, counted_by: str = COUNTED_BY_TOKENIZER) -> Lengths:
    return Lengths.of(list(values), path="dir/my.jsonl", counted_by=counted_by)


DATA = lengths(*[200] * 90, *[300] * 8, 400, 600)


@pytest.mark.parametrize(
    ("flags", "longest", "planned"),
    [
        ({}, 600, 600),
        ({}, 5000, 4096),  # the most that the model was made for
        ({"seq_len": 256}, 600, 256),
        ({"packing": True}, 600, None),
        ({"cp": 4}, 601, 608),
        ({"sp": 2}, 601, 602),
        ({"precision": "fp8", "fp8_backend": "te"}, 601, 608),
        ({}, 1, 2),
    ],
)
def test_length(flags: dict[str, object], longest: int, planned: int | None) -> None:
    model = profile(max_position_embeddings=4096)
    fitted = fit_to_data(Request.from_flags(flags), lengths(1, longest), model=model)
    assert fitted.request.seq_len == planned


def test_nothing_changes_without_data() -> None:
    request = Request(seq_len=None)
    assert fit_to_data(request, None, model=profile()).request is request


def test_what_is_said_of_lengths() -> None:
    model = profile(max_position_embeddings=500)
    notes = fit_to_data(Request(), lengths(*[100] * 298, 510, 520), model=model).notes
    assert notes[0] == "2 examples are cut at 500 tokens, the most that the model was made for"
    assert notes[1].startswith("2 examples are longer than 100 tokens: --seq-len 100 cuts them")
    guessed = fit_to_data(Request(), lengths(100, counted_by="estimated as a guess"), model=model).notes
    assert guessed == (
        "the model's tokenizer is not at hand: lengths are estimated as a guess; --seq-len sets your own",
    )


def test_one_epoch() -> None:
    source, on = WrittenSource(2), cluster(num_gpus=1)
    asked = scenario(seq_len=600, micro_batch=2, gradient_accumulation_steps=8, strategy="single")
    found = planner.estimate(source, cluster=on, scenario=asked, lengths=DATA)
    assert found.data is not None
    assert (found.data.num_rows, found.data.num_steps, found.data.num_truncated) == (100, 7, 0)
    # Batches of two are 228 tokens wide on average, and a step of 600 takes as much longer.
    width = DATA.padded_tokens(2, seq_len=600)
    narrow = planner.estimate(source, cluster=on, scenario=replace(asked, batch=replace(asked.batch, seq_len=width)))
    assert found.data.seconds == pytest.approx(7 * narrow.step.seconds)
    assert found.data.seconds < 7 * found.step.seconds
    assert (found.data.seconds_low, found.data.seconds_high) == (
        FASTER * found.data.seconds,
        SLOWER * found.data.seconds,
    )


def test_packed_rows_are_full() -> None:
    on, training = cluster(num_gpus=1), {"packing": True, "strategy": "single"}
    found = planner.estimate(
        WrittenSource(2), cluster=on, scenario=scenario(seq_len=512, **training), lengths=lengths(1000, 1000, 48)
    )
    assert found.data is not None
    assert (found.data.num_rows, found.data.num_steps, found.data.num_truncated) == (4, 4, 0)
    assert found.data.seconds == pytest.approx(4 * found.step.seconds)


def test_a_plan_shows_its_data_and_keeps_it() -> None:
    plan = planner.plan(
        WrittenSource(2), cluster=cluster(num_gpus=2), request=Request(data="dir/my.jsonl"), lengths=DATA
    )
    assert plan.chosen is not None and plan.chosen.scenario.batch.seq_len == 600
    assert "seq_len" not in plan.request  # it was not asked for
    assert plan_from_text(document_text(plan_document(plan)), name="plan") == plan
    screen = render_plan(plan, canvas=Canvas(width=100))
    assert "my.jsonl: 100 examples · 214 tokens each, the longest 600 · 4 steps an epoch" in screen
    assert "of the longest sequence (600 tokens)" in screen and "for one epoch" in screen
    assert "per epoch" in screen.split("also fits")[1]
