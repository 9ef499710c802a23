"""The first screen: what to run, what it takes, what else would do, and why the rest would not."""

from __future__ import annotations

from launchkit.hardware import Cluster
from launchkit.plan import Candidate, Estimate, Plan, Rejected, Suggestion
from launchkit.report.candidate import (
    INDENT,
    bars,
    data_parts,
    device_text,
    disk_uses,
    headline,
    host_uses,
    memory_lines,
    model_name,
    peak_text,
    phases,
    saved_text,
    short_name,
    step_text,
    time_text,
    worst_moment,
)
from launchkit.report.text import MARGIN, Canvas, Ink, beside, columns, shorten, table
from launchkit.report.verdict import asks_rare_host, closest, closest_but_for_host
from launchkit.scenario import Precision, Scenario, Trainer
from launchkit.units import count, duration, gib

SHOWN_ALTERNATIVES = 3
SHOWN_REJECTED = 4
SIDE_BY_SIDE_COLUMNS = 120


def render_plan(
    plan: Plan, *, canvas: Canvas, plan_file: str = "", how_to_keep: str = "add --output FILE", in_full: bool = False
) -> str:
    """The screen of ``launchkit plan``; ``plan_file`` is where the plan was written, if it was, and
    ``how_to_keep`` what to type for that, if it was not.

    ``in_full`` shows all that also fits and all that was rejected, not only the first few, and the phases of the run.
    """
    head = _nothing_fits(plan, canvas=canvas) if plan.chosen is None else _chosen(plan, plan.chosen, canvas=canvas)
    lines = [*head, *_others(plan, canvas=canvas, in_full=in_full)]
    if in_full and plan.chosen is not None:
        lines += _particulars(plan.chosen.estimate, canvas=canvas)
    lines += canvas.section(
        "to fit more" if plan.chosen else "would fit", _suggestions(plan.suggestions), separator="  ·  "
    )
    lines += canvas.section("data", data_parts(plan.chosen.data if plan.chosen else None), separator=" · ")
    lines += canvas.section("model", _subject(plan), separator=" · ")
    lines += canvas.section("assumes", list(plan.assumptions), separator=", ")
    for note in (*plan.cluster.notes, *plan.notes):
        lines += canvas.section("note", [note])
    lines += canvas.section("next", _next(plan, plan_file=plan_file, how_to_keep=how_to_keep))
    return "\n".join(lines) + "\n"


def _chosen(plan: Plan, chosen: Candidate, *, canvas: Canvas) -> list[str]:
    lines = headline(chosen, cluster=plan.cluster, canvas=canvas)
    lines += memory_lines(chosen, cluster=plan.cluster, canvas=canvas)
    lines += bars(chosen.estimate, canvas=canvas)
    lines += [INDENT + worst_moment(chosen)]
    for note in chosen.notes:
        lines += canvas.flow([note], first=INDENT, rest=INDENT)
    return lines


def _particulars(estimate: Estimate, *, canvas: Canvas) -> list[str]:
    """Phase by phase, the host and the disk by what they are needed for."""
    lines = canvas.section("phases", phases(estimate), separator=" · ")
    lines += canvas.section("host", host_uses(estimate), separator=" · ")
    return lines + canvas.section("disk", disk_uses(estimate), separator=" · ")


def _nothing_fits(plan: Plan, *, canvas: Canvas) -> list[str]:
    number = plan.num_considered
    considered = f"{number} configuration{'' if number == 1 else 's'} considered" if number else "as asked"
    lines = canvas.flow([f"nothing fits {plan.cluster.text}: {considered}"], first=" ✗ ", rest=INDENT)
    lines = [canvas.paint(line, Ink.BAD) for line in lines]
    lacking = closest_but_for_host(plan)
    if lacking is not None:
        name = short_name(lacking.candidate.scenario, cluster=plan.cluster)
        needs = peak_text(lacking.candidate.estimate, cluster=plan.cluster)
        text = f"closest: {name} takes {needs}; {lacking.reason}, of {gib(plan.cluster.node.host_memory_bytes)}"
        return [*lines, *canvas.flow([text], first=INDENT, rest=INDENT)]
    nearest = closest(plan)
    if nearest is None:
        return lines
    missing = gib(max(0, nearest.estimate.device_peak_high_bytes - nearest.estimate.device_usable_bytes))
    name = short_name(nearest.scenario, cluster=plan.cluster)
    text = f"closest: {name} needs {peak_text(nearest.estimate, cluster=plan.cluster)}"
    lines += canvas.flow([f"{text}; {missing} too much"], first=INDENT, rest=INDENT)
    return [*lines, *bars(nearest.estimate, canvas=canvas), INDENT + worst_moment(nearest)]


def _others(plan: Plan, *, canvas: Canvas, in_full: bool) -> list[str]:
    alternatives = plan.alternatives if in_full else plan.alternatives[:SHOWN_ALTERNATIVES]
    rejected = plan.rejected if in_full else plan.rejected[:SHOWN_REJECTED]
    undecided = tuple(item.candidate for item in rejected if item.is_undecided)
    fitting = [
        *_labelled("also fits", _alternative_rows(alternatives, plan, canvas=canvas), canvas=canvas),
        *_labelled("may fit: -v", _alternative_rows(undecided, plan, canvas=canvas), canvas=canvas),
    ]
    lost = tuple(item for item in rejected if not item.is_undecided)
    losing = _labelled("rejected", _rejected_rows(lost, plan, canvas=canvas), canvas=canvas)
    if fitting and losing and canvas.width >= SIDE_BY_SIDE_COLUMNS:
        together = beside(fitting, losing)
        if max(columns(line) for line in together) <= canvas.width:
            return together
    return [*fitting, *losing]


def _row_name(scenario: Scenario, plan: Plan) -> str:
    """Of a row beside the chosen one, whose precision need not be said again."""
    usual = plan.chosen.scenario.training.precision if plan.chosen else Precision.BF16
    return short_name(scenario, cluster=plan.cluster, usual=usual)


def _alternative_rows(candidates: tuple[Candidate, ...], plan: Plan, *, canvas: Canvas) -> list[str]:
    rows = [
        [
            _row_name(item.scenario, plan),
            device_text(item.estimate),
            _time_text(item) + _rare_host(item, plan.cluster),
        ]
        for item in candidates
    ]
    return table([row[:2] for row in rows] if canvas.is_narrow else rows, right=(1,))


def _time_text(candidate: Candidate) -> str:
    """Of one pass over the data, where there is any; else of a step."""
    data = candidate.data
    return f"~{duration(data.seconds)} per epoch" if data and data.seconds else step_text(candidate.step)


def _rare_host(candidate: Candidate, cluster: Cluster) -> str:
    needed = candidate.estimate.host_needed_bytes
    return f", if its host has {gib(needed)}" if asks_rare_host(candidate.estimate, cluster) else ""


def _rejected_rows(rejected: tuple[Rejected, ...], plan: Plan, *, canvas: Canvas) -> list[str]:
    rows = [
        [
            _row_name(item.candidate.scenario, plan),
            device_text(item.candidate.estimate),
            f"({item.reason})",
        ]
        for item in rejected
    ]
    return table([row[:2] for row in rows] if canvas.is_narrow else rows, right=(1,))


def _labelled(label: str, rows: list[str], *, canvas: Canvas) -> list[str]:
    margins = [canvas.paint(f" {label:<{MARGIN - 2}} ", Ink.LABEL), *[" " * MARGIN] * (len(rows) - 1)]
    return [margin + shorten(row, width=canvas.width - MARGIN) for margin, row in zip(margins, rows, strict=False)]


def _suggestions(suggestions: tuple[Suggestion, ...]) -> list[str]:
    return [f"{item.flags}  {saved_text(item.saved_bytes)}{time_text(item.time_factor)}" for item in suggestions]


def _subject(plan: Plan) -> list[str]:
    return [model_name(plan.model), f"{count(plan.model.num_parameters)} parameters", plan.cluster.text]


def _next(plan: Plan, *, plan_file: str, how_to_keep: str) -> list[str]:
    """One command: on several nodes the one that is typed on each, for Axolotl the one that writes its file."""
    if plan.chosen is None:
        return ["launchkit explain <term>"]
    scenario = plan.chosen.scenario
    is_for_axolotl = scenario.training.trainer is Trainer.AXOLOTL
    if not plan_file:
        return [f"{how_to_keep} to keep this plan for launchkit {'config' if is_for_axolotl else 'launch'}"]
    if is_for_axolotl:
        return [f"launchkit config {plan_file} --target axolotl, then axolotl train axolotl.yaml"]
    launch = f"launchkit launch --plan {plan_file}"
    last = plan.cluster.num_nodes - 1
    if last == 0 or scenario.strategy.num_ranks(plan.cluster.num_gpus) == 1:
        return [launch]
    return [f"{launch} --master-addr <of node 0> --node-rank <0 to {last}>, on every node"]
