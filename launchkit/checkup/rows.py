"""The answer's rows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """A problem breaks runs; a warning changes what they do, or breaks some."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One check's answer: the fact with its value, and what to type where something is to be done."""

    level: Level
    fact: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that belong together."""

    title: str
    rows: tuple[Row, ...]


def ok(fact: str, fix: str = "") -> Row:
    return Row(level=Level.OK, fact=fact, fix=fix)


def warning(fact: str, fix: str) -> Row:
    return Row(level=Level.WARNING, fact=fact, fix=fix)


def problem(fact: str, fix: str) -> Row:
    return Row(level=Level.PROBLEM, fact=fact, fix=fix)
