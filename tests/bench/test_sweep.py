"""A swept model misses a bar for its size, its seconds or its reason, and for nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.sweep import Outcome, known_counts, misses


@pytest.mark.parametrize(
    ("outcome", "counts", "missed"),
    [
        (Outcome(name="it", num_parameters=7, seconds=5.9), {7, 8}, []),
        (Outcome(name="it", num_parameters=7, seconds=5.9), set(), []),
        (Outcome(name="it", num_parameters=6), {7}, ["6 parameters, not 7"]),
        (Outcome(name="it", num_parameters=7, seconds=6.5), {7}, ["6.5 s, more than 6"]),
        (Outcome(name="it", num_parameters=7, num_active_parameters=2, seconds=11.9), {7}, []),
        (Outcome(name="it", num_parameters=7, num_active_parameters=2, seconds=12.5), {7}, ["12.5 s, more than 12"]),
        (Outcome(name="it", reason="no class; name one"), {7}, []),
        (Outcome(name="it", reason="Traceback\nof some kind"), {7}, ["its reason takes more than one line"]),
    ],
)
def test_bars(outcome: Outcome, counts: set[int], missed: list[str]) -> None:
    assert misses(outcome, counts) == missed


def test_counts_are_taken_where_the_table_is_sure(tmp_path: Path) -> None:
    rows = [
        "id\tn_params_counted\tn_params_published\tmatch",
        "a/b\t1\t2\texact_after_adjustment",
        "c/d\t3\t4\tMISMATCH",
    ]
    (tmp_path / "models.tsv").write_text("\n".join(rows))
    assert known_counts(tmp_path / "models.tsv") == {"a/b": {1, 2}}
    assert known_counts(tmp_path / "none.tsv") == {}
