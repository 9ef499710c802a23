"""The glossary: whole, consistent, and found by every name a user may have read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from launchkit.errors import UsageError
from launchkit.plan import Estimate, StepTime
from launchkit.program import Owner
from launchkit.report.explain import ENGINES_PAGE, TERMS, Term, find_term, render_term, render_terms
from launchkit.report.text import Canvas
from launchkit.request import FLAGS
from launchkit.scenario import StrategyKind


@pytest.mark.parametrize("owner", [*Owner, "cuda_context", "nccl", "fragmentation"])
def test_every_owner_of_memory_is_explained(owner: str) -> None:
    assert find_term(owner).name == owner


@pytest.mark.parametrize("kind", StrategyKind)
def test_every_strategy_is_explained(kind: StrategyKind) -> None:
    assert find_term(kind).name == kind


@pytest.mark.parametrize("name", [field.name for field in (*fields(Estimate), *fields(StepTime))])
def test_every_number_of_an_estimate_is_explained(name: str) -> None:
    spoken_of_elsewhere = {"at_peak", "steady_bytes", "validated", "compute_seconds", "tokens_per_second_per_gpu"}
    assert name in spoken_of_elsewhere or find_term(name)


@pytest.mark.parametrize(
    "choice", [choice for flag in FLAGS for choice in flag.choices if flag.name in ("precision", "method")]
)
def test_values_of_flags_are_explained(choice: str) -> None:
    assert find_term(choice)


def test_cross_references_lead_somewhere() -> None:
    for term in TERMS:
        for name in term.see:
            assert find_term(name).name == name


def test_no_word_means_two_things() -> None:
    words = [word.lower() for term in TERMS for word in {term.name.lower(), *map(str.lower, term.also)}]
    assert sorted(words) == sorted(set(words))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("LOGITS", "logits"), ("gathered weights", "gathered_weights"), ("peak-phase", "worst moment")],
)
def test_spelling_is_forgiven(name: str, expected: str) -> None:
    assert find_term(name).name == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logitz", "'logitz' is no term of launchkit; did you mean logits?"),
        ("qqqq", "launchkit explain lists them all"),
    ],
)
def test_unknown_term_is_one_line(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        find_term(name)


@pytest.mark.parametrize("width", [50, 80, 120])
def test_terms_keep_the_width(width: int) -> None:
    canvas = Canvas(width=width)
    for text in (*(render_term(term, canvas=canvas) for term in TERMS), render_terms(canvas=canvas)):
        assert max(len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize("term", [term for term in TERMS if term.page], ids=lambda term: term.name)
def test_pages_are_there(term: Term) -> None:
    assert (Path(__file__).parents[2] / term.page).is_file()
    assert render_term(term, canvas=Canvas()).endswith(f" read         {term.page}\n")


@pytest.mark.parametrize("kind", [kind for kind in StrategyKind if kind is not StrategyKind.SINGLE])
def test_every_engine_leads_to_the_page_that_compares_them(kind: StrategyKind) -> None:
    assert find_term(kind).page == ENGINES_PAGE
