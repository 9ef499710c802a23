"""GPUs, links, nodes and clusters as values, and the short text that names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from launchkit.scenario import DeviceKind


class Backend(StrEnum):
    """Which software stack drives the device."""

    CUDA = "cuda"
    ROCM = "rocm"
    MPS = "mps"
    HPU = "hpu"
    CPU = "cpu"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One model of accelerator. Rates are dense peaks; 0 where the device has no such unit.

    ``memory_bytes`` is the total that the driver reports, ``reserved_by_driver_bytes`` what torch does not see of it.
    ``confidence`` is ``high``, ``medium`` or ``low``; ``source`` names where the row comes from.
    """

    name: str
    aliases: tuple[str, ...] = ()
    backend: Backend = Backend.CUDA
    architecture: str = ""
    compute_capability: tuple[int, int] = (0, 0)
    memory_bytes: int = 0
    memory_bandwidth_bytes_per_s: float = 0.0
    fp32_flops_per_s: float = 0.0
    tf32_flops_per_s: float = 0.0
    fp16_flops_per_s: float = 0.0
    bf16_flops_per_s: float = 0.0
    fp8_flops_per_s: float = 0.0
    nvlink_bytes_per_s: float = 0.0  # one direction, all links together; 0 without
    pcie_bytes_per_s: float = 0.0  # one direction
    matmul_efficiency: float = 0.0  # measured matmul ceiling over peak; 0 where nobody measured it
    confidence: str = "low"
    source: str = ""

    @property
    def device_kind(self) -> DeviceKind:
        return DeviceKind.CPU if self.backend is Backend.CPU else DeviceKind.CUDA

    @property
    def supports_bf16(self) -> bool:
        return self.bf16_flops_per_s > 0


@dataclass(frozen=True, kw_only=True)
class Node:
    """One host: GPUs alike, what joins them, and its memory. Zero bytes mean unknown."""

    num_gpus: int
    gpu_link_bytes_per_s: float  # per GPU, one direction
    gpu_link: str = "PCIe"  # NVLink | PCIe | shared memory
    host_memory_bytes: int = 0
    disk_free_bytes: int = 0
    num_cpu_cores: int = 0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``num_nodes`` nodes alike. ``used_bytes`` is what others already hold on the fullest GPU."""

    gpu: Gpu
    node: Node
    num_nodes: int = 1
    network_bytes_per_s: float = 0.0  # per node, one direction
    used_bytes: int = 0
    detected: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.node.num_gpus

    @property
    def text(self) -> str:
        """The spec again: ``4× RTX 4090``, ``2×8× H100 SXM``, ``CPU``."""
        if self.gpu.backend is Backend.CPU:
            return "CPU" if self.num_gpus == 1 else f"{self.num_gpus}× CPU process"
        per_node = f"{self.node.num_gpus}× {self.gpu.name}"
        return per_node if self.num_nodes == 1 else f"{self.num_nodes}×{per_node}"
