"""The launchers: each a function from a job's shape to the argument list that starts it.

A single process is started by Python itself, DDP and FSDP by torchrun, ZeRO by DeepSpeed's launcher (or torchrun).
``accelerate launch`` is not used: what it would tell the script goes through the environment (``environment``), which
works under all three, and without its silent fallbacks to one process.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from launchkit.errors import IllegalScenarioError, UsageError
from launchkit.scenario import Strategy, StrategyKind

DEFAULT_MASTER_PORT = 29500
DEVICE_INDICES = re.compile(r"\d+(,\d+)*")


class Engine(StrEnum):
    """What starts the processes."""

    PYTHON = "python"
    TORCHRUN = "torchrun"
    DEEPSPEED = "deepspeed"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What every process runs: a Python module with its arguments."""

    module: str
    args: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """How many hosts take part and how they meet. On one node torchrun picks a port of its own, without a race, and
    ``master_port`` is unused; ``hostfile`` is DeepSpeed's, needed on several nodes."""

    num_nodes: int = 1
    node_rank: int = 0
    num_processes_per_node: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_MASTER_PORT
    hostfile: str = ""


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """A file that the command needs, by its name in the run directory."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A launch, ready to print or to run: arguments, changes to the environment, files to write first."""

    engine: Engine
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: tuple[RunFile, ...] = ()

    @property
    def text(self) -> str:
        """The command as a shell takes it, environment included."""
        changes = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*changes, shlex.join(self.argv)])


def choose_engine(strategy: Strategy, *, preferred: Engine | None = None, visible_devices: str = "") -> Engine:
    """The launcher for a strategy. ``visible_devices`` is ``CUDA_VISIBLE_DEVICES``: DeepSpeed's launcher reads only
    indices there, so that UUIDs and MIG slices go to torchrun."""
    legal = _legal_engines(strategy)
    if preferred is not None:
        if preferred not in legal:
            raise IllegalScenarioError(
                f"{strategy.name} is not started by {preferred}; use {' or '.join(legal)}, or leave --engine out"
            )
        return preferred
    if legal[0] is Engine.DEEPSPEED and visible_devices and not DEVICE_INDICES.fullmatch(visible_devices):
        return Engine.TORCHRUN
    return legal[0]


def _legal_engines(strategy: Strategy) -> tuple[Engine, ...]:
    kind = strategy.kind
    if kind is StrategyKind.SINGLE and strategy.split.num_ranks == 1:
        return (Engine.PYTHON, Engine.TORCHRUN)
    return (Engine.DEEPSPEED, Engine.TORCHRUN) if kind.zero_stage else (Engine.TORCHRUN,)


def launcher_argv(engine: Engine, entry: Entry, *, python: str, nodes: Nodes, visible_devices: str = "") -> list[str]:
    """The whole argument list."""
    return [*_LAUNCHERS[engine](python, nodes, visible_devices), entry.module, *entry.args]


def _python_argv(python: str, nodes: Nodes, _visible_devices: str) -> list[str]:
    num_processes = nodes.num_nodes * nodes.num_processes_per_node
    if num_processes != 1:
        raise UsageError(f"python starts 1 process, not {num_processes}; choose a strategy for several")
    return [python, "-u", "-m"]


def _torchrun_argv(python: str, nodes: Nodes, _visible_devices: str) -> list[str]:
    argv = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(nodes.num_processes_per_node)]
    if nodes.num_nodes == 1:
        argv += ["--standalone", "--local-addr", "127.0.0.1"]
    else:
        argv += ["--nnodes", str(nodes.num_nodes), "--node-rank", str(nodes.node_rank)]
        argv += ["--master-addr", nodes.master_addr, "--master-port", str(nodes.master_port)]
    return [*argv, "--module"]


def _deepspeed_argv(python: str, nodes: Nodes, visible_devices: str) -> list[str]:
    """DeepSpeed's own flags must come before the script. ``--no_local_rank``: scripts know nothing of its argument."""
    argv = [python, "-m", "deepspeed.launcher.runner"]
    if nodes.num_nodes == 1:
        # Not a file, so that a stray /job/hostfile, the launcher's default, is not read.
        argv += ["--hostfile", "none", *_deepspeed_devices(nodes, visible_devices)]
    elif not nodes.hostfile:
        raise UsageError("deepspeed on several nodes needs a list of them; pass --hostfile FILE (lines: NAME slots=N)")
    else:
        argv += ["--hostfile", nodes.hostfile, "--no_ssh", "--node_rank", str(nodes.node_rank)]
    argv += ["--master_addr", nodes.master_addr, "--master_port", str(nodes.master_port)]
    return [*argv, "--no_local_rank", "--module"]


def _deepspeed_devices(nodes: Nodes, visible_devices: str) -> list[str]:
    """``--num_gpus`` ignores CUDA_VISIBLE_DEVICES and takes GPUs 0 to N-1; the named ones must be included by hand."""
    if not visible_devices:
        return ["--num_gpus", str(nodes.num_processes_per_node)]
    if not DEVICE_INDICES.fullmatch(visible_devices):
        raise UsageError(
            f"deepspeed's launcher cannot read CUDA_VISIBLE_DEVICES={visible_devices}; "
            "use indices, or --engine torchrun"
        )
    chosen = visible_devices.split(",")[: nodes.num_processes_per_node]
    return ["--include", f"localhost:{','.join(chosen)}"]


_LAUNCHERS: Mapping[Engine, Callable[[str, Nodes, str], list[str]]] = {
    Engine.PYTHON: _python_argv,
    Engine.TORCHRUN: _torchrun_argv,
    Engine.DEEPSPEED: _deepspeed_argv,
}
