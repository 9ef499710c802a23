"""The system around the GPUs: limits, disks, the hub, and what builds extensions."""

from __future__ import annotations

from collections.abc import Iterator

from launchkit.checkup.facts import Directory, Facts
from launchkit.checkup.rows import Row, ok, problem, warning
from launchkit.units import GB, GIB, MIB, gib, gigabytes

# Docker's default is 64 MiB. NCCL takes some 10 MiB per pair of ranks there, dataloader workers whole batches.
TIGHT_SHARED_MEMORY_BYTES = 64 * MIB
SMALL_SHARED_MEMORY_BYTES = GIB
FEW_OPEN_FILES = 1024
FEW_PROCESSES = 4096
FULL_DISK_BYTES = GB
SMALL_DISK_BYTES = 20 * GB


def check_system(facts: Facts) -> Iterator[Row]:
    system = facts.system
    if system.is_wsl:
        yield warning(
            "this is WSL: half of the memory is the guest's, pinned memory is scarce, GPUs have no peer-to-peer",
            "memory=… under [wsl2] in %UserProfile%\\.wslconfig, then wsl --shutdown",
        )
    if system.platform == "Darwin":
        yield warning(
            "this is macOS: one process on MPS or the CPU, since DDP, FSDP and ZeRO have no backend for MPS",
            "launchkit plan MODEL --gpus auto --strategy single",
        )
    if system.container:
        yield ok(f"inside a container ({system.container})")


def check_limits(facts: Facts) -> Iterator[Row]:
    yield from _shared_memory(facts)
    limits, host = facts.limits, facts.detection.host
    if 0 < limits.open_files <= FEW_OPEN_FILES:
        yield warning(
            f"{limits.open_files} open files at most (ulimit -n): dataloader workers need more", "ulimit -n 65536"
        )
    if 0 < limits.processes <= FEW_PROCESSES:
        yield warning(f"{limits.processes} processes and threads at most (ulimit -u)", "ulimit -u unlimited")
    if facts.has_infiniband and limits.locked_memory_bytes >= 0:
        yield problem(
            f"{gib(limits.locked_memory_bytes)} of locked memory at most (ulimit -l): InfiniBand needs more",
            "ulimit -l unlimited; docker run --ulimit memlock=-1",
        )
    if host.usable_memory_bytes < host.memory_bytes:
        yield warning(
            f"host memory is limited to {gib(host.memory_limit_bytes)} of {gib(host.memory_bytes)} by a control group",
            "docker run --memory, or the scheduler's --mem",
        )
    else:
        free = gib(host.memory_available_bytes)
        yield ok(f"host memory {gib(host.memory_bytes)}, {free} of it free; {host.num_cpu_cores} cores")


def _shared_memory(facts: Facts) -> Iterator[Row]:
    size = facts.limits.shared_memory_bytes
    several = len(facts.detection.visible) > 1
    fix = "docker run --shm-size=16g (or --ipc=host); sudo mount -o remount,size=16G /dev/shm"
    if not size:
        return
    if size <= TIGHT_SHARED_MEMORY_BYTES and several:
        yield problem(f"/dev/shm has {gib(size)}: NCCL between GPUs and dataloader workers run out of it", fix)
    elif size < SMALL_SHARED_MEMORY_BYTES:
        yield warning(f"/dev/shm has {gib(size)}: dataloader workers run out of it", fix)
    else:
        yield ok(f"/dev/shm has {gib(size)}")


def check_disks(facts: Facts) -> Iterator[Row]:
    for place in facts.directories:
        yield _directory(place)


def _directory(place: Directory) -> Row:
    free = gigabytes(place.free_bytes)
    if not place.is_writable:
        return problem(f"{place.purpose} cannot be written: {place.path}", place.setting)
    if place.free_bytes < FULL_DISK_BYTES:
        return problem(f"{place.purpose}: {free} free in {place.path}", place.setting)
    if place.free_bytes < SMALL_DISK_BYTES:
        return warning(f"{place.purpose}: {free} free in {place.path}", place.setting)
    return ok(f"{place.purpose}: {free} free in {place.path}")


def check_hub(facts: Facts) -> Iterator[Row]:
    hub = facts.hub
    if facts.environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield warning("HF_HUB_OFFLINE is set: only what is in the cache can be used", "unset HF_HUB_OFFLINE")
    if hub.was_asked and hub.answer:
        yield problem(f"{hub.endpoint} was not reached: {hub.answer}", "HTTPS_PROXY, or HF_ENDPOINT of a mirror")
    elif hub.was_asked:
        yield ok(f"{hub.endpoint} answers")
    if hub.token_from:
        yield ok(f"a token of the hub is set ({hub.token_from}; not shown)")
    else:
        yield ok("no token of the hub: gated models cannot be read", "hf auth login")


def check_builds(facts: Facts) -> Iterator[Row]:
    """What DeepSpeed builds at run time: CPUAdam for offload, FusedAdam, asynchronous disk access; on a CPU its
    communication. Nothing here matters without it."""
    tools = facts.tools
    for lock in tools.stale_locks:
        yield problem(f"{lock} was left by a build that was killed: the next run waits for it forever", f"rm {lock}")
    if "deepspeed" not in facts.versions:
        return
    if not tools.ninja:
        yield warning("no ninja: DeepSpeed's extensions cannot be built", "pip install ninja")
    if not tools.compiler:
        yield warning("no C++ compiler: DeepSpeed's extensions cannot be built", "apt-get install build-essential")
    if facts.has_nvidia:
        yield from _nvcc(facts)
    if tools.ninja and tools.compiler and (tools.nvcc or not facts.has_nvidia):
        yield ok(f"DeepSpeed can build: {tools.compiler}, {tools.ninja}" + (f", {tools.nvcc}" if tools.nvcc else ""))


def _nvcc(facts: Facts) -> Iterator[Row]:
    tools = facts.tools
    cuda = facts.torch.cuda if facts.torch is not None else ""
    if not tools.nvcc:
        yield warning(
            "no nvcc (CUDA_HOME is not set): DeepSpeed cannot build CPUAdam or FusedAdam",
            f"apt-get install cuda-toolkit-{cuda.replace('.', '-') or '12-8'}, then export CUDA_HOME=/usr/local/cuda",
        )
    elif cuda and tools.nvcc_version and cuda.split(".")[0] != tools.nvcc_version.split(".")[0]:
        yield warning(
            f"{tools.nvcc} is of CUDA {tools.nvcc_version}, torch of {cuda}: DeepSpeed refuses to build",
            f"export CUDA_HOME=/usr/local/cuda-{cuda}",
        )
