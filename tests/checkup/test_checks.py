"""Facts in, rows out: what is called a problem, what a warning, and the fix beside it."""

# ruff: noqa: E501 (a row per line)

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launchkit.checkup.environment import TABLE
from launchkit.checkup.examine import CHECKS, count, examine
from launchkit.checkup.facts import Directory, Facts, Hub, Limits, Need, System, Tools, Torch
from launchkit.checkup.gpus import supports
from launchkit.checkup.rows import Level, Row
from launchkit.detection import ComputeMode, DetectedGpu, Detection, GpuHealth, GpuPair, Host, Topology
from launchkit.units import GB, GIB, MIB

HOST = Host(
    memory_bytes=64 * GIB,
    memory_available_bytes=60 * GIB,
    memory_limit_bytes=0,
    num_cpu_cores=16,
    disk_free_bytes=500 * GB,
)
OK, WARNING, PROBLEM = Level.OK, Level.WARNING, Level.PROBLEM


def gpu(index: int = 0, **overrides: Any) -> DetectedGpu:
    values = {"index": index, "name": "NVIDIA A100", "memory_bytes": 40 * GIB, "compute_capability": (8, 0)}
    return DetectedGpu(**(values | overrides))


def detection(*gpus: DetectedGpu, **overrides: Any) -> Detection:
    values: dict[str, Any] = {"host": HOST, "gpus": gpus, "visible": tuple(found.index for found in gpus)}
    if gpus:
        values |= {"found_by": "nvml", "driver_version": "550.54", "cuda_version": "12.4"}
    return Detection(**(values | overrides))


TORCH = Torch(version="2.13.0", cuda="12.4", architectures=("sm_80", "sm_90", "compute_90"), num_devices=2)
PAIR = GpuPair(first=0, second=1, topology=Topology.ONE_SWITCH, peer_to_peer=True)
GOOD = Facts(
    system=System(python="3.11.7"),
    detection=detection(gpu(0), gpu(1), pairs=(PAIR,)),
    health=(GpuHealth(index=0, persistence=True), GpuHealth(index=1, persistence=True)),
    versions={"torch": "2.13.0", "deepspeed": "0.19.8", "bitsandbytes": "0.50.2"},
    torch=TORCH,
    limits=Limits(shared_memory_bytes=32 * GIB, open_files=65536, locked_memory_bytes=-1, processes=-1),
    directories=(Directory(purpose="runs", path="/data", free_bytes=500 * GB, is_writable=True, setting="--run-dir"),),
    tools=Tools(nvcc="/usr/bin/nvcc", nvcc_version="12.4", ninja="/usr/bin/ninja", compiler="/usr/bin/c++"),
    hub=Hub(endpoint="https://huggingface.co", token_from="HF_TOKEN"),
    interfaces=("lo", "eth0"),
    bitsandbytes_cuda=("124", "128"),
)


def on_gpu(**overrides: Any) -> dict[str, Any]:
    return {"detection": detection(gpu(0, **overrides), gpu(1), pairs=(PAIR,))}


def health(**overrides: Any) -> dict[str, Any]:
    return {"health": (GpuHealth(index=0, **overrides),)}


def disk(free_bytes: int, *, is_writable: bool = True) -> dict[str, Any]:
    place = replace(GOOD.directories[0], free_bytes=free_bytes, is_writable=is_writable)
    return {"directories": (place,)}


def need(by: str, wanted: str, installed: str, *, is_met: bool = False) -> dict[str, Any]:
    return {
        "needs": (
            Need(by=by, package=wanted.split(">")[0].split("<")[0], wanted=wanted, installed=installed, is_met=is_met),
        )
    }


EXTRA = "launchkit-planner[train]"
# what differs from the good machine: the level, a part of the fact, a part of the fix
ROWS: list[tuple[str, dict[str, Any], Level, str, str]] = [
    ("old-package", need(EXTRA, "trl>=1.0", "0.9"), PROBLEM, "trl 0.9 is installed, launchkit-planner[train] wants trl>=1.0", "pip install --upgrade 'trl>=1.0'"),
    ("extra-absent", need(EXTRA, "trl>=1.0", ""), OK, "launchkit-planner[train] is not whole: trl is not installed", "pip install 'launchkit-planner[train]'"),
    ("mixed", need("trl 1.16", "transformers<5", "5.23"), WARNING, "trl 1.16 wants transformers<5, 5.23 is installed", "pip install 'transformers<5'"),
    ("pynvml", {"versions": {"pynvml": "11.5"}}, WARNING, "pynvml 11.5", "pip uninstall -y pynvml"),
    ("no-torch", {"torch": None}, OK, "torch is not installed", "pip install torch"),
    ("broken-torch", {"torch": Torch(error="OSError: libcudart.so.12")}, PROBLEM, "libcudart.so.12", "--force-reinstall torch"),
    ("cpu-torch", {"torch": replace(TORCH, cuda="")}, PROBLEM, "built without CUDA, and an NVIDIA GPU is here", "pytorch.org"),
    ("newer-cuda", {"torch": replace(TORCH, cuda="13.0")}, PROBLEM, "built for CUDA 13.0, the driver 550.54 has CUDA 12.4", "newer driver"),
    ("older-cuda", {"torch": replace(TORCH, cuda="11.8")}, OK, "built for CUDA 11.8", ""),
    ("minor-cuda", {"torch": replace(TORCH, cuda="12.8")}, OK, "built for CUDA 12.8", ""),
    ("sees-none", {"torch": replace(TORCH, num_devices=0)}, PROBLEM, "sees none of the 2 GPUs", "torch.cuda.init()"),
    ("extension", {"torch": replace(TORCH, broken_extensions={"flash-attn": "undefined symbol"})}, PROBLEM, "flash-attn cannot be loaded", "--no-build-isolation flash-attn"),
    ("bitsandbytes", {"bitsandbytes_cuda": ("118",)}, WARNING, "has no library for CUDA 12.4 (there are: 118)", "--upgrade bitsandbytes"),
    ("no-driver", {"detection": detection(notes=("no GPU found: no NVIDIA driver is installed",))}, OK, "no NVIDIA driver", ""),
    ("driver-down", {"detection": detection(notes=("no GPU found: the NVIDIA driver is installed but not loaded",))}, PROBLEM, "not loaded", "nvidia-smi"),
    ("hidden-gpu", {"detection": detection(gpu(), visible=(), notes=("CUDA_VISIBLE_DEVICES is set to nothing",))}, WARNING, "set to nothing", "launchkit gpus"),
    ("too-new", on_gpu(compute_capability=(7, 0)), PROBLEM, "GPU 0 has compute capability 7.0, torch 2.13.0 has kernels for sm_80", "another torch"),
    ("used", on_gpu(used_bytes=3 * GIB), WARNING, "GPU 0: 3.0 GiB of 40.0 GiB are held by others", "nvidia-smi"),
    ("used-by", on_gpu(used_bytes=3 * GIB) | health(pids=(7, 8)), WARNING, "(process 7, 8)", "ps -fp 7,8"),
    ("ecc", health(num_uncorrected_errors=2), PROBLEM, "2 memory errors", "--gpu-reset -i 0"),
    ("prohibited", health(compute_mode=ComputeMode.PROHIBITED), PROBLEM, "lets no process compute", "-c DEFAULT"),
    ("exclusive", health(compute_mode=ComputeMode.EXCLUSIVE), WARNING, "exclusive mode", "-c DEFAULT"),
    ("persistence", health(persistence=False), OK, "persistence mode is off", "nvidia-smi -pm 1"),
    ("no-p2p", {"detection": detection(gpu(0), gpu(1), pairs=(replace(PAIR, peer_to_peer=False),))}, WARNING, "no peer-to-peer between GPUs 0–1", "NCCL_P2P_DISABLE=1"),
    ("wsl", {"system": replace(GOOD.system, is_wsl=True)}, WARNING, "this is WSL", ".wslconfig"),
    ("mac", {"system": replace(GOOD.system, platform="Darwin")}, WARNING, "this is macOS", "--strategy single"),
    ("container", {"system": replace(GOOD.system, container="docker")}, OK, "inside a container (docker)", ""),
    ("shm-64", {"limits": replace(GOOD.limits, shared_memory_bytes=64 * MIB)}, PROBLEM, "/dev/shm has 64 MiB", "--shm-size"),
    ("shm-512", {"limits": replace(GOOD.limits, shared_memory_bytes=512 * MIB)}, WARNING, "/dev/shm has 512 MiB", "--shm-size"),
    ("files", {"limits": replace(GOOD.limits, open_files=1024)}, WARNING, "1024 open files", "ulimit -n 65536"),
    ("processes", {"limits": replace(GOOD.limits, processes=256)}, WARNING, "256 processes", "ulimit -u unlimited"),
    ("memlock", {"limits": replace(GOOD.limits, locked_memory_bytes=64 * 1024), "has_infiniband": True}, PROBLEM, "64 KiB of locked memory", "memlock=-1"),
    ("cgroup", {"detection": replace(GOOD.detection, host=replace(HOST, memory_limit_bytes=8 * GIB))}, WARNING, "limited to 8.0 GiB of 64.0 GiB", "--memory"),
    ("read-only", disk(500 * GB, is_writable=False), PROBLEM, "runs cannot be written: /data", "--run-dir"),
    ("full", disk(GB // 2), PROBLEM, "runs: 0.5 GB free in /data", "--run-dir"),
    ("small", disk(5 * GB), WARNING, "runs: 5.0 GB free", "--run-dir"),
    ("offline", {"environment": {"HF_HUB_OFFLINE": "1"}}, WARNING, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
    ("unreachable", {"hub": Hub(endpoint="https://hf", was_asked=True, answer="timed out")}, PROBLEM, "https://hf was not reached: timed out", "HF_ENDPOINT"),
    ("reachable", {"hub": Hub(endpoint="https://hf", was_asked=True)}, OK, "https://hf answers", ""),
    ("no-token", {"hub": Hub(endpoint="https://hf")}, OK, "no token of the hub", "hf auth login"),
    ("lock", {"tools": replace(GOOD.tools, stale_locks=("/x/lock",))}, PROBLEM, "/x/lock was left", "rm /x/lock"),
    ("ninja", {"tools": replace(GOOD.tools, ninja="")}, WARNING, "no ninja", "pip install ninja"),
    ("compiler", {"tools": replace(GOOD.tools, compiler="")}, WARNING, "no C++ compiler", "build-essential"),
    ("nvcc", {"tools": replace(GOOD.tools, nvcc="")}, WARNING, "no nvcc", "cuda-toolkit-12-4"),
    ("other-nvcc", {"tools": replace(GOOD.tools, nvcc_version="11.8")}, WARNING, "is of CUDA 11.8, torch of 12.4", "CUDA_HOME=/usr/local/cuda-12.4"),
    ("rank", {"environment": {"RANK": "0", "WORLD_SIZE": "2"}}, WARNING, "RANK, WORLD_SIZE are set: a script started without a launcher", "unset RANK WORLD_SIZE"),
    ("accelerate", {"environment": {"ACCELERATE_USE_FSDP": "true"}}, WARNING, "ACCELERATE_USE_FSDP=true: Accelerator()", "unset ACCELERATE_USE_FSDP"),
    ("many", {"environment": {f"FSDP_{number}": "1" for number in range(6)}}, WARNING, "FSDP_3 and 2 more are set", "FSDP_5"),
    ("p2p-off", {"environment": {"NCCL_P2P_DISABLE": "1"}}, WARNING, "NCCL_P2P_DISABLE=1: traffic", "unset NCCL_P2P_DISABLE"),
    ("allocator", {"environment": {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}}, WARNING, "the allocator", "unset"),
    ("deepspeed-cpu", {"environment": {"DS_ACCELERATOR": "cpu"}}, WARNING, "leaves the GPUs unused", "unset"),
    ("libraries", {"environment": {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}}, WARNING, "stand before those", "unset"),
    ("visible", {"environment": {"CUDA_VISIBLE_DEVICES": "0,1"}}, OK, "CUDA_VISIBLE_DEVICES=0,1", ""),
    ("interface", {"environment": {"NCCL_SOCKET_IFNAME": "ib0"}}, PROBLEM, "NCCL_SOCKET_IFNAME=ib0 is no network interface here (lo, eth0)", "unset NCCL_SOCKET_IFNAME"),
    ("interface-found", {"environment": {"NCCL_SOCKET_IFNAME": "=eth0"}}, OK, "NCCL_SOCKET_IFNAME==eth0", ""),
    ("default-config", {"hidden_files": {"/h/default_config.yaml": "accelerate launch obeys it"}}, WARNING, "/h/default_config.yaml is there", "mv /h/default_config.yaml"),
]  # fmt: skip


def rows(facts: Facts) -> list[Row]:
    return [row for group in examine(facts) for row in group.rows]


def test_a_good_machine_has_neither_problems_nor_warnings() -> None:
    found = examine(GOOD)
    assert (count(found, PROBLEM), count(found, WARNING)) == (0, 0)
    assert [group.title for group in found] == list(CHECKS)
    assert not [row for row in rows(GOOD) if row.fix]


@pytest.mark.parametrize(("changes", "level", "fact", "fix"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_each_check(changes: dict[str, Any], level: Level, fact: str, fix: str) -> None:
    new = [row for row in rows(replace(GOOD, **changes)) if row not in rows(GOOD)]
    matching = [row for row in new if fact in row.fact]
    assert [row.level for row in matching] == [level]
    assert fix in matching[0].fix
    assert bool(matching[0].fix) or level is OK


@pytest.mark.parametrize(
    "environment",
    [
        {"NCCL_P2P_DISABLE": "0"},
        {"TORCH_DISTRIBUTED_DEBUG": "OFF"},
        {"NCCL_SOCKET_IFNAME": "^docker0"},
        {"LD_LIBRARY_PATH": "/opt/lib"},
        {"HF_TOKEN": "hf_secret", "RANKING": "1"},
    ],
)
def test_settings_that_change_nothing_are_not_mentioned(environment: dict[str, str]) -> None:
    assert rows(replace(GOOD, environment=environment)) == rows(GOOD)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "ACCELERATE_TOKEN", "FSDP_SECRET"])
def test_no_secret_is_ever_shown(name: str) -> None:
    assert not [
        row for row in rows(replace(GOOD, environment={name: "hf_secret"})) if "hf_secret" in row.fact + row.fix
    ]


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (("sm_80",), (8, 0), True),
        (("sm_80",), (8, 6), True),  # a later one of the same generation
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("compute_80",), (9, 0), True),  # compiled for it when it runs
        (("compute_90",), (8, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_120",), (12, 0), True),
        (("sm_100", "sm_120"), (12, 1), True),
        ((), (8, 0), False),
    ],
)
def test_which_kernels_run_on_which_gpu(
    architectures: tuple[str, ...], capability: tuple[int, int], expected: bool
) -> None:
    assert supports(architectures, capability) is expected


def test_every_line_of_the_table_of_variables_says_what_to_type() -> None:
    assert all("{names}" in line.fix for line in TABLE if line.level is not OK)
