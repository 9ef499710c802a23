"""launch and demo as commands, up to the point where processes would start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launchkit.cli import demo
from launchkit.cli.console import Console
from launchkit.cli.launch import report_run
from launchkit.cli.main import main
from launchkit.detection import Detection
from launchkit.errors import LaunchkitError
from launchkit.launch.record import RunRecord
from launchkit.plan import Plan
from launchkit.probe.host import detect_host
from launchkit.process.run import RunOptions
from launchkit.scenario import CommHook, DdpSettings, StrategyKind
from launchkit.serialize import document_text, plan_document
from launchkit.units import MIB
from tests.report import plans


@pytest.fixture
def plan_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a plan for DDP, a script and some data."""
    monkeypatch.chdir(tmp_path)
    plan = plans.plan(chosen=plans.candidate(of=plans.scenario(StrategyKind.DDP)))
    path = tmp_path / "plan.json"
    path.write_text(document_text(plan_document(plan)), encoding="utf-8")
    (tmp_path / "train.py").write_text("print('trained')\n", encoding="utf-8")
    (tmp_path / "my.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    return path


def _record(**changes: object) -> RunRecord:
    values = {"run_dir": "runs/1", "command": ("python",), "engine": "python", "strategy": "DDP", "exit_code": 0}
    return RunRecord(**{**values, "seconds": 1.0, "predicted": {}, **changes})  # type: ignore[arg-type]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[RunOptions]:
    """Runs nothing; keeps what would have been run."""
    asked: list[RunOptions] = []

    def launch_run(plan: Plan, *, options: RunOptions) -> RunRecord:
        asked.append(options)
        return _record(exit_code=7, failure="CUDA out of memory", log="runs/1/logs/rank1.log")

    monkeypatch.setattr("launchkit.cli.launch.launch_run", launch_run)
    return asked


def test_dry_run_prints_the_command_and_starts_nothing(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(plan_file.parent.iterdir())
    assert main(["launch", "--plan", str(plan_file), "--dry-run", "train.py", "--lr", "1e-5", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "--nproc" in text
    assert "train.py --lr 1e-5 --dry-run" in text
    assert set(plan_file.parent.iterdir()) == before


def test_dry_run_is_a_document(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--plan", str(plan_file), "--dry-run", "--json", "-q", "train.py"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"schema_version", "argv", "environment", "run_dir", "files"} == set(document)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.py", "--json", "-x"], {"script": "train.py", "script_args": ("--json", "-x")}),
        (["--data", "my.jsonl", "--max-steps", "3"], {"script": None, "data": "my.jsonl", "max_steps": 3}),
        (["--engine", "torchrun", "train.py"], {"engine": "torchrun", "script": "train.py"}),
        (["--node-rank", "1", "--master-addr", "10.0.0.1", "t.py"], {"node_rank": 1, "master_addr": "10.0.0.1"}),
    ],
)
def test_options_reach_the_run(
    arguments: list[str], expected: dict[str, object], plan_file: Path, launched: list[RunOptions]
) -> None:
    main(["launch", "--plan", str(plan_file), *arguments])
    assert {name: getattr(launched[0], name) for name in expected} == expected


def test_the_child_s_exit_code_is_ours(
    plan_file: Path, launched: list[RunOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--plan", str(plan_file), "train.py"]) == 7
    captured = capsys.readouterr()
    assert "exit code 7: CUDA out of memory" in captured.err
    assert "runs/1/logs/rank1.log" in captured.err
    assert "run: runs/1" in captured.out
    assert captured.err.endswith("next launchkit why runs/1\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data"),
        (["gone.py"], "gone.py is not a file"),
        (["--data", "gone.jsonl"], "gone.jsonl is not a file"),
        (["--max-steps", "0", "train.py"], "Invalid value for '--max-steps'"),
        (["--plan", "gone.json"], "gone.json does not exist; write a plan with launchkit plan MODEL"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    arguments: list[str], message: str, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--plan", str(plan_file), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_run_that_succeeded_has_no_failure_line(capsys: pytest.CaptureFixture[str]) -> None:
    report_run(_record(), console=Console())
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.endswith("run: runs/1\n")


def test_demo_never_takes_a_directory_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(LaunchkitError, match="exists and is not the demo's model"):
        demo.make_model(tmp_path / "model")


def test_demo_data_ships_with_the_package() -> None:
    first = json.loads(demo.demo_data().read_text(encoding="utf-8").splitlines()[0])
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(("num_nodes", "others"), [(1, ""), (2, "--node-rank 1 --"), (4, "--node-rank 1 to 3 --")])
def test_the_first_node_says_what_to_type_on_the_others(
    num_nodes: int, others: str, plan_file: Path, launched: list[RunOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = replace(plans.CLUSTER, num_nodes=num_nodes)
    plan_file.write_text(document_text(plan_document(plans.plan(cluster=cluster))), encoding="utf-8")
    main(["launch", "--plan", str(plan_file), "train.py"])
    said = capsys.readouterr().err
    assert ("note: this is node 0" in said) is bool(others)
    assert others in said


@pytest.mark.parametrize(
    ("settings", "words", "advice"),
    [
        (DdpSettings(), ["train.py"], ""),
        (
            DdpSettings(bucket_cap_bytes=50 * MIB, comm_hook=CommHook.FP16),
            ["train.py"],
            "note: the plan's --ddp-settings reach a script only if it says Accelerator(kwargs_handlers="
            '[DistributedDataParallelKwargs(bucket_cap_mb=50, comm_hook=DDPCommunicationHookType("fp16"))])\n',
        ),
        (DdpSettings(static_graph=True), ["--data", "my.jsonl"], ""),  # the built-in fine-tune has them
    ],
)
def test_what_a_script_has_to_say_itself_is_said(
    settings: DdpSettings,
    words: list[str],
    advice: str,
    plan_file: Path,
    launched: list[RunOptions],
    capsys: pytest.CaptureFixture[str],
) -> None:
    scenario = plans.scenario(StrategyKind.DDP)
    scenario = replace(scenario, strategy=replace(scenario.strategy, ddp=settings))
    plan = plans.plan(chosen=plans.candidate(of=scenario))
    plan_file.write_text(document_text(plan_document(plan)), encoding="utf-8")
    main(["launch", "--plan", str(plan_file), *words])
    said = capsys.readouterr().err
    assert ("DistributedDataParallelKwargs" in said) is bool(advice)
    assert advice in said


def test_a_plan_for_gpus_starts_nothing_where_there_are_none(
    plan_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = detect_host()
    monkeypatch.setattr("launchkit.probe.detect.detect", lambda: Detection(host=host))
    monkeypatch.setattr("launchkit.process.run._require_packages", lambda *_: None)
    before = set(plan_file.parent.iterdir())
    assert main(["launch", "--plan", str(plan_file), "train.py"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "launchkit: the plan is for 2× RTX 4090 and no GPU is seen here; launch it where they are, or plan for this "
        "machine: launchkit plan Qwen/Qwen3-8B --gpus cpu\n"
    )
    assert set(plan_file.parent.iterdir()) == before
