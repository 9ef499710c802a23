"""Lengths of a data set, summed up."""

from __future__ import annotations

import random

import pytest

from launchkit.lengths import COUNTED_BY_TOKENIZER, MOST_QUANTILES, Lengths


def lengths(*values: int) -> Lengths:
    return Lengths.of(list(values), path="a.jsonl", counted_by=COUNTED_BY_TOKENIZER)


def test_what_a_few_examples_say() -> None:
    few = lengths(30, 10, 20, 40)
    assert (few.num_examples, few.total_tokens, few.mean, few.longest) == (4, 100, 25, 40)
    assert few.quantiles == (10, 20, 30, 40)
    assert [few.quantile(share) for share in (0.0, 0.25, 0.5, 1.0)] == [10, 10, 20, 40]
    assert [few.num_longer(length) for length in (5, 10, 35, 40)] == [4, 3, 1, 0]


def test_many_examples_keep_their_ends() -> None:
    source = random.Random(7)
    values = [source.randint(50, 4000) for _ in range(20_000)] + [9999]
    many = lengths(*values)
    assert len(many.quantiles) == MOST_QUANTILES
    assert (many.quantiles[0], many.longest, many.total_tokens) == (min(values), 9999, sum(values))
    assert many.num_longer(5000) == 1  # one in 20,001 is not rounded away
    assert many.num_longer(2000) == pytest.approx(sum(value > 2000 for value in values), rel=0.01)


@pytest.mark.parametrize("num_sequences", [1, 2, 8])
def test_the_width_of_a_batch_is_that_of_random_ones(num_sequences: int) -> None:
    source = random.Random(3)
    values = [round(source.lognormvariate(5.5, 0.8)) + 1 for _ in range(4000)]
    widths = [min(1024, max(source.choices(values, k=num_sequences))) for _ in range(20_000)]
    expected = sum(widths) / len(widths)
    assert lengths(*values).padded_tokens(num_sequences, seq_len=1024) == pytest.approx(expected, rel=0.02)


def test_rows_are_examples_or_what_they_fill() -> None:
    few = lengths(30, 10, 20, 45)
    assert few.num_rows(seq_len=25, packing=False) == 4
    assert few.num_rows(seq_len=25, packing=True) == 4  # 105 tokens; the short last row goes
    assert few.num_rows(seq_len=1000, packing=True) == 1
