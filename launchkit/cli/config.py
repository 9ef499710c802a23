"""``launchkit config PLAN``."""

from __future__ import annotations

from pathlib import Path

import click

from launchkit.cli.console import Console
from launchkit.cli.files import DEFAULT_PLAN, check_free, read_plan, show, write
from launchkit.cli.options import console_options
from launchkit.export.axolotl import DEFAULT_DATA
from launchkit.export.files import DEFAULT_TARGETS, Target, config_files


@click.command(name="config")
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path), default=DEFAULT_PLAN)
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    type=click.Choice([target.value for target in Target]),
    help="only this one; repeatable [accelerate, deepspeed, axolotl]",
)
@click.option("--model", metavar="ID", help="the model that the files name [the plan's]")
@click.option("--data", metavar="FILE", help="the training data that the files name")
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
    files = config_files(plan, plan.cluster, targets=targets or DEFAULT_TARGETS, model=model, data=data or DEFAULT_DATA)
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
