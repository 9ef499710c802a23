"""The picture of the accuracy page."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from bench.accuracy import plot
from bench.accuracy.rows import CLASSES
from tests.bench.evidence import comparison

AXES = plot.Axes(left=10.0, low=1.0, high=100.0)


def panel(*points: plot.Comparison) -> plot.Panel:
    return plot.Panel(title="runs", unit="bytes", unit_bytes=1, points=points)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(8.0, 60.0, (10, 20, 50)), (0.5, 1.5, (0.5, 1)), (3.0, 4.0, ()), (1.0, 2.0, (1, 2))]
)
def test_ticks_are_1_2_and_5(low: float, high: float, expected: tuple[float, ...]) -> None:
    assert plot.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "share"), [(1.0, 0.0), (10.0, 0.5), (100.0, 1.0)])
def test_axes_are_logarithmic(value: float, share: float) -> None:
    assert AXES.x(value) == pytest.approx(10.0 + share * plot.PANEL)
    assert AXES.y(value) == pytest.approx(plot.TOP + (1 - share) * plot.PANEL)


def test_an_answer_beyond_the_axes_lies_on_the_edge() -> None:
    point = comparison(measured=10)
    x, y = plot.place(AXES, panel(point), point, 5000)
    assert (x, y) == pytest.approx((AXES.x(10), plot.TOP))


def test_of_a_measured_range_the_nearest_end_counts() -> None:
    point = comparison(measured_low_bytes=10, measured_high_bytes=20, predicted=15)
    assert plot.place(AXES, panel(point), point, 15) == pytest.approx((AXES.x(15), AXES.y(15)))


def test_every_class_and_every_rival_has_a_mark_and_the_file_is_xml() -> None:
    points = [comparison(id=kind, kind=kind, rivals_bytes=dict.fromkeys(plot.RIVAL_MARKERS, 90)) for kind in CLASSES]
    points.append(comparison(id="litgpt", like_with_like=False))
    text = plot.svg([panel(*points)])
    ElementTree.fromstring(text)
    legend_marks = len(CLASSES) + 1
    assert text.count('class="mark ') == len(points) + legend_marks
    assert text.count('class="rival"') == len(CLASSES) * len(plot.RIVAL_MARKERS) + len(plot.RIVAL_MARKERS)
    assert "litgpt: +0.0 %" in text


def test_an_empty_panel_is_drawn() -> None:
    ElementTree.fromstring(plot.svg([panel()]))
