"""The screen and the document of ``launchkit doctor``."""

from __future__ import annotations

from typing import Any

from launchkit.checkup.examine import count
from launchkit.checkup.rows import Group, Level, Row
from launchkit.report.text import Canvas, Ink
from launchkit.serialize import encode

_MARKS = {Level.OK: ("✓", Ink.GOOD), Level.WARNING: ("~", Ink.CARE), Level.PROBLEM: ("✗", Ink.BAD)}
_OPEN = "·"  # nothing is wrong, and something could be done
_INDENT = " " * 3


def render_checkup(groups: tuple[Group, ...], *, canvas: Canvas) -> str:
    """The verdict, then every row under its group; what to type stands below the row that wants it."""
    lines = [_verdict(groups, canvas=canvas)]
    for group in groups:
        lines += ["", canvas.paint(f" {group.title}", Ink.LABEL)]
        for row in group.rows:
            lines += _row(row, canvas=canvas)
    return "\n".join(lines) + "\n"


def checkup_document(groups: tuple[Group, ...]) -> dict[str, Any]:
    """As JSON values: the counts, and each group's rows."""
    counts = {"num_problems": count(groups, Level.PROBLEM), "num_warnings": count(groups, Level.WARNING)}
    return {**counts, "groups": encode(groups)}


def _verdict(groups: tuple[Group, ...], *, canvas: Canvas) -> str:
    problems, warnings = count(groups, Level.PROBLEM), count(groups, Level.WARNING)
    worst = Level.PROBLEM if problems else Level.WARNING if warnings else Level.OK
    mark, ink = _MARKS[worst]
    broken = _number(problems, "problem") if problems else "nothing is broken here"
    text = broken + (f", {_number(warnings, 'warning')}" if warnings else "")
    return canvas.paint(f" {mark} {text}", ink)


def _number(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _row(row: Row, *, canvas: Canvas) -> list[str]:
    mark, ink = _MARKS[row.level]
    if row.level is Level.OK and row.fix:
        mark = _OPEN
    lines = canvas.flow([row.fact], first=f" {canvas.paint(mark, ink)} ", rest=_INDENT)
    if row.fix:
        lines += canvas.flow([row.fix], first=f"{_INDENT}→ ", rest=f"{_INDENT}  ")
    return lines
