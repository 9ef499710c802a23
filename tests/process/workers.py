"""Tiny programs that stand for launchers and workers; each is given as Python source."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

# Starts a worker in a session of its own, as torchrun does, writes both pids down, and sleeps.
LAUNCHER_WITH_WORKER = """
import pathlib, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
path = pathlib.Path(sys.argv[1])
path.with_suffix(".part").write_text(f"{worker.pid}")
path.with_suffix(".part").rename(path)
time.sleep(60)
"""

# As above, but it ends at once with code 0 and leaves its worker behind, as deepspeed does.
LAUNCHER_THAT_LEAVES_ITS_WORKER = LAUNCHER_WITH_WORKER.replace("time.sleep(60)\n", "", 1)

DEAF = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(60)
"""


def python(source: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", source, *arguments]


def wait_for_file(path: Path, *, seconds: float = 20.0) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until_gone(pid: int, *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
