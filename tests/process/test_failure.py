"""Failures: which rank was first, the line that says why, what it means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launchkit.process.failure import explain, find_failure, root_cause_line
from launchkit.process.supervisor import Outcome

TORCHRUN_KILLED = """
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 4242)
  traceback : Signal 9 (SIGKILL) received by PID 4242
"""
PEER = "RuntimeError: [1] Connection closed by peer [127.0.0.1]:1234"


def write(log_dir: Path, *, launcher: str = "", **ranks: tuple[int, float, str] | None) -> None:
    """``rank0=(exit code, seconds, error)``; None is a rank that started and never said how it ended."""
    (log_dir / "launcher.log").write_text(launcher)
    for name, ended in ranks.items():
        rank = int(name.removeprefix("rank"))
        (log_dir / f"rank{rank}.log").write_text("")
        if ended is not None:
            record = {"rank": rank, "exit_code": ended[0], "unix_seconds": ended[1], "error": ended[2]}
            (log_dir / f"rank{rank}.exit.json").write_text(json.dumps(record))


def outcome(returncode: int = 1, received: int = 0) -> Outcome:
    return Outcome(returncode=returncode, received=received, num_left=0, seconds=1.0)


DONE = (0, 1.0, "")
FAILURES = [
    pytest.param(
        {"rank0": (1, 5.0, "ValueError: late"), "rank1": (3, 4.0, "exit code 3")},
        outcome(),
        (1, 3, "exit code 3"),
        id="the-first-in-time",
    ),
    pytest.param(
        {"rank0": (1, 4.0, PEER), "rank1": (1, 5.0, "ValueError: the cause")},
        outcome(),
        (1, 1, "ValueError: the cause"),
        id="a-peer-error-is-never-the-cause",
    ),
    pytest.param(
        {"rank0": (1, 4.0, PEER), "rank1": None, "launcher": TORCHRUN_KILLED},
        outcome(),
        (1, 137, "ended by SIGKILL"),
        id="torchrun-names-the-killed-rank",
    ),
    pytest.param(
        {"rank0": None, "rank1": (1, 4.0, PEER), "launcher": "['python'] exits with return code = -9"},
        outcome(247),
        (0, 137, "ended by SIGKILL"),
        id="deepspeed-returns-247",
    ),
    pytest.param(
        {"rank0": None, "rank1": None, "launcher": "['python'] exits with return code = -9"},
        outcome(247),
        (-1, 137, "ended by SIGKILL"),
        id="deepspeed-does-not-say-which",
    ),
    pytest.param({"rank0": None}, outcome(-9), (0, 137, "ended by SIGKILL"), id="a-single-process-killed"),
    pytest.param(
        {"rank0": DONE, "rank1": None},
        outcome(0),
        (-1, 1, "rank 1 vanished before its work was done although the launcher returned 0"),
        id="exit-code-0-is-not-believed",
    ),
    pytest.param(
        {"launcher": "Traceback\nModuleNotFoundError: No module named 'deepspeed'\n"},
        outcome(1),
        (-1, 1, "ModuleNotFoundError: No module named 'deepspeed'"),
        id="the-launcher-itself",
    ),
]


@pytest.mark.parametrize(("files", "ended", "expected"), FAILURES)
def test_find_failure(files: dict[str, object], ended: Outcome, expected: tuple[int, int, str], tmp_path: Path) -> None:
    write(tmp_path, **files)  # type: ignore[arg-type]
    num_ranks = max(1, sum(name.startswith("rank") for name in files))
    failure = find_failure(tmp_path, outcome=ended, ranks=range(num_ranks))
    assert failure is not None
    assert (failure.rank, failure.exit_code, failure.line) == expected


@pytest.mark.parametrize("returncode", [0, 1, -6])
def test_ranks_that_finished_are_no_failure_however_teardown_went(returncode: int, tmp_path: Path) -> None:
    write(tmp_path, rank0=DONE, rank1=DONE)
    assert find_failure(tmp_path, outcome=outcome(returncode), ranks=(0, 1)) is None


@pytest.mark.parametrize("received", [2, 15])
def test_a_run_that_was_told_to_stop_did_not_fail(received: int, tmp_path: Path) -> None:
    write(tmp_path, rank0=(130, 2.0, "KeyboardInterrupt"), rank1=None)
    assert find_failure(tmp_path, outcome=outcome(1, received=received), ranks=(0, 1)) is None


@pytest.mark.parametrize(
    ("line", "exit_code", "part"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", 1, "out of GPU memory"),
        ("RuntimeError: [enforce fail] . DefaultCPUAllocator: can't allocate memory", 1, "out of host memory"),
        ("", -9, "killed, probably out of host memory"),
        ("", 137, "killed, probably out of host memory"),
        ("", 247, "killed, probably out of host memory"),
        ("", -11, "a crash in native code"),
        ("The server socket has failed to listen: EADDRINUSE", 1, "the rendezvous port is taken"),
        ("OSError: [Errno 28] No space left on device", 1, "the disk is full"),
        ("ValueError: something of the user's", 1, ""),
        ("", 0, ""),
    ],
)
def test_explain(line: str, exit_code: int, part: str) -> None:
    explanation = explain(line, exit_code)
    assert part in explanation if part else explanation == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nValueError: x\nmore", "ValueError: x"),
        ("[rank1]: torch.OutOfMemoryError: CUDA out of memory", "torch.OutOfMemoryError: CUDA out of memory"),
        (f"ValueError: x\n{PEER}", "ValueError: x"),
        (PEER, PEER),
        ("terminate called without an active exception", "terminate called without an active exception"),
        ("first\nlast\n", "last"),
        ("", "no output"),
    ],
)
def test_root_cause_line(text: str, expected: str) -> None:
    assert root_cause_line(text) == expected


def test_text_is_one_line_with_the_advice(tmp_path: Path) -> None:
    write(tmp_path, rank0=(1, 1.0, "torch.OutOfMemoryError: CUDA out of memory"))
    failure = find_failure(tmp_path, outcome=outcome(), ranks=(0,))
    assert failure is not None
    assert failure.text.startswith(
        "rank 0 failed first: torch.OutOfMemoryError: CUDA out of memory (out of GPU memory;"
    )
    assert failure.log == str(tmp_path / "rank0.log")
