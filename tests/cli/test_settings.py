"""Flags before variables before files before defaults, and what took effect is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchkit.alloc_conf import AllocatorSettings
from launchkit.catalog.presets import find_preset
from launchkit.cli.settings import gather, unknown_variables
from launchkit.errors import UsageError


def _write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


OWN = {"launchkit.toml": 'seq-len = 512\nstrategy = "ddp"\n'}
PROJECT = {"pyproject.toml": "[tool.launchkit]\nseq_len = 256\npacking = true\n"}


@pytest.mark.parametrize(
    ("typed", "environment", "files", "given", "text"),
    [
        ({}, {}, {}, {}, ""),
        ({"seq_len": "64"}, {}, {}, {"seq_len": 64}, ""),
        (
            {"seq_len": "64"},
            {"LAUNCHKIT_SEQ_LEN": "128"},
            OWN,
            {"seq_len": 64, "strategy": "ddp"},
            "--strategy ddp (launchkit.toml)",
        ),
        ({}, {"LAUNCHKIT_SEQ_LEN": "128"}, {}, {"seq_len": 128}, "--seq-len 128 (LAUNCHKIT_SEQ_LEN)"),
        (
            {},
            {},
            PROJECT,
            {"seq_len": 256, "packing": True},
            "--seq-len 256 --packing True (pyproject.toml)",
        ),
        (
            {},
            {},
            {**OWN, **PROJECT},
            {"seq_len": 512, "strategy": "ddp"},
            "--seq-len 512 --strategy ddp (launchkit.toml)",
        ),
        ({}, {"LAUNCHKIT_GPUS": ""}, {"pyproject.toml": "[project]\nname = 'x'\n"}, {}, ""),
        ({"packing": False}, {}, PROJECT, {"packing": False, "seq_len": 256}, "--seq-len 256 (pyproject.toml)"),
        ({"preset": None}, {"LAUNCHKIT_PRESET": ""}, {}, {}, ""),
        (
            {},
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            {},
            {"alloc_conf": "expandable_segments:True"},
            "--alloc-conf expandable_segments:True (PYTORCH_ALLOC_CONF)",
        ),
        (
            {},
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            {},
            {"alloc_conf": "max_split_size_mb:64"},
            "--alloc-conf max_split_size_mb:64 (PYTORCH_CUDA_ALLOC_CONF)",
        ),
        ({"gpus": "4x4090"}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, {}, {"gpus": "4x4090"}, ""),
    ],
)
def test_the_nearest_source_wins(
    typed: dict[str, object],
    environment: dict[str, str],
    files: dict[str, str],
    given: dict[str, object],
    text: str,
    tmp_path: Path,
) -> None:
    _write(tmp_path, files)
    settings = gather(typed, environment=environment, directory=tmp_path)
    assert settings.request.given() == given
    assert settings.text == text


@pytest.mark.parametrize(
    ("typed", "environment", "files", "name", "changed", "text"),
    [
        ({"preset": "Vicuna_7B"}, {}, {}, "vicuna-7b", {}, "--strategy fsdp --method full --"),
        (
            {"preset": "vicuna-7b", "seq_len": "64"},
            {"LAUNCHKIT_MICRO_BATCH": "1"},
            OWN,
            "vicuna-7b",
            {"seq_len": 64, "micro_batch": 1, "strategy": "ddp"},
            "--micro-batch 1 (LAUNCHKIT_MICRO_BATCH), --strategy ddp (launchkit.toml), --method full --",
        ),
        (
            {},
            {"LAUNCHKIT_PRESET": "vicuna-7b"},
            {},
            "vicuna-7b",
            {},
            "--preset vicuna-7b (LAUNCHKIT_PRESET), --strategy",
        ),
        (
            {},
            {},
            {"launchkit.toml": 'preset = "alpaca-7b"\n'},
            "alpaca-7b",
            {},
            "--preset alpaca-7b (launchkit.toml), --strategy fsdp --method full --",
        ),
    ],
)
def test_a_preset_stands_behind_all_that_was_said(
    typed: dict[str, object],
    environment: dict[str, str],
    files: dict[str, str],
    name: str,
    changed: dict[str, object],
    text: str,
    tmp_path: Path,
) -> None:
    _write(tmp_path, files)
    settings = gather(typed, environment=environment, directory=tmp_path)
    assert settings.request.given() == {**find_preset(name).flags, **changed}
    assert settings.text.startswith(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"launchkit.toml": "seq_len = "}, "launchkit.toml is not TOML"),
        (
            {"launchkit.toml": "seqlen = 4"},
            "launchkit.toml: 'seqlen' is no setting of launchkit; did you mean seq_len?",
        ),
        ({"pyproject.toml": "[tool]\nlaunchkit = 4"}, "pyproject.toml has a launchkit setting that is no table"),
        ({"launchkit.toml": "seq_len = -1"}, "--seq-len -1 is not a whole number"),
        ({"launchkit.toml": "strategy = ['ddp']"}, "--strategy ['ddp'] is unknown"),
        ({"launchkit.toml": 'preset = "vicuna7b"'}, "--preset vicuna7b is unknown; did you mean vicuna-7b?"),
    ],
)
def test_bad_files_are_one_line(files: dict[str, str], message: str, tmp_path: Path) -> None:
    _write(tmp_path, files)
    with pytest.raises(UsageError) as raised:
        gather({}, environment={}, directory=tmp_path)
    assert message in str(raised.value)


def test_slips_in_variable_names_are_found() -> None:
    environment = {"LAUNCHKIT_SEQLEN": "1", "LAUNCHKIT_SEQ_LEN": "1", "LAUNCHKIT_HOME": "/x", "SEQLEN": "1"}
    environment["LAUNCHKIT_PRESET"] = "vicuna-7b"
    assert unknown_variables(environment) == ["LAUNCHKIT_SEQLEN"]


def test_torch_may_be_told_what_is_not_modelled(tmp_path: Path) -> None:
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    gathered = gather({}, environment=environment, directory=tmp_path)
    assert gathered.request.alloc_conf is None and not gathered.origins
    assert gathered.notes == (
        "PYTORCH_CUDA_ALLOC_CONF has an option 'backend' that is not modelled: planned as if it were not set",
    )
    assert not gather({"gpus": "4x4090"}, environment=environment, directory=tmp_path).notes
    with pytest.raises(UsageError, match="not modelled"):
        AllocatorSettings.parse("backend:cudaMallocAsync")
