"""``launchkit env``."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import click

from launchkit import __version__
from launchkit.cli.console import Console
from launchkit.cli.options import console_options
from launchkit.probe.detect import detect
from launchkit.probe.packages import REPORTED, installed_version
from launchkit.serialize import encode

PREFIXES = ("LAUNCHKIT_", "ACCELERATE_", "FSDP_", "CUDA_", "NCCL_", "PYTORCH_", "HF_", "TORCH_", "DS_")
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


@click.command(name="env")
@console_options
@click.pass_obj
def command(console: Console, /) -> None:
    """Versions, hardware and settings: a block to paste into a bug report. Tokens are never printed."""
    versions = {name: installed_version(name) or "not installed" for name in REPORTED}
    variables = relevant_variables(os.environ)
    system = {"launchkit": __version__, "python": platform.python_version(), "platform": platform.platform()}
    hardware = encode(detect())
    rows: dict[str, object] = {**system, **versions, **variables, **_flat(hardware, name="hardware")}
    width = max(len(name) for name in rows)
    console.text("".join(f"{name:<{width}}  {value}\n" for name, value in rows.items()))
    console.document({**system, "packages": versions, "environment": variables, "hardware": hardware})


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that change what a run does; the value of a secret is not shown."""
    return {
        name: "(set, not shown)" if any(word in name for word in SECRET_WORDS) else value
        for name, value in sorted(environment.items())
        if name.startswith(PREFIXES)
    }


def _flat(value: object, *, name: str) -> dict[str, object]:
    """Nested values as rows ``hardware.host.num_cpu_cores``; what is empty is left out."""
    if isinstance(value, Mapping):
        return {row: item for key, inner in value.items() for row, item in _flat(inner, name=f"{name}.{key}").items()}
    if isinstance(value, list):
        return {row: item for n, inner in enumerate(value) for row, item in _flat(inner, name=f"{name}[{n}]").items()}
    return {} if value in ("", None) else {name: value}
