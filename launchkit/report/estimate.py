"""The screen of ``launchkit estimate``: one scenario, every owner of memory, no search."""

from __future__ import annotations

from launchkit.alloc_conf import VARIABLE
from launchkit.hardware import Backend, Cluster, format_gpus
from launchkit.plan import Candidate, Estimate, RunPhase
from launchkit.report.candidate import INDENT, data_parts, headline, memory_lines, model_name, phases, worst_moment
from launchkit.report.text import MARGIN, Canvas, Ink, bar, table
from launchkit.report.verdict import Verdict, verdict
from launchkit.units import count, gib

BAR_LENGTH = 24


def render_estimate(candidate: Candidate, *, cluster: Cluster, canvas: Canvas) -> str:
    """Verdict, peak and range, memory by owner, when, speed, and what was assumed."""
    lines = estimate_lines(candidate, cluster=cluster, canvas=canvas)
    for note in (*cluster.notes, *candidate.notes, *_idle(candidate, cluster=cluster)):
        lines += canvas.section("note", [note])
    if verdict(candidate.estimate) is not Verdict.FITS:
        lines += canvas.section("next", [search_text(candidate, cluster=cluster)])
    return "\n".join(lines) + "\n"


def estimate_lines(candidate: Candidate, *, cluster: Cluster, canvas: Canvas) -> list[str]:
    """All that is said of the memory of one scenario, without notes."""
    estimate = candidate.estimate
    lines = headline(candidate, cluster=cluster, canvas=canvas)
    lines += memory_lines(candidate, cluster=cluster, canvas=canvas)
    stage = f" (stage {estimate.peak_stage})" if estimate.worst_phase is RunPhase.STEADY_STEP else ""
    lines += [f"{INDENT}{worst_moment(candidate)}{stage}"]
    lines += [f"{' ' * MARGIN}{row}" for row in _owner_rows(estimate, canvas=canvas)]
    lines += canvas.section("phases", phases(estimate), separator=" · ")
    lines += canvas.section("allocator", _allocator(candidate), separator=" · ")
    lines += canvas.section("data", data_parts(candidate.data), separator=" · ")
    return lines + canvas.section("model", _subject(candidate, cluster=cluster), separator=" · ")


def search_text(candidate: Candidate, *, cluster: Cluster) -> str:
    """What to type where the scenario does not fit."""
    return f"launchkit plan {candidate.model.name} --gpus {format_gpus(cluster)} looks for what fits"


def _idle(candidate: Candidate, *, cluster: Cluster) -> list[str]:
    """Whoever names several GPUs and no strategy means all of them, and gets the default."""
    used = candidate.scenario.strategy.num_ranks(cluster.num_gpus)
    if used == cluster.num_gpus:
        return []
    what = "processes" if cluster.gpu.backend is Backend.CPU else "GPUs"
    return [f"{used} of {cluster.num_gpus} {what} used; --strategy ddp, fsdp2 or zero3 takes them all"]


def _owner_rows(estimate: Estimate, *, canvas: Canvas) -> list[str]:
    """Each part of the peak, how it is known, and its bar where there is room."""
    largest, basis = max(estimate.at_peak.values(), default=0), estimate.basis
    rows = [
        (name, gib(value, digits=2), basis[name], canvas.paint(bar(value, of=largest, length=BAR_LENGTH), Ink.BAR))
        for name, value in estimate.at_peak.items()
        if value > 0
    ]
    return table([row[:3] if canvas.is_narrow else row for row in rows], right=(1,))


def _allocator(candidate: Candidate) -> list[str]:
    estimate, conf = candidate.estimate, candidate.scenario.alloc_conf
    return [
        *([f"{VARIABLE}={conf}"] if conf else []),
        f"allocated {gib(estimate.allocated_peak_bytes, digits=2)}",
        f"reserved {gib(estimate.reserved_peak_bytes, digits=2)}",
        f"between steps {gib(estimate.steady_bytes, digits=2)}",
    ]


def _subject(candidate: Candidate, *, cluster: Cluster) -> list[str]:
    trained = count(candidate.num_trainable)
    return [
        model_name(candidate.model),
        f"{count(candidate.num_parameters)} parameters, {trained} trained",
        cluster.text,
    ]
