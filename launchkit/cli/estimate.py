"""``launchkit estimate MODEL``."""

from __future__ import annotations

from typing import Any

import click

from launchkit import api
from launchkit.cli.console import Console
from launchkit.cli.options import console_options, read_request, scenario_options
from launchkit.cli.progress import progress_bar
from launchkit.report.estimate import render_estimate
from launchkit.report.verdict import verdict
from launchkit.serialize import candidate_document


@click.command(name="estimate")
@click.argument("model")
@click.option("--check", is_flag=True, help="exit 3 if it does not fit, 4 if only within the error band")
@click.option("--trust-remote-code", is_flag=True, help="run the model repository's own code, in a subprocess")
@scenario_options()
@console_options
@click.pass_obj
def command(console: Console, /, model: str, check: bool, trust_remote_code: bool, **typed: Any) -> int:
    """Memory and speed of exactly this scenario for MODEL (hub id, directory or config.json), without a search."""
    request = read_request(typed, console=console)
    with progress_bar(console) as progress:
        candidate, cluster = api.estimate_request(
            model, request, trust_remote_code=trust_remote_code, progress=progress
        )
    console.text(render_estimate(candidate, cluster=cluster, canvas=console.canvas()))
    console.document(candidate_document(candidate, cluster=cluster))
    return verdict(candidate.estimate).value if check else 0
