"""Launchers: whole argument lists."""

from __future__ import annotations

import pytest

from launchkit.errors import IllegalScenarioError, UsageError
from launchkit.launch.command import Command, Engine, Entry, Nodes, choose_engine, launcher_argv
from launchkit.scenario import Strategy, StrategyKind

ENTRY = Entry(module="launchkit.finetune.run_script", args=("/a/train.py", "--lr", "1"))
TORCHRUN = ["py", "-m", "torch.distributed.run"]
DEEPSPEED = ["py", "-m", "deepspeed.launcher.runner"]
TAIL = ["launchkit.finetune.run_script", "/a/train.py", "--lr", "1"]
TWO_NODES = Nodes(
    num_nodes=2, node_rank=1, num_processes_per_node=8, master_addr="10.0.0.1", master_port=1234, hostfile="/h"
)

ARGV = [
    pytest.param(Engine.PYTHON, Nodes(), "", ["py", "-u", "-m"], id="python"),
    pytest.param(
        Engine.TORCHRUN,
        Nodes(num_processes_per_node=4, master_port=1234),
        "",
        [*TORCHRUN, "--nproc-per-node", "4", "--standalone", "--local-addr", "127.0.0.1", "--module"],
        id="torchrun-one-node-picks-its-port",
    ),
    pytest.param(
        Engine.TORCHRUN,
        TWO_NODES,
        "",
        [
            *TORCHRUN,
            "--nproc-per-node",
            "8",
            "--nnodes",
            "2",
            "--node-rank",
            "1",
            "--master-addr",
            "10.0.0.1",
            "--master-port",
            "1234",
            "--module",
        ],
        id="torchrun-two-nodes",
    ),
    pytest.param(
        Engine.DEEPSPEED,
        Nodes(num_processes_per_node=2, master_port=1234),
        "",
        [
            *DEEPSPEED,
            "--hostfile",
            "none",
            "--num_gpus",
            "2",
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            "1234",
            "--no_local_rank",
            "--module",
        ],
        id="deepspeed-one-node",
    ),
    pytest.param(
        Engine.DEEPSPEED,
        Nodes(num_processes_per_node=2, master_port=1234),
        "3,5,7",
        [
            *DEEPSPEED,
            "--hostfile",
            "none",
            "--include",
            "localhost:3,5",
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            "1234",
            "--no_local_rank",
            "--module",
        ],
        id="deepspeed-includes-the-visible-gpus",
    ),
    pytest.param(
        Engine.DEEPSPEED,
        TWO_NODES,
        "",
        [
            *DEEPSPEED,
            "--hostfile",
            "/h",
            "--no_ssh",
            "--node_rank",
            "1",
            "--master_addr",
            "10.0.0.1",
            "--master_port",
            "1234",
            "--no_local_rank",
            "--module",
        ],
        id="deepspeed-two-nodes-without-ssh",
    ),
]


@pytest.mark.parametrize(("engine", "nodes", "visible", "head"), ARGV)
def test_argv(engine: Engine, nodes: Nodes, visible: str, head: list[str]) -> None:
    assert launcher_argv(engine, ENTRY, python="py", nodes=nodes, visible_devices=visible) == head + TAIL


@pytest.mark.parametrize(
    ("engine", "nodes", "visible", "message"),
    [
        (Engine.PYTHON, Nodes(num_processes_per_node=2), "", "python starts 1 process, not 2"),
        (Engine.DEEPSPEED, Nodes(num_nodes=2), "", "pass --hostfile FILE"),
        (Engine.DEEPSPEED, Nodes(), "GPU-8b1c", "CUDA_VISIBLE_DEVICES=GPU-8b1c; use indices"),
    ],
)
def test_argv_refused(engine: Engine, nodes: Nodes, visible: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        launcher_argv(engine, ENTRY, python="py", nodes=nodes, visible_devices=visible)


@pytest.mark.parametrize(
    ("kind", "preferred", "visible", "expected"),
    [
        ("single", None, "", Engine.PYTHON),
        ("ddp", None, "", Engine.TORCHRUN),
        ("fsdp", None, "", Engine.TORCHRUN),
        ("fsdp2", None, "MIG-1", Engine.TORCHRUN),
        ("zero2", None, "", Engine.DEEPSPEED),
        ("zero3", None, "0,1", Engine.DEEPSPEED),
        ("zero3", None, "MIG-1", Engine.TORCHRUN),
        ("zero1", Engine.TORCHRUN, "", Engine.TORCHRUN),
        ("single", Engine.TORCHRUN, "", Engine.TORCHRUN),
    ],
)
def test_choose_engine(kind: str, preferred: Engine | None, visible: str, expected: Engine) -> None:
    strategy = Strategy(kind=StrategyKind(kind))
    assert choose_engine(strategy, preferred=preferred, visible_devices=visible) is expected


@pytest.mark.parametrize(
    ("kind", "preferred"), [("ddp", Engine.PYTHON), ("fsdp2", Engine.DEEPSPEED), ("single", Engine.DEEPSPEED)]
)
def test_choose_engine_refused(kind: str, preferred: Engine) -> None:
    with pytest.raises(IllegalScenarioError, match=f"is not started by {preferred}; use "):
        choose_engine(Strategy(kind=StrategyKind(kind)), preferred=preferred)


def test_command_text_is_what_a_shell_takes() -> None:
    command = Command(engine=Engine.PYTHON, argv=("py", "a b.py"), environment={"B": "2", "A": "x y"})
    assert command.text == "A='x y' B=2 py 'a b.py'"
