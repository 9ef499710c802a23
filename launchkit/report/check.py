"""The screen of ``launchkit check``: the verdict, what the lint found, what to change in the file, what was assumed."""

from __future__ import annotations

from launchkit.export.check import FileChange, FileCheck
from launchkit.export.edits import Edit
from launchkit.export.lint import Finding, Severity, Tool
from launchkit.hardware import Backend
from launchkit.report.candidate import INDENT, saved_text, time_text
from launchkit.report.estimate import estimate_lines, search_text
from launchkit.report.text import MARGIN, Canvas, Ink
from launchkit.report.verdict import Verdict, verdict

EXIT_ERRORS = 1
SHOWN_CHANGES = 6
_SHOWN_UNRELATED = 6
_RUN = {
    Tool.AXOLOTL: "axolotl train {path}",
    Tool.TRL: "trl sft --config {path}",
    Tool.ACCELERATE: "accelerate launch --config_file {path} train.py",
    Tool.DEEPSPEED: "deepspeed train.py --deepspeed --deepspeed_config {path}",
}


def check_exit_code(check: FileCheck) -> int:
    """1 where the file would not run, or not as written, whatever it would take; else as ``plan --check``."""
    if check.errors or check.candidate is None:
        return EXIT_ERRORS
    return verdict(check.candidate.estimate).value


def render_check(check: FileCheck, *, canvas: Canvas) -> str:
    """All of a check, the verdict first and the next command last."""
    lines = _verdict_lines(check, canvas=canvas)
    lines += canvas.section("file", [check.path, f"read as {check.tool.called}'s"], separator=" · ")
    for severity, ink in ((Severity.ERROR, Ink.BAD), (Severity.WARNING, Ink.CARE)):
        lines += _findings(check, severity=severity, ink=ink, canvas=canvas)
    lines += _changes(check, canvas=canvas)
    if check.more_gpus:
        lines += canvas.section("or more GPUs", [check.more_gpus])
    notes = check.candidate.notes if check.candidate else ()
    for label, texts in (("assumes", check.assumed), ("not counted", check.ignored)):
        lines += _listed(label, texts, canvas=canvas)
    lines += canvas.section("unrelated", _unrelated(check))
    for note in (*check.cluster.notes, *notes):
        lines += canvas.section("note", [note])
    lines += canvas.section("next", [_next(check)])
    return "\n".join(lines) + "\n"


def _verdict_lines(check: FileCheck, *, canvas: Canvas) -> list[str]:
    if check.candidate is not None:
        return estimate_lines(check.candidate, cluster=check.cluster, canvas=canvas)
    mark = Verdict.DOES_NOT_FIT.mark
    lines = canvas.flow([f"not estimated: {check.refusal}"], first=f" {mark} ", rest=INDENT)
    return [canvas.paint(line, Ink.BAD) for line in lines]


def _findings(check: FileCheck, *, severity: Severity, ink: Ink, canvas: Canvas) -> list[str]:
    found = [finding for finding in check.findings if finding.severity is severity]
    label = {Severity.ERROR: "errors", Severity.WARNING: "warnings"}[severity]
    return _listed(label, [_finding(finding) for finding in found], canvas=canvas, ink=ink)


def _finding(finding: Finding) -> str:
    return f"{finding.path} {finding.problem}; {finding.fix}"


def _changes(check: FileCheck, *, canvas: Canvas) -> list[str]:
    """One change a line, those first that are enough."""
    fits_already = check.candidate is not None and check.candidate.estimate.fits
    texts = [_change(change, says_fits=not fits_already) for change in check.changes[:SHOWN_CHANGES]]
    lines = _listed("could change" if fits_already else "to change", texts, canvas=canvas)
    if check.together is not None:
        lines += _listed("together", [_change(check.together, says_fits=True)], canvas=canvas)
    return lines


def _change(change: FileChange, *, says_fits: bool) -> str:
    is_shorter = change.time_factor <= 0
    effect = saved_text(change.saved_bytes) + time_text(change.time_factor) + (", fewer tokens" if is_shorter else "")
    return f"{_edits(change.edits)}   {effect}{', fits' if change.fits and says_fits else ''}"


def _edits(edits: tuple[Edit, ...]) -> str:
    """Edits of the file first; what goes elsewhere is said once for each place."""
    parts = dict.fromkeys(edit.part for edit in edits)
    texts = []
    for part in parts:
        own = " · ".join(edit.text for edit in edits if edit.part == part)
        texts.append(f"in {part}: {own}" if part else own)
    return " · ".join(texts)


def _listed(label: str, texts: tuple[str, ...] | list[str], *, canvas: Canvas, ink: Ink = Ink.LABEL) -> list[str]:
    """One text a line behind one label, longer ones indented."""
    lines: list[str] = []
    for index, text in enumerate(texts):
        first = canvas.paint(f" {label if index == 0 else '':<{MARGIN - 2}} ", ink)
        lines += canvas.flow([text], first=first, rest=" " * (MARGIN + 2))
    return lines


def _unrelated(check: FileCheck) -> list[str]:
    number = len(check.unrelated)
    if not number:
        return []
    names = ", ".join(check.unrelated[:_SHOWN_UNRELATED]) + (", …" if number > _SHOWN_UNRELATED else "")
    return [f"no memory depends on {names}" if number < 2 else f"no memory depends on {number} keys ({names})"]


def _next(check: FileCheck) -> str:
    is_unnamed_cpu = check.cluster.gpu.backend is Backend.CPU
    if check.candidate is None and is_unnamed_cpu:
        return f"launchkit check {check.path} --gpus 4x4090 (or what it is to run on)"
    if check.errors or check.candidate is None:
        return f"launchkit check {check.path}, once it is corrected"
    if verdict(check.candidate.estimate) is not Verdict.FITS:
        return search_text(check.candidate, cluster=check.cluster)
    return _RUN[check.tool].format(path=check.path)
