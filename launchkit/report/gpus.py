"""What ``launchkit gpus`` shows: the hardware found here, and every device and node that ``--gpus`` knows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launchkit.detection import DetectedGpu, Detection, GpuPair, Host
from launchkit.hardware import Backend, Gpu, HardwareTable, NodeType
from launchkit.units import gib, gigabytes

SCHEMA_VERSION = 1
_GAP = "  "


def gpus_document(detection: Detection, table: HardwareTable) -> dict[str, Any]:
    """The JSON of ``launchkit gpus``. Memory in bytes, rates per second, 0 or empty for unknown."""
    return {
        "schema_version": SCHEMA_VERSION,
        "detected": {
            "found_by": detection.found_by,
            "driver_version": detection.driver_version,
            "cuda_version": detection.cuda_version,
            "cuda_visible_devices": detection.visible_devices,
            "visible": list(detection.visible),
            "visible_mig": detection.visible_mig,
            "gpus": [_detected_gpu(gpu) for gpu in detection.gpus],
            "pairs": [_pair(pair) for pair in detection.pairs],
            "host": _host(detection.host),
            "notes": list(detection.notes),
        },
        "gpus": [_known_gpu(gpu) for gpu in table.gpus],
        "nodes": [_known_node(node) for node in table.nodes],
        "shorthands": [{"text": row.text, "gpu": row.gpu, "others": list(row.others)} for row in table.shorthands],
    }


def render_gpus(detection: Detection, table: HardwareTable, *, width: int = 100) -> str:
    """The same for people, within ``width`` columns: a narrow screen loses columns from the right, never a row."""
    lines = ["Found here", *_found_lines(detection, width=width)]
    lines += ["", "Known devices (NAME, 4xNAME, 2x8xNAME: nodes × GPUs)"]
    ordered = sorted(table.gpus, key=lambda gpu: list(Backend).index(gpu.backend))
    lines += _grid([_gpu_cells(gpu) for gpu in ordered], heads=_GPU_HEADS, width=width)
    lines += ["", "Known nodes (NAME, 2xNAME)"]
    lines += _grid([_node_cells(node) for node in table.nodes], heads=_NODE_HEADS, width=width)
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class _Head:
    title: str
    is_number: bool = False


_GPU_HEADS = (
    _Head(title="name"),
    _Head(title="memory", is_number=True),
    _Head(title="bf16 TFLOPS", is_number=True),
    _Head(title="GB/s", is_number=True),
    _Head(title="link"),
    _Head(title="trust"),
)
_NODE_HEADS = (
    _Head(title="name"),
    _Head(title="GPUs"),
    _Head(title="host memory", is_number=True),
    _Head(title="network Gb/s", is_number=True),
    _Head(title="from"),
    _Head(title="trust"),
)


def _found_lines(detection: Detection, *, width: int) -> list[str]:
    host = detection.host
    driver = f"NVIDIA {detection.driver_version}, CUDA up to {detection.cuda_version}"
    entries = [("driver", driver)] if detection.driver_version else []
    entries += [(f"GPU {gpu.index}", _found_gpu_text(gpu, detection)) for gpu in detection.gpus]
    limit = f" ({gib(host.memory_limit_bytes)} for this container)" if host.memory_limit_bytes else ""
    free = gigabytes(host.disk_free_bytes)
    entries += [("host", f"{gib(host.memory_bytes)}{limit}, {host.num_cpu_cores} cores, {free} free on disk")]
    entries += [("note", note) for note in detection.notes]
    return [line for label, text in entries for line in _entry(label, text, width=width)]


def _entry(label: str, text: str, *, width: int) -> list[str]:
    first = f"  {label:<6} "
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * len(first))


def _found_gpu_text(gpu: DetectedGpu, detection: Detection) -> str:
    parts = [gpu.name, gib(gpu.memory_bytes)]
    if gpu.used_bytes:
        parts.append(f"{gib(gpu.used_bytes)} in use")
    if gpu.num_nvlinks:
        parts.append(f"{gpu.num_nvlinks} NVLinks")
    if gpu.pcie_generation:
        parts.append(f"PCIe {gpu.pcie_generation}.0 ×{gpu.pcie_lanes}")
    if gpu.mig_enabled:
        parts.append(f"MIG: {', '.join(piece.name for piece in gpu.mig_instances) or 'no slice'}")
    if gpu.index not in detection.visible:
        parts.append("not visible")
    return ", ".join(parts)


def _gpu_cells(gpu: Gpu) -> tuple[str, ...]:
    flops = f"{gpu.bf16_flops_per_s / 1e12:.4g}" if gpu.supports_bf16 else "–"
    return (
        _typed_name(gpu),
        gib(gpu.memory_bytes) if gpu.memory_bytes else "varies",
        flops,
        f"{gpu.memory_bandwidth_bytes_per_s / 1e9:.0f}",
        gpu.fabric.value or ("PCIe" if gpu.backend not in (Backend.CPU, Backend.MPS) else "shared memory"),
        gpu.confidence,
    )


def _typed_name(gpu: Gpu) -> str:
    return "cpu" if gpu.backend is Backend.CPU else gpu.name.replace(" ", "-")


def _node_cells(node: NodeType) -> tuple[str, ...]:
    return (
        node.name,
        f"{node.num_gpus}× {node.gpu}",
        gib(node.host_memory_bytes, digits=0),
        f"{node.network_bytes_per_s * 8 / 1e9:.0f}" if node.network_bytes_per_s else "–",
        node.provider,
        node.confidence,
    )


def _grid(rows: Sequence[tuple[str, ...]], *, heads: Sequence[_Head], width: int) -> list[str]:
    """Rows under their heads, with as many columns from the left as fit."""
    titled = [tuple(head.title for head in heads), *rows]
    widths = [max(len(row[column]) for row in titled) for column in range(len(heads))]
    shown = len(heads)
    while shown > 1 and len("  ") + sum(widths[:shown]) + len(_GAP) * (shown - 1) > width:
        shown -= 1
    return ["  " + _line(row[:shown], heads=heads, widths=widths) for row in titled]


def _line(cells: Sequence[str], *, heads: Sequence[_Head], widths: Sequence[int]) -> str:
    padded = (
        f"{cell:>{width}}" if head.is_number else f"{cell:<{width}}"
        for cell, head, width in zip(cells, heads, widths, strict=False)
    )
    return _GAP.join(padded).rstrip()


def _detected_gpu(gpu: DetectedGpu) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "name": gpu.name,
        "uuid": gpu.uuid,
        "backend": gpu.backend.value,
        "memory_bytes": gpu.memory_bytes,
        "used_bytes": gpu.used_bytes,
        "reserved_bytes": gpu.reserved_bytes,
        "compute_capability": _capability(gpu.compute_capability),
        "pcie_generation": gpu.pcie_generation,
        "pcie_lanes": gpu.pcie_lanes,
        "num_nvlinks": gpu.num_nvlinks,
        "nvlink_peers": list(gpu.nvlink_peers),
        "nvlink_to_switch": gpu.nvlink_to_switch,
        "mig_enabled": gpu.mig_enabled,
        "mig_instances": [
            {"uuid": piece.uuid, "name": piece.name, "memory_bytes": piece.memory_bytes, "used_bytes": piece.used_bytes}
            for piece in gpu.mig_instances
        ],
    }


def _pair(pair: GpuPair) -> dict[str, Any]:
    return {
        "gpus": [pair.first, pair.second],
        "topology": pair.topology.value,
        "peer_to_peer": pair.peer_to_peer,
    }


def _host(host: Host) -> dict[str, int]:
    return {
        "memory_bytes": host.memory_bytes,
        "memory_available_bytes": host.memory_available_bytes,
        "memory_limit_bytes": host.memory_limit_bytes,
        "num_cpu_cores": host.num_cpu_cores,
        "disk_free_bytes": host.disk_free_bytes,
    }


def _known_gpu(gpu: Gpu) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "spec": _typed_name(gpu),
        "aliases": list(gpu.aliases),
        "backend": gpu.backend.value,
        "architecture": gpu.architecture,
        "compute_capability": _capability(gpu.compute_capability),
        "memory_bytes": gpu.memory_bytes,
        "reserved_by_driver_bytes": gpu.reserved_by_driver_bytes,
        "memory_bandwidth_bytes_per_s": gpu.memory_bandwidth_bytes_per_s,
        "fp32_flops_per_s": gpu.fp32_flops_per_s,
        "tf32_flops_per_s": gpu.tf32_flops_per_s,
        "fp16_flops_per_s": gpu.fp16_flops_per_s,
        "bf16_flops_per_s": gpu.bf16_flops_per_s,
        "fp8_flops_per_s": gpu.fp8_flops_per_s,
        "fabric": gpu.fabric.value,
        "fabric_bytes_per_s": gpu.nvlink_bytes_per_s,
        "pcie_bytes_per_s": gpu.pcie_bytes_per_s,
        "peer_to_peer": gpu.peer_to_peer,
        "matmul_efficiency": gpu.matmul_efficiency,
        "confidence": gpu.confidence,
        "source": gpu.source,
    }


def _known_node(node: NodeType) -> dict[str, Any]:
    return {
        "name": node.name,
        "aliases": list(node.aliases),
        "provider": node.provider,
        "gpu": node.gpu,
        "num_gpus": node.num_gpus,
        "host_memory_bytes": node.host_memory_bytes,
        "num_cpu_cores": node.num_cpu_cores,
        "disk_bytes": node.disk_bytes,
        "network_bytes_per_s": node.network_bytes_per_s,
        "confidence": node.confidence,
        "source": node.source,
    }


def _capability(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}" if version != (0, 0) else ""
