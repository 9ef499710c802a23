"""Reading what a run left behind: a directory of ``launchkit launch``, one of another launcher, or a single log."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from launchkit.diagnosis.evidence import Evidence, Exit, Log, LoggedStep
from launchkit.diagnosis.logs import logged_steps
from launchkit.diagnosis.rules import signal_of
from launchkit.errors import PlanFileError, UsageError
from launchkit.launch.record import RunRecord
from launchkit.plan import Plan
from launchkit.process.supervisor import STATUS_FILE
from launchkit.process.worker import PROGRESS_LOG
from launchkit.serialize import Mismatch, decode, plan_from_text

COMMAND_FILE = "command.txt"  # what tells a run of launchkit's from any other directory
RESULT_FILE = "result.json"
PROCESS_FILE = "process.json"
LOG_SUFFIXES = frozenset({".log", ".out", ".err", ".txt"})
MAXIMUM_LOGS = 512
# Of a longer log only the end is read: a run's last words stand there.
MAXIMUM_LOG_BYTES = 8 * 1024**2
ADVICE = "give the directory of a run, or a log file of torchrun, accelerate or deepspeed"
_RANK_NAME = re.compile(r"rank[_-]?(\d+)", re.IGNORECASE)


def newest_run(runs: Path) -> Path:
    """The last run that ``launchkit launch`` wrote under ``runs``."""
    found = [path.parent for path in runs.glob(f"*/{COMMAND_FILE}")]
    if not found:
        raise UsageError(f"no run is in {runs}, where launchkit launch writes them; {ADVICE}")
    return max(found, key=lambda path: (path / COMMAND_FILE).stat().st_mtime)


def read_evidence(path: Path) -> Evidence:
    """Everything that ``diagnose`` can make use of in a directory or a file."""
    if not path.exists():
        raise UsageError(f"{path} does not exist; {ADVICE}")
    if path.is_file():
        return _foreign(path, (_log(path, rank=None),))
    if (path / COMMAND_FILE).is_file() or (path / RESULT_FILE).is_file():
        return _own(path)
    found = tuple(_log(file, rank=_rank_of(file)) for file in _log_files(path))
    if not found:
        raise UsageError(f"{path} holds no logs (*{', *'.join(sorted(LOG_SUFFIXES))}); {ADVICE}")
    return _foreign(path, found)


def own_process() -> dict[str, object]:
    """What ``process.json`` says of the process that carries a run out, so that another can see whether it is alive."""
    return {"host": platform.node(), "pid": psutil.Process().pid, "started": psutil.Process().create_time()}


def _foreign(path: Path, logs: tuple[Log, ...]) -> Evidence:
    steps = tuple(step for log in logs for step in logged_steps(log))
    exits = tuple(_torchrun_exits(path)) if path.is_dir() else ()
    return Evidence(path=str(path), logs=logs, exits=exits, steps=steps)


def _own(path: Path) -> Evidence:
    record = _record(path / RESULT_FILE)
    logs = tuple(_log(file, rank=_rank_of(file)) for file in _log_files(path / "logs") if file.name != PROGRESS_LOG)
    exits = _recorded_exits(path / "logs")
    return Evidence(
        path=str(path),
        logs=logs,
        exits=(*exits, *_killed(path / "logs", logs, exits)),
        has_ended=True if record is not None else not _is_alive(path / PROCESS_FILE),
        record=record,
        plan=_plan(path / "plan.json"),
        steps=_metrics(path / "metrics.jsonl") or tuple(step for log in logs for step in logged_steps(log)),
    )


def _log_files(directory: Path) -> list[Path]:
    """The log files under a directory, launchers' first, then by rank as a number."""
    found = [file for file in directory.rglob("*") if file.suffix in LOG_SUFFIXES and file.is_file()]
    ordered = sorted(found, key=lambda file: (_rank_of(file) if _rank_of(file) is not None else -1, str(file)))
    return ordered[:MAXIMUM_LOGS]


def _rank_of(file: Path) -> int | None:
    """The rank in a file's name (``rank1.log``), or in torchrun's directories (``attempt_0/1/stderr.log``)."""
    if match := _RANK_NAME.search(file.name):
        return int(match[1])
    is_torchruns = file.parent.name.isdecimal() and file.parent.parent.name.startswith("attempt_")
    return int(file.parent.name) if is_torchruns else None


def _log(file: Path, *, rank: int | None) -> Log:
    with file.open("rb") as opened:
        skipped = opened.read(max(0, file.stat().st_size - MAXIMUM_LOG_BYTES))
        text = opened.read().decode("utf-8", errors="replace")
    return Log(path=str(file), text=text, rank=rank, first_line=1 + skipped.count(b"\n"))


def _json(path: Path) -> Any:
    """A file's JSON; None where there is none that can be read, as of a run that died while it wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _record(path: Path) -> RunRecord | None:
    document = _json(path)
    if not isinstance(document, dict):
        return None
    try:
        record = decode(RunRecord, {**document, "predicted": {}}, path="")
    except Mismatch as mismatch:
        raise UsageError(f"{path} is not a result of this launchkit ({mismatch}); {ADVICE}") from None
    assert isinstance(record, RunRecord)
    return replace(record, predicted=document.get("predicted", {}))


def _plan(path: Path) -> Plan | None:
    try:
        return plan_from_text(path.read_text(encoding="utf-8"), name=str(path))
    except (OSError, PlanFileError):
        return None  # a plan of another version: the logs still say what happened


def _recorded_exits(log_dir: Path) -> tuple[Exit, ...]:
    documents = [_json(file) for file in sorted(log_dir.glob("rank*.exit.json"))]
    return tuple(Exit(**document) for document in documents if isinstance(document, dict))


def _killed(log_dir: Path, logs: tuple[Log, ...], exits: tuple[Exit, ...]) -> tuple[Exit, ...]:
    """The one rank that did not say how it ended, where the launcher returned a signal; torchrun names it itself."""
    status = _json(log_dir / STATUS_FILE)
    silent = [log.rank for log in logs if log.rank is not None and log.rank not in {ended.rank for ended in exits}]
    number = signal_of(int(status.get("returncode", 0))) if isinstance(status, dict) else 0
    if not number or len(silent) != 1:
        return ()
    return (Exit(rank=silent[0], exit_code=-number),)


def _torchrun_exits(directory: Path) -> Iterator[Exit]:
    """``error.json`` of scripts under torchrun's ``@record``."""
    for file in directory.rglob("error.json"):
        rank, document = _rank_of(file), _json(file)
        message = document.get("message") if isinstance(document, dict) else None
        if rank is None or not isinstance(message, Mapping):
            continue
        seconds = float(message.get("extraInfo", {}).get("timestamp", 0) or 0)
        yield Exit(rank=rank, exit_code=1, unix_seconds=seconds, error=str(message.get("message", "")))


def _metrics(path: Path) -> tuple[LoggedStep, ...]:
    if not path.is_file():
        return ()
    lines = (_line(text) for text in path.read_text(encoding="utf-8").splitlines())
    return tuple(
        LoggedStep(
            step=int(line["step"]), loss=float(line["loss"]), gradient_norm=float(line.get("gradient_norm", 0.0))
        )
        for line in lines
        if line is not None
    )


def _line(text: str) -> dict[str, Any] | None:
    """One logged step; None for a line that was cut, as the last of a run that was killed."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"step", "loss"} <= set(line) else None


def _is_alive(path: Path) -> bool:
    """Whether the process that carries the run out is there; one on another machine is taken for it."""
    document = _json(path)
    if not isinstance(document, dict) or "host" not in document:
        return False
    if document["host"] != platform.node():
        return True
    try:
        return bool(abs(psutil.Process(int(document["pid"])).create_time() - float(document["started"])) < 1.0)
    except (psutil.Error, KeyError, ValueError, TypeError):
        return False
