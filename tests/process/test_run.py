"""``launch_run`` up to the moment where something starts: options, directories, dry runs."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from launchkit.errors import IllegalScenarioError, LaunchError, LaunchkitError, MissingExtraError, UsageError
from launchkit.process import run
from launchkit.process.run import RunOptions, launch_run, prepare_run
from tests.builders import candidate, cluster, plan


@pytest.fixture(autouse=True)
def every_package_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: object())


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("print('trained')")
    return str(path)


def test_a_dry_run_writes_nothing(script: str, tmp_path: Path) -> None:
    options = RunOptions(script=script, run_dir=str(tmp_path / "run"), dry_run=True)
    record = launch_run(plan(), options=options)
    assert record.dry_run
    assert record.command[-1] == script
    assert record.exit_code == 0
    assert not (tmp_path / "run").exists()


def test_an_existing_directory_is_never_taken(script: str, tmp_path: Path) -> None:
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    prepared = prepare_run(plan(), options=RunOptions(script=script, run_dir=str(tmp_path / "run")))
    assert prepared.run_dir == tmp_path / "run-3"


def test_the_default_directory_is_dated_and_named_after_the_strategy(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = prepare_run(plan(), options=RunOptions(script=script))
    assert prepared.run_dir.parent == tmp_path / "runs"
    assert prepared.run_dir.name.endswith("-fsdp2")


@pytest.mark.parametrize(("max_steps", "wish", "pads"), [(0, None, False), (4, None, True), (4, False, False)])
def test_a_trial_pads_to_the_planned_length(max_steps: int, wish: bool | None, pads: bool, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "a"}')
    options = RunOptions(data=str(data), max_steps=max_steps, pad_to_seq_len=wish, run_dir=str(tmp_path / "run"))
    job = next(needed for needed in prepare_run(plan(), options=options).command.files if needed.name == "job.json")
    assert json.loads(job.text)["data"]["pad_to_seq_len"] is pads


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "has no data; pass --data"),
        ({"data": "/none.jsonl"}, UsageError, "/none.jsonl is not a file"),
        ({"script": "/none.py"}, UsageError, "/none.py is not a file"),
        ({"node_rank": 1, "script": __file__}, UsageError, "node rank 1 is not one of 1 nodes"),
    ],
)
def test_refused(options: dict[str, Any], error: type[LaunchkitError], message: str) -> None:
    with pytest.raises(error, match=message):
        launch_run(plan(), options=RunOptions(**options))


@pytest.mark.parametrize(
    ("files", "named", "loaded"),
    [
        (["config.json"], "config.json", "."),
        (["config.json", "a.gguf"], ".", "."),
        (["b.gguf", "a.gguf"], ".", "a.gguf"),
        (["a.gguf", "b.gguf"], "b.gguf", "b.gguf"),
    ],
)
def test_what_was_planned_is_loaded(files: list[str], named: str, loaded: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    options = RunOptions(data=__file__, model_path=str(tmp_path / named), run_dir=str(tmp_path / "run"))
    files_needed = prepare_run(plan(), options=options).command.files
    job = json.loads(next(needed.text for needed in files_needed if needed.name == "job.json"))
    assert Path(job["model_path"], job["gguf_file"]) == tmp_path / loaded


def test_a_local_model_that_is_gone(tmp_path: Path) -> None:
    options = RunOptions(data=__file__, model_path=str(tmp_path / "gone"))
    with pytest.raises(UsageError, match="gone is not here; pass --model-path"):
        prepare_run(plan(), options=options)


def test_a_plan_that_found_nothing(script: str) -> None:
    with pytest.raises(IllegalScenarioError, match="nothing that fits"):
        launch_run(plan(chosen=None, fits=False), options=RunOptions(script=script))


def test_a_missing_package_is_named_with_its_extra(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else object())
    chosen = plan(chosen=candidate(strategy="zero2"))
    with pytest.raises(MissingExtraError, match=r"needs deepspeed.*launchkit-planner\[deepspeed\]"):
        launch_run(chosen, options=RunOptions(script=script))


def test_what_no_package_mends_is_said_before_a_package_is_asked_for(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    chosen = plan(chosen=candidate(trainer="axolotl"))
    with pytest.raises(IllegalScenarioError, match="the plan is for axolotl"):
        launch_run(chosen, options=RunOptions(data=script))


def test_node_1_must_know_where_node_0_is(script: str) -> None:
    two_nodes = plan(cluster=cluster(num_nodes=2))
    with pytest.raises(UsageError, match="--master-addr ADDRESS of node 0"):
        launch_run(two_nodes, options=RunOptions(script=script, node_rank=1))


def test_a_taken_port_is_said_before_anything_starts(script: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} is taken"):
            launch_run(plan(), options=RunOptions(script=script, master_port=port))


def test_a_stale_lock_stops_zero_before_it_hangs(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "op" / "lock"
    monkeypatch.setattr(run, "stale_locks", lambda environment: (lock,))
    chosen = plan(chosen=candidate(strategy="zero3"))
    options = RunOptions(script=script, run_dir=str(tmp_path / "run"))
    with pytest.raises(LaunchError, match=f"; rm {lock}"):
        launch_run(chosen, options=options)
