"""From what was found to the cluster that is planned for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from launchkit.detection import DetectedGpu, Detection, Host, MigInstance
from launchkit.errors import UnknownGpuError
from launchkit.hardware import (
    Backend,
    Cluster,
    Fabric,
    Gpu,
    HardwareTable,
    Node,
    cpu_cluster,
    gpu_of_memory,
    pcie_bytes_per_s,
)
from launchkit.units import gib

# One direction of one link by compute capability. Source: NVIDIA's NVLink page (20 GB/s in generation 1, 25 in 2 to 4,
# 50 in 5) and the GA102 whitepaper (4 links, 56.25 GB/s).
_NVLINK_BYTES_PER_S = {6: 20e9, 7: 25e9, 8: 25e9, 9: 25e9, 10: 50e9}
_NVLINK_GA102_BYTES_PER_S = 14.0625e9
# A GPU in MIG mode is cut into seven slices of multiprocessors. Source: NVIDIA MIG user guide, "Partitioning".
_NUM_MIG_COMPUTE_SLICES = 7


def cluster_from(detection: Detection, table: HardwareTable, *, num_gpus: int | None = None) -> Cluster:
    """The GPUs that a process here would see, or the first ``num_gpus`` of them; without any, CPU processes.

    GPUs that differ are planned as so many of the smallest, since every rank of a sharded run does the same work.
    """
    visible = detection.visible_gpus
    if num_gpus is not None and visible and not 1 <= num_gpus <= len(visible):
        raise UnknownGpuError(
            f"{num_gpus} GPUs were asked for and {len(visible)} are here; write --gpus {len(visible)}xauto"
        )
    if not visible:
        cluster = host_cluster(detection.host, table, num_processes=max(1, num_gpus or 1))
        return replace(cluster, notes=(*detection.notes, *cluster.notes))
    if detection.mig_instance is not None:
        return _mig_cluster(detection, visible[0], detection.mig_instance, table)
    chosen = visible[:num_gpus]
    smallest = min(chosen, key=lambda gpu: gpu.memory_bytes)
    gpu, gpu_notes = identify(smallest, table)
    node, node_notes = _node(chosen, gpu, detection)
    return Cluster(
        gpu=gpu,
        node=node,
        used_bytes=max(found.used_bytes for found in chosen),
        detected=True,
        notes=(*detection.notes, *_mixed_notes(chosen, smallest), *gpu_notes, *node_notes),
    )


def identify(found: DetectedGpu, table: HardwareTable) -> tuple[Gpu, tuple[str, ...]]:
    """The table's row for a detected GPU, with the memory that its driver really reports."""
    row, notes = _row(found, table)
    measured = replace(
        row,
        memory_bytes=found.memory_bytes or row.memory_bytes,
        reserved_by_driver_bytes=found.reserved_bytes or row.reserved_by_driver_bytes,
        pcie_bytes_per_s=_pcie_rate(found) or row.pcie_bytes_per_s,
    )
    if found.compute_capability != (0, 0):
        measured = replace(measured, compute_capability=found.compute_capability)
    return measured, notes


def _row(found: DetectedGpu, table: HardwareTable) -> tuple[Gpu, tuple[str, ...]]:
    named = [gpu for gpu in table.gpus_called(found.name) if gpu.backend is found.backend]
    if named:
        return min(named, key=lambda gpu: abs(gpu.memory_bytes - found.memory_bytes)), ()
    if found.backend is Backend.CUDA and found.memory_bytes:
        nearest, note = gpu_of_memory(found.memory_bytes, table)
        return replace(nearest, name=found.name), (f"{found.name} is not in the table; {note}",)
    unknown = Gpu(name=found.name, backend=found.backend, source="the driver")
    return unknown, (f"{found.name} is not in the table: its speed is unknown",)


def host_cluster(host: Host, table: HardwareTable, *, num_processes: int) -> Cluster:
    """Processes on this machine's CPU, with its memory and disk."""
    core = next(gpu for gpu in table.gpus if gpu.backend is Backend.CPU)
    memory_bytes, num_cores = host.usable_memory_bytes, host.num_cpu_cores
    cluster = cpu_cluster(core, num_processes=num_processes, memory_bytes=memory_bytes, num_cores=num_cores)
    node = replace(cluster.node, disk_free_bytes=host.disk_free_bytes)
    return replace(cluster, node=node, detected=True, notes=cluster.notes + _limit_notes(host))


def _node(chosen: Sequence[DetectedGpu], gpu: Gpu, detection: Detection) -> tuple[Node, tuple[str, ...]]:
    host = detection.host
    node = Node(
        num_gpus=len(chosen),
        gpu_link_bytes_per_s=gpu.pcie_bytes_per_s,
        host_memory_bytes=host.usable_memory_bytes,
        disk_free_bytes=host.disk_free_bytes,
        num_cpu_cores=host.num_cpu_cores,
    )
    limits = _limit_notes(host)
    if len(chosen) == 1:
        return node, limits
    if gpu.backend is not Backend.CUDA:
        on_fabric = gpu.fabric.joins_all
        rate = gpu.nvlink_bytes_per_s if on_fabric else gpu.pcie_bytes_per_s
        return replace(node, gpu_link=gpu.fabric.link if on_fabric else "PCIe", gpu_link_bytes_per_s=rate), limits
    if _all_on_nvlink(chosen):
        return replace(node, gpu_link=Fabric.NVLINK.link, gpu_link_bytes_per_s=_nvlink_rate(chosen)), limits
    notes = limits
    if any(found.num_nvlinks for found in chosen):
        notes += ("NVLink joins only some of these GPUs: PCIe is what all of them share",)
    if _peer_to_peer(chosen, gpu, detection):
        return node, notes
    notes += ("no peer-to-peer between these GPUs: traffic through host memory, at half of PCIe's rate",)
    return replace(node, peer_to_peer=False, gpu_link_bytes_per_s=node.gpu_link_bytes_per_s / 2), notes


def _all_on_nvlink(chosen: Sequence[DetectedGpu]) -> bool:
    indices = {found.index for found in chosen}
    return all(
        found.num_nvlinks and (found.nvlink_to_switch or indices - {found.index} <= set(found.nvlink_peers))
        for found in chosen
    )


def _nvlink_rate(chosen: Sequence[DetectedGpu]) -> float:
    slowest = min(chosen, key=lambda found: found.num_nvlinks)
    is_ga102 = slowest.compute_capability == (8, 6)
    per_link = _NVLINK_GA102_BYTES_PER_S if is_ga102 else _NVLINK_BYTES_PER_S.get(slowest.compute_capability[0], 25e9)
    return slowest.num_nvlinks * per_link


def _peer_to_peer(chosen: Sequence[DetectedGpu], gpu: Gpu, detection: Detection) -> bool:
    """What the driver says of every pair; the table's word where it says nothing."""
    indices = {found.index for found in chosen}
    answers = {pair.peer_to_peer for pair in detection.pairs if {pair.first, pair.second} <= indices}
    return gpu.peer_to_peer if answers <= {None} else False not in answers


def _mig_cluster(detection: Detection, parent: DetectedGpu, piece: MigInstance, table: HardwareTable) -> Cluster:
    """One slice: its own memory, a seventh of the multiprocessors per compute slice, bandwidth as memory."""
    whole, notes = identify(parent, table)
    profile = re.search(r"(\d)g\.\d+gb", piece.name)
    compute_share = int(profile[1]) / _NUM_MIG_COMPUTE_SLICES if profile else 1 / _NUM_MIG_COMPUTE_SLICES
    memory_share = piece.memory_bytes / whole.memory_bytes if whole.memory_bytes else compute_share
    gpu = replace(
        whole,
        name=f"{whole.name} MIG {profile[0] if profile else 'slice'}",
        memory_bytes=piece.memory_bytes,
        reserved_by_driver_bytes=0,
        memory_bandwidth_bytes_per_s=whole.memory_bandwidth_bytes_per_s * memory_share,
        fp32_flops_per_s=whole.fp32_flops_per_s * compute_share,
        tf32_flops_per_s=whole.tf32_flops_per_s * compute_share,
        fp16_flops_per_s=whole.fp16_flops_per_s * compute_share,
        bf16_flops_per_s=whole.bf16_flops_per_s * compute_share,
        fp8_flops_per_s=whole.fp8_flops_per_s * compute_share,
        fabric=Fabric.NONE,
        nvlink_bytes_per_s=0.0,
    )
    node, node_notes = _node([parent], gpu, detection)
    return Cluster(
        gpu=gpu, node=node, used_bytes=piece.used_bytes, detected=True, notes=(*detection.notes, *notes, *node_notes)
    )


def _pcie_rate(found: DetectedGpu) -> float:
    return pcie_bytes_per_s(generation=found.pcie_generation, num_lanes=found.pcie_lanes)


def _mixed_notes(chosen: Sequence[DetectedGpu], smallest: DetectedGpu) -> tuple[str, ...]:
    names = list(dict.fromkeys(found.name for found in chosen))
    if len(names) == 1:
        return ()
    return (f"these GPUs differ ({', '.join(names)}): planned as {len(chosen)} × {smallest.name}, the smallest",)


def _limit_notes(host: Host) -> tuple[str, ...]:
    if host.usable_memory_bytes == host.memory_bytes:
        return ()
    limit, total = gib(host.memory_limit_bytes), gib(host.memory_bytes)
    return (f"host memory is limited to {limit} of {total} by the container (control group)",)
