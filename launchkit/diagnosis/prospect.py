"""What the plan said of the moment at which a run failed, beside what the run asked for; and what the planner would
change."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launchkit.diagnosis.evidence import Evidence
from launchkit.diagnosis.logs import Fault
from launchkit.diagnosis.rules import Cause
from launchkit.plan import Candidate, PhasePeak, Plan, RunPhase
from launchkit.request import Request, option_text
from launchkit.units import GIB, KIB, MIB, gib

SHOWN_CHANGES = 2
PHASE_TEXT: Mapping[RunPhase, str] = {
    RunPhase.LOAD: "loading",
    RunPhase.FIRST_STEP: "the first step",
    RunPhase.STEADY_STEP: "a step",
    RunPhase.LONGEST_BATCH: "the longest batch",
    RunPhase.EVALUATION: "an evaluation",
    RunPhase.SAVE: "saving",
}


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A part of a run that a traceback tells: in words, and which of the plan's phases it belongs to (None: a step)."""

    text: str
    pattern: re.Pattern[str]
    phase: RunPhase | None = None


# The first that matches: an evaluation has a forward pass, checkpointing computes a forward pass in the backward one.
MOMENTS = (
    Moment(text="saving", pattern=re.compile(r"\bsave_\w+|_save_checkpoint|state_dict"), phase=RunPhase.SAVE),
    Moment(text="an evaluation", pattern=re.compile("evaluat|prediction_step"), phase=RunPhase.EVALUATION),
    Moment(text="loading", pattern=re.compile(r"from_pretrained|load_model"), phase=RunPhase.LOAD),
    Moment(text="the optimizer's step", pattern=re.compile(r"/torch/optim/|optimizer\S* in \w*step|_take_model_step")),
    Moment(text="the backward pass", pattern=re.compile(r"backward")),
    Moment(text="the loss", pattern=re.compile(r"cross_entropy|loss_utils|fixed_cross_entropy")),
    Moment(text="the forward pass", pattern=re.compile(r"\bforward\b")),
)

# torch c10/cuda/CUDACachingAllocator.cpp, in the words of torch 2.1 and later.
_SIZE = r"([\d.]+) ([KMG]i?B|bytes)"
_ASKED = re.compile(rf"Tried to allocate {_SIZE}")
_CAPACITY = re.compile(rf"total capaci?ty of {_SIZE} of which {_SIZE} is free")
_ALLOCATED = re.compile(rf"Of the allocated memory {_SIZE} is allocated by PyTorch")
_UNUSED = re.compile(rf"and {_SIZE} is reserved by PyTorch but unallocated")
_OTHERS = re.compile(rf"Process (\d+) has {_SIZE} memory in use")
_UNITS = {"bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "KB": KIB, "MB": MIB, "GB": GIB}
ELSEWHERE = ("sudo dmesg | grep -i 'killed process'", "free -h, to see what else holds memory here")
OWN_HOST_MEMORY = frozenset({"host-memory", "worker-killed", "killed"})


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """Lines that set numbers side by side, and what to do about them before a rule's general advice."""

    numbers: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


def moment_of(fault: Fault | None) -> Moment | None:
    """The part of the run in which an error was raised, as far as its traceback tells."""
    if fault is None:
        return None
    return next((moment for moment in MOMENTS if moment.pattern.search(fault.path)), None)


def prospect(evidence: Evidence, *, cause: Cause | None, fault: Fault | None) -> Prospect:
    """Predicted beside asked, for causes that a plan can speak of."""
    if cause is None:
        return Prospect()
    if cause.name == "gpu-memory":
        return _gpu_memory(evidence, fault)
    if cause.name in OWN_HOST_MEMORY:
        return _host_memory(evidence)
    return Prospect()


def _gpu_memory(evidence: Evidence, fault: Fault | None) -> Prospect:
    message = "" if fault is None else fault.text
    asked, unused = _bytes(_ASKED.search(message)), _bytes(_UNUSED.search(message))
    advice: tuple[str, ...] = ()
    if others := _OTHERS.findall(message):
        held = ", ".join(f"{number} {unit} by process {pid}" for pid, number, unit in others)
        advice += (f"nvidia-smi: of this GPU's memory {held} is held",)
    if asked and unused >= asked:
        advice += (
            "PYTORCH_ALLOC_CONF=expandable_segments:True before the command: what was asked for was there, in pieces",
        )
    return Prospect(
        numbers=tuple(line for line in (_asked_text(message, asked, unused), _predicted(evidence, fault)) if line),
        advice=advice + _changes(evidence.plan),
    )


def _asked_text(message: str, asked_bytes: int, unused_bytes: int) -> str:
    """``asked for 2.0 GiB: 22.9 GiB were allocated of 23.7, 0.2 more kept unused, 11 MiB free``."""
    capacity, allocated = _CAPACITY.search(message), _bytes(_ALLOCATED.search(message))
    if not asked_bytes or capacity is None:
        return f"asked for {gib(asked_bytes)}" if asked_bytes else ""
    free = _size(capacity[3], capacity[4])
    held = f", {gib(unused_bytes)} kept by torch unused" if unused_bytes else ""
    return (
        f"asked for {gib(asked_bytes)} with {gib(allocated)} allocated{held}, {gib(free)} free "
        f"of the GPU's {gib(_size(capacity[1], capacity[2]))}"
    )


def _predicted(evidence: Evidence, fault: Fault | None) -> str:
    chosen = None if evidence.plan is None else evidence.plan.chosen
    if chosen is None:
        return ""
    estimate, moment = chosen.estimate, moment_of(fault)
    peak = _phase(evidence, chosen, moment)
    allocated, device = estimate.allocated_peak_bytes, estimate.device_peak_bytes
    when = PHASE_TEXT[peak.phase] if peak is not None else "a step"
    if peak is not None:
        allocated, device = peak.allocated_peak_bytes, peak.device_peak_bytes
    return (
        f"predicted for {when}: {gib(allocated)} allocated, {gib(device)} on the device "
        f"of {gib(estimate.device_usable_bytes)} usable"
    )


def _phase(evidence: Evidence, chosen: Candidate, moment: Moment | None) -> PhasePeak | None:
    step = RunPhase.STEADY_STEP if evidence.num_steps else RunPhase.FIRST_STEP
    wanted = step if moment is None or moment.phase is None else moment.phase
    return next((peak for peak in chosen.estimate.phases if peak.phase is wanted), None)


def _host_memory(evidence: Evidence) -> Prospect:
    """The plan's host peak beside the node's memory. Where it would have fitted, the plan explains nothing."""
    plan = evidence.plan
    if plan is None or plan.chosen is None:
        return Prospect()
    estimate, total = plan.chosen.estimate, plan.cluster.node.host_memory_bytes
    phases = [(phase.host_peak_bytes, PHASE_TEXT[phase.phase]) for phase in estimate.phases]
    peak, when = max([*phases, (estimate.host_peak_bytes, "a step"), (estimate.host_load_peak_bytes, "loading")])
    number = f"predicted host memory: {gib(peak)} at most ({when})"
    if not total:
        return Prospect(numbers=(number,))
    number += f" of {gib(total)} that the node has"
    if peak < total:
        unexplained = (
            "the plan does not explain it: other processes, a limit of the scheduler's, or the script's own data"
        )
        return Prospect(numbers=(number, unexplained), advice=ELSEWHERE)
    return Prospect(
        numbers=(number,), advice=_strategies(plan, need=lambda candidate: candidate.estimate.host_peak_bytes)
    )


def _changes(plan: Plan | None) -> tuple[str, ...]:
    """Commands for the next plan: what the planner found to save most, then its other strategies that need less."""
    if plan is None:
        return ()
    flags = [item.flags for item in sorted(plan.suggestions, key=lambda item: -item.saved_bytes)]
    commands = tuple(plan_command(plan, flag) for flag in flags)
    commands += _strategies(plan, need=lambda candidate: candidate.estimate.device_peak_bytes)
    return commands[:SHOWN_CHANGES]


def _strategies(plan: Plan, *, need: Callable[[Candidate], int]) -> tuple[str, ...]:
    """Commands for the alternatives of other strategies that need less than what was run, the least first."""
    if plan.chosen is None:
        return ()
    limit, used = need(plan.chosen), plan.chosen.scenario.strategy.kind
    kinds = [other.scenario.strategy.kind for other in sorted(plan.alternatives, key=need) if need(other) < limit]
    return tuple(plan_command(plan, f"--strategy {kind}") for kind in dict.fromkeys(kinds) if kind is not used)


def plan_command(plan: Plan, change: str) -> str:
    """``launchkit plan MODEL`` with the flags that were typed, and a change to them."""
    given = Request.from_flags(plan.request).given()
    changed = {word[2:].replace("-", "_") for word in change.split() if word.startswith("--")}
    kept = [option_text(name, value) for name, value in given.items() if name not in changed]
    return " ".join(["launchkit plan", shlex.quote(plan.model.name), *kept, change])


def _bytes(match: re.Match[str] | None) -> int:
    return 0 if match is None else _size(match[1], match[2])


def _size(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
