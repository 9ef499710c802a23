"""Running one command to its end: live output, signals handed on, nothing left behind, an exit code that says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from launchkit.errors import LaunchError

POLL_SECONDS = 0.1
LAUNCHER_LOG = "launcher.log"
STATUS_FILE = "guard.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a supervised command ended.

    ``returncode`` is the launcher's own (negative: the signal that ended it). ``received`` is the signal that launchkit
    got and handed on, 0 for none. ``num_left`` counts processes that outlived the launcher and had to be ended.
    """

    returncode: int
    received: int
    num_left: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """What a shell expects: 128 + signal (130 after Ctrl-C), else the child's own code."""
        if self.received:
            return 128 + self.received
        return self.returncode if self.returncode >= 0 else 128 - self.returncode


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """How to watch over a command: where its logs go, which of them is shown live, how long it may take to stop."""

    log_dir: Path
    live_log: str = "rank0.log"
    stream: BinaryIO | None = None
    grace_seconds: float = 15.0


def supervise(argv: Sequence[str], *, environment: Mapping[str, str], how: Supervision) -> Outcome:
    """Runs ``argv`` under a guard in a new session and returns when every process of it is gone.

    ``environment`` is the whole environment. The launcher's own output goes to ``launcher.log``; the workers write
    their logs themselves (``launchkit.process.worker``), and the live one is copied to ``how.stream`` as it grows.
    """
    how.log_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    status_file = how.log_dir / STATUS_FILE
    with (how.log_dir / LAUNCHER_LOG).open("wb") as launcher_log, _received_signals() as received:
        guard = _start_guard(argv, environment=environment, status_file=status_file, output=launcher_log, how=how)
        _follow(guard, received, _Tail(how.log_dir / how.live_log, how.stream))
    returncode, num_left = _read_status(status_file, fallback=guard.returncode)
    return Outcome(
        returncode=returncode,
        received=received[0] if received else 0,
        num_left=num_left,
        seconds=time.monotonic() - started,
    )


def _start_guard(
    argv: Sequence[str], *, environment: Mapping[str, str], status_file: Path, output: BinaryIO, how: Supervision
) -> subprocess.Popen[bytes]:
    guard_argv = [sys.executable, "-m", "launchkit.process.guard", "--parent-pid", str(os.getpid())]
    guard_argv += ["--grace-seconds", str(how.grace_seconds), "--status-file", str(status_file), "--", *argv]
    try:
        return subprocess.Popen(
            guard_argv,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise LaunchError(f"{sys.executable} cannot be started ({error}); check the Python installation") from error


def _follow(guard: subprocess.Popen[bytes], received: list[int], tail: _Tail) -> None:
    num_sent = 0
    while guard.poll() is None:
        while num_sent < len(received):
            guard.send_signal(received[num_sent])
            num_sent += 1
        tail.copy_new()
        time.sleep(POLL_SECONDS)
    tail.copy_new()


def _read_status(path: Path, *, fallback: int) -> tuple[int, int]:
    """The launcher's return code and the number of leftovers; the guard's own code when it could not write them."""
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return fallback, 0
    return int(status["returncode"]), int(status["num_left"])


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP instead of dying of them. Only a main thread can set handlers."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Tail:
    """Copies what is appended to a file, which may not exist yet, to a stream."""

    def __init__(self, path: Path, stream: BinaryIO | None) -> None:
        self._path = path
        self._stream = stream
        self._offset = 0

    def copy_new(self) -> None:
        if self._stream is None or not self._path.exists():
            return
        with self._path.open("rb") as log:
            log.seek(self._offset)
            chunk = log.read()
        if not chunk:
            return
        self._offset += len(chunk)
        try:
            self._stream.write(chunk)
            self._stream.flush()
        except BrokenPipeError:
            self._stream = None  # the reader left (`| head`); the log file has everything
