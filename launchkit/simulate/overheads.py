"""What a training process takes of a GPU besides torch's segments, and the range that a device's peak lies in.

On top of the reserved memory come the CUDA context with its loaded kernels, and the communicators' buffers. Neither is
computed: both are tables of what was seen, with its spread. The cuBLAS workspaces are torch allocations and belong
into the program (``cublas_workspaces``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import hypot, sqrt
from typing import NamedTuple

from launchkit.alloc_conf import AllocatorSettings
from launchkit.hardware import Backend, Cluster, Gpu
from launchkit.program import Owner, Persistent, Size
from launchkit.scenario import Checkpointing, DeviceKind, Scenario, StrategyKind
from launchkit.simulate.memory import MemoryReading
from launchkit.units import GIB, MIB

# Shares of the reserved peak that are allowed for above and below it. Traced models are within 2 % of the real
# allocator in what they allocate, but the cache of a real run fills differently: nine tenths of the published runs of
# transformers' own kernels (A100, 1 s samples) held from 5 % less to 9 % more than the model's reserved peak and a
# context, the others up to 7 % less or, under FSDP, 15 % more. The low end stays near what is allocated.
MEMORY_MODEL_ERROR = 0.07
RESERVED_BELOW = 0.08
ALLOCATED_BELOW = 0.02


class CacheShare(NamedTuple):
    """What torch's cache adds to the allocated peak, as shares of it: half of the jobs that were simulated stay below
    ``typical``, all of them below ``most``."""

    typical: float
    most: float


class CacheShares(NamedTuple):
    """With torch's own segments, and with such as grow in place (``expandable_segments``)."""

    fixed: CacheShare
    expandable: CacheShare


# By engine, by whether weights (of ZeRO-1 and 2: states) wait on the host, and by whether blocks are checkpointed:
# weights that come and go leave holes of their size, and more of them where a block runs twice. Source: the allocator
# model over 576 scenarios of six catalogued models, every strategy of the search (``python -m bench.cache``, and with
# ``--alloc-conf expandable_segments:True``).
# Of small models more, since segments and buckets do not shrink with them: 0.8 GiB beside 1.5 in GPT-2.
_CACHE_SHARES: Mapping[tuple[str, bool, bool], CacheShares] = {
    ("", False, False): CacheShares(CacheShare(0.04, 0.23), CacheShare(0.02, 0.09)),
    ("", False, True): CacheShares(CacheShare(0.09, 0.29), CacheShare(0.04, 0.16)),
    ("", True, False): CacheShares(CacheShare(0.04, 0.23), CacheShare(0.02, 0.09)),
    ("", True, True): CacheShares(CacheShare(0.10, 0.35), CacheShare(0.04, 0.16)),
    ("fsdp1", False, False): CacheShares(CacheShare(0.10, 0.26), CacheShare(0.10, 0.22)),
    ("fsdp1", False, True): CacheShares(CacheShare(0.30, 0.76), CacheShare(0.28, 0.44)),
    # As not offloaded: not among those simulated.
    ("fsdp1", True, False): CacheShares(CacheShare(0.10, 0.26), CacheShare(0.10, 0.22)),
    ("fsdp1", True, True): CacheShares(CacheShare(0.40, 0.76), CacheShare(0.28, 0.44)),
    ("fsdp", False, False): CacheShares(CacheShare(0.12, 0.22), CacheShare(0.10, 0.20)),
    ("fsdp", False, True): CacheShares(CacheShare(0.27, 0.46), CacheShare(0.23, 0.30)),
    ("fsdp", True, False): CacheShares(CacheShare(0.10, 0.20), CacheShare(0.07, 0.18)),
    ("fsdp", True, True): CacheShares(CacheShare(0.40, 0.69), CacheShare(0.29, 0.56)),
    ("zero3", False, False): CacheShares(CacheShare(0.06, 0.20), CacheShare(0.03, 0.09)),
    ("zero3", False, True): CacheShares(CacheShare(0.18, 0.33), CacheShare(0.08, 0.18)),
    ("zero3", True, False): CacheShares(CacheShare(0.07, 0.18), CacheShare(0.05, 0.10)),
    ("zero3", True, True): CacheShares(CacheShare(0.30, 0.71), CacheShare(0.15, 0.27)),
}
SMALL_CACHE_BYTES = GIB
_CACHING_ENGINES: Mapping[StrategyKind, str] = {
    StrategyKind.FSDP: "fsdp1",
    StrategyKind.FSDP2: "fsdp",
    StrategyKind.HSDP: "fsdp",
    StrategyKind.ZERO3: "zero3",
}


def cache_share(scenario: Scenario) -> CacheShare:
    """What the cache adds in ``scenario`` where the allocator was not run: seen of its like, not computed."""
    kind, offload = scenario.strategy.kind, scenario.strategy.offload
    engine = (
        "fsdp1"
        if kind is StrategyKind.FSDP
        else "fsdp"
        if kind.is_fsdp
        else "zero3"
        if kind is StrategyKind.ZERO3
        else ""
    )
    waits = scenario.strategy.offloads_params if engine else offload.optimizer
    shares = _CACHE_SHARES[engine, waits, scenario.training.checkpointing is not Checkpointing.NONE]
    is_expandable = AllocatorSettings.parse(scenario.alloc_conf).expandable_segments
    return shares.expandable if is_expandable else shares.fixed


class ByteRange(NamedTuple):
    """A quantity known by observation: the least seen, the usual, the most seen."""

    low: int
    typical: int
    high: int

    def plus(self, other: ByteRange) -> ByteRange:
        """The sum of two quantities that do not depend on each other.

        Formula: usual values add, and so do the squares of what they may miss on either side: that both are at the same
        end of their ranges is rare.
        """
        typical = self.typical + other.typical
        below = hypot(self.typical - self.low, other.typical - other.low)
        above = hypot(self.high - self.typical, other.high - other.typical)
        return ByteRange(typical - round(below), typical, typical + round(above))

    def times(self, number: int) -> ByteRange:
        return ByteRange(self.low * number, self.typical * number, self.high * number)


NOTHING = ByteRange(0, 0, 0)


class Observation(NamedTuple):
    """One row of a table below: MiB seen, and where."""

    low_mib: int
    typical_mib: int
    high_mib: int
    source: str

    @property
    def range(self) -> ByteRange:
        return ByteRange(self.low_mib * MIB, self.typical_mib * MIB, self.high_mib * MIB)


# By major.minor compute capability, else by major alone. "OOM message" is torch's own: memory in use by the process
# less allocated less reserved-but-unallocated, of a single-GPU process. Lazy module loading (CUDA 11.7, torch 1.13)
# keeps the context small and lets it grow with the kernels in use: the upper ends are of processes that load many.
CONTEXTS: Mapping[tuple[int, ...], Observation] = {
    (6,): Observation(200, 250, 450, "OOM message on a P100 (0.24 GiB); spread as for 8.6"),
    (7, 0): Observation(300, 450, 1343, "typical as pytorch#109888 (400 MB); high: Hugging Face's V100, eager loading"),
    (7, 5): Observation(150, 280, 550, "pytorch#86509 (274 MiB with lazy loading); spread as for 8.6"),
    (8, 0): Observation(
        400, 600, 950, "OOM messages: 0.76 GiB (openfold#473), 0.84 (PyTorch FAQ); least 0.4 (pytorch#109888)"
    ),
    (8, 6): Observation(230, 320, 500, "OOM messages on RTX 3090, A5000, A6000: 0.24 to 0.39 GiB"),
    (8, 9): Observation(
        380, 480, 620, "426 MiB bare on RTX 6000 Ada (unsloth-zoo#1053); OOM messages on 4090: 0.46 to 0.51 GiB"
    ),
    (9,): Observation(450, 650, 950, "1.06 GiB with one communicator of 8 H100 (nccl#1685), less the communicator"),
    (10,): Observation(450, 700, 1100, "not observed; as for 9.0 with the upper end raised"),
    (12,): Observation(400, 600, 750, "OOM message on an RTX 5090 (0.60 GiB)"),
}
UNKNOWN_CONTEXT = Observation(300, 600, 1500, "no observation; the span of the others")

# One communicator, all collectives of one process group: buffers grow with the number of channels, which follows the
# bandwidth of the link, and no more with the number of ranks beyond two nodes (nccl#986).
COMMUNICATORS: Mapping[str, Observation] = {
    "NVLink, 2 GPUs": Observation(200, 400, 560, "544 MB, 4 MB all-reduce on 2 A100 (nccl#964)"),
    "NVLink": Observation(
        250, 500, 1100, "688 MB on more than 2 A100 (nccl#964); about 0.45 GiB on 8 H100 (nccl#1685)"
    ),
    "PCIe": Observation(30, 120, 350, "0.36 GiB with the context on 8 RTX 3080 (trl#3436)"),
    "network": Observation(100, 250, 600, "added to the node's own: grows with the number of network cards (nccl#818)"),
}

CUBLAS_WORKSPACES_PER_PROCESS = 2  # one handle for the thread of the forward, one for autograd's


def cuda_context(gpu: Gpu) -> ByteRange:
    """The CUDA context of one training process on ``gpu``.

    Source: ``CONTEXTS``, row by row. Omits: other processes, which ``Cluster.used_bytes`` counts.
    """
    if gpu.backend in (Backend.CPU, Backend.MPS):
        return NOTHING
    by_minor = CONTEXTS.get(gpu.compute_capability)
    observation = by_minor or CONTEXTS.get(gpu.compute_capability[:1]) or UNKNOWN_CONTEXT
    return observation.range


def communicator_buffers(cluster: Cluster, *, num_communicators: int = 1) -> ByteRange:
    """NCCL's buffers on each GPU for ``num_communicators`` process groups over the whole cluster.

    Source: ``COMMUNICATORS``. Nothing for a single GPU, and for CPU processes, whose gloo works in host memory.
    """
    if cluster.num_gpus == 1 or cluster.gpu.backend is Backend.CPU:
        return NOTHING
    buffers = NOTHING
    if cluster.node.num_gpus > 1:
        buffers = COMMUNICATORS[_node_link(cluster)].range
    if cluster.num_nodes > 1:
        buffers = buffers.plus(COMMUNICATORS["network"].range)
    return buffers.times(num_communicators)


def _node_link(cluster: Cluster) -> str:
    """The row of ``COMMUNICATORS`` for the link within a node; other fabrics are as fast as NVLink."""
    if cluster.node.gpu_link in ("PCIe", "shared memory"):
        return "PCIe"
    return "NVLink, 2 GPUs" if cluster.num_gpus == 2 else "NVLink"


def cublas_workspace_bytes(gpu: Gpu) -> int:
    """One cuBLAS handle's workspace, which torch takes from its own allocator.

    Source: pytorch ``aten/src/ATen/cuda/CublasHandlePool.cpp``: 4096 KiB × 2 + 16 KiB × 8, on compute capability 9.0
    and 10.0 4096 KiB × 8; hipBLAS 128 MiB on CDNA3 and later, else 32 MiB. Omits: ``CUBLAS_WORKSPACE_CONFIG``.
    """
    if gpu.backend is Backend.ROCM:
        return (128 if gpu.architecture.startswith(("CDNA3", "CDNA4")) else 32) * MIB
    if gpu.backend is not Backend.CUDA:
        return 0
    return 32 * MIB if gpu.compute_capability[0] in (9, 10) else 8 * MIB + 128 * 1024


def transformer_engine_workspace_bytes(gpu: Gpu) -> int:
    """What Transformer Engine gives cuBLASLt for all its products: one tensor of torch's allocator, made at the first
    of them and kept.

    Formula: 32 MiB + 1024 B from compute capability 9.0 on, else 4 MiB. Source: Transformer Engine 2.18
    ``pytorch/cpp_extensions/gemm.py``, ``get_cublas_workspace`` (cached), ``get_cublas_workspace_size_bytes``.
    """
    return 32 * MIB + 1024 if gpu.compute_capability >= (9, 0) else 4 * MIB


def cublas_workspaces(gpu: Gpu, *, transformer_engine: bool = False) -> tuple[Persistent, ...]:
    """The workspaces of a training process, to be added to a program's persistent storages."""
    own = ((transformer_engine_workspace_bytes(gpu), 1),) if transformer_engine else ()
    counted = ((cublas_workspace_bytes(gpu), CUBLAS_WORKSPACES_PER_PROCESS), *own)
    return tuple(Persistent(Size.constant(size), Owner.TEMPORARIES, count) for size, count in counted if size)


@dataclass(frozen=True, kw_only=True)
class DevicePeak:
    """What ``nvidia-smi`` shows at the peak, in bytes, and the parts that are not torch allocations."""

    low_bytes: int
    typical_bytes: int
    high_bytes: int
    cuda_context_bytes: int
    nccl_bytes: int
    fragmentation_bytes: int


def unsimulated_peak(
    reading: MemoryReading, scenario: Scenario, cluster: Cluster, *, left_bytes: int = 0, num_communicators: int = 1
) -> DevicePeak:
    """The peak on the device where ``reading`` is of live bytes alone.

    Formula: ``device_peak`` with more reserved than allocated: nothing at the low end, ``CacheShare.typical`` of it
    between, ``CacheShare.most`` but at least ``SMALL_CACHE_BYTES`` at the high end, and at these two ``left_bytes``,
    what loading leaves of 4-bit weights. On the CPU nothing is cached.
    """
    allocated, share = reading.allocated_peak_bytes, cache_share(scenario)
    most = max(round(share.most * allocated), SMALL_CACHE_BYTES)
    caches = (0, left_bytes + round(share.typical * allocated), left_bytes + most)
    if cluster.gpu.device_kind is DeviceKind.CPU:
        caches = (0, 0, 0)
    low, typical, high = (
        device_peak(
            replace(reading, reserved_peak_bytes=allocated + cached), cluster, num_communicators=num_communicators
        )
        for cached in caches
    )
    return replace(typical, low_bytes=low.low_bytes, high_bytes=high.high_bytes)


def device_peak(reading: MemoryReading, cluster: Cluster, *, num_communicators: int = 1) -> DevicePeak:
    """The peak on the device: reserved memory, context and communicators.

    Formula: the sum (``ByteRange.plus``) of the reserved memory, the context and the communicators. What is reserved
    may be more by ``MEMORY_MODEL_ERROR`` and less by ``RESERVED_BELOW``, but at most by ``ALLOCATED_BELOW`` less than
    what is allocated: fragmentation may be less than modelled, the tensors are there.
    """
    context = cuda_context(cluster.gpu)
    communicators = communicator_buffers(cluster, num_communicators=num_communicators)
    reserved, allocated = reading.reserved_peak_bytes, reading.allocated_peak_bytes
    least = max(round(reserved * (1 - RESERVED_BELOW)), round(allocated * (1 - ALLOCATED_BELOW)))
    segments = ByteRange(least, reserved, round(reserved * (1 + MEMORY_MODEL_ERROR)))
    total = segments.plus(context).plus(communicators)
    return DevicePeak(
        low_bytes=total.low,
        typical_bytes=total.typical,
        high_bytes=total.high,
        cuda_context_bytes=context.typical,
        nccl_bytes=communicators.typical,
        fragmentation_bytes=reserved - allocated,
    )


def reservable_bytes(usable_bytes: int, outside: ByteRange) -> int:
    """The most that may be reserved beside ``outside`` for the top of the device's range to stay within
    ``usable_bytes``; nothing where ``outside`` alone does not.

    Formula: ``device_peak`` solved for the reserved memory r: r + hypot(e r, h) = x, with e ``MEMORY_MODEL_ERROR``, h
    what ``outside`` may miss above, and x what its usual value leaves.
    """
    left = usable_bytes - outside.typical
    missed = outside.high - outside.typical
    if left <= missed:
        return 0
    squared = MEMORY_MODEL_ERROR**2
    return int((left - sqrt(squared * left**2 + (1 - squared) * missed**2)) / (1 - squared))
