"""Flowing, folding and aligning text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchkit.report.text import Canvas, Ink, MemoryScale, bar, beside, columns, shorten, table
from launchkit.units import GIB, MIB


@pytest.mark.parametrize(
    ("items", "width", "expected"),
    [
        ([], 20, [">"]),
        (["one"], 20, ["> one"]),
        (["one", "two"], 20, ["> one · two"]),
        (["one", "two"], 10, ["> one ·", "  two"]),
        (["one long item"], 10, ["> one long", "  item"]),
        (["unbreakable_word"], 10, ["> unbreakable_word"]),
    ],
)
def test_flow_breaks_between_items(items: list[str], width: int, expected: list[str]) -> None:
    assert Canvas(width=width).flow(items, first="> ", rest="  ", separator=" · ") == expected


@given(
    words=st.lists(st.text("abcdefgh", min_size=1, max_size=12), min_size=1, max_size=40),
    width=st.integers(20, 120),
    colour=st.booleans(),
)
def test_flow_keeps_every_word_and_the_width(words: list[str], width: int, colour: bool) -> None:
    canvas = Canvas(width=width, colour=colour)
    lines = canvas.flow([canvas.paint(word, Ink.BAR) for word in words], first="   ", rest="   ", separator=" ")
    assert all(columns(line) <= width for line in lines)
    assert " ".join(Canvas().flow(lines)).count("\x1b[34m") == (len(words) if colour else 0)


def test_table_aligns_columns() -> None:
    assert table([["a", "1", "x"], ["bbb", "22", ""]], right=(1,)) == ["a     1  x", "bbb  22"]
    assert table([]) == []


def test_blocks_stand_side_by_side() -> None:
    assert beside(["a", "bb"], ["c"], gap=" | ") == ["a  | c", "bb |"]


@pytest.mark.parametrize(
    ("value", "of", "expected"), [(0, 10, ""), (0.01, 10, "▇"), (5, 10, "▇▇▇▇▇"), (10, 10, "▇" * 10), (1, 0, "")]
)
def test_bar_shows_anything_above_zero(value: float, of: float, expected: str) -> None:
    assert bar(value, of=of) == expected


@pytest.mark.parametrize(
    ("text", "width", "expected"), [("abcdef", 6, "abcdef"), ("abc def", 6, "abc d…"), ("abc def", 5, "abc…")]
)
def test_shorten_says_that_it_cut(text: str, width: int, expected: str) -> None:
    assert shorten(text, width=width) == expected


@pytest.mark.parametrize(
    ("largest", "value", "expected"),
    [(GIB, GIB // 2, "0.5 GiB"), (GIB - 1, 512 * MIB, "512 MiB"), (2 * GIB, MIB, "0.0 GiB")],
)
def test_memory_scale_has_one_unit(largest: int, value: int, expected: str) -> None:
    scale = MemoryScale(largest_bytes=largest)
    assert f"{scale.number(value)} {scale.unit}" == expected


def test_colour_can_be_switched_off() -> None:
    assert Canvas(colour=False).paint("x", Ink.GOOD) == "x"
    assert Canvas(colour=True).paint("x", Ink.GOOD) == "\x1b[1;32mx\x1b[0m"
