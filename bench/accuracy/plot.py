"""Predicted against measured, both logarithmic, as one SVG file of two panels; readable in light and dark.

Written by hand rather than by a plotting library: the same numbers give the same bytes, so that a test can say whether
the file in ``docs`` is stale, and the file follows the reader's colour scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.accuracy.rows import CLASSES, Comparison

PANEL, LEFT, TOP, GAP, MARGIN = 400.0, 64.0, 56.0, 84.0, 24.0  # px
WIDTH = LEFT + 2 * PANEL + GAP + MARGIN
LEGEND_TOP = TOP + PANEL + 66.0
HEIGHT = LEGEND_TOP + 62.0
BAND = 0.10
MARKERS = {"a": "circle", "b": "square", "c": "triangle", "d": "diamond"}
RIVAL_MARKERS = {"accelerate": "plus", "DeepSpeed": "cross", "EleutherAI": "minus", "llm-analysis": "bar"}

STYLE = """
  svg { --paper: #ffffff; --ink: #1f2328; --soft: #818b98; --grid: #e3e7ec; --band: #d8e6f5;
        --a: #0b62a8; --b: #c2570c; --c: #1a7f37; --d: #8250df; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --ink: #e6edf3; --soft: #7d8590; --grid: #262c34; --band: #16304d;
          --a: #58a6ff; --b: #f0883e; --c: #3fb950; --d: #bc8cff; } }
  text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
  .title { font-size: 14px; font-weight: 600; } .tick { fill: var(--soft); }
  .end { text-anchor: end; } .middle { text-anchor: middle; }
  .paper { fill: var(--paper); } .frame { fill: none; stroke: var(--soft); } .grid { stroke: var(--grid); }
  .band { fill: var(--band); } .equal { stroke: var(--soft); stroke-dasharray: 5 4; }
  .mark { stroke-width: 1.5; fill-opacity: .55; } .hollow { fill: var(--paper); fill-opacity: 0; }
  .a { stroke: var(--a); fill: var(--a); } .b { stroke: var(--b); fill: var(--b); }
  .c { stroke: var(--c); fill: var(--c); } .d { stroke: var(--d); fill: var(--d); }
  .hollow.a, .hollow.b, .hollow.c, .hollow.d { fill-opacity: 0; }
  .rival { stroke: var(--soft); stroke-width: 1.2; stroke-opacity: .75; fill: none; }
"""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One square plot: the points, and the unit that its axes count."""

    title: str
    unit: str
    unit_bytes: int
    points: Sequence[Comparison]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Where a panel lies and which values it spans, the same on both axes."""

    left: float
    low: float
    high: float

    def place(self, value: float) -> float:
        """Distance from the lower left corner, along either axis."""
        return PANEL * math.log(value / self.low) / math.log(self.high / self.low)

    def x(self, value: float) -> float:
        return self.left + self.place(value)

    def y(self, value: float) -> float:
        return TOP + PANEL - self.place(value)


def svg(panels: Sequence[Panel]) -> str:
    """The whole file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" '
        'aria-label="Predicted against measured memory">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH:.0f}" height="{HEIGHT:.0f}" rx="6"/>',
    ]
    for number, panel in enumerate(panels):
        parts += draw(panel, left=LEFT + number * (PANEL + GAP), name=f"panel{number}")
    return "\n".join([*parts, *legend(), "</svg>"]) + "\n"


def draw(panel: Panel, *, left: float, name: str) -> Iterator[str]:
    """The frame, the band and the marks of a panel. Ours lie over the rivals'."""
    values = [value / panel.unit_bytes for point in panel.points for value in extremes(point)] or [1.0, 2.0]
    axes = Axes(left=left, low=min(values) / 1.25, high=max(values) * 1.25)
    yield f'<clipPath id="{name}"><rect x="{left:.1f}" y="{TOP}" width="{PANEL}" height="{PANEL}"/></clipPath>'
    yield from grid(axes)
    yield from (f'<g clip-path="url(#{name})">', *band(axes), "</g>")
    for tool, shape in RIVAL_MARKERS.items():
        for point in panel.points:
            if tool in point.rivals_bytes:
                yield mark(shape, *place(axes, panel, point, point.rivals_bytes[tool]), css="rival", label="")
    for point in sorted(panel.points, key=lambda point: point.kind):
        css = f"mark {point.kind}" if point.like_with_like else f"mark hollow {point.kind}"
        label = f"{point.id}: {point.own_error_percent:+.1f} %"
        yield mark(MARKERS[point.kind], *place(axes, panel, point, point.predicted_bytes), css=css, label=label)
    yield f'<rect class="frame" x="{left:.1f}" y="{TOP}" width="{PANEL}" height="{PANEL}"/>'
    yield text(left, TOP - 16, panel.title, css="title")
    yield text(left + PANEL / 2, TOP + PANEL + 38, f"measured, {panel.unit}", css="middle")
    yield (
        f'<text class="middle" transform="translate({left - 44:.1f} {TOP + PANEL / 2:.1f}) rotate(-90)">'
        f"predicted, {panel.unit}</text>"
    )


def extremes(point: Comparison) -> tuple[int, int, int]:
    """What a panel must span: measured and predicted. Rivals further out lie on its edge."""
    return point.measured_low_bytes, point.measured_high_bytes, point.predicted_bytes


def place(axes: Axes, panel: Panel, point: Comparison, said_bytes: int) -> tuple[float, float]:
    """Where an answer is drawn; one beyond the axes is drawn on the edge."""
    measured = min(max(said_bytes, point.measured_low_bytes), point.measured_high_bytes) / panel.unit_bytes
    said = min(max(said_bytes / panel.unit_bytes, axes.low), axes.high)
    return axes.x(measured), axes.y(said)


def ticks(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 times the powers of ten between two values."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return tuple(value for e in exponents for step in (1, 2, 5) if low <= (value := step * 10.0**e) <= high)


def grid(axes: Axes) -> Iterator[str]:
    bottom, right = TOP + PANEL, axes.left + PANEL
    for value in ticks(axes.low, axes.high):
        x, y = axes.x(value), axes.y(value)
        yield f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}M{axes.left:.1f} {y:.1f}H{right:.1f}"/>'
        yield text(x, bottom + 17, f"{value:g}", css="tick middle")
        yield text(axes.left - 6, y + 4, f"{value:g}", css="tick end")


def band(axes: Axes) -> Iterator[str]:
    """Everything within ``BAND`` of equality, and equality itself."""
    low, high = axes.low / 2, axes.high * 2
    corners = ((low, low * (1 + BAND)), (high, high * (1 + BAND)), (high, high * (1 - BAND)), (low, low * (1 - BAND)))
    points = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in corners)
    yield f'<polygon class="band" points="{points}"/>'
    yield f'<path class="equal" d="M{axes.left:.1f} {TOP + PANEL:.1f}l{PANEL} {-PANEL}"/>'


SHAPES = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M-4-4h8v8h-8z",
    "triangle": "M0-5L5 4H-5z",
    "diamond": "M0-5.5L5 0L0 5.5L-5 0z",
    "plus": "M-4 0h8M0-4v8",
    "cross": "M-3-3l6 6M-3 3l6-6",
    "minus": "M-5 0h10",
    "bar": "M0-5v10",
}


def mark(shape: str, x: float, y: float, *, css: str, label: str) -> str:
    """A marker with its centre at a point; ``label`` shows under the pointer."""
    title = f"<title>{label}</title></path>" if label else "</path>"
    return f'<path class="{css}" transform="translate({x:.1f} {y:.1f})" d="{SHAPES[shape]}">{title}'


def text(x: float, y: float, content: str, *, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{content}</text>'


def legend() -> Iterator[str]:
    """Our classes in the first line, then what differs, then the rivals."""
    first, second, third = (LEGEND_TOP + 20.0 * line for line in range(3))
    for number, (kind, name) in enumerate(CLASSES.items()):
        x = LEFT + 210.0 * number
        yield mark(MARKERS[kind], x, first - 4, css=f"mark {kind}", label="")
        yield text(x + 12, first, f"{kind}: {name}", css="")
    yield mark("circle", LEFT, second - 4, css="mark hollow a", label="")
    yield text(LEFT + 12, second, "hollow: executed other code than is traced", css="")
    yield f'<rect class="band" x="{LEFT + 415:.1f}" y="{second - 10:.1f}" width="12" height="12"/>'
    yield text(LEFT + 432, second, f"within {100 * BAND:.0f} % of what was measured", css="")
    for number, (tool, shape) in enumerate(RIVAL_MARKERS.items()):
        x = LEFT + 210.0 * number
        yield mark(shape, x, third - 4, css="rival", label="")
        yield text(x + 12, third, tool, css="tick")
