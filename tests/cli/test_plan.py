"""plan, estimate and config as commands: what reaches the planner, what is printed, written and returned."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launchkit.catalog.presets import find_preset, load_presets
from launchkit.cli.main import main
from launchkit.plan import Candidate, Plan
from launchkit.request import Request
from launchkit.scenario import Precision
from launchkit.serialize import plan_document, plan_from_text
from tests.report import plans

Answer = Callable[[Plan], list[tuple[str, Request]]]


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Lets the planner answer with a given plan, and keeps what it was asked."""

    def arrange(plan: Plan) -> list[tuple[str, Request]]:
        asked: list[tuple[str, Request]] = []

        def plan_request(model: str, request: Request, **_: object) -> Plan:
            asked.append((model, request))
            return plan

        def estimate_request(model: str, request: Request, **_: object) -> tuple[Candidate, object]:
            asked.append((model, request))
            assert plan.chosen is not None
            return plan.chosen, plan.cluster

        monkeypatch.setattr("launchkit.api.plan_request", plan_request)
        monkeypatch.setattr("launchkit.api.estimate_request", estimate_request)
        return asked

    return arrange


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {}),
        (["--gpus", "2x4090", "--seq-len", "4096"], {"gpus": "2x4090", "seq_len": 4096}),
        (["--seq_len=64", "--micro_batch", "2"], {"seq_len": 64, "micro_batch": 2}),
        (["--packing", "--no-compile"], {"packing": True, "compile": False}),
        (
            ["--fsdp-sharding", "shard-grad-op", "--strategy", "FSDP2"],
            {"fsdp_sharding": "shard_grad_op", "strategy": "fsdp2"},
        ),
        (["--num-gpus", "2"], {"gpus": "2xauto"}),
        (["--num-processes", "4", "--gpus", "H100"], {"gpus": "4xH100"}),
        (["--nproc-per-node", "2", "--gpus", "cpu"], {"gpus": "2xcpu"}),
        (["--nproc_per_node", "2", "--gpus", "cpu"], {"gpus": "2xcpu"}),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "estimate"])
def test_flags_reach_the_planner(verb: str, arguments: list[str], given: dict[str, object], answer: Answer) -> None:
    asked = answer(plans.plan())
    assert main([verb, "Qwen/Qwen3-8B", *arguments]) == 0
    assert [(model, request.given()) for model, request in asked] == [("Qwen/Qwen3-8B", given)]


@pytest.mark.parametrize("verb", ["plan", "estimate"])
def test_a_preset_reaches_the_planner_below_what_is_typed(
    verb: str, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answer(plans.plan())
    assert main([verb, "gpt2", "--preset", "zephyr-7b-sft", "--seq-len", "64"]) == 0
    assert asked[0][1].given() == {**find_preset("zephyr-7b-sft").flags, "seq_len": 64}
    said = capsys.readouterr().err
    assert "settings: --strategy zero3 --method full --precision bf16" in said
    assert said.count("preset zephyr-7b-sft") == 1
    assert "--seq-len" not in said


@pytest.mark.parametrize("verb", ["plan", "estimate"])
def test_an_unknown_preset_is_one_line(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "gpt2", "--preset", "zephyr"]) == 2
    assert capsys.readouterr().err == "launchkit: --preset zephyr is unknown; did you mean zephyr-7b-sft?\n"


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "presets", "--json"]) == 0
    captured = capsys.readouterr()
    assert [row["name"] for row in json.loads(captured.out)["presets"]] == [preset.name for preset in load_presets()]
    assert all(f" {preset.name}\n" in captured.err for preset in load_presets())


def test_what_took_effect_is_said(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answer(plans.plan())
    monkeypatch.setenv("LAUNCHKIT_SEQ_LEN", "4096")
    monkeypatch.setenv("LAUNCHKIT_SEQLEN", "4096")
    Path("launchkit.toml").write_text('gpus = "2x4090"\n', encoding="utf-8")
    assert main(["plan", "gpt2"]) == 0
    assert asked[0][1].given() == {"gpus": "2x4090", "seq_len": 4096}
    assert capsys.readouterr().err == (
        "note: LAUNCHKIT_SEQLEN is no setting of launchkit and does nothing\n"
        "settings: --seq-len 4096 (LAUNCHKIT_SEQ_LEN), --gpus 2x4090 (launchkit.toml)\n"
    )


@pytest.mark.parametrize(
    ("plan", "exit_code"),
    [(plans.plan(), 0), (plans.plan(chosen=plans.candidate(peak_gib=23.2)), 4), (plans.nothing_fits(), 3)],
)
def test_check_tells_by_exit_code(plan: Plan, exit_code: int, answer: Answer) -> None:
    answer(plan)
    assert main(["plan", "gpt2", "--check", "-q"]) == exit_code
    assert main(["plan", "gpt2", "-q"]) == 0
    if plan.chosen is not None:
        assert main(["estimate", "gpt2", "--check", "-q"]) == exit_code


def test_check_writes_nothing(answer: Answer) -> None:
    answer(plans.plan())
    main(["plan", "gpt2", "--check"])
    main(["plan", "gpt2", "--dry-run"])
    main(["plan", "gpt2", "--json"])
    assert list(Path.cwd().iterdir()) == []


def test_plan_is_kept_and_named(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(plans.plan())
    assert main(["plan", "gpt2"]) == 0
    assert "launchkit launch --plan .launchkit/plan.json" in capsys.readouterr().out
    assert plan_from_text(Path(".launchkit/plan.json").read_text(encoding="utf-8"), name="plan") == plans.plan()


def test_another_plan_overwrites_none(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(plans.plan())
    main(["plan", "gpt2"])
    main(["plan", "gpt2"])
    answer(plans.plan(num_considered=1))
    capsys.readouterr()
    main(["plan", "gpt2"])
    kept = {path.name for path in Path(".launchkit").iterdir()}
    (other,) = kept - {"plan.json"}
    assert f"launchkit launch --plan .launchkit/{other}" in capsys.readouterr().out
    main(["plan", "gpt2", "--force"])
    assert {path.name for path in Path(".launchkit").iterdir()} == kept
    assert json.loads(Path(".launchkit/plan.json").read_text(encoding="utf-8"))["num_considered"] == 1


def test_output_is_written_once(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(plans.plan())
    assert main(["plan", "gpt2", "-o", "deep/mine.json"]) == 0
    answer(plans.nothing_fits())
    assert main(["plan", "gpt2", "-o", "deep/mine.json"]) == 2
    assert "deep/mine.json exists already; add --force to overwrite" in capsys.readouterr().err
    assert main(["plan", "gpt2", "-o", "deep/mine.json", "--force"]) == 0


def test_a_directory_that_takes_no_files_still_gets_an_answer(
    answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(plans.plan())
    Path(".launchkit").write_text("in the way", encoding="utf-8")
    assert main(["plan", "gpt2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(" ✓ LoRA")
    assert captured.err.startswith("note: the plan was not kept")


def test_json_is_one_document_and_people_read_stderr(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(plans.plan())
    assert main(["plan", "gpt2", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(json.dumps(plan_document(plans.plan())))
    assert captured.err.startswith(" ✓ LoRA")
    assert main(["estimate", "gpt2", "--json", "-q"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["estimate"]["fits"] is True
    assert captured.err == ""


@pytest.mark.parametrize(
    ("environment", "has_colour", "width"),
    [
        ({}, False, 100),
        ({"FORCE_COLOR": "1"}, True, 100),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, 100),
        ({"COLUMNS": "60"}, False, 60),
        ({"COLUMNS": "sixty"}, False, 100),
    ],
)
def test_the_terminal_is_respected(
    environment: dict[str, str],
    has_colour: bool,
    width: int,
    answer: Answer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    answer(plans.plan())
    main(["plan", "gpt2", "--dry-run"])
    text = capsys.readouterr().out
    assert ("\x1b[" in text) is has_colour
    if not has_colour:
        assert width - 20 < max(len(line) for line in text.splitlines()) <= width


def test_config_writes_what_a_plan_says(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(plans.plan())
    main(["plan", "gpt2"])
    capsys.readouterr()
    assert main(["config", "--dry-run"]) == 0
    assert "# accelerate.yaml" in capsys.readouterr().out
    assert not Path("accelerate.yaml").exists()
    assert main(["config", ".launchkit/plan.json", "--output-dir", "out", "--target", "accelerate"]) == 0
    assert capsys.readouterr().out == "out/accelerate.yaml\n"
    assert main(["config", "--output-dir", "out"]) == 2
    assert "out/accelerate.yaml exists already" in capsys.readouterr().err
    assert {path.name for path in Path("out").iterdir()} == {"accelerate.yaml"}
    assert main(["config", "--output-dir", "out", "--force", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] is True
    assert {Path(file["path"]).name for file in document["files"]} == {path.name for path in Path("out").iterdir()}


def test_config_of_a_plan_in_which_nothing_fits(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(plans.nothing_fits())
    main(["plan", "gpt2", "-o", "plan.json"])
    capsys.readouterr()
    assert main(["config", "plan.json"]) == 2
    assert "nothing fits" in capsys.readouterr().err


def test_a_plan_in_which_nothing_fits_is_named_where_it_was_asked_for(
    answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(plans.nothing_fits())
    main(["plan", "gpt2", "-o", "plan.json"])
    assert capsys.readouterr().err == "written: plan.json\n"


def test_a_dry_run_says_what_would_keep_the_plan(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(plans.plan())
    main(["plan", "gpt2", "--dry-run"])
    assert "leave out --dry-run" in capsys.readouterr().out


def test_data_that_is_not_here_is_said_when_planning(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(plans.plan())
    Path("here.jsonl").touch()
    assert main(["plan", "gpt2", "--data", "here.jsonl"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["plan", "gpt2", "--data", "gone.jsonl"]) == 0
    assert capsys.readouterr().err.startswith("note: gone.jsonl is not a file here")


@pytest.mark.parametrize(
    ("planned", "typed", "named"),
    [({}, [], "train.jsonl"), ({"data": "chat.jsonl"}, [], "chat.jsonl"), ({"data": "a"}, ["--data", "b"], "b")],
)
def test_files_name_the_data_of_the_plan(
    planned: dict[str, object], typed: list[str], named: str, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(plans.plan(request=planned))
    main(["plan", "gpt2"])
    assert main(["config", "--target", "axolotl", "--dry-run", *typed]) == 0
    assert f"- path: {named}\n" in capsys.readouterr().out


def test_a_tool_that_cannot_run_the_plan_is_left_out(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    training = replace(plans.LORA, precision=Precision.BF16_PURE)
    answer(plans.plan(chosen=plans.candidate(of=plans.scenario(training=training))))
    main(["plan", "gpt2"])
    capsys.readouterr()
    assert main(["config"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "accelerate.yaml\n"
    assert captured.err.startswith("note: left out: Axolotl always autocasts")
    assert main(["config", "--target", "axolotl"]) == 2
