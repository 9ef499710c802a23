"""From what a run left behind to what went wrong first, and on which rank."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from launchkit.diagnosis.evidence import Diagnosis, Evidence, Place, State
from launchkit.diagnosis.launchers import launcher_exits, received_signal
from launchkit.diagnosis.logs import find_faults, find_line, last_line
from launchkit.diagnosis.prospect import moment_of, prospect
from launchkit.diagnosis.rules import SIGNALS, recognise, signal_name
from launchkit.diagnosis.suspects import Suspect, find_suspects
from launchkit.launch.record import comparison_lines

EXCERPT_LINES = 6
NOT_A_NUMBER = "Loss is NaN"  # what the rule of that name knows
UNKNOWN = "launchkit does not know this error; the traceback says where it was raised."
WITHOUT_A_WORD = "It left no error in these logs: its own may be elsewhere (torchrun --log-dir, another node)."


def diagnose(evidence: Evidence) -> Diagnosis:
    """What happened in a run."""
    if evidence.has_ended is False:
        return _running(evidence)
    faults = tuple(fault for log in evidence.logs for fault in find_faults(log))
    launchers = "\n".join(log.text for log in evidence.logs if log.rank is None)
    suspects = find_suspects(evidence, faults, seen=launcher_exits(launchers))
    stopped = _stopping_signal(evidence, launchers, suspects)
    if stopped:
        return _stopped(stopped, evidence)
    if evidence.record is not None and evidence.record.exit_code == 0:
        return _finished(evidence)
    if suspects:
        return _failed(_first(suspects), suspects, evidence)
    return _silent(evidence)


def _running(evidence: Evidence) -> Diagnosis:
    last = evidence.steps[-1] if evidence.steps else None
    logged = f": step {last.step} is logged, loss {last.loss:.4g}" if last else ": no step is logged yet"
    tails = [last_line(log) for log in evidence.logs if log.rank is not None] or [
        last_line(log) for log in evidence.logs
    ]
    return Diagnosis(
        state=State.RUNNING,
        headline=f"the run goes on{logged}",
        excerpt=tuple(text for text, _ in tails[:EXCERPT_LINES] if text),
        numbers=_not_finite(evidence),
    )


def _stopping_signal(evidence: Evidence, launchers: str, suspects: Sequence[Suspect]) -> str:
    """The signal that ended a run from outside, empty for none."""
    if evidence.record is not None:
        return evidence.record.stopped_by
    number = received_signal(launchers)
    interrupted = [
        suspect for suspect in suspects if suspect.fault and suspect.fault.line.startswith("KeyboardInterrupt")
    ]
    if number or (interrupted and len(interrupted) == len(suspects)):
        return signal_name(number or signal.SIGINT)
    return ""


def _stopped(by: str, evidence: Evidence) -> Diagnosis:
    cause = next((cause for number, cause in SIGNALS.items() if signal_name(number) == by), None)
    return Diagnosis(
        state=State.STOPPED,
        headline=f"stopped by {by}" if cause is None else f"the run was {cause.fact}",
        cause=cause.name if cause else "",
        meaning=f"{evidence.num_steps} steps were logged before." if evidence.num_steps else "",
        advice=cause.advice if cause else (),
    )


def _finished(evidence: Evidence) -> Diagnosis:
    record = evidence.record
    assert record is not None
    warning = _not_finite(evidence)
    cause = recognise(NOT_A_NUMBER) if warning else None
    return Diagnosis(
        state=State.FINISHED,
        headline="the run finished" + (", but not with a number for a loss" if warning else ""),
        cause=cause.name if cause else "",
        meaning=cause.meaning if cause else "",
        numbers=(*warning, *comparison_lines(record)),
        advice=cause.advice if cause else (),
    )


def _not_finite(evidence: Evidence) -> tuple[str, ...]:
    """From which step on loss or gradients are no numbers."""
    bad = [logged for logged in evidence.steps if not logged.is_finite]
    if not bad:
        return ()
    text = f"loss or gradients were not finite in {len(bad)} of {len(evidence.steps)} logged steps"
    return (f"{text}, first in step {bad[0].step}" if bad[0].step else text,)


def _first(suspects: Sequence[Suspect]) -> Suspect:
    return next((suspect for suspect in suspects if suspect.is_root), suspects[0])


def _failed(first: Suspect, suspects: Sequence[Suspect], evidence: Evidence) -> Diagnosis:
    fault, cause = first.fault, first.cause
    told = prospect(evidence, cause=cause, fault=fault)
    place, excerpt = _evidence_lines(first, evidence)
    unknown = WITHOUT_A_WORD if fault is None else UNKNOWN
    return Diagnosis(
        state=State.FAILED,
        headline=f"{_who(first, suspects)}: {_what(first, evidence)}",
        cause=cause.name if cause else "",
        rank=first.rank,
        error=first.error,
        place=place,
        excerpt=excerpt,
        code=fault.code if fault is not None else "",
        meaning=cause.meaning if cause else unknown,
        numbers=(*told.numbers, *_not_finite(evidence)),
        others=_others(first, suspects),
        advice=told.advice or (cause.advice if cause else ()),
    )


def _who(first: Suspect, suspects: Sequence[Suspect]) -> str:
    if first.rank is None:
        return "the run failed" if first.fault is not None else "a process failed"
    if not first.is_root:
        return f"rank {first.rank} gave up first"
    return f"rank {first.rank} failed first" if len(suspects) > 1 else f"rank {first.rank} failed"


def _what(first: Suspect, evidence: Evidence) -> str:
    """The cause in a few words with the moment; where it is not known, the error itself."""
    if first.cause is None:
        return f"{first.error} (not a known cause)"
    moment = moment_of(first.fault)
    if first.cause.name != "gpu-memory" or moment is None:
        return first.cause.fact
    where = f" of step {evidence.num_steps + 1}" if moment.phase is None and evidence.steps else ""
    return f"{first.cause.fact} in {moment.text}{where}"


def _evidence_lines(first: Suspect, evidence: Evidence) -> tuple[Place | None, tuple[str, ...]]:
    """Where to look, and what stands there: the error, or what the launcher says of a rank without one."""
    if first.fault is not None:
        return first.fault.place, tuple(first.fault.messages[-1].split("\n")[:EXCERPT_LINES])
    told = re.compile(
        rf"exitcode *: {first.exit_code} |\(exitcode: {first.exit_code}\)|return code = {first.exit_code}$"
    )
    own = next((last_line(log) for log in evidence.logs if log.rank is not None and log.rank == first.rank), None)
    launchers = (find_line(log, told) for log in evidence.logs if log.rank is None)
    text, place = next((found for found in launchers if found is not None), own) or ("", None)
    last_words = () if own is None or own[1] == place or not own[0] else (f"its log ends: {own[0]}",)
    return place, tuple(line for line in (text, *last_words) if line)


def _others(first: Suspect, suspects: Sequence[Suspect]) -> str:
    """What became of the other ranks."""
    others = [suspect for suspect in suspects if suspect.rank != first.rank and suspect.rank is not None]
    same = [other for other in others if other.cause and first.cause and other.cause.name == first.cause.name]
    if same:
        return f"{_ranks(same)} the same"
    silent = [other for other in others if other.is_silent]
    if silent and not first.is_root:
        return f"{_ranks(silent)} said nothing until the launcher ended it: look there"
    echoing = [other for other in others if other.fault is not None and not other.is_root]
    if echoing:
        said = echoing[0].cause
        return f"{_ranks(echoing)}, after it: {said.fact if said else echoing[0].error}"
    return f"{_ranks(silent)} ended by the launcher" if silent else ""


def _ranks(suspects: Sequence[Suspect]) -> str:
    numbers = sorted(suspect.rank for suspect in suspects if suspect.rank is not None)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _silent(evidence: Evidence) -> Diagnosis:
    """No rank and no launcher said anything bad."""
    record = evidence.record
    if record is not None:
        return Diagnosis(state=State.FAILED, headline=record.ending or "the run failed", error=record.failure)
    if evidence.has_ended:
        return Diagnosis(
            state=State.STOPPED,
            headline="the run has no result: launchkit itself was ended, and its workers with it",
            meaning="Nothing in the logs is an error. A SIGKILL or a restart of the machine leaves this.",
        )
    number = len(evidence.logs)
    warning = _not_finite(evidence)
    where = "the log" if number == 1 else f"its {number} logs"
    return Diagnosis(
        state=State.FINISHED,
        headline=f"no error is in {where}",
        numbers=warning,
        excerpt=tuple(text for log in evidence.logs[:EXCERPT_LINES] if (text := last_line(log)[0])),
    )
