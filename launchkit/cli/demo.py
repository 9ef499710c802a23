"""``launchkit demo``."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from launchkit import api
from launchkit.catalog.files import examples_directory
from launchkit.cli.console import Console
from launchkit.cli.launch import live_stream, report_run, write_configs
from launchkit.cli.options import console_options
from launchkit.cli.progress import progress_bar
from launchkit.errors import LaunchkitError, MissingExtraError
from launchkit.hardware import Backend, Cluster
from launchkit.plan import Plan
from launchkit.process.run import RunOptions, launch_run
from launchkit.quiet import without_logs
from launchkit.report.plan import render_plan
from launchkit.request import Request
from launchkit.units import GIB

RUN_DIR = "runs/demo"
MODEL_DIR = "runs/demo-model"
MEMORY_FOR_TWO_PROCESSES_BYTES = 4 * GIB
SETTINGS: dict[str, object] = {
    "method": "full",
    "checkpointing": "none",
    "micro_batch": 2,
    "seq_len": 128,
    "trainer": "hf",
}


@click.command(name="demo")
@click.option("--max-steps", type=click.IntRange(min=2), default=6, help="optimizer steps to train [6]")
@click.option("--run-dir", metavar="DIR", default=RUN_DIR, help=f"where the run leaves its files [{RUN_DIR}]")
@click.option("--dry-run", is_flag=True, help="make the model and plan, but do not train")
@console_options
@click.pass_obj
def command(console: Console, /, max_steps: int, run_dir: str, dry_run: bool) -> int:
    """Plan, configure, train and measure a tiny model, made on the spot, on whatever is here."""
    model = make_model(Path(MODEL_DIR))
    console.note(f"a model of 11 million random parameters is in {model}")
    plan = _plan(model, console=console)
    console.text(render_plan(plan, canvas=console.canvas(), plan_file="" if dry_run else f"{run_dir}/plan.json"))
    if plan.chosen is None or dry_run:
        console.document({"fits": plan.chosen is not None})
        return 0 if plan.chosen else 1
    return _train(plan, model=model, max_steps=max_steps, run_dir=run_dir, console=console)


def demo_data() -> Path:
    """The conversations that ship with launchkit."""
    return examples_directory() / "data" / "chat.jsonl"


def make_model(directory: Path) -> Path:
    """The demo's model in ``directory``, made where it is not there yet."""
    if (directory / "model.safetensors").is_file():
        return directory
    if directory.exists():
        raise LaunchkitError(f"{directory} exists and is not the demo's model; move it away, then launchkit demo")
    try:
        from launchkit.finetune.tiny import make_tiny_model  # lazy: imports torch and transformers
    except ImportError as error:
        raise MissingExtraError(
            f"the demo trains a model, and {error.name} is not installed; pip install 'launchkit-planner[train]'"
        ) from None
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with without_logs():  # DeepSpeed, imported where it is installed, says that it finds no accelerator
        make_tiny_model(unfinished, demo_data().read_text(encoding="utf-8").splitlines())
    unfinished.rename(directory)
    return directory


def _plan(model: Path, *, console: Console) -> Plan:
    found = api.find_cluster(None)
    gpus = _two_cpu_processes(found) if found.gpu.backend is Backend.CPU else "auto"
    num_processes = api.find_cluster(gpus).num_gpus
    request = Request.from_flags({**SETTINGS, "gpus": gpus, "global_batch": 4 * num_processes})
    with progress_bar(console) as progress:
        return api.plan_request(str(model), request, progress=progress)


def _two_cpu_processes(cluster: Cluster) -> str:
    """Without a GPU, two processes show sharding where cores and memory allow it."""
    has_room = cluster.node.host_memory_bytes >= MEMORY_FOR_TWO_PROCESSES_BYTES and cluster.node.num_cpu_cores >= 2
    return "2xauto" if has_room else "auto"


def _train(plan: Plan, *, model: Path, max_steps: int, run_dir: str, console: Console) -> int:
    record = launch_run(
        plan,
        options=RunOptions(
            data=str(demo_data()),
            model_path=str(model),
            max_steps=max_steps,
            run_dir=run_dir,
            stream=live_stream(console),
        ),
    )
    write_configs(plan, Path(record.run_dir) / "configs")
    report_run(record, console=console)
    console.document(record.document)
    if record.exit_code == 0 and record.strategy_is_live is False:
        raise LaunchkitError(f"{record.strategy} was not in force in the demo; see {record.run_dir}/result.json")
    return record.exit_code
