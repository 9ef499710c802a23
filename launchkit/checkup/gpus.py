"""The GPUs: whether this torch can use them, who else does, how they reach each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from launchkit.checkup.facts import Facts
from launchkit.checkup.rows import Row, ok, problem, warning
from launchkit.detection import ComputeMode, DetectedGpu
from launchkit.hardware import Backend
from launchkit.units import MIB, gib

# An idle driver and a desktop hold some of a GPU; more than this is somebody's job.
NEGLIGIBLE_USED_BYTES = 512 * MIB
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)")


def check_found(facts: Facts) -> Iterator[Row]:
    """What is here, and what the driver or ``CUDA_VISIBLE_DEVICES`` hides."""
    for gpu in facts.detection.gpus:
        capability = ".".join(map(str, gpu.compute_capability)) if gpu.backend is Backend.CUDA else gpu.backend
        yield ok(f"GPU {gpu.index}: {gpu.name}, {gib(gpu.memory_bytes)}, {capability}")
    for note in facts.detection.notes:
        if facts.detection.gpus:
            yield warning(note, "launchkit gpus")
        elif "not loaded" in note or "not reloaded" in note or "may not be used" in note:
            yield problem(note, "nvidia-smi, which must list the GPU before anything else can use it")
        else:
            yield ok(note)


def check_architectures(facts: Facts) -> Iterator[Row]:
    """Kernels run on a later GPU of the same generation; code for ``compute_`` is compiled for any later one.

    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    torch = facts.torch
    if torch is None or not torch.architectures or not facts.has_nvidia:
        return
    for gpu in facts.detection.gpus:
        if gpu.compute_capability != (0, 0) and not supports(torch.architectures, gpu.compute_capability):
            there = " ".join(torch.architectures)
            yield problem(
                f"GPU {gpu.index} has compute capability {'.'.join(map(str, gpu.compute_capability))}, torch "
                f"{torch.version} has kernels for {there}",
                "another torch for this GPU: https://pytorch.org/get-started/locally",
            )


def supports(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of that compute capability."""
    for text in architectures:
        match = _ARCHITECTURE.match(text)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if (match[1] == "compute" and built <= capability) or (built[0] == capability[0] and built[1] <= capability[1]):
            return True
    return False


def check_others(facts: Facts) -> Iterator[Row]:
    """Memory that other processes hold; a plan for this machine leaves it to them."""
    pids = {health.index: health.pids for health in facts.health}
    for gpu in facts.detection.gpus:
        if gpu.used_bytes > NEGLIGIBLE_USED_BYTES:
            who = ", ".join(map(str, pids.get(gpu.index, ())))
            yield warning(
                f"GPU {gpu.index}: {gib(gpu.used_bytes)} of {gib(gpu.memory_bytes)} are held by others"
                + (f" (process {who})" if who else ""),
                f"ps -fp {who.replace(' ', '')}" if who else "nvidia-smi",
            )


def check_health(facts: Facts) -> Iterator[Row]:
    """Errors of the memory, and modes that keep processes out."""
    for health in facts.health:
        if health.num_uncorrected_errors:
            yield problem(
                f"GPU {health.index}: {health.num_uncorrected_errors} memory errors that ECC could not correct",
                f"sudo nvidia-smi --gpu-reset -i {health.index}, or another GPU",
            )
        if health.compute_mode is ComputeMode.PROHIBITED:
            yield problem(
                f"GPU {health.index} lets no process compute", f"sudo nvidia-smi -i {health.index} -c DEFAULT"
            )
        elif health.compute_mode is ComputeMode.EXCLUSIVE:
            yield warning(
                f"GPU {health.index} is in exclusive mode: one process at a time",
                f"sudo nvidia-smi -i {health.index} -c DEFAULT",
            )
    if any(health.persistence is False for health in facts.health):
        yield ok("persistence mode is off: each run begins seconds later", "sudo nvidia-smi -pm 1")


def check_pairs(facts: Facts) -> Iterator[Row]:
    """Peer-to-peer traffic, without which NCCL goes through host memory and, on some boards, hangs."""
    visible = set(facts.detection.visible)
    pairs = [pair for pair in facts.detection.pairs if {pair.first, pair.second} <= visible]
    refused = [pair for pair in pairs if pair.peer_to_peer is False]
    if refused:
        names = ", ".join(f"{pair.first}–{pair.second}" for pair in refused)
        yield warning(
            f"no peer-to-peer between GPUs {names}: NCCL goes through host memory",
            "export NCCL_P2P_DISABLE=1, where a run hangs at its start",
        )
    elif pairs and all(pair.peer_to_peer for pair in pairs):
        links = ", ".join(sorted({_link(facts.detection.gpu(pair.first), pair.topology) for pair in pairs}))
        yield ok(f"peer-to-peer between all {len(visible)} GPUs ({links})")


def _link(gpu: DetectedGpu, topology: str) -> str:
    return "NVLink" if gpu.num_nvlinks else f"PCIe, {topology}"
