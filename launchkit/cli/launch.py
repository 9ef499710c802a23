"""``launchkit launch [SCRIPT]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, BinaryIO

import click

from launchkit.cli.console import Console
from launchkit.cli.files import DEFAULT_PLAN, read_plan, show, write
from launchkit.cli.options import console_options
from launchkit.diagnosis.diagnose import diagnose
from launchkit.errors import IllegalScenarioError
from launchkit.export.files import expressible_files
from launchkit.export.layout import ddp_advice, num_nodes
from launchkit.launch.command import Engine
from launchkit.launch.record import RunRecord, comparison_text
from launchkit.plan import Plan
from launchkit.process.evidence import RESULT_FILE, read_evidence
from launchkit.process.run import RunOptions, launch_run, prepare_run


@click.command(
    name="launch",
    context_settings={"allow_interspersed_args": False},
    epilog="Exits with the child's code, 128 + its signal, or 130 after Ctrl-C once every process is gone.",
)
@click.argument("script", required=False)
@click.argument("script_args", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help=f"[{DEFAULT_PLAN}]")
@click.option("--data", metavar="FILE", help="JSON lines for the built-in fine-tune [the plan's --data]")
@click.option("--model-path", metavar="PATH", help="weights for the built-in fine-tune [the plan's model]")
@click.option("--max-steps", type=click.IntRange(min=1), help="stop after so many optimizer steps [whole epochs]")
@click.option("--num-epochs", type=click.FloatRange(min=0, min_open=True), default=1.0, help="times over the data [1]")
@click.option("--run-dir", metavar="DIR", help="where the run leaves its files [runs/<time>-<strategy>]")
@click.option(
    "--engine",
    type=click.Choice([engine.value for engine in Engine]),
    help="what starts the processes [by the strategy]",
)
@click.option("--node-rank", type=click.IntRange(min=0), default=0, help="which node this is [0]")
@click.option("--master-addr", default="127.0.0.1", metavar="HOST", help="address of node 0")
@click.option("--master-port", type=click.IntRange(1, 65535), help="port on node 0, the same on every node")
@click.option("--hostfile", default="", metavar="FILE", help="DeepSpeed's list of hosts")
@click.option("--dry-run", is_flag=True, help="print the command, the environment and the files; start nothing")
@console_options
@click.pass_obj
def command(
    console: Console,
    /,
    script: str | None,
    script_args: tuple[str, ...],
    plan_file: Path | None,
    dry_run: bool,
    max_steps: int | None,
    engine: str | None,
    **options: Any,
) -> int:
    """Run SCRIPT with its ARGS as planned, unchanged; without SCRIPT, the built-in fine-tune on --data.

    Options come before SCRIPT, all but --plan; what follows it are its ARGS.
    """
    following, script_args = split_script_args(script_args)
    plan = read_plan(plan_file or following or DEFAULT_PLAN)
    if script is None and options["data"] is None:
        options["data"] = plan.request.get("data")
    wanted = RunOptions(
        script=script,
        script_args=script_args,
        max_steps=max_steps or 0,
        engine=Engine(engine) if engine else None,
        dry_run=dry_run,
        stream=live_stream(console),
        **options,
    )
    _say_other_nodes(plan, wanted, console=console)
    _say_untold_settings(plan, wanted, console=console)
    return _preview(plan, wanted, console=console) if dry_run else _carry_out(plan, wanted, console=console)


def split_script_args(words: tuple[str, ...]) -> tuple[Path | None, tuple[str, ...]]:
    """What follows SCRIPT: the plan, which people type there as well, and the script's own arguments. Behind a ``--``
    all is the script's."""
    end = words.index("--") if "--" in words else len(words)
    plan, own = _take_plan(words[:end])
    return plan, own + words[end:] if own else words[end + 1 :]  # a separator that comes first is ours


def _take_plan(words: tuple[str, ...]) -> tuple[Path | None, tuple[str, ...]]:
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--plan" and equals:
            return Path(value), words[:place] + words[place + 1 :]
        if word == "--plan" and place + 1 < len(words):
            return Path(words[place + 1]), words[:place] + words[place + 2 :]
    return None, words


def live_stream(console: Console) -> BinaryIO | None:
    """Where the run's progress goes while it runs."""
    if console.quiet:
        return None
    return sys.stderr.buffer if console.json else sys.stdout.buffer


def report_run(record: RunRecord, *, console: Console) -> None:
    """What was measured beside what was predicted; of a run that failed at last why, and where to read more."""
    lines = [line for line in (comparison_text(record), f"run: {record.run_dir}") if line]
    console.text("\n".join(lines) + "\n")
    if record.ending:
        console.note(f"launchkit: {record.ending}")
    if record.log:
        console.note(f"log: {record.log}")
    if record.failure:
        console.note(f"{_cause(Path(record.run_dir))}next launchkit why {record.run_dir}")


def _cause(run_dir: Path) -> str:
    """What the logs are known to say, which can be more than the last line of the rank that failed."""
    is_written = (run_dir / RESULT_FILE).is_file()
    diagnosis = diagnose(read_evidence(run_dir)) if is_written else None
    return f"{diagnosis.headline}; " if diagnosis is not None and diagnosis.cause else ""


def write_configs(plan: Plan, directory: Path) -> None:
    """The job that was run as files for other launchers, of those that can express it."""
    try:
        files, _ = expressible_files(plan, plan.cluster)
    except IllegalScenarioError:
        return  # FSDP on the CPU, for one, is beyond the files of them all
    for file in files:
        write(directory / file.name, file.text, force=True)


def _say_other_nodes(plan: Plan, options: RunOptions, *, console: Console) -> None:
    """The first node would wait for the others without a word."""
    nodes = 1 if plan.chosen is None else num_nodes(plan.chosen, plan.cluster)
    if nodes > 1 and options.node_rank == 0:
        console.note(
            f"note: this is node 0 of {nodes}, which waits for the others; type the same on each of them with "
            f"--node-rank 1{'' if nodes == 2 else f' to {nodes - 1}'} --master-addr ADDRESS of this one"
        )


def _say_untold_settings(plan: Plan, options: RunOptions, *, console: Console) -> None:
    """A script's DDP has the settings that the script gives it."""
    advice = ddp_advice(plan.chosen) if plan.chosen is not None and options.script is not None else ""
    if advice:
        console.note(f"note: the plan's --ddp-settings reach a script only if it says {advice}")


def _preview(plan: Plan, options: RunOptions, *, console: Console) -> int:
    prepared = prepare_run(plan, options=options)
    console.text(f"{prepared.command.text}\n\n")
    for file in prepared.command.files:
        show(prepared.run_dir / file.name, file.text, console=console)
    console.document(
        {
            "argv": list(prepared.command.argv),
            "environment": dict(prepared.command.environment),
            "run_dir": str(prepared.run_dir),
            "files": [
                {"path": str(prepared.run_dir / file.name), "text": file.text} for file in prepared.command.files
            ],
        }
    )
    return 0


def _carry_out(plan: Plan, options: RunOptions, *, console: Console) -> int:
    record = launch_run(plan, options=options)
    write_configs(plan, Path(record.run_dir) / "configs")
    report_run(record, console=console)
    console.document(record.document)
    return record.exit_code
