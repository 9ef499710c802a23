"""Workers: their log, their exit record, and that they follow the guard into death."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from launchkit.process.worker import global_rank
from tests.process.workers import environment, python, wait_for_file

WORKER = """
import sys
from launchkit.process.worker import run_worker
def body():
{body}
sys.exit(run_worker(body))
"""


def run_worker(body: str, run_dir: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        python(WORKER.format(body=f"    {body}")),
        env={**environment(), "LAUNCHKIT_RUN_DIR": str(run_dir), "RANK": "2", **variables},
        capture_output=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("body", "exit_code", "error"),
    [
        ("print('fine')", 0, ""),
        ("raise ValueError('no such thing')", 1, "ValueError: no such thing"),
        ("raise SystemExit(3)", 3, "exit code 3"),
        ("raise SystemExit('usage: x')", 1, "usage: x"),
        ("raise SystemExit(None)", 0, ""),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_exit_record(body: str, exit_code: int, error: str, tmp_path: Path) -> None:
    assert run_worker(body, tmp_path).returncode == exit_code
    record = json.loads((tmp_path / "logs" / "rank2.exit.json").read_text())
    assert (record["rank"], record["exit_code"], record["error"]) == (2, exit_code, error)


def test_everything_printed_goes_to_the_ranks_log(tmp_path: Path) -> None:
    completed = run_worker("import os; os.write(2, b'native '); print('python', flush=True)", tmp_path)
    assert completed.stdout == completed.stderr == b""
    assert (tmp_path / "logs" / "rank2.log").read_text() == "native python\n"


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_what_rank_0_says_is_shown(rank: str, shown: bool, tmp_path: Path) -> None:
    run_worker("from launchkit.process.worker import say; print('noise'); say('step 1')", tmp_path, RANK=rank)
    progress = tmp_path / "logs" / "progress.log"
    assert progress.exists() is shown
    assert not shown or progress.read_text() == "step 1\n"
    assert (tmp_path / "logs" / f"rank{rank}.log").read_text() == "noise\nstep 1\n"


def test_a_traceback_goes_to_the_log_as_well(tmp_path: Path) -> None:
    run_worker("raise ValueError('no such thing')", tmp_path)
    assert "Traceback" in (tmp_path / "logs" / "rank2.log").read_text()


def test_a_worker_follows_the_guard(tmp_path: Path) -> None:
    """The guard here is a sleeping process that is no parent of the worker."""
    guard = subprocess.Popen(python("import time; time.sleep(60)"))
    body = "import time; print('ready', flush=True); time.sleep(60)"
    variables = {"LAUNCHKIT_RUN_DIR": str(tmp_path), "LAUNCHKIT_GUARD_PID": str(guard.pid)}
    worker = subprocess.Popen(python(WORKER.format(body=f"    {body}")), env={**environment(), **variables})
    while "ready" not in wait_for_file(tmp_path / "logs" / "rank0.log"):
        pass
    guard.kill()
    guard.wait()
    assert worker.wait(timeout=20) == -9


@pytest.mark.parametrize(("environ", "rank"), [({}, 0), ({"RANK": "5"}, 5)])
def test_global_rank(environ: dict[str, str], rank: int) -> None:
    assert global_rank(environ) == rank
