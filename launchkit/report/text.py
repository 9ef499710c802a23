"""The few things that every printed screen needs: colour, width, flowing text, bars."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from launchkit.units import GIB, MIB

NARROW_COLUMNS = 80
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Ink(StrEnum):
    """Colours by meaning, as ANSI codes. Never the only carrier of it: the words and marks say the same."""

    GOOD = "1;32"
    CARE = "1;33"
    BAD = "1;31"
    LABEL = "36"
    BAR = "34"


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Where text goes: its width in columns, and whether it shows colour. A pipe gets the default."""

    width: int = 100
    colour: bool = False

    @property
    def is_narrow(self) -> bool:
        return self.width < NARROW_COLUMNS

    def paint(self, text: str, ink: Ink) -> str:
        """``text`` in a colour where there is colour."""
        return f"\x1b[{ink.value}m{text}\x1b[0m" if self.colour and text else text

    def flow(self, items: Iterable[str], *, first: str = "", rest: str = "", separator: str = "  ") -> list[str]:
        """Lines of whole items, each line as full as the width allows; an item is broken only at its own spaces."""
        lines, line = [], first
        is_empty = True
        for item in items:
            addition = item if is_empty else separator + item
            if not is_empty and columns(line) + columns(addition) + len(separator.rstrip()) > self.width:
                lines.append((line + separator).rstrip())
                line, addition = rest, item
            line += addition
            is_empty = False
        lines.append(line.rstrip())
        return [part for line in lines for part in self._fold(line, indent=rest)]

    def section(self, label: str, items: Sequence[str], *, separator: str = "  ") -> list[str]:
        """Items behind a label in the margin; nothing at all where there are none."""
        if not items:
            return []
        margin = f" {label:<{MARGIN - 2}} "
        return self.flow(items, first=self.paint(margin, Ink.LABEL), rest=" " * MARGIN, separator=separator)

    def _fold(self, line: str, *, indent: str) -> list[str]:
        folded = []
        while columns(line) > self.width:
            cut = line.rfind(" ", len(indent) + 1, self.width + len(line) - columns(line) + 1)
            if cut <= len(indent):
                break
            folded.append(line[:cut].rstrip())
            line = indent + line[cut:].lstrip()
        return [*folded, line]


MARGIN = 14


def columns(text: str) -> int:
    """Columns that ``text`` takes, colour codes left out."""
    return len(_ANSI.sub("", text))


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), gap: str = "  ") -> list[str]:
    """Rows as aligned text; ``right`` names the columns that are aligned to the right."""
    if not rows:
        return []
    widths = [max(columns(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        gap.join(_pad(cell, widths[index], to_the_right=index in right) for index, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def beside(left: Sequence[str], right: Sequence[str], *, gap: str = "   ") -> list[str]:
    """Two blocks of lines side by side."""
    width = max((columns(line) for line in left), default=0)
    height = max(len(left), len(right))
    filled = zip(_filled(left, height), _filled(right, height), strict=True)
    return [(_pad(one, width, to_the_right=False) + gap + other).rstrip() for one, other in filled]


def shorten(text: str, *, width: int) -> str:
    """Uncoloured text cut to a width, with a sign that it was."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def bar(value: float, *, of: float, length: int = 10) -> str:
    """A bar of blocks, at most ``length``; a value above zero shows at least one."""
    return "▇" * max(1 if value > 0 else 0, round(length * value / of)) if of > 0 else ""


@dataclass(frozen=True, kw_only=True)
class MemoryScale:
    """One unit for numbers that are read together: GiB, or MiB where the largest is below one GiB."""

    largest_bytes: int

    @property
    def unit(self) -> str:
        return "GiB" if self.largest_bytes >= GIB else "MiB"

    def number(self, num_bytes: float) -> str:
        """The number without its unit."""
        return f"{num_bytes / GIB:.1f}" if self.unit == "GiB" else f"{num_bytes / MIB:.0f}"


def _pad(text: str, width: int, *, to_the_right: bool) -> str:
    padding = " " * (width - columns(text))
    return padding + text if to_the_right else text + padding


def _filled(lines: Sequence[str], height: int) -> list[str]:
    return [*lines, *[""] * (height - len(lines))]
