"""``launchkit config PLAN``."""

from __future__ import annotations

from pathlib import Path

import click

from launchkit.cli.console import Console
from launchkit.cli.files import DEFAULT_PLAN, check_free, read_plan, show, write
from launchkit.cli.options import console_options
from launchkit.export.axolotl import DEFAULT_DATA
from launchkit.export.files import Target, config_files, expressible_files


@click.command(name="config")
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path), default=DEFAULT_PLAN)
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    type=click.Choice([target.value for target in Target]),
    help="only this one; repeatable [accelerate, deepspeed, axolotl, as far as they can run the plan]",
)
@click.option("--model", metavar="ID", help="the model that the files name [the plan's]")
@click.option("--data", metavar="FILE", help="the training data that the files name [the plan's --data]")
@click.option("-o", "--output-dir", type=click.Path(path_type=Path), default=Path(), help="write here [.]")
@click.option("--force", is_flag=True, help="overwrite")
@click.option("--dry-run", is_flag=True, help="print the files, write none")
@console_options
@click.pass_obj
def command(
    console: Console,
    /,
    plan_file: Path,
    targets: tuple[str, ...],
    model: str | None,
    data: str | None,
    output_dir: Path,
    force: bool,
    dry_run: bool,
) -> None:
    """Write the configuration files of a plan: accelerate YAML, DeepSpeed JSON, Axolotl YAML."""
    plan = read_plan(plan_file)
    data = data or str(plan.request.get("data", DEFAULT_DATA))
    if targets:
        files = config_files(plan, plan.cluster, targets=targets, model=model, data=data)
    else:
        files, reasons = expressible_files(plan, plan.cluster, model=model, data=data)
        for reason in reasons:
            console.note(f"note: left out: {reason.partition('; ')[0]}")
    paths = {output_dir / file.name: file.text for file in files}
    if not dry_run:
        check_free(list(paths), force=force)
    for path, text in paths.items():
        if dry_run:
            show(path, text, console=console)
        else:
            write(path, text, force=force)
            console.text(f"{path}\n")
    console.document(
        {"files": [{"path": str(path), "text": text} for path, text in paths.items()], "written": not dry_run}
    )
