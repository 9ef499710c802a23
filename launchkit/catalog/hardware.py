"""The tables of known devices and nodes, read from ``profiles/gpus`` and ``profiles/nodes``.

A file of ``profiles/gpus`` holds ``devices`` and ``shorthands``, a file of ``profiles/nodes`` holds ``nodes``; every
row names its source and how far it is to be trusted. Units are those of data sheets (MiB, GB/s, TFLOPS, Gb/s) and are
converted here, in one place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from launchkit.catalog.files import profiles_directory
from launchkit.hardware import Backend, Fabric, Gpu, HardwareTable, NodeType, Shorthand, pcie_bytes_per_s
from launchkit.units import GB, GIB, MIB


@cache
def hardware_table(profiles: Path | None = None) -> HardwareTable:
    """Everything in ``profiles`` (by default what ships with launchkit), files in the order of their names."""
    directory = profiles or profiles_directory()
    return HardwareTable(
        gpus=tuple(_gpu(row) for row in _rows(directory / "gpus", "devices")),
        nodes=tuple(_node_type(row, provider) for provider, row in _rows_by_file(directory / "nodes", "nodes")),
        shorthands=tuple(_shorthand(row) for row in _rows(directory / "gpus", "shorthands")),
    )


def _rows(directory: Path, key: str) -> Iterator[Mapping[str, Any]]:
    return (row for _, row in _rows_by_file(directory, key))


def _rows_by_file(directory: Path, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in sorted(directory.glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))[key]:
            yield path.stem, row


def _gpu(row: Mapping[str, Any]) -> Gpu:
    tflops: Mapping[str, float] = row["tflops"]
    bandwidth = row["memory_bandwidth_gb_per_s"] * 1e9
    pcie: Mapping[str, int] | None = row.get("pcie")  # none where host and device share their memory
    pcie_rate = pcie_bytes_per_s(generation=pcie["generation"], num_lanes=pcie["lanes"]) if pcie else bandwidth
    major, minor = row.get("compute_capability", "0.0").split(".")
    return Gpu(
        name=row["name"],
        aliases=tuple(row["aliases"]),
        backend=Backend(row["backend"]),
        architecture=row["architecture"],
        compute_capability=(int(major), int(minor)),
        memory_bytes=row["memory_mib"] * MIB,
        reserved_by_driver_bytes=row.get("reserved_by_driver_mib", 0) * MIB,
        memory_bandwidth_bytes_per_s=bandwidth,
        fp32_flops_per_s=tflops.get("fp32", 0.0) * 1e12,
        tf32_flops_per_s=tflops.get("tf32", 0.0) * 1e12,
        fp16_flops_per_s=tflops.get("fp16", 0.0) * 1e12,
        bf16_flops_per_s=tflops.get("bf16", 0.0) * 1e12,
        fp8_flops_per_s=tflops.get("fp8", 0.0) * 1e12,
        fabric=Fabric(row.get("fabric", "")),
        nvlink_bytes_per_s=row.get("fabric_gb_per_s", 0.0) * 1e9,
        pcie_bytes_per_s=pcie_rate,
        peer_to_peer=row.get("peer_to_peer", True),
        max_gpus_per_node=row.get("max_gpus_per_node", 8),
        matmul_efficiency=row.get("matmul_efficiency", 0.0),
        confidence=row["confidence"],
        source=row["source"],
    )


def _node_type(row: Mapping[str, Any], provider: str) -> NodeType:
    return NodeType(
        name=row["name"],
        provider=provider,
        gpu=row["gpu"],
        num_gpus=row["num_gpus"],
        aliases=tuple(row.get("aliases", ())),
        host_memory_bytes=int(row["host_memory_gib"] * GIB),
        num_cpu_cores=row["num_cpu_cores"],
        disk_bytes=row["disk_gb"] * GB,
        network_bytes_per_s=row["network_gbit_per_s"] * 1e9 / 8,
        confidence=row["confidence"],
        source=row["source"],
    )


def _shorthand(row: Mapping[str, Any]) -> Shorthand:
    return Shorthand(text=row["text"], gpu=row["gpu"], others=tuple(row["others"]))
