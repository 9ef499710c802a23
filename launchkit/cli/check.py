"""``launchkit check FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from launchkit import api
from launchkit.cli.console import Console
from launchkit.cli.options import console_options, read_request, scenario_options
from launchkit.cli.progress import progress_bar
from launchkit.report.check import check_exit_code, render_check
from launchkit.serialize import check_document


@click.command(name="check")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", metavar="ID", help="the model, where the file names none; it wins where the file does")
@click.option("--trust-remote-code", is_flag=True, help="run the model repository's own code, in a subprocess")
@scenario_options()
@console_options
@click.pass_obj
def command(console: Console, /, file: Path, model: str | None, trust_remote_code: bool, **typed: Any) -> int:
    """What FILE would take, what is wrong in it and what to change: a YAML of Axolotl, accelerate or TRL, or a JSON of
    DeepSpeed.

    Flags win over the file, and say what it leaves open. Exit code: 1 if the file would not run, or not as written;
    else 3 if it does not fit, 4 if only within the error band.
    """
    request = read_request(typed, console=console)
    with progress_bar(console) as progress:
        check = api.check_request(file, request, model=model, trust_remote_code=trust_remote_code, progress=progress)
    console.text(render_check(check, canvas=console.canvas()))
    console.document(check_document(check))
    return check_exit_code(check)
