"""Finding what ended a run: the first rank that failed, the line that says why, and what that line means."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launchkit.diagnosis.launchers import launcher_exits
from launchkit.diagnosis.rules import explain, is_echo, signal_name, signal_of
from launchkit.process.supervisor import LAUNCHER_LOG, Outcome
from launchkit.process.worker import RankExit, exit_path, log_path

TAIL_BYTES = 64 * 1024

ERROR_LINE = re.compile(r"^(?:\[rank\d+\]: ?)?((?:[\w.]+(?:Error|Exception|Interrupt|Exit))\b.*)$")
NATIVE_CRASH = re.compile(r"^(terminate called .*|Fatal Python error: .*|.*Segmentation fault.*)$")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The first failure of a run. ``rank`` is -1 when it was the launcher's own, or when nobody says whose it was."""

    rank: int
    exit_code: int
    line: str
    explanation: str = ""
    log: str = ""
    is_launchers: bool = False

    @property
    def text(self) -> str:
        """One sentence: ``rank 1 failed first: RuntimeError: … (out of GPU memory; …)``."""
        nameless = "the launcher failed" if self.is_launchers else "a process failed"
        who = f"rank {self.rank} failed first" if self.rank >= 0 else nameless
        return f"{who}: {self.line}" + (f" ({self.explanation})" if self.explanation else "")


def find_failure(log_dir: Path, *, outcome: Outcome, ranks: Sequence[int]) -> Failure | None:
    """What ended the run of ``ranks`` (those of this node); None when all finished their work, or launchkit was told to
    stop.

    A launcher's exit code proves little: ``deepspeed`` returns 0 when its middle process is killed, and gloo sometimes
    aborts at teardown after the work is done. The ranks' own records decide.
    """
    exits = read_exits(log_dir, ranks)
    if outcome.received or (len(exits) == len(ranks) and all(ended.exit_code == 0 for ended in exits)):
        return None
    failed = sorted((ended for ended in exits if ended.exit_code), key=lambda ended: ended.unix_seconds)
    roots = [ended for ended in failed if not is_echo(ended.error)]
    launcher_text = _tail(log_dir / LAUNCHER_LOG)
    silent = sorted(set(ranks) - {ended.rank for ended in exits})
    if roots:
        return _recorded(roots[0], log_dir)
    killed = _killed_rank(launcher_text, silent=silent, outcome=outcome)
    if killed is not None:
        return _from_signal(*killed, log_dir=log_dir)
    if failed:
        return _recorded(failed[0], log_dir)
    return _without_records(log_dir, launcher_text, silent=silent, outcome=outcome)


def read_exits(log_dir: Path, ranks: Sequence[int]) -> list[RankExit]:
    """The exit records that exist, by rank."""
    exits = []
    for rank in ranks:
        path = exit_path(log_dir, rank)
        if path.exists():
            exits.append(RankExit(**json.loads(path.read_text(encoding="utf-8"))))
    return exits


def root_cause_line(text: str) -> str:
    """The last exception line of a log that does not only report a peer's death; else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    matches = [match.group(1) for line in lines if (match := ERROR_LINE.match(line) or NATIVE_CRASH.match(line))]
    roots = [line for line in matches if not is_echo(line)]
    return (roots or matches or lines or ["no output"])[-1]


def _recorded(ended: RankExit, log_dir: Path) -> Failure:
    line = ended.error or f"exit code {ended.exit_code}"
    return Failure(
        rank=ended.rank,
        exit_code=ended.exit_code,
        line=line,
        explanation=explain(line, ended.exit_code),
        log=str(log_path(log_dir, ended.rank)),
    )


def _killed_rank(launcher_text: str, *, silent: Sequence[int], outcome: Outcome) -> tuple[int, int] | None:
    """The rank that a signal ended, with its negative exit code, as far as the launcher tells. DeepSpeed ends the other
    ranks without naming the first: where several left no word, it is -1."""
    first = next(iter(launcher_exits(launcher_text)), None)
    if first is not None and first.rank is not None and first.exit_code < 0:
        return first.rank, first.exit_code
    told = first.exit_code if first is not None and first.rank is None else 0
    number = signal_of(told) or signal_of(outcome.returncode)
    if silent and number:
        return silent[0] if len(silent) == 1 else -1, -number
    return None


def _from_signal(rank: int, exit_code: int, *, log_dir: Path) -> Failure:
    number = -exit_code
    return Failure(
        rank=rank,
        exit_code=128 + number,
        line=f"ended by {signal_name(number)}",
        explanation=explain("", exit_code),
        log=str(log_path(log_dir, rank) if rank >= 0 else log_dir / LAUNCHER_LOG),
    )


def _without_records(log_dir: Path, launcher_text: str, *, silent: Sequence[int], outcome: Outcome) -> Failure:
    """No rank said how it ended: it vanished, or the launcher never started it."""
    started = [rank for rank in silent if log_path(log_dir, rank).exists()]
    if started and outcome.returncode == 0:
        line = f"rank {started[0]} vanished before its work was done although the launcher returned 0"
    else:
        line = root_cause_line(launcher_text)
    return Failure(
        rank=-1,
        exit_code=outcome.exit_code or 1,
        line=line,
        explanation=explain(launcher_text, outcome.returncode),
        log=str(log_dir / LAUNCHER_LOG),
        is_launchers=True,
    )


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return log.read().decode("utf-8", errors="replace")
