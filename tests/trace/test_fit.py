"""Sizes seen at a few points become exact polynomials, or an error."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchkit.errors import TraceError
from launchkit.program import Point, Size, Term
from launchkit.scenario import Method
from launchkit.trace.fit import Fitter
from launchkit.trace.tracing import Lengths, trace_points
from tests.trace.models import LORA, key

BATCHED = trace_points(key())
RANKED = trace_points(key(**LORA))
SINGLE = trace_points(key(single_sequence=True))
ELSEWHERE = Point(7, 4096, 32)  # a point that is never traced

SIZES = [
    (),
    (Term(4096),),
    (Term(12, 1, 1),),
    (Term(4, 1, 2),),
    (Term(128, 0, 1),),
    (Term(8, 0, 2),),
    (Term(64, 1, 0), Term(12, 1, 1)),
    (Term(4, 1, 2), Term(12, 1, 1)),
    (Term(-16), Term(4, 1, 1)),
]


def seen(terms: tuple[Term, ...], points: tuple[Point, ...]) -> list[int]:
    return [Size(terms).at(point) for point in points]


@pytest.mark.parametrize("terms", SIZES)
def test_a_size_is_found_exactly(terms: tuple[Term, ...]) -> None:
    found = Fitter(BATCHED).fit(seen(terms, BATCHED), what="it")
    assert sorted(found.terms) == sorted(terms)


@pytest.mark.parametrize("terms", [(Term(128, 0, 0, 1),), (Term(4, 1, 1, 1),), (Term(64, 1, 1), Term(4, 1, 1, 1))])
def test_a_size_that_grows_with_the_rank_is_told_from_one_that_does_not(terms: tuple[Term, ...]) -> None:
    found = Fitter(RANKED).fit(seen(terms, RANKED), what="it")
    assert found.at(ELSEWHERE) == Size(terms).at(ELSEWHERE)


@given(
    coefficient=st.integers(1, 10**12),
    powers=st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 1)),
)
def test_one_monomial_is_right_everywhere(coefficient: int, powers: tuple[int, int, int]) -> None:
    size = Size((Term(coefficient, *powers),))
    assert Fitter(RANKED).fit([size.at(p) for p in RANKED], what="it") == size


@given(
    coefficients=st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)),
    length_powers=st.sampled_from([(0, 1), (1, 2)]),
)
@settings(max_examples=30)
def test_a_single_sequence_is_a_polynomial_in_length(
    coefficients: tuple[int, int], length_powers: tuple[int, int]
) -> None:
    size = Size(tuple(Term(c, 0, power) for c, power in zip(coefficients, length_powers, strict=True)))
    assert Fitter(SINGLE).fit([size.at(p) for p in SINGLE], what="it").at(ELSEWHERE) == size.at(ELSEWHERE)


@pytest.mark.parametrize(
    ("points", "width"), [(BATCHED, 4), (RANKED, 3), (SINGLE, 3)], ids=["full", "lora", "single sequence"]
)
def test_forms_are_told_apart(points: tuple[Point, ...], width: int) -> None:
    """Where any four columns are independent, two different sums of two monomials never agree at all points; where any
    three are, no monomial agrees with a sum of two others."""
    columns = Fitter(points)._columns
    for powers in combinations(columns, width):
        assert rank([[columns[p][i] for p in powers] for i in range(len(points))]) == width, powers


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([p.micro_batch**3 * p.seq_len for p in BATCHED], id="cubic in batch"),
        pytest.param([-(-p.seq_len // 128) * 128 * 4 for p in BATCHED], id="padded to 128"),
        pytest.param([100, 200, 300, 500], id="no form"),
    ],
)
def test_a_wrong_form_is_an_error(values: list[int]) -> None:
    with pytest.raises(TraceError, match=r"the size of the mask is no polynomial in batch and length .* at b=2 s=64"):
        Fitter(BATCHED).fit(values, what="the mask")


@pytest.mark.parametrize("terms", SIZES[1:])
@pytest.mark.parametrize("off_by", [-1, 1])
def test_one_byte_at_the_held_back_point_is_an_error(terms: tuple[Term, ...], off_by: int) -> None:
    values = seen(terms, BATCHED)
    values[-1] += off_by
    with pytest.raises(TraceError):
        Fitter(BATCHED).fit(values, what="it")


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("single", [False, True])
def test_the_held_back_point_is_further_out_than_all_others(method: Method, single: bool) -> None:
    *points, held_back = trace_points(key(method=method, single_sequence=single))
    assert held_back.seq_len > max(point.seq_len for point in points)
    assert held_back.micro_batch >= max(point.micro_batch for point in points)
    assert {point.micro_batch == 1 for point in (*points, held_back)} == {single}
    ranks = {point.lora_rank for point in points}
    assert ranks == {0} if method is Method.FULL else len(ranks) == 2


def test_points_lie_beyond_the_window() -> None:
    assert min(point.seq_len for point in trace_points(key(beyond_window=True), Lengths(window=100))) > 100


def rank(rows: list[list[int]]) -> int:
    """Of a matrix of whole numbers, by elimination."""
    matrix = [[Fraction(x) for x in row] for row in rows]
    found = 0
    for column in range(len(matrix[0])):
        pivot = next((i for i in range(found, len(matrix)) if matrix[i][column]), None)
        if pivot is None:
            continue
        matrix[found], matrix[pivot] = matrix[pivot], matrix[found]
        for i in range(found + 1, len(matrix)):
            factor = matrix[i][column] / matrix[found][column]
            matrix[i] = [x - factor * y for x, y in zip(matrix[i], matrix[found], strict=True)]
        found += 1
    return found
