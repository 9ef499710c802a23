"""check as a command, on a catalogued model: what is printed, the document, the exit code; nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

import launchkit
from launchkit.catalog.models import TracedModel
from launchkit.cli.main import main
from launchkit.errors import MissingExtraError, UsageError
from launchkit.export.lint import Tool
from launchkit.program import StepProgram
from launchkit.scenario import TraceKey

AXOLOTL = """
base_model: Qwen/Qwen3-8B
datasets: [{path: a.jsonl, type: completion}]
learning_rate: 0.0002
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_target_linear: true
sequence_len: 2048
micro_batch_size: 1
gradient_accumulation_steps: 4
bf16: true
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
"""
TRL = """
model_name_or_path: Qwen/Qwen3-8B
dataset_name: a
use_peft: true
load_in_4bit: true
dtype: bfloat16
lora_target_modules: all-linear
lora_dropout: 0.0
max_length: 4096
per_device_train_batch_size: 4
"""
ACCELERATE = """
distributed_type: MULTI_GPU
mixed_precision: bf16
num_processes: 2
"""


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    Path("a.yml").write_text(AXOLOTL)
    Path("acc.yaml").write_text(ACCELERATE)


def written(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def test_the_screen_says_the_verdict_first_and_the_next_command_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "a.yml", "--gpus", "4090"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(" ✓ QLoRA r=16 on all linear layers · single GPU · bf16-params")
    assert any("a.yml · read as Axolotl's" in line for line in lines)
    assert lines[-1].split("  ")[-1].strip() == "axolotl train a.yml"
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["a.yml", "acc.yaml"]


@pytest.mark.parametrize(
    ("text", "arguments", "exit_code"),
    [
        (AXOLOTL, ["--gpus", "4090"], 0),
        (AXOLOTL, ["--gpus", "6GiB"], 3),
        (AXOLOTL, ["--gpus", "4090", "--seq-len", "16384", "--checkpointing", "none"], 3),
        (AXOLOTL + "micro_batchsize: 1\n", ["--gpus", "4090"], 1),
        (AXOLOTL + "micro_batchsize: 1\n", ["--gpus", "6GiB"], 1),
        (AXOLOTL + "seed: 1\nseed: 2\n", ["--gpus", "4090"], 0),  # a warning
        (AXOLOTL + "attn_implementation: flash_attention_2\n", ["--gpus", "T4"], 1),  # no kernel there: refused
    ],
)
def test_the_exit_code_is_the_verdict_unless_the_file_is_wrong(text: str, arguments: list[str], exit_code: int) -> None:
    assert main(["check", written("b.yml", text), "-q", *arguments]) == exit_code


def test_only_within_the_band_is_a_code_of_its_own() -> None:
    peak = launchkit.check("a.yml", gpus="4090").candidate
    assert peak is not None
    mib = round(peak.estimate.device_peak_bytes / 2**20)
    sizes = (mib + extra for extra in range(-2500, 2500, 250))
    codes = [main(["check", "a.yml", "-q", "--gpus", f"{size}MiB"]) for size in sizes]
    assert list(dict.fromkeys(codes)) == [3, 4, 0]


def test_the_document_is_the_candidate_and_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    name = written("b.yml", AXOLOTL + "micro_batchsize: 1\nneftune_noise_alpha: 5\nwandb_project: x\n")
    assert main(["check", name, "--gpus", "6GiB", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert main(["estimate", "Qwen/Qwen3-8B", "--json", *_flags(document["candidate"]["scenario"])]) == 0
    estimated = json.loads(capsys.readouterr().out)
    assert document["candidate"]["estimate"] == estimated["estimate"]
    assert document["candidate"]["scenario"] == estimated["scenario"]
    assert (document["schema_version"], document["kind"], document["file"]) == (1, "axolotl", "b.yml")
    assert [finding["path"] for finding in document["findings"]] == ["micro_batchsize"]
    assert document["ignored"] == ["neftune_noise_alpha is not modelled"]
    assert "wandb_project" in document["unrelated"]
    assert any(edit["path"] == "sequence_len" for change in document["changes"] for edit in change["edits"])


def _flags(scenario: dict[str, object]) -> list[str]:
    """What to type to ``estimate`` for the scenario of a document."""
    names = (
        *("strategy", "method", "lora_rank", "lora_targets", "precision", "optimizer", "micro_batch", "global_batch"),
        *("seq_len", "checkpointing", "attention", "loss", "trainer"),
    )
    flags = [f"--{name.replace('_', '-')}={scenario[name]}" for name in names]
    return [*flags, "--gpus=6GiB"]


def test_what_fits_after_its_edits_really_does() -> None:
    """The edits are written into the file, and the file is checked again."""
    given = launchkit.check(written("t.yaml", TRL), gpus="12GiB")
    fitting = [change for change in (*given.changes, given.together) if change is not None and change.fits]
    assert given.candidate is not None and not given.candidate.estimate.fits
    assert fitting
    for change in fitting:
        config = yaml.safe_load(TRL) | {edit.path: edit.value for edit in change.edits}
        again = launchkit.check(written("again.yaml", yaml.safe_dump(config)), gpus="12GiB").candidate
        assert again is not None
        saved = given.candidate.estimate.allocated_peak_bytes - again.estimate.allocated_peak_bytes
        assert saved == pytest.approx(change.saved_bytes, rel=0.02)
        assert again.estimate.device_peak_bytes <= again.estimate.device_usable_bytes


def test_flags_supply_what_a_file_leaves_open(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["acc.yaml", "--gpus", "4090", "--model", "Qwen/Qwen3-8B", "--method", "qlora", "--seq-len", "1024"]
    assert main(["check", *arguments, "--checkpointing", "full"]) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "QLoRA r=16 on all linear layers · DDP · bf16-params" in screen
    assert "× 2 GPUs = 2 sequences of 1024 tokens" in screen
    assert "not said: --optimizer adamw_torch_fused, --micro-batch 1, --attention sdpa, --loss plain" in screen


def test_a_refusal_is_a_verdict_too(capsys: pytest.CaptureFixture[str]) -> None:
    name = written("b.yml", AXOLOTL + "attn_implementation: flash_attention_2\n")
    assert main(["check", name, "--gpus", "cpu", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["candidate"] is None
    assert captured.err.startswith(" ✗ not estimated: flash_attention_2 does not run on")
    assert captured.err.rstrip().endswith("launchkit check b.yml --gpus 4x4090 (or what it is to run on)")


BAD: list[tuple[str, list[str], str]] = [
    ("", ["nowhere.yml"], "nowhere.yml does not exist; give a YAML of Axolotl"),
    ("", ["."], ". is a directory; give"),
    ("", [os.devnull], f"{os.devnull} is no regular file; give"),
    ("- a\n", ["f.yml"], "f.yml is a list, not keys with values; give"),
    ("x: 1\n", ["f.yml"], "f.yml has no key that Axolotl, accelerate, DeepSpeed or TRL know; give"),
    ("a: [\n", ["f.yml"], "f.yml is not YAML (line "),
    ("a: !!python/object/apply:os.system ['touch pwned']\n", ["f.yml"], "could not determine a constructor"),
    ("x: 1\n" * 300_000, ["f.yml"], "f.yml holds 1,500,000 bytes, too many for a configuration"),
    (ACCELERATE, ["f.yml", "--gpus", "4090"], "f.yml names no model; add --model ID, such as"),
    (ACCELERATE, ["f.yml", "--gpus", "4090", "--model", "no/such/model"], "no/such/model"),
    (AXOLOTL, ["f.yml", "--gpus", "4x9999"], "9999"),
    (AXOLOTL.replace("size: 1", "size: two"), ["f.yml", "--gpus", "4090"], "f.yml: micro_batch_size is 'two', not a"),
    (AXOLOTL, ["f.yml", "--gpus", "4090", "--seq-len", "-1"], "--seq-len -1 is not a whole number"),
    (AXOLOTL + "deepspeed: z.json\n", ["f.yml", "--gpus", "4090"], "f.yml: deepspeed names z.json, which is not there"),
]


@pytest.mark.parametrize(("text", "arguments", "message"), BAD, ids=lambda value: str(value)[-50:])
def test_bad_input_is_one_line_and_code_2(
    text: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if text:
        written("f.yml", text)
    assert main(["check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("launchkit: ") and "; " in captured.err
    assert message in captured.err
    assert not Path("pwned").exists()


def test_a_file_that_no_text_is_in_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("f.yml").write_bytes(bytes(range(256)))
    assert main(["check", "f.yml"]) == 2
    assert "f.yml is no text; give" in capsys.readouterr().err


def test_a_file_that_another_names_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    text = AXOLOTL.replace("adapter: qlora\nload_in_4bit: true\n", "")
    (folder / "a.yml").write_text(text + "deepspeed: ds.json\n")
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    check = launchkit.check(folder / "a.yml", gpus="8xH100")
    assert check.tool is Tool.AXOLOTL
    assert check.candidate is not None and check.candidate.scenario.strategy.kind == "zero2"
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "bf16": {"enabled": true}}')
    check = launchkit.check(folder / "a.yml", gpus="8xH100")  # where Axolotl is started, it is found first
    assert check.candidate is not None and check.candidate.scenario.strategy.kind == "zero1"


@pytest.mark.parametrize(
    ("text", "gpus", "num_gpus"),
    [
        ("num_processes: 2", "H100", 2),
        ("num_processes: 2", "8xH100", 2),
        ("num_processes: 8", "4xH100", 4),
        ("num_processes: 16\nnum_machines: 2", "H100", 16),
        ("machine_rank: 0", "4xH100", 4),
    ],
)
def test_as_many_gpus_are_counted_as_processes_are_started(text: str, gpus: str, num_gpus: int) -> None:
    name = written("f.yml", f"distributed_type: MULTI_GPU\nmixed_precision: bf16\n{text}\n")
    check = launchkit.check(name, gpus=gpus, model="Qwen/Qwen3-8B", method="qlora", checkpointing="full")
    assert check.cluster.num_gpus == num_gpus


def test_trls_file_is_for_as_many_gpus_as_the_launcher_that_it_names() -> None:
    (Path.cwd() / "two.yaml").write_text(ACCELERATE)
    for name, num_gpus in (("two.yaml", 2), ("fsdp2", 8), ("single_gpu", 1)):
        check = launchkit.check(written("t.yaml", TRL + f"accelerate_config: {name}\n"), gpus="H100")
        assert check.cluster.num_gpus == num_gpus
    check = launchkit.check(written("t.yaml", TRL + "accelerate_config: fsdp2\nnum_processes: 4\n"), gpus="H100")
    assert check.cluster.num_gpus == 4


def test_the_python_function_raises_what_the_command_prints() -> None:
    with pytest.raises(UsageError, match=r"acc\.yaml names no model"):
        launchkit.check("acc.yaml", gpus="4090")


def test_without_the_training_stack_the_nearest_program_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axolotl's own defaults re-enter checkpoints, and most examples have dropout: neither program ships."""

    def untraceable(self: TracedModel, key: TraceKey) -> StepProgram:
        raise MissingExtraError("tracing needs the extra trace; pip install it")

    monkeypatch.setattr(TracedModel, "_trace", untraceable)
    monkeypatch.setenv("LAUNCHKIT_HOME", str(Path.cwd() / "home"))
    text = AXOLOTL.replace("{use_reentrant: false}", "{use_reentrant: true}") + "lora_dropout: 0.05\n"
    check = launchkit.check(written("f.yml", text), gpus="4090")
    nearest = launchkit.check("a.yml", gpus="4090")
    assert check.candidate is not None and nearest.candidate is not None
    assert check.candidate.estimate == nearest.candidate.estimate
    assert any("without lora_dropout and with full checkpointing" in line for line in check.assumed)
    assert any("counted as transformers' Trainer runs it" in note for note in nearest.candidate.notes)
    with pytest.raises(MissingExtraError):
        launchkit.check(written("g.yml", AXOLOTL + "peft_use_dora: true\n"), gpus="4090")
