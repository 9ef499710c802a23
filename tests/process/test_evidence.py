"""What is read of a run's directory, of other launchers' logs, and of a single file."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launchkit.diagnosis.diagnose import diagnose
from launchkit.diagnosis.evidence import State
from launchkit.errors import UsageError
from launchkit.process import evidence
from launchkit.process.evidence import newest_run, own_process, read_evidence

TORCHRUN = Path(__file__).parents[1] / "diagnosis" / "torchrun"
RESULT = {
    "schema_version": 1,
    "run_dir": "runs/1",
    "command": ["torchrun"],
    "engine": "torchrun",
    "strategy": "DDP",
    "exit_code": 137,
    "seconds": 3.0,
    "predicted": {"step_seconds": 0.5, "allocated_peak_bytes": 7},
    "failure": "rank 1 failed first: ended by SIGKILL",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of launchkit of two ranks, of which rank 1 was killed."""
    directory = tmp_path / "runs" / "1"
    (directory / "logs").mkdir(parents=True)
    texts = {
        "command.txt": "torchrun\n",
        "result.json": json.dumps(RESULT),
        "metrics.jsonl": "\n".join(
            ('{"step": 1, "loss": 2.5, "gradient_norm": 1.0}', '{"step": 2, "loss": 0.0, "gradient_norm": NaN}', '{"st')
        ),
        "logs/launcher.log": "",
        "logs/progress.log": "step 1/3  loss 2.5\n",
        "logs/rank0.log": "Connection closed by peer\n",
        "logs/rank0.exit.json": json.dumps({"rank": 0, "exit_code": 1, "unix_seconds": 9.0, "error": "Broken pipe"}),
        "logs/rank1.log": "loading\n",
        "logs/guard.json": '{"returncode": 247, "num_left": 0}',
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def test_a_run_of_launchkit_is_read_whole(run: Path) -> None:
    found = read_evidence(run)
    assert [log.rank for log in found.logs] == [None, 0, 1]
    assert {(ended.rank, ended.exit_code) for ended in found.exits} == {(0, 1), (1, -9)}
    assert found.record is not None and found.record.predicted["step_seconds"] == 0.5
    assert [step.is_finite for step in found.steps] == [True, False]
    assert found.has_ended
    assert diagnose(found).headline == "rank 1 failed first: killed, probably out of host memory"


@pytest.mark.parametrize(
    ("process", "state"),
    [
        (own_process(), State.RUNNING),
        ({**own_process(), "started": 1.0}, State.STOPPED),  # another process has the number now
        ({"host": "elsewhere", "pid": 1, "started": 1.0}, State.RUNNING),
        ({"host": platform.node(), "pid": 2**22 + 1, "started": 1.0}, State.STOPPED),
        ({}, State.STOPPED),
    ],
)
def test_without_a_result_the_process_tells(process: dict[str, Any], state: State, run: Path) -> None:
    (run / "result.json").unlink()
    for name in ("logs/guard.json", "logs/rank0.exit.json", "logs/rank0.log"):
        (run / name).unlink()
    (run / "process.json").write_text(json.dumps(process))
    assert diagnose(read_evidence(run)).state is state


def test_a_result_that_was_cut_is_none(run: Path) -> None:
    (run / "result.json").write_text('{"schema_')
    assert read_evidence(run).record is None


def test_a_result_of_something_else(run: Path) -> None:
    (run / "result.json").write_text('{"score": 1}')
    with pytest.raises(UsageError, match="is not a result of this launchkit"):
        read_evidence(run)


def test_a_plan_that_cannot_be_read_is_left_out(run: Path) -> None:
    (run / "plan.json").write_text('{"kind": "plan", "schema_version": 99}')
    assert read_evidence(run).plan is None


def test_torchrun_s_directories_name_the_ranks() -> None:
    found = diagnose(read_evidence(TORCHRUN))
    assert (found.rank, found.error) == (1, "ValueError: bad sample 17")
    assert found.place is not None and found.place.path.endswith("attempt_0/1/stderr.log")


def test_torchrun_s_error_files_say_who_was_first(tmp_path: Path) -> None:
    for rank, seconds in ((0, 20), (1, 10)):
        directory = tmp_path / "attempt_0" / str(rank)
        directory.mkdir(parents=True)
        (directory / "stderr.log").write_text("")
        message = {"message": f"ValueError: {rank}", "extraInfo": {"timestamp": str(seconds)}}
        (directory / "error.json").write_text(json.dumps({"message": message}))
    assert diagnose(read_evidence(tmp_path)).rank == 1


def test_deepspeed_s_logs_name_the_ranks(tmp_path: Path) -> None:
    for rank in (0, 10, 2):
        (tmp_path / f"20260101_rank{rank}.log").write_text("")
    assert [log.rank for log in read_evidence(tmp_path).logs] == [0, 2, 10]


def test_of_a_long_log_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MAXIMUM_LOG_BYTES", 8)
    path = tmp_path / "a.log"
    path.write_text("one\ntwo\nthree\nfour\n")
    log = read_evidence(path).logs[0]
    assert log.text.split("\n")[:2] == ["ee", "four"]
    assert log.first_line == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "none does not exist; give the directory of a run"), (".", r"holds no logs \(\*.err, \*.log")],
)
def test_what_is_no_run_is_said(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_evidence(tmp_path / name)


def test_the_newest_run_is_the_last_that_was_started(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run is in"):
        newest_run(tmp_path)
    for number, name in enumerate(("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "command.txt").touch()
        os.utime(tmp_path / name / "command.txt", (number, time.time() + number))
    (tmp_path / "other").mkdir()
    assert newest_run(tmp_path).name == "a"


def test_this_process_is_told_by_its_start() -> None:
    assert own_process()["started"] == psutil.Process().create_time()
