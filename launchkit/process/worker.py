"""What every worker of a run does first and last: its log, its ties to the run, the record of how it ended."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from launchkit.launch.environment import RUN_DIR_VARIABLE
from launchkit.process.guard import GUARD_PID_VARIABLE
from launchkit.process.parent_death import die_with_parent, die_with_process

MAXIMUM_ERROR_CHARACTERS = 2000
PROGRESS_LOG = "progress.log"


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """How one rank ended: its exit code, when (seconds since the epoch), and the error that it ended with."""

    rank: int
    exit_code: int
    unix_seconds: float
    error: str = ""


def log_path(log_dir: Path, rank: int) -> Path:
    return log_dir / f"rank{rank}.log"


def exit_path(log_dir: Path, rank: int) -> Path:
    return log_dir / f"rank{rank}.exit.json"


def global_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This worker's rank over all nodes; 0 when nobody set ``RANK``."""
    return int(environment.get("RANK", "0"))


def run_worker(body: Callable[[], None]) -> int:
    """Runs ``body`` as one rank of the run named by ``LAUNCHKIT_RUN_DIR`` and returns its exit code.

    Everything that the rank prints, native crashes included, goes to ``logs/rank<k>.log``. Outside a run (the variable
    is not set) the output stays where it is.
    """
    rank = global_rank()
    _tie_to_run()
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    if not run_dir:
        return _guarded(body)[0]
    log_dir = Path(run_dir) / "logs"
    log_dir.mkdir(parents=True, exist_ok=True)
    _redirect_output(log_path(log_dir, rank))
    exit_code, error = _guarded(body)
    ended = RankExit(rank=rank, exit_code=exit_code, unix_seconds=time.time(), error=error)
    exit_path(log_dir, rank).write_text(json.dumps(asdict(ended)), encoding="utf-8")
    return exit_code


def say(line: str) -> None:
    """A line for whoever watches the run: rank 0's reach the screen, every rank's are in its log."""
    print(line, flush=True)
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    if run_dir and global_rank() == 0:
        with (Path(run_dir) / "logs" / PROGRESS_LOG).open("a", encoding="utf-8") as progress:
            progress.write(line + "\n")


def _tie_to_run() -> None:
    guard_pid = os.environ.get(GUARD_PID_VARIABLE)
    if guard_pid:
        die_with_parent()
        die_with_process(int(guard_pid))


def _redirect_output(path: Path) -> None:
    """Points file descriptors 1 and 2 at ``path``: libraries that write below Python's streams are kept as well."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _guarded(body: Callable[[], None]) -> tuple[int, str]:
    """Runs ``body``; its exit code as the interpreter would give it, and the last line of its traceback."""
    try:
        body()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0, f"exit code {stop.code}" if stop.code else ""
        print(stop.code, file=sys.stderr)
        return 1, str(stop.code)
    except KeyboardInterrupt:
        return 130, "KeyboardInterrupt"
    except BaseException as error:
        traceback.print_exc()
        text = traceback.format_exception_only(error)[-1].strip()
        return 1, text[:MAXIMUM_ERROR_CHARACTERS]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0, ""
