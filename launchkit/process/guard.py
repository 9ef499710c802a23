"""The process between launchkit and a launcher: whatever dies, no worker outlives the run.

launchkit starts ``python -m launchkit.process.guard … -- launcher …`` in a session of its own. The guard adopts every
orphaned descendant, hands signals on to the launcher's process group, and before it exits it ends all that is left:

- launchkit is killed: the guard sees that its parent changed, and stops the run;
- the launcher is killed or leaves workers behind (``deepspeed`` does on SIGTERM): the guard ends them;
- the guard is killed: the launcher gets a death signal, and each worker watches the guard
  (``LAUNCHKIT_GUARD_PID``) and follows it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from launchkit.process.parent_death import adopt_orphans, die_with_parent

GUARD_PID_VARIABLE = "LAUNCHKIT_GUARD_PID"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.1
LINGER_SECONDS = 3.0  # helpers (resource trackers, loggers) leave by themselves shortly after their parent


@dataclass
class Signals:
    """Signals received, and those of them not yet acted upon."""

    pending: list[signal.Signals] = field(default_factory=list)
    num_received: int = 0

    def install(self) -> None:
        for number in FORWARDED:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.num_received += 1
        self.pending.append(signal.Signals(number))

    def take(self) -> signal.Signals | None:
        return self.pending.pop(0) if self.pending else None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command after ``--`` under guard; returns its exit code, 128 + signal when a signal ended it."""
    options = _parser().parse_args(arguments)
    signals = Signals()
    signals.install()
    adopt_orphans()
    environment = {**os.environ, GUARD_PID_VARIABLE: str(os.getpid())}
    launcher = subprocess.Popen(
        options.command,
        env=environment,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: die_with_parent(signal.SIGTERM),  # this process has one thread, so that forking so is safe
    )
    _watch(launcher, signals, parent_pid=options.parent_pid, grace_seconds=options.grace_seconds)
    num_left = _end_leftovers(linger_seconds=0.0 if signals.num_received else LINGER_SECONDS)
    status = {"returncode": launcher.returncode, "num_left": num_left}
    Path(options.status_file).write_text(json.dumps(status), encoding="utf-8")
    return launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launchkit.process.guard")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--grace-seconds", type=float, default=15.0)
    parser.add_argument("--status-file", required=True)
    parser.add_argument("command", nargs="+")
    return parser


def _watch(launcher: subprocess.Popen[bytes], signals: Signals, *, parent_pid: int, grace_seconds: float) -> None:
    """Waits for the launcher. The first signal is handed on and starts the grace time; a second one ends it."""
    deadline = float("inf")
    while launcher.poll() is None:
        received = signals.take()
        if received is None and deadline == float("inf") and os.getppid() != parent_pid:
            received = signal.SIGTERM  # launchkit itself is gone
        if received is not None:
            if deadline == float("inf"):
                _send(_group_members(), received)
                deadline = time.monotonic() + grace_seconds
            else:
                deadline = 0.0
        if time.monotonic() >= deadline:
            _send(_descendants(), signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _end_leftovers(*, linger_seconds: float) -> int:
    """Ends every remaining descendant: first by waiting, then SIGTERM, then SIGKILL. Returns how many did not leave."""
    _, remaining = psutil.wait_procs(_descendants(), timeout=linger_seconds)
    num_left = len(remaining)
    for number in (signal.SIGTERM, signal.SIGKILL):
        # Asked for anew: an ending process can still start another one.
        remaining = _descendants()
        _send(remaining, number)
        psutil.wait_procs(remaining, timeout=LINGER_SECONDS)
    return num_left


def _descendants() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _group_members() -> list[psutil.Process]:
    """Descendants in this process's group. torchrun's workers have sessions of their own; it signals them itself."""
    own = os.getpgrp()
    return [process for process in _descendants() if _group_of(process.pid) == own]


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def _send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(main())
