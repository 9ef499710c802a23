"""``launchkit trace MODEL``."""

from __future__ import annotations

import time
from typing import Any

import click

from launchkit import api
from launchkit.catalog.cache import cache_directory
from launchkit.cli.console import Console
from launchkit.cli.options import console_options, read_request, scenario_options
from launchkit.cli.progress import progress_bar
from launchkit.units import count, duration


@click.command(name="trace")
@click.argument("model")
@click.option("--trust-remote-code", is_flag=True, help="run the model repository's own code, in a subprocess")
@scenario_options()
@console_options
@click.pass_obj
def command(console: Console, /, model: str, trust_remote_code: bool, **typed: Any) -> None:
    """Trace one training step of MODEL into the cache, as the scenario's strategy needs it; plan does so by itself."""
    request = read_request(typed, console=console)
    started = time.monotonic()
    with progress_bar(console) as progress:
        traced = api.trace_request(model, request, trust_remote_code=trust_remote_code, progress=progress)
    program, seconds = traced.program, time.monotonic() - started
    lines = {
        "model": f"{traced.profile.name}, {count(program.num_parameters(traced.lora_rank))} parameters",
        "program": traced.key.text,
        "size": f"{len(program.stages)} stages, {len(program.sections)} sections",
        "had from": f"{traced.profile.source}, in {duration(seconds)}",
        "cache": str(cache_directory()),
    }
    for label, text in lines.items():
        console.text("\n".join(console.canvas().section(label, [text])) + "\n")
    console.document(
        {
            "model": {"name": traced.profile.name, "source": traced.profile.source},
            "num_parameters": program.num_parameters(traced.lora_rank),
            "program": traced.key.text,
            "num_stages": len(program.stages),
            "num_sections": len(program.sections),
            "cache": str(cache_directory()),
            "seconds": seconds,
        }
    )
