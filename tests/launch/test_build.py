"""Whole launches: arguments, environment and files, compared with golden text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from launchkit.errors import IllegalScenarioError
from launchkit.launch.build import (
    BuiltIn,
    Launcher,
    Script,
    build_command,
    child_environment,
    local_ranks,
    nodes_of,
)
from launchkit.launch.command import Command, Engine
from launchkit.launch.job import Data, FineTuneJob
from tests.builders import candidate, cluster, profile

SCRIPT = Script(path="/home/me/train.py", args=("--epochs", "2"))
BUILT_IN = BuiltIn(model_path="/models/llama", data=Data(path="/data/chat.jsonl", max_steps=4))
LAUNCHER = Launcher(python="python", master_port=12345)

LAUNCHES: dict[str, tuple[dict[str, Any], dict[str, Any], BuiltIn | Script, Launcher]] = {
    "single-cpu-script": (
        {"strategy": "single", "precision": "fp32"},
        {"num_gpus": 1, "backend": "cpu"},
        SCRIPT,
        LAUNCHER,
    ),
    "ddp-gpu-script": ({"strategy": "ddp", "gradient_accumulation_steps": 4}, {"num_gpus": 4}, SCRIPT, LAUNCHER),
    "ddp-cpu-script": ({"strategy": "ddp", "precision": "fp32"}, {"num_gpus": 2, "backend": "cpu"}, SCRIPT, LAUNCHER),
    "fsdp2-gpu-script": ({"strategy": "fsdp2", "checkpointing": "full"}, {"num_gpus": 4}, SCRIPT, LAUNCHER),
    "fsdp2-cpu-built-in": ({"strategy": "fsdp2"}, {"num_gpus": 2, "backend": "cpu"}, BUILT_IN, LAUNCHER),
    "fsdp1-gpu-script": ({"strategy": "fsdp", "sharding": "shard_grad_op"}, {"num_gpus": 4}, SCRIPT, LAUNCHER),
    "hsdp-two-nodes-script": (
        {"strategy": "hsdp"},
        {"num_gpus": 4, "num_nodes": 2},
        SCRIPT,
        Launcher(python="python", node_rank=1, master_addr="10.0.0.1", master_port=12345),
    ),
    "zero2-cpu-script": ({"strategy": "zero2"}, {"num_gpus": 2, "backend": "cpu"}, SCRIPT, LAUNCHER),
    "zero3-gpu-built-in-qlora": (
        {"strategy": "zero3", "method": "qlora", "offload": "optimizer"},
        {"num_gpus": 4},
        BUILT_IN,
        Launcher(python="python", master_port=12345, visible_devices="4,5,6,7", measure="counters"),
    ),
    "zero3-two-nodes-script": (
        {"strategy": "zero3"},
        {"num_gpus": 8, "num_nodes": 2},
        SCRIPT,
        Launcher(python="python", master_addr="10.0.0.1", master_port=12345, hostfile="/etc/hosts.txt"),
    ),
    "zero1-torchrun-built-in": (
        {"strategy": "zero1"},
        {"num_gpus": 2},
        BUILT_IN,
        Launcher(python="python", engine=Engine.TORCHRUN, master_port=12345),
    ),
}


def build(name: str) -> Command:
    scenario, hardware, target, launcher = LAUNCHES[name]
    return build_command(
        candidate(**scenario), cluster(**hardware), target=target, run_dir="/runs/one", launcher=launcher
    )


@pytest.mark.parametrize("name", LAUNCHES)
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    command = build(name)
    lines = [*command.argv, "", *(f"{key}={value}" for key, value in sorted(command.environment.items()))]
    files = [f"\n# {needed.name}\n{needed.text}" for needed in command.files]
    golden(f"{name}.txt", "\n".join(lines) + "\n" + "".join(files))


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_is_the_same_twice(name: str) -> None:
    assert build(name) == build(name)


@pytest.mark.parametrize("name", [name for name in LAUNCHES if "zero" in name and "script" in name])
def test_a_script_gets_numbers_never_auto(name: str) -> None:
    (file,) = build(name).files
    assert "auto" not in json.dumps(json.loads(file.text))


@pytest.mark.parametrize("name", [name for name in LAUNCHES if "built-in" in name])
def test_the_job_file_reads_back(name: str) -> None:
    text = next(needed.text for needed in build(name).files if needed.name == "job.json")
    assert FineTuneJob.from_text(text, name="job.json").text == text


def test_cpu_sharding_must_not_say_use_cpu() -> None:
    """With ACCELERATE_USE_CPU accelerate would turn FSDP into DDP without a word; DDP in turn needs it."""
    assert "ACCELERATE_USE_CPU" not in build("fsdp2-cpu-built-in").environment
    assert build("ddp-cpu-script").environment["ACCELERATE_USE_CPU"] == "true"


def test_local_ranks_are_those_of_the_node() -> None:
    launcher = Launcher(python="python", node_rank=1)
    nodes = nodes_of(candidate(strategy="ddp"), cluster(num_gpus=4, num_nodes=2), launcher)
    assert local_ranks(nodes) == (4, 5, 6, 7)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("PATH", True),
        ("HF_TOKEN", True),
        ("NCCL_DEBUG", True),
        ("RANK", False),
        ("WORLD_SIZE", False),
        ("MASTER_PORT", False),
        ("TORCHELASTIC_RUN_ID", False),
        ("ACCELERATE_USE_FSDP", False),
        ("FSDP_VERSION", False),
    ],
)
def test_what_a_surrounding_job_left_is_dropped(name: str, kept: bool) -> None:
    assert child_environment({name: "old"}, {"NEW": "1"}) == ({name: "old"} if kept else {}) | {"NEW": "1"}


@pytest.mark.parametrize(
    ("scenario", "model", "message"),
    [
        ({"loss": "cce"}, {}, "no cut cross-entropy; plan with --loss plain"),
        ({"checkpointing": "selective"}, {}, "no selective checkpointing"),
        ({"precision": "fp8"}, {}, "no fp8"),
        ({"trainer": "axolotl"}, {}, "the plan is for axolotl"),
        ({}, {"task": "seq2seq-lm"}, "not seq2seq-lm"),
    ],
)
def test_the_built_in_refuses(scenario: dict[str, Any], model: dict[str, Any], message: str) -> None:
    chosen = candidate(model=profile(**model), **scenario)
    with pytest.raises(IllegalScenarioError, match=message):
        build_command(chosen, cluster(num_gpus=1), target=BUILT_IN, run_dir="/r", launcher=LAUNCHER)


@pytest.mark.parametrize(("strategy", "gathers"), [("ddp", "False"), ("fsdp2", "True")])
def test_a_script_gets_accelerates_fp8_recipe(strategy: str, gathers: str) -> None:
    """Whose all-gather would take the converted layers from the optimizer where nothing is gathered."""
    command = build_command(
        candidate(strategy=strategy, precision="fp8"), cluster(), target=SCRIPT, run_dir="/r", launcher=LAUNCHER
    )
    assert command.environment["ACCELERATE_MIXED_PRECISION"] == "fp8"
    assert command.environment["ACCELERATE_FP8_BACKEND"] == "AO"
    assert command.environment["ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER"] == gathers
    assert command.environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false") == "false"


def test_a_script_gets_transformer_engine() -> None:
    chosen = candidate(strategy="ddp", precision="fp8", fp8_backend="te")
    command = build_command(chosen, cluster(), target=SCRIPT, run_dir="/r", launcher=LAUNCHER)
    fp8 = {name: value for name, value in command.environment.items() if name.startswith("ACCELERATE_FP8")}
    assert fp8 == {"ACCELERATE_FP8_BACKEND": "TE"}


def test_fp8_is_not_launched_on_a_cpu() -> None:
    with pytest.raises(IllegalScenarioError, match="there is none; use --precision bf16"):
        build_command(
            candidate(precision="fp8"), cluster(backend="cpu"), target=SCRIPT, run_dir="/r", launcher=LAUNCHER
        )
