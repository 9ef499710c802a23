"""GPUs, links, nodes and clusters as values, and the short text that names them.

``4x4090`` → :func:`parse_spec` → :class:`GpuSpec` → :func:`resolve_spec`, which looks the name up in a
:class:`HardwareTable` → :class:`Cluster`. :func:`parse_gpus` does both; :func:`format_gpus` goes back.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from launchkit.errors import UnknownGpuError, UsageError
from launchkit.scenario import DeviceKind
from launchkit.units import GB, GIB, MIB, gib

MAX_GPUS = 100_000
_MAX_QUOTED_CHARACTERS = 40
# What stands before an x: anything without letters, so that "-1x" and "10^9x" are seen as counts and refused as such.
# Not the x of "7900 XT" and "7900 XTX".
_COUNT = re.compile(r"([^a-zA-Z:]*|[0-9]+e[0-9]+) ?[xX](?![tT][xX]?\b) ?")
_MAX_SPEC_CHARACTERS = 80
_MAX_GPU_MEMORY_BYTES = 4096 * GIB
# Transfers per second and lane by PCI Express generation. Source: PCI Express base specifications.
_PCIE_TRANSFERS_PER_S = {1: 2.5e9, 2: 5e9, 3: 8e9, 4: 16e9, 5: 32e9, 6: 64e9}
# Assumed where only GPUs are stated, per node and direction: 400 Gb/s as the first cloud nodes with NVSwitch have
# (AWS p4d), 100 Gb/s for nodes of PCIe cards (AWS g5.48xlarge).
_FABRIC_NODE_NETWORK_BYTES_PER_S = 50e9
_PCIE_NODE_NETWORK_BYTES_PER_S = 12.5e9
# What a host is taken to have at most where no node of its GPUs is known to have more: four modules of 64 GiB, which is
# what boards for desktop processors take.
DESKTOP_HOST_BYTES = 256 * GIB
HOST_UNKNOWN = (
    "host memory unknown: taken to be enough for what is offloaded and loaded; --host-memory 256GiB would say it"
)
_HOST_MEMORY = re.compile(r"([0-9]{1,7}(?:\.[0-9]{1,3})?) ?([mgt]i?b)?", re.IGNORECASE)
_HOST_UNITS = {"mib": MIB, "mb": 10**6, "gib": GIB, "gb": GB, "tib": 1024 * GIB, "tb": 1000 * GB}
_MAX_HOST_BYTES = 1024 * 1024 * GIB
_MEMORY = re.compile(
    r"(.*?)[\s_-]*(?<![a-z0-9.])([0-9]{1,6}(?:\.[0-9]{1,3})?) ?([gm])(i?)b?(?:[ _-]?gpus?)?", re.IGNORECASE
)


class Backend(StrEnum):
    """Which software stack drives the device."""

    CUDA = "cuda"
    ROCM = "rocm"
    MPS = "mps"
    HPU = "hpu"
    CPU = "cpu"


class Fabric(StrEnum):
    """What joins GPUs of this model inside a node, besides PCIe. A bridge joins pairs, and only where one is fitted."""

    NONE = ""
    NVLINK = "NVLink"
    NVSWITCH = "NVSwitch"
    NVLINK_BRIDGE = "NVLink bridge"
    INFINITY_FABRIC = "Infinity Fabric"
    ROCE = "RoCE"

    @property
    def link(self) -> str:
        """The fabric as ``Node.gpu_link`` calls it."""
        return "NVLink" if self.value.startswith("NV") else self.value or "PCIe"

    @property
    def joins_all(self) -> bool:
        """Whether every GPU of a node can be taken to be on it."""
        return self not in (Fabric.NONE, Fabric.NVLINK_BRIDGE)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One model of accelerator. Rates are dense peaks with fp32 accumulation; 0 where the device has no such unit.

    ``memory_bytes`` is the total that the driver reports, ``reserved_by_driver_bytes`` what torch does not see of it
    (0 where nobody measured it). ``confidence`` is ``high``, ``medium`` or ``low``; ``source`` names where the row
    comes from. ``peer_to_peer`` is whether the driver lets GPUs reach each other over PCIe.
    """

    name: str
    aliases: tuple[str, ...] = ()
    backend: Backend = Backend.CUDA
    architecture: str = ""
    compute_capability: tuple[int, int] = (0, 0)
    memory_bytes: int = 0
    reserved_by_driver_bytes: int = 0
    memory_bandwidth_bytes_per_s: float = 0.0
    fp32_flops_per_s: float = 0.0
    tf32_flops_per_s: float = 0.0
    fp16_flops_per_s: float = 0.0
    bf16_flops_per_s: float = 0.0
    fp8_flops_per_s: float = 0.0
    fabric: Fabric = Fabric.NONE
    nvlink_bytes_per_s: float = 0.0  # over the fabric: one direction, all links together; 0 without
    pcie_bytes_per_s: float = 0.0  # one direction, host to device; with shared memory that memory's bandwidth
    peer_to_peer: bool = True
    max_gpus_per_node: int = 8
    matmul_efficiency: float = 0.0  # measured matmul ceiling over peak; 0 where nobody measured it
    confidence: str = "low"
    source: str = ""

    @property
    def device_kind(self) -> DeviceKind:
        return DeviceKind.CPU if self.backend is Backend.CPU else DeviceKind.CUDA

    @property
    def supports_bf16(self) -> bool:
        return self.bf16_flops_per_s > 0

    @property
    def supports_fp8(self) -> bool:
        """Whether ``torch._scaled_mm`` runs: compute capability 8.9 or later, or MI300 or later.

        Source: pytorch ``ScaledBlas.cpp``, ``scaled_mm_arch_allowed``.
        """
        if self.backend is Backend.ROCM:
            return self.fp8_flops_per_s > 0
        return self.backend is Backend.CUDA and self.compute_capability >= (8, 9)

    @property
    def transposes_float8(self) -> bool:
        """Whether cuBLAS multiplies 8-bit matrices in one layout only, so that a factor is kept in two: Ada, Hopper and
        consumer Blackwell.

        Source: Transformer Engine 2.18 ``common/transformer_engine.cpp``, ``nvte_is_non_tn_fp8_gemm_supported``.
        """
        return not (10, 0) <= self.compute_capability < (12, 0) and self.compute_capability < (13, 0)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One host: GPUs alike, what joins them, and its memory. Zero bytes mean unknown.

    ``plausible_host_bytes`` is the most that a host of stated GPUs, whose memory is unknown, is likely to have.
    ``name`` is the catalogue's (``p4d.24xlarge``), empty for a node of stated GPUs. Without ``peer_to_peer`` what one
    GPU sends another passes through host memory; ``gpu_link_bytes_per_s`` has that in it already.
    """

    num_gpus: int
    gpu_link_bytes_per_s: float  # per GPU, one direction
    gpu_link: str = "PCIe"  # NVLink | PCIe | Infinity Fabric | RoCE | shared memory
    host_memory_bytes: int = 0
    disk_free_bytes: int = 0
    num_cpu_cores: int = 0
    peer_to_peer: bool = True
    name: str = ""
    plausible_host_bytes: int = 0


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
        return f"{self.num_nodes}×{per_node}" if self.needs_num_nodes else per_node

    @property
    def needs_num_nodes(self) -> bool:
        """Whether the count of GPUs alone would be read as other nodes: ``2× GH200`` is two nodes of one."""
        return self.num_nodes > 1 or self.node.num_gpus > self.gpu.max_gpus_per_node


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A node that can be rented or bought under one name. ``gpu`` is a name in the same table; zero means unknown."""

    name: str
    provider: str
    gpu: str
    num_gpus: int
    aliases: tuple[str, ...] = ()
    host_memory_bytes: int = 0
    num_cpu_cores: int = 0
    disk_bytes: int = 0
    network_bytes_per_s: float = 0.0
    confidence: str = "low"
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Shorthand:
    """A name that several devices share, the one that is taken, and the ones it could have meant."""

    text: str
    gpu: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HardwareTable:
    """Every known device and node, found by any spelling of their names."""

    gpus: tuple[Gpu, ...]
    nodes: tuple[NodeType, ...] = ()
    shorthands: tuple[Shorthand, ...] = ()

    def gpu(self, name: str) -> Gpu:
        """The device of exactly this name."""
        return next(gpu for gpu in self.gpus if gpu.name == name)

    def gpus_called(self, text: str) -> tuple[Gpu, ...]:
        """Every device that goes by ``text``, the default first: a driver's name can stand for two memory sizes."""
        key = name_key(text)
        shorthand = self._shorthands_by_key.get(key)
        if shorthand is not None:
            return tuple(self.gpu(name) for name in (shorthand.gpu, *shorthand.others))
        return self._gpus_by_key.get(key, ())

    def node_called(self, text: str) -> NodeType | None:
        return self._nodes_by_key.get(name_key(text))

    def plausible_host_bytes(self, gpu: Gpu, *, num_gpus: int) -> int:
        """The most that a node of ``num_gpus`` of these is likely to have of host memory: as much per GPU as the known
        node that has most, but no more than any node, and no less than a desktop takes."""
        per_gpu = max(
            (node.host_memory_bytes // node.num_gpus for node in self.nodes if node.gpu == gpu.name), default=0
        )
        most = max((node.host_memory_bytes for node in self.nodes), default=0)
        return max(DESKTOP_HOST_BYTES, min(num_gpus * per_gpu, most))

    def similar_names(self, text: str) -> list[str]:
        """Up to three known names that look like ``text``, in the form that can be typed."""
        names = {key: node.name for key, node in self._nodes_by_key.items()}
        names |= {key: gpus[0].name for key, gpus in self._gpus_by_key.items()}
        names |= {key: row.text for key, row in self._shorthands_by_key.items()}
        keys = difflib.get_close_matches(name_key(text), names, n=6, cutoff=0.6)
        return list(dict.fromkeys(names[key].replace(" ", "-") for key in keys))[:3]

    @cached_property
    def _shorthands_by_key(self) -> dict[str, Shorthand]:
        return {name_key(row.text): row for row in self.shorthands}

    @cached_property
    def _nodes_by_key(self) -> dict[str, NodeType]:
        return {name_key(name): row for row in self.nodes for name in (row.name, *row.aliases)}

    @cached_property
    def _gpus_by_key(self) -> dict[str, tuple[Gpu, ...]]:
        rows: dict[str, tuple[Gpu, ...]] = {}
        for gpu in self.gpus:
            for key in dict.fromkeys(name_key(name) for name in (gpu.name, *gpu.aliases)):
                rows[key] = (*rows.get(key, ()), gpu)
        return rows


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """What was typed, taken apart: ``2x8xH100`` is name ``H100``, 8 per node, 2 nodes. None: not said."""

    name: str
    num_gpus: int | None = None
    num_nodes: int | None = None


def name_key(text: str) -> str:
    """A device or node name without what people leave out: case, spaces, punctuation, vendor and series prefixes."""
    key = re.sub(r"[^a-z0-9]", "", text.lower())
    prefix = r"(?:nvidia|geforce|rtx|gtx|rx|tesla|amd|instinct|radeon|intel|habana|apple)"
    return re.sub(rf"^{prefix}+(?=.)", "", key)


def pcie_bytes_per_s(*, generation: int, num_lanes: int) -> float:
    """One direction of a PCI Express link before protocol overhead.

    Formula: transfers/s × lanes × encoding / 8, encoding 128/130 from generation 3 on and 8/10 before.
    Source: PCI Express base specifications. Omits: packet headers (about 5 to 15 %).
    """
    encoding = 8 / 10 if generation < 3 else 128 / 130
    return _PCIE_TRANSFERS_PER_S.get(generation, 0.0) * num_lanes * encoding / 8


def parse_gpus(spec: str, table: HardwareTable) -> Cluster:
    """``4x4090``, ``A100-80GB:4``, ``2x8xH100``, ``24GiB``, ``2xcpu``, ``2xp5.48xlarge`` → the cluster that is meant.

    Case, spaces, punctuation and vendor prefixes do not matter. What had to be assumed is in ``Cluster.notes``.
    Raises ``UsageError`` for counts that make no sense, ``UnknownGpuError`` for names nobody knows.
    """
    return resolve_spec(parse_spec(spec), table)


def parse_spec(text: str) -> GpuSpec:
    """Takes a spec apart without asking whether its name exists."""
    compact = re.sub(r"\s+", " ", text.strip()).replace("×", "x")
    if not compact:
        raise UsageError("the GPU spec is empty; write something like 4x4090, 2x8xH100 or cpu")
    if len(compact) > _MAX_SPEC_CHARACTERS:
        raise UsageError(f"{_quoted(text)} is no GPU spec: {len(compact)} characters; write something like 4x4090")
    counts: list[int] = []
    while match := _COUNT.match(compact):
        counts.append(_count(match[1].strip(), text))
        compact = compact[match.end() :]
    name, colon, after = compact.partition(":")
    if colon:
        counts.append(_count(after.strip(), text))
    if len(counts) > 2 or (colon and len(counts) > 1):
        raise UsageError(f"{_quoted(text)} has a count too many; write nodes × GPUs, such as 2x8xH100")
    if not re.match(r"[a-zA-Z0-9]", name):
        raise UsageError(f"{_quoted(text)} names no GPU; write something like 4x4090")
    num_gpus = counts[-1] if counts else None
    num_nodes = counts[0] if len(counts) == 2 else None
    if (num_nodes or 1) * (num_gpus or 1) > MAX_GPUS:
        raise UsageError(f"{_quoted(text)} is more than {MAX_GPUS} GPUs; write a smaller count")
    return GpuSpec(name=name.strip(), num_gpus=num_gpus, num_nodes=num_nodes)


def format_spec(spec: GpuSpec) -> str:
    """The shortest text that :func:`parse_spec` reads as ``spec``."""
    return "".join(f"{count}x" for count in (spec.num_nodes, spec.num_gpus) if count is not None) + spec.name


def resolve_spec(spec: GpuSpec, table: HardwareTable) -> Cluster:
    """Looks the name up and fills in what was not said."""
    if name_key(spec.name) == "auto":
        raise UsageError("'auto' stands for this machine's hardware, not for a GPU; write a spec such as 4x4090")
    node_type = table.node_called(spec.name)
    if node_type is not None:
        return _cluster_of_node_type(spec, node_type, table)
    if _has_count_last(spec, table):
        raise UsageError(f"{format_spec(spec)} has the count last; write {spec.name}x{spec.num_gpus}")
    gpu, notes = _find_gpu(spec.name, table)
    if gpu.backend is Backend.CPU:
        return cpu_cluster(gpu, num_processes=(spec.num_nodes or 1) * (spec.num_gpus or 1))
    stated = stated_cluster(gpu, num_gpus=spec.num_gpus or 1, num_nodes=spec.num_nodes, notes=notes)
    plausible = table.plausible_host_bytes(gpu, num_gpus=stated.node.num_gpus)
    return replace(stated, node=replace(stated.node, plausible_host_bytes=plausible))


def format_gpus(cluster: Cluster) -> str:
    """The text that :func:`parse_gpus` reads as this cluster, but for the note of an ambiguous name."""
    if cluster.node.name:
        return format_spec(
            GpuSpec(name=cluster.node.name, num_gpus=cluster.num_nodes if cluster.num_nodes > 1 else None)
        )
    if cluster.gpu.backend is Backend.CPU:
        return format_spec(GpuSpec(name="cpu", num_gpus=cluster.num_gpus if cluster.num_gpus > 1 else None))
    num_gpus = cluster.node.num_gpus
    says_gpus = cluster.needs_num_nodes or num_gpus > 1
    return format_spec(
        GpuSpec(
            name=cluster.gpu.name.replace(" ", "-"),
            num_gpus=num_gpus if says_gpus else None,
            num_nodes=cluster.num_nodes if cluster.needs_num_nodes else None,
        )
    )


def stated_cluster(gpu: Gpu, *, num_gpus: int, num_nodes: int | None, notes: tuple[str, ...] = ()) -> Cluster:
    """The cluster that a bare count of GPUs stands for.

    Without ``num_nodes``, a count above what one node of this model holds is spread over full nodes when it divides
    evenly. GPUs on a fabric that joins them all use it; others use PCIe, through host memory where the driver allows
    no peer-to-peer.
    """
    most = gpu.max_gpus_per_node
    if num_nodes is None and num_gpus > most and num_gpus % most == 0:
        num_nodes, num_gpus = num_gpus // most, most
        notes += (f"{num_nodes * most} GPUs read as {num_nodes} nodes of {most}",)
    num_nodes = num_nodes or 1
    node = gpu_node(gpu, num_gpus=num_gpus)
    notes += _link_notes(gpu, node)
    if gpu.backend is Backend.MPS:
        node = replace(node, host_memory_bytes=gpu.memory_bytes)
        notes += ("memory is shared between CPU and GPU",)
    else:
        notes += (HOST_UNKNOWN,)
    network = 0.0
    if num_nodes > 1:
        network = _FABRIC_NODE_NETWORK_BYTES_PER_S if gpu.fabric.joins_all else _PCIE_NODE_NETWORK_BYTES_PER_S
        notes += (f"network between nodes assumed: {network * 8 / 1e9:.0f} Gb/s per node",)
    return Cluster(gpu=gpu, node=node, num_nodes=num_nodes, network_bytes_per_s=network, notes=notes)


def with_host_memory(cluster: Cluster, text: str) -> Cluster:
    """The cluster whose nodes have the memory that ``text`` says: ``512GiB``, ``1.5TB``, ``512`` in GiB."""
    match = _HOST_MEMORY.fullmatch(text.strip())
    number = float(match[1]) if match else 0.0
    unit = _HOST_UNITS[(match[2] or "gib").lower()] if match else 0
    num_bytes = round(number * unit)
    if not MIB <= num_bytes <= _MAX_HOST_BYTES:
        raise UsageError(f"--host-memory {_quoted(text)} is no size of a host's memory; write something like 512GiB")
    notes = tuple(note for note in cluster.notes if note != HOST_UNKNOWN)
    return replace(cluster, node=replace(cluster.node, host_memory_bytes=num_bytes), notes=notes)


def gpu_node(gpu: Gpu, *, num_gpus: int) -> Node:
    """A node of ``num_gpus`` such GPUs, nothing known of its host.

    Formula without peer-to-peer: half of PCIe, since what is sent crosses to host memory and back. Source:
    p2pBandwidthLatencyTest on eight A40s over PCIe 4.0 ×16, posted to NVIDIA/nccl-tests in 2021: 20 GB/s both ways
    without, 40 with.
    """
    if gpu.fabric.joins_all and num_gpus > 1:
        return Node(num_gpus=num_gpus, gpu_link=gpu.fabric.link, gpu_link_bytes_per_s=gpu.nvlink_bytes_per_s)
    rate = gpu.pcie_bytes_per_s if gpu.peer_to_peer else gpu.pcie_bytes_per_s / 2
    return Node(num_gpus=num_gpus, gpu_link_bytes_per_s=rate, peer_to_peer=gpu.peer_to_peer)


def cpu_cluster(core: Gpu, *, num_processes: int, memory_bytes: int = 0, num_cores: int = 0) -> Cluster:
    """``num_processes`` CPU processes over gloo on one machine, which share its memory and cores evenly.

    ``core`` is the table's CPU row, whose rates are one core's. Memory and cores that are not given are assumed, and
    a note says so.
    """
    notes: tuple[str, ...] = ()
    if not memory_bytes:
        memory_bytes = 16 * GIB
        notes += (f"memory of this machine not read: {gib(memory_bytes)} assumed",)
    if not num_cores:
        num_cores = max(4, num_processes)
        notes += (f"cores of this machine not counted: {num_cores} assumed",)
    share = num_cores / num_processes
    bandwidth = core.memory_bandwidth_bytes_per_s * share
    gpu = replace(
        core,
        memory_bytes=memory_bytes // num_processes,
        memory_bandwidth_bytes_per_s=bandwidth,
        pcie_bytes_per_s=bandwidth,
        fp32_flops_per_s=core.fp32_flops_per_s * share,
        fp16_flops_per_s=core.fp16_flops_per_s * share,
        bf16_flops_per_s=core.bf16_flops_per_s * share,
    )
    node = Node(
        num_gpus=num_processes,
        gpu_link="shared memory",
        gpu_link_bytes_per_s=bandwidth,
        host_memory_bytes=memory_bytes,
        num_cpu_cores=num_cores,
    )
    return Cluster(gpu=gpu, node=node, notes=notes)


def gpu_of_memory(memory_bytes: int, table: HardwareTable) -> tuple[Gpu, str]:
    """A GPU of which only the memory is known, and the note that says whose speed it was given: of the documented CUDA
    devices with bf16, the nearest in memory, and of these the slowest."""
    known = [gpu for gpu in table.gpus if gpu.backend is Backend.CUDA and gpu.supports_bf16 and gpu.confidence != "low"]
    nearest = min(known, key=lambda gpu: (abs(gpu.memory_bytes - memory_bytes), gpu.bf16_flops_per_s))
    gpu = replace(
        nearest,
        name=f"{_exact_memory(memory_bytes)} GPU",
        aliases=(),
        memory_bytes=memory_bytes,
        reserved_by_driver_bytes=0,
        fabric=Fabric.NONE,
        nvlink_bytes_per_s=0.0,
        confidence="low",
        source=f"memory as stated, everything else as {nearest.name}",
    )
    return gpu, f"only memory stated ({gib(memory_bytes)}): speed and compute capability taken from {nearest.name}"


def _has_count_last(spec: GpuSpec, table: HardwareTable) -> bool:
    """``4090x2``: a number that is no GPU, counted as often as a GPU's name says."""
    is_bare_number = spec.name.isdecimal() and not table.gpus_called(spec.name)
    return is_bare_number and bool(table.gpus_called(str(spec.num_gpus)))


def _find_gpu(text: str, table: HardwareTable) -> tuple[Gpu, tuple[str, ...]]:
    found = table.gpus_called(text)
    if found and found[0].memory_bytes == 0 and found[0].backend is not Backend.CPU:
        example = f"{found[0].name.replace(' ', '-')}-32GiB"
        raise UsageError(f"{found[0].name} comes with several memory sizes; write which, such as {example}")
    if found:
        return found[0], _ambiguity(text, found)
    name, memory_bytes, note = _split_memory(text)
    if not memory_bytes:
        raise _unknown(text, table)
    if not name:
        gpu, borrowed = gpu_of_memory(memory_bytes, table)
        return gpu, (*note, borrowed)
    return _gpu_of_stated_memory(text, name, memory_bytes, table)


def _gpu_of_stated_memory(text: str, name: str, memory_bytes: int, table: HardwareTable) -> tuple[Gpu, tuple[str, ...]]:
    found = table.gpus_called(name)
    if not found:
        raise _unknown(text, table)
    if found[0].memory_bytes == 0:
        return replace(found[0], name=f"{found[0].name} {_exact_memory(memory_bytes)}", memory_bytes=memory_bytes), ()
    # drivers report up to 10 % less than the size on the box, which is sometimes GB and sometimes GiB
    matching = tuple(gpu for gpu in found if 0.9 <= gpu.memory_bytes / memory_bytes <= 1.08)
    if not matching:
        sizes = ", ".join(dict.fromkeys(f"{gpu.name} {gib(gpu.memory_bytes)}" for gpu in found))
        alone = _exact_memory(memory_bytes)
        raise UnknownGpuError(
            f"no {_quoted(name)} of {alone} is known ({sizes}); write {alone} for any card of that size"
        )
    return matching[0], _ambiguity(text, matching)


def _ambiguity(text: str, found: tuple[Gpu, ...]) -> tuple[str, ...]:
    if len(found) == 1:
        return ()
    others = ", ".join(gpu.name for gpu in found[1:])
    return (f"{_quoted(text)} read as {found[0].name}; it could also mean {others}",)


def _split_memory(text: str) -> tuple[str, int, tuple[str, ...]]:
    """``H100-80GB`` → (``H100``, bytes, notes); the name is empty for a bare size, the bytes are 0 without a size.

    Behind a name GB and GiB are alike, as on the box. A bare ``24GB`` is taken by the letter, 24·10⁹, which every
    card sold as 24 GB has; whole MiB, so that the size can be written back.
    """
    match = _MEMORY.fullmatch(text)
    if match is None:
        return text, 0, ()
    name, number, letter, binary = match.groups()
    is_giga, is_decimal = letter in "gG", not (binary or name)
    unit = (GB if is_giga else GB // 1000) if is_decimal else (GIB if is_giga else MIB)
    memory_bytes = int(float(number) * unit) // MIB * MIB
    if memory_bytes > _MAX_GPU_MEMORY_BYTES:
        raise UsageError(f"{_quoted(text)} is more memory than any GPU has; write something like 24GiB")
    if not is_decimal:
        return name, memory_bytes, ()
    size = f"{number} {letter.upper()}B"
    return (
        name,
        memory_bytes,
        (f"{size} read as decimal, {gib(memory_bytes)}; write {number}{letter.upper()}iB for more",),
    )


def _exact_memory(memory_bytes: int) -> str:
    if memory_bytes % GIB == 0:
        return f"{memory_bytes // GIB}GiB"
    gigabytes = round(memory_bytes / GB)
    if memory_bytes == gigabytes * GB // MIB * MIB:
        return f"{gigabytes}GB"
    return f"{memory_bytes // MIB}MiB"


def _link_notes(gpu: Gpu, node: Node) -> tuple[str, ...]:
    if node.num_gpus == 1:
        return ()
    if not node.peer_to_peer:
        return ("no peer-to-peer between these cards: traffic through host memory, at half of PCIe's rate",)
    if gpu.fabric is Fabric.NVLINK_BRIDGE:
        return ("PCIe assumed between GPUs: NVLink bridges join pairs only, where fitted",)
    return ()


def _cluster_of_node_type(spec: GpuSpec, row: NodeType, table: HardwareTable) -> Cluster:
    if spec.num_nodes is not None:
        raise UsageError(
            f"{row.name} already is {row.num_gpus} GPUs; write {spec.num_nodes}x{row.name} for nodes of it"
        )
    num_nodes = spec.num_gpus or 1
    gpu = table.gpu(row.gpu)
    node = replace(
        gpu_node(gpu, num_gpus=row.num_gpus),
        name=row.name,
        host_memory_bytes=row.host_memory_bytes,
        num_cpu_cores=row.num_cpu_cores,
        disk_free_bytes=row.disk_bytes,
    )
    network, notes = row.network_bytes_per_s, _link_notes(gpu, node)
    if num_nodes > 1 and not network:
        network = _PCIE_NODE_NETWORK_BYTES_PER_S
        notes += (f"network between nodes assumed: {network * 8 / 1e9:.0f} Gb/s per node",)
    return Cluster(gpu=gpu, node=node, num_nodes=num_nodes, network_bytes_per_s=network, notes=notes)


def _count(text: str, spec: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise UsageError(f"{_quoted(text)} in {_quoted(spec)} is not a number of GPUs; write something like 4x4090")
    if not 1 <= int(text) <= MAX_GPUS:
        raise UsageError(f"{_quoted(spec)} asks for {text} GPUs; write a count between 1 and {MAX_GPUS}")
    return int(text)


def _unknown(text: str, table: HardwareTable) -> UnknownGpuError:
    similar = table.similar_names(text)
    hint = (
        f"did you mean {' or '.join(similar)}?"
        if similar
        else "'launchkit gpus' lists them, and a memory such as 24GiB is enough"
    )
    return UnknownGpuError(f"no GPU or node is called {_quoted(text)}; {hint}")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED_CHARACTERS else text[:_MAX_QUOTED_CHARACTERS] + "…")
