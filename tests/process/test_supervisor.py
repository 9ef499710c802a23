"""Supervision: exit codes, signals, and nobody left behind whatever dies."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from launchkit.process.supervisor import Outcome, Supervision, supervise
from tests.process.workers import (
    DEAF,
    LAUNCHER_THAT_LEAVES_ITS_WORKER,
    LAUNCHER_WITH_WORKER,
    environment,
    python,
    wait_for_file,
    wait_until_gone,
)

SUPERVISE = """
import os, pathlib, sys
from launchkit.process.supervisor import Supervision, supervise
how = Supervision(log_dir=pathlib.Path(sys.argv[1]), grace_seconds=float(sys.argv[2]))
sys.exit(supervise(sys.argv[3:], environment=os.environ, how=how).exit_code)
"""


def run(argv: list[str], log_dir: Path, *, stream: io.BytesIO | None = None) -> Outcome:
    how = Supervision(log_dir=log_dir, stream=stream, grace_seconds=2.0)
    return supervise(argv, environment=environment(), how=how)


def start(argv: list[str], log_dir: Path, *, grace_seconds: float = 5.0) -> subprocess.Popen[bytes]:
    """A supervisor as a process of its own, so that it can be signalled and killed."""
    return subprocess.Popen(python(SUPERVISE, str(log_dir), str(grace_seconds), *argv), env=environment())


@pytest.mark.parametrize(
    ("source", "returncode", "exit_code"),
    [
        ("pass", 0, 0),
        ("raise SystemExit(3)", 3, 3),
        ("import os; os.kill(os.getpid(), 9)", -9, 137),
        ("import os; os.kill(os.getpid(), 15)", -15, 143),
    ],
)
def test_exit_code_is_the_childs(source: str, returncode: int, exit_code: int, tmp_path: Path) -> None:
    outcome = run(python(source), tmp_path)
    assert (outcome.returncode, outcome.exit_code, outcome.num_left) == (returncode, exit_code, 0)


@pytest.mark.parametrize(
    ("returncode", "received", "exit_code"),
    [(1, signal.SIGINT, 130), (0, signal.SIGTERM, 143), (-9, 0, 137), (2, 0, 2)],
)
def test_a_received_signal_decides_the_exit_code(returncode: int, received: int, exit_code: int) -> None:
    outcome = Outcome(returncode=returncode, received=received, num_left=0, seconds=1.0)
    assert outcome.exit_code == exit_code


def test_the_launchers_output_is_in_its_log(tmp_path: Path) -> None:
    run(python("import sys; print('out'); print('err', file=sys.stderr)"), tmp_path)
    assert sorted((tmp_path / "launcher.log").read_text().split()) == ["err", "out"]


def test_the_live_log_is_copied_while_it_grows(tmp_path: Path) -> None:
    stream = io.BytesIO()
    source = f"f = open({str(tmp_path / 'rank0.log')!r}, 'w'); f.write('step 1'); f.flush(); f.write(' step 2')"
    run(python(source), tmp_path, stream=stream)
    assert stream.getvalue() == b"step 1 step 2"


def test_a_worker_that_outlives_the_launcher_is_ended_and_counted(tmp_path: Path) -> None:
    outcome = run(python(LAUNCHER_THAT_LEAVES_ITS_WORKER, str(tmp_path / "pid")), tmp_path)
    assert outcome.num_left == 1
    wait_until_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_nobody_is_left_when_the_supervisor_gets_a_signal(
    number: signal.Signals, expected: int, tmp_path: Path
) -> None:
    supervisor = start(python(LAUNCHER_WITH_WORKER, str(tmp_path / "pid")), tmp_path)
    worker = int(wait_for_file(tmp_path / "pid"))
    launcher = psutil.Process(worker).ppid()
    supervisor.send_signal(number)
    assert supervisor.wait(timeout=30) == expected
    wait_until_gone(launcher)
    wait_until_gone(worker)


def test_nobody_is_left_when_the_launcher_is_killed(tmp_path: Path) -> None:
    supervisor = start(python(LAUNCHER_WITH_WORKER, str(tmp_path / "pid")), tmp_path)
    worker = int(wait_for_file(tmp_path / "pid"))
    os.kill(psutil.Process(worker).ppid(), signal.SIGKILL)
    assert supervisor.wait(timeout=30) == 137
    wait_until_gone(worker)


def test_a_deaf_child_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    supervisor = start(python(DEAF), tmp_path, grace_seconds=0.5)
    while "deaf" not in (wait_for_file(tmp_path / "launcher.log")):
        pass
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(timeout=30) == 143
    assert '"returncode": -9' in (tmp_path / "guard.json").read_text()


def test_supervising_outside_the_main_thread_sets_no_handlers(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run(python("raise SystemExit(4)"), tmp_path)))
    thread.start()
    thread.join()
    assert outcomes[0].exit_code == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run([sys.executable, "-c", "pass"], tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
