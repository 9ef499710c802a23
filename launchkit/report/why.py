"""The screen and the document of ``launchkit why``: the sentence, the evidence, what it means, what to type next."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from launchkit.diagnosis.evidence import Diagnosis, Place, State
from launchkit.report.text import MARGIN, Canvas, Ink, shorten
from launchkit.serialize import encode

_MARKS = {
    State.FINISHED: ("✓", Ink.GOOD),
    State.RUNNING: ("~", Ink.CARE),
    State.STOPPED: ("~", Ink.CARE),
    State.FAILED: ("✗", Ink.BAD),
}
LONGEST_LINE = 400  # of an excerpt: some libraries print all that they know in one


def render_diagnosis(diagnosis: Diagnosis, *, run: str, canvas: Canvas) -> str:
    """The screen. What is not known has no line."""
    mark, ink = _MARKS[diagnosis.state]
    if diagnosis.state is State.FINISHED and diagnosis.cause:
        mark, ink = "~", Ink.CARE
    head = canvas.flow([diagnosis.headline], first=f" {mark} ", rest="   ")
    lines = [canvas.paint(line, ink) for line in head]
    lines += canvas.section("run", [run])
    lines += canvas.section("where", _where(diagnosis, run=run), separator=" · ")
    lines += _block("log says", [shorten(line, width=LONGEST_LINE) for line in diagnosis.excerpt], canvas=canvas)
    lines += canvas.section("means", [diagnosis.meaning] if diagnosis.meaning else [])
    lines += _block("numbers", list(diagnosis.numbers), canvas=canvas)
    lines += canvas.section("others", [shorten(diagnosis.others, width=LONGEST_LINE)] if diagnosis.others else [])
    lines += _block("next", list(diagnosis.advice), canvas=canvas)
    return "\n".join(lines) + "\n"


def diagnosis_document(diagnosis: Diagnosis, *, run: str) -> dict[str, Any]:
    """As JSON values; ``cause`` is the name of the rule, empty where none knows the error."""
    document: dict[str, Any] = encode(diagnosis)
    return {"run": run, **document}


def _where(diagnosis: Diagnosis, *, run: str) -> list[str]:
    place = [] if diagnosis.place is None else [_short(diagnosis.place, run=run)]
    return [*place, *([f"raised in {diagnosis.code}"] if diagnosis.code else [])]


def _short(place: Place, *, run: str) -> str:
    """A place within the run's directory without that directory's own path."""
    path = PurePath(place.path)
    is_within = path.is_relative_to(run) and path != PurePath(run)
    return f"{path.relative_to(run) if is_within else path}:{place.line}"


def _block(label: str, items: list[str], *, canvas: Canvas) -> list[str]:
    """Items on lines of their own, the first behind the label."""
    lines = canvas.section(label, items[:1])
    for item in items[1:]:
        lines += canvas.flow([item], first=" " * MARGIN, rest=" " * MARGIN)
    return lines
