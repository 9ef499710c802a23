"""``launchkit gpus``."""

from __future__ import annotations

import click

from launchkit.catalog.hardware import hardware_table
from launchkit.cli.console import Console
from launchkit.cli.options import console_options
from launchkit.probe.detect import detect
from launchkit.report.gpus import gpus_document, render_gpus


@click.command(name="gpus")
@console_options
@click.pass_obj
def command(console: Console, /) -> None:
    """The hardware found here, and the table of GPUs that --gpus knows."""
    detection, table = detect(), hardware_table()
    console.text(render_gpus(detection, table, width=console.canvas().width))
    console.document(gpus_document(detection, table))
