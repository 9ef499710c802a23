"""The screen of ``check``, as golden files at three widths, and the laws that every width keeps."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from launchkit.export.check import FileChange, FileCheck
from launchkit.export.edits import Edit
from launchkit.export.lint import Finding, Severity, Tool
from launchkit.report.check import check_exit_code, render_check
from launchkit.report.text import Canvas, columns
from launchkit.units import GIB
from tests.report import plans

WIDTHS = (60, 80, 100, 140)


def change(*texts: tuple[str, object], saved_gib: float, time_factor: float = 1.0, fits: bool = False) -> FileChange:
    edits = tuple(Edit(path=path, value=value) for path, value in texts)
    return FileChange(edits=edits, saved_bytes=round(saved_gib * GIB), time_factor=time_factor, fits=fits)


CHECKPOINTING = ("gradient_checkpointing", True), ("gradient_checkpointing_kwargs", {"use_reentrant": False})
FITS = FileCheck(
    path="my_axolotl.yml",
    tool=Tool.AXOLOTL,
    model="Qwen/Qwen3-8B",
    cluster=plans.CLUSTER,
    candidate=plans.candidate(),
    findings=(
        Finding(
            path="gradient_checkpointing_kwargs.use_reentrant",
            problem="is true unless written",
            fix="write false",
            severity=Severity.WARNING,
        ),
    ),
    changes=(change(*CHECKPOINTING, saved_gib=3.2, time_factor=1.22),),
    assumed=("not said: --attention sdpa",),
    unrelated=("datasets", "wandb_project", "learning_rate"),
)
DOES_NOT_FIT = replace(
    FITS,
    candidate=plans.candidate(peak_gib=40.0),
    findings=(Finding(path="micro_batchsize", problem="is no key here, and would be ignored", fix="remove it"),),
    changes=(
        change(("sequence_len", 512), saved_gib=18.0, time_factor=0.0, fits=True),
        change(*CHECKPOINTING, saved_gib=8.0, time_factor=1.25),
    ),
    together=change(("sequence_len", 2048), *CHECKPOINTING, saved_gib=18.1, time_factor=0.0, fits=True),
    more_gpus="--gpus 8xRTX-4090 with fsdp2",
    ignored=("neftune_noise_alpha is not modelled",),
)
REFUSED = replace(FITS, candidate=None, refusal="RTX 4090 has no such thing; use --precision bf16", changes=())
CHECKS = {"check": FITS, "check_misfit": DOES_NOT_FIT, "check_refused": REFUSED}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("width", [60, 100, 140])
def test_screen_is_as_kept(name: str, width: int, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}_{width}.txt", render_check(CHECKS[name], canvas=Canvas(width=width)))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CHECKS)
def test_no_line_is_wider_than_the_terminal_and_colour_adds_nothing(name: str, width: int) -> None:
    plain = render_check(CHECKS[name], canvas=Canvas(width=width))
    coloured = render_check(CHECKS[name], canvas=Canvas(width=width, colour=True))
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert max(map(columns, plain.splitlines())) <= width


@pytest.mark.parametrize(
    ("check", "exit_code"),
    [
        (FITS, 0),
        (replace(FITS, candidate=plans.candidate(peak_gib=23.2)), 4),
        (replace(FITS, candidate=plans.candidate(peak_gib=40.0)), 3),
        (DOES_NOT_FIT, 1),
        (replace(FITS, findings=DOES_NOT_FIT.findings), 1),
        (REFUSED, 1),
    ],
)
def test_errors_in_the_file_go_before_the_verdict(check: FileCheck, exit_code: int) -> None:
    assert check_exit_code(check) == exit_code


@pytest.mark.parametrize(
    ("check", "last"),
    [
        (FITS, "axolotl train my_axolotl.yml"),
        (replace(FITS, tool=Tool.TRL), "trl sft --config my_axolotl.yml"),
        (replace(FITS, tool=Tool.ACCELERATE), "accelerate launch --config_file my_axolotl.yml train.py"),
        (DOES_NOT_FIT, "launchkit check my_axolotl.yml, once it is corrected"),
        (
            replace(DOES_NOT_FIT, findings=()),
            "launchkit plan Qwen/Qwen3-8B --gpus 2xRTX-4090 looks for what fits",
        ),
        (
            replace(REFUSED, cluster=plans.CPU_CLUSTER),
            "launchkit check my_axolotl.yml --gpus 4x4090 (or what it is to run on)",
        ),
    ],
)
def test_the_last_line_is_what_to_type_next(check: FileCheck, last: str) -> None:
    line = render_check(check, canvas=Canvas(width=140)).splitlines()[-1]
    assert line == f" next         {last}"
