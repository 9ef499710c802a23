"""``launchkit plan MODEL``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from launchkit import api
from launchkit.cli.console import Console
from launchkit.cli.files import keep_plan
from launchkit.cli.options import console_options, read_request, scenario_options
from launchkit.cli.progress import progress_bar
from launchkit.plan import Plan
from launchkit.report.plan import render_plan
from launchkit.report.verdict import plan_verdict
from launchkit.serialize import plan_document


@click.command(name="plan", epilog="With --check: exit 3 if nothing fits, 4 if it fits only within the error band.")
@click.argument("model")
@click.option("--check", is_flag=True, help="exit 3 if nothing fits, 4 if only within the error band; write no file")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="write the plan here [.launchkit/plan.json]")
@click.option("--force", is_flag=True, help="overwrite")
@click.option("--dry-run", is_flag=True, help="write no file")
@click.option("--trust-remote-code", is_flag=True, help="run the model repository's own code, in a subprocess")
@scenario_options()
@console_options
@click.pass_obj
def command(
    console: Console,
    /,
    model: str,
    check: bool,
    output: Path | None,
    force: bool,
    dry_run: bool,
    trust_remote_code: bool,
    **typed: Any,
) -> int:
    """What to run here to fine-tune MODEL (hub id, directory or config.json): a search over what is not given."""
    request = read_request(typed, console=console)
    if request.data is not None and not Path(request.data).exists():
        console.note(f"note: {request.data} is not a file here; the plan keeps the name, and launch will look for it")
    with progress_bar(console) as progress:
        plan = api.plan_request(
            model, request, trust_remote_code=trust_remote_code, progress=progress, in_full=console.verbose
        )
    plan_file = "" if dry_run or (check and output is None) else _keep(plan, output, force=force, console=console)
    how_to_keep = "leave out --dry-run" if dry_run else "add --output FILE"
    console.text(
        render_plan(
            plan, canvas=console.canvas(), plan_file=plan_file, how_to_keep=how_to_keep, in_full=console.verbose
        )
    )
    if plan_file and plan.chosen is None:
        console.note(f"written: {plan_file}")
    console.document(plan_document(plan))
    return plan_verdict(plan).value if check else 0


def _keep(plan: Plan, output: Path | None, *, force: bool, console: Console) -> str:
    """Where the plan was written. A directory that takes no files is no reason to withhold the answer."""
    if output is None and (plan.chosen is None or console.json):
        return ""
    try:
        return str(keep_plan(plan, output=output, force=force))
    except OSError as error:
        if output is not None:
            raise
        console.note(f"note: the plan was not kept ({error.strerror}); --output FILE writes it elsewhere")
        return ""
