"""``launchkit doctor``."""

from __future__ import annotations

import click

from launchkit.checkup.examine import count, examine
from launchkit.checkup.rows import Level
from launchkit.cli.console import Console
from launchkit.cli.options import console_options
from launchkit.probe.facts import gather
from launchkit.report.doctor import checkup_document, render_checkup


@click.command(name="doctor", epilog="Exits with 1 if there is a problem, with 0 if there are warnings at most.")
@click.option("--online", is_flag=True, help="ask the hub for an answer too; nothing else uses the network")
@console_options
@click.pass_obj
def command(console: Console, /, online: bool) -> int:
    """What would break here: packages, GPUs, limits, disks, the hub, variables that act unasked. Each with its fix."""
    groups = examine(gather(online=online))
    console.text(render_checkup(groups, canvas=console.canvas()))
    console.document(checkup_document(groups))
    return 1 if count(groups, Level.PROBLEM) else 0
