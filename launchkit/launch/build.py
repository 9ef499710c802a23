"""A launch as a value: from a candidate, a cluster and what to run to the whole ``Command``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launchkit.errors import IllegalScenarioError
from launchkit.export.deepspeed import deepspeed_config
from launchkit.export.layout import DEEPSPEED_FILE, num_nodes, num_processes
from launchkit.hardware import Backend, Cluster
from launchkit.launch.command import (
    DEFAULT_MASTER_PORT,
    Command,
    Engine,
    Entry,
    Nodes,
    RunFile,
    choose_engine,
    launcher_argv,
)
from launchkit.launch.environment import (
    MEASURE_VARIABLE,
    RUN_DIR_VARIABLE,
    device_environment,
    strategy_environment,
)
from launchkit.launch.job import Data, fine_tune_job
from launchkit.plan import Candidate
from launchkit.scenario import Precision

JOB_FILE = "job.json"
MODEL_DIR = "model"
SCRIPT_MODULE = "launchkit.finetune.run_script"
BUILT_IN_MODULE = "launchkit.finetune"

# What another launcher left in the environment would steer this one: ranks of a surrounding job, a strategy that
# somebody exported, accelerate's own settings.
INHERITED_AND_DROPPED = re.compile(
    r"^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_\w+|MASTER_ADDR|MASTER_PORT"
    r"|TORCHELASTIC_\w+|CROSS_RANK|CROSS_SIZE|LOCAL_SIZE|ACCELERATE_\w+|FSDP_\w+|PARALLELISM_CONFIG_\w+"
    r"|LAUNCHKIT_(RUN_DIR|GUARD_PID|MEASURE|DEVICE|CPU_SHARDING))$"
)


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """The built-in fine-tune of a model directory, hub id or GGUF file."""

    model_path: str
    data: Data


@dataclass(frozen=True, kw_only=True)
class Script:
    """A script of the user's own, run unchanged."""

    path: str
    args: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """How to start: the interpreter, a launcher if one was asked for, where the nodes meet, which GPUs to use.

    ``measure`` is ``profile`` (every CPU allocation of the first steps, through torch's profiler) or ``counters``
    (what costs nothing: CUDA's counters, the resident set).
    """

    python: str
    engine: Engine | None = None
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_MASTER_PORT
    hostfile: str = ""
    visible_devices: str = ""
    measure: str = "counters"


def build_command(
    candidate: Candidate, cluster: Cluster, *, target: BuiltIn | Script, run_dir: str, launcher: Launcher
) -> Command:
    """Everything that starts ``target`` as ``candidate`` was planned, in ``run_dir`` (absolute)."""
    if candidate.scenario.training.precision is Precision.FP8 and cluster.gpu.backend is Backend.CPU:
        raise IllegalScenarioError("--precision fp8 is launched on GPUs alone, and there is none; use --precision bf16")
    deepspeed_file = f"{run_dir}/{DEEPSPEED_FILE}" if candidate.scenario.strategy.kind.zero_stage else ""
    engine = choose_engine(
        candidate.scenario.strategy, preferred=launcher.engine, visible_devices=launcher.visible_devices
    )
    environment = {
        **device_environment(candidate, cluster),
        **strategy_environment(candidate, cluster, deepspeed_file=deepspeed_file),
        RUN_DIR_VARIABLE: run_dir,
        MEASURE_VARIABLE: launcher.measure,
    }
    files = _deepspeed_files(candidate, cluster, auto=isinstance(target, BuiltIn))
    if isinstance(target, Script):
        entry = Entry(module=SCRIPT_MODULE, args=(target.path, *target.args))
        steps = candidate.scenario.batch.gradient_accumulation_steps
        environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(steps)
    else:
        entry = Entry(module=BUILT_IN_MODULE, args=(f"{run_dir}/{JOB_FILE}",))
        files += (_job_file(candidate, cluster, target=target, run_dir=run_dir, deepspeed_file=deepspeed_file),)
        # The Trainer takes the file as its own argument, before the model is built; the variables would compete.
        environment = {name: value for name, value in environment.items() if "DEEPSPEED" not in name}
    argv = launcher_argv(
        engine,
        entry,
        python=launcher.python,
        nodes=nodes_of(candidate, cluster, launcher),
        visible_devices=launcher.visible_devices,
    )
    return Command(engine=engine, argv=tuple(argv), environment=environment, files=files)


def nodes_of(candidate: Candidate, cluster: Cluster, launcher: Launcher) -> Nodes:
    """The hosts that take part and their meeting point."""
    count = num_nodes(candidate, cluster)
    return Nodes(
        num_nodes=count,
        node_rank=launcher.node_rank,
        num_processes_per_node=num_processes(candidate, cluster) // count,
        master_addr=launcher.master_addr,
        master_port=launcher.master_port,
        hostfile=launcher.hostfile,
    )


def local_ranks(nodes: Nodes) -> tuple[int, ...]:
    """The global ranks of this node's processes."""
    first = nodes.node_rank * nodes.num_processes_per_node
    return tuple(range(first, first + nodes.num_processes_per_node))


def child_environment(inherited: Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """The inherited environment without what would steer the launcher, plus the changes."""
    return {name: value for name, value in inherited.items() if not INHERITED_AND_DROPPED.match(name)} | dict(changes)


def _deepspeed_files(candidate: Candidate, cluster: Cluster, *, auto: bool) -> tuple[RunFile, ...]:
    if not candidate.scenario.strategy.kind.zero_stage:
        return ()
    return (_json_file(DEEPSPEED_FILE, deepspeed_config(candidate, cluster, auto=auto)),)


def _job_file(candidate: Candidate, cluster: Cluster, *, target: BuiltIn, run_dir: str, deepspeed_file: str) -> RunFile:
    job = fine_tune_job(
        candidate,
        cluster,
        model_path=target.model_path,
        output_dir=f"{run_dir}/{MODEL_DIR}",
        data=target.data,
        deepspeed_file=deepspeed_file,
    )
    return RunFile(name=JOB_FILE, text=job.text)


def _json_file(name: str, document: Mapping[str, object]) -> RunFile:
    return RunFile(name=name, text=json.dumps(document, indent=2) + "\n")
