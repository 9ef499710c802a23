"""Flags before variables before files before defaults, and what took effect is said."""

from __future__ import annotations

from pathlib import Path

import pytest

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
            "--seq-len 256 (pyproject.toml), --packing True (pyproject.toml)",
        ),
        (
            {},
            {},
            {**OWN, **PROJECT},
            {"seq_len": 512, "strategy": "ddp"},
            "--seq-len 512 (launchkit.toml), --strategy ddp (launchkit.toml)",
        ),
        ({}, {"LAUNCHKIT_GPUS": ""}, {"pyproject.toml": "[project]\nname = 'x'\n"}, {}, ""),
        ({"packing": False}, {}, PROJECT, {"packing": False, "seq_len": 256}, "--seq-len 256 (pyproject.toml)"),
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
    ],
)
def test_bad_files_are_one_line(files: dict[str, str], message: str, tmp_path: Path) -> None:
    _write(tmp_path, files)
    with pytest.raises(UsageError) as raised:
        gather({}, environment={}, directory=tmp_path)
    assert message in str(raised.value)


def test_slips_in_variable_names_are_found() -> None:
    environment = {"LAUNCHKIT_SEQLEN": "1", "LAUNCHKIT_SEQ_LEN": "1", "LAUNCHKIT_HOME": "/x", "SEQLEN": "1"}
    assert unknown_variables(environment) == ["LAUNCHKIT_SEQLEN"]
