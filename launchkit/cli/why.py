"""``launchkit why RUN``."""

from __future__ import annotations

from pathlib import Path

import click

from launchkit.cli.console import Console
from launchkit.cli.options import console_options
from launchkit.diagnosis.diagnose import diagnose
from launchkit.process.evidence import newest_run, read_evidence
from launchkit.process.run import RUNS_DIR
from launchkit.report.why import diagnosis_document, render_diagnosis


@click.command(
    name="why", epilog="Exits with 0 whatever became of the run: the answer is the text, or state in --json."
)
@click.argument("run", required=False, type=click.Path(path_type=Path))
@console_options
@click.pass_obj
def command(console: Console, /, run: Path | None) -> None:
    """What went wrong first in RUN, on which rank, and what to do about it.

    RUN is a directory that launchkit launch wrote [the newest in runs/], the logs of torchrun, accelerate or deepspeed,
    or one log file.
    """
    path = newest_run(RUNS_DIR) if run is None else run
    diagnosis = diagnose(read_evidence(path))
    console.text(render_diagnosis(diagnosis, run=str(path), canvas=console.canvas()))
    console.document(diagnosis_document(diagnosis, run=str(path)))
