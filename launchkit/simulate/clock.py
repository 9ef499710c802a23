"""How long a step takes: kernels, collectives and copies on three streams that wait for one another.

Sections are the grain. A section's kernels run on the compute stream at the GPU's roofline; its collectives and
copies on streams of their own. What a section waits for (``Moment.BEFORE``) may run from the moment the section ahead
of it starts; what follows it (``AFTER``) holds up nothing until the optimizer; ``BLOCKING`` holds up everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from launchkit.hardware import Backend, Cluster, Gpu
from launchkit.plan import StepTime
from launchkit.program import (
    Collective,
    CollectiveKind,
    Copy,
    Group,
    Kernel,
    Moment,
    Phase,
    Point,
    Section,
    Stage,
    StepProgram,
)
from launchkit.scenario import Compute, Split
from launchkit.units import GB


class Efficiency(NamedTuple):
    """What share of its peaks a family of devices reaches in training.

    ``matmul`` is the share of the matmul ceiling (``Gpu.matmul_efficiency``) that a layer's products and attention
    reach on average, ``memory`` the share of the memory bandwidth that elementwise kernels reach.
    """

    matmul: float
    memory: float
    source: str


# By the start of ``Gpu.architecture``. Calibrated rows: traced models against published tokens/s, family by family.
# Ampere: HF Trainer on Mistral-7B (1 GPU) and llm-foundry on 7B and 30B (8 GPUs): predicted over measured 0.98 to 1.03;
# smaller models spread more (1B and 3B, some of them compiled: 0.78 to 1.05).
# Hopper: llm-foundry on 7B and 30B, 2k to 8k tokens: 0.97 to 1.06; 1.23 at 32k, whose attention kernel was slower.
# GPT-NeoX of the same sizes stood in for llm-foundry's MPT, with FSDP's collectives put in by hand.
# Ada: torchtune on one 4090, three runs; the boost clock is above the one that its nominal peak is for.
EFFICIENCIES: Mapping[str, Efficiency] = {
    "Volta": Efficiency(0.55, 0.75, "not calibrated; below Ampere as the tensor cores need larger tiles"),
    "Turing": Efficiency(0.55, 0.75, "not calibrated; as for Volta"),
    "Ampere": Efficiency(0.85, 0.80, "published runs on A100: 0.98 to 1.03 of measured; 0.78 to 1.05 with a 1B model"),
    "Ada": Efficiency(0.92, 0.80, "published runs on one RTX 4090"),
    "Hopper": Efficiency(0.68, 0.80, "published runs on H100: 0.97 to 1.06 of measured up to 8k tokens"),
    "Blackwell": Efficiency(0.65, 0.80, "not calibrated; below Hopper as peaks grew faster than bandwidth"),
    "CDNA": Efficiency(0.70, 0.70, "not calibrated"),
}
DEFAULT_EFFICIENCY = Efficiency(0.60, 0.70, "not calibrated")

# Where nobody measured a GPU's matmul ceiling: the middle of the NVIDIA GPUs on which it was (0.73 to 0.87).
# Source: stas00/ml-engineering, compute/accelerator, "Maximum Achievable Matmul FLOPS".
DEFAULT_MATMUL_CEILING = 0.80


class Link(NamedTuple):
    """What a kind of link gives of its nominal rate in a ring, and what one message costs besides its bytes."""

    efficiency: float
    base_seconds: float
    hop_seconds: float
    source: str


# Shares: nccl-tests bus bandwidth of large messages over the nominal rate. Latencies: order of magnitude of
# nccl-tests at 8 bytes on 8 ranks (20 to 40 µs within a node); not calibrated.
LINKS: Mapping[str, Link] = {
    "NVLink": Link(0.80, 15e-6, 2e-6, "nccl-tests: about 235 of 300 GB/s on 8 A100, 360 of 450 on 8 H100"),
    "PCIe": Link(0.75, 20e-6, 3e-6, "bandwidthTest: about 24 of 31.5 GB/s on generation 4"),
    "shared memory": Link(0.50, 100e-6, 50e-6, "gloo; not calibrated"),
    "network": Link(0.85, 30e-6, 5e-6, "nccl-tests: about 42 of 50 GB/s over 400 Gb/s"),
}
ASSUMED_NETWORK_BYTES_PER_S = 12.5 * GB  # 100 Gb/s, where the cluster does not say
ASSUMED_PCIE_BYTES_PER_S = 15.75 * GB  # generation 3, 16 lanes
PCIE_COPY_EFFICIENCY = 0.80  # of pinned memory; bandwidthTest, as above

GPU_LAUNCH_SECONDS = 2e-6  # between two kernels on one stream; not calibrated
HOST_LAUNCH_SECONDS = 6e-6  # the host's work per eager kernel, autograd's included; not calibrated
COMPILED_HOST_LAUNCH_SECONDS = 2e-6  # under torch.compile; not calibrated

# Memory traffic of an optimizer on the CPU, all processes of a node together. DeepSpeed's CPU Adam comes near the
# bandwidth of two sockets; a typical training node has eight channels of DDR4-3200 on each. Not calibrated.
HOST_MEMORY_BYTES_PER_S = 200 * GB

_PEAK_FIELDS: Mapping[Compute, str] = {
    Compute.FP32: "fp32_flops_per_s",  # torch leaves TF32 off for matrix products unless told otherwise
    Compute.AUTOCAST_BF16: "bf16_flops_per_s",
    Compute.AUTOCAST_FP16: "fp16_flops_per_s",
    Compute.BF16: "bf16_flops_per_s",
    Compute.BF16_AUTOCAST: "bf16_flops_per_s",
    Compute.FP16: "fp16_flops_per_s",
    Compute.FP16_AUTOCAST: "fp16_flops_per_s",
    Compute.AUTOCAST_FP8: "bf16_flops_per_s",  # attention and the head; torchao's products have a peak of their own
    Compute.FP8_AUTOCAST: "bf16_flops_per_s",
}

# Share of the payload that crosses each link of a ring of n ranks, times n / (n - 1).
_RING_PASSES: Mapping[CollectiveKind, int] = {
    CollectiveKind.ALL_REDUCE: 2,
    CollectiveKind.ALL_GATHER: 1,
    CollectiveKind.REDUCE_SCATTER: 1,
    CollectiveKind.BROADCAST: 1,
    CollectiveKind.ALL_TO_ALL: 1,
}
_REDUCTIONS = frozenset({CollectiveKind.ALL_REDUCE, CollectiveKind.REDUCE_SCATTER})


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the time of a step depends on besides its program and point.

    ``shard_group_size`` is the number of ranks of ``Group.SHARD`` (0: all), ``split`` how many share a step. Without
    ``reduces_every_micro_batch`` gradients are reduced with the last micro-batch only (``no_sync``).
    ``host_optimizer_bytes`` is the memory traffic of one rank's optimizer on the CPU. The last four describe the model,
    for MFU.
    """

    cluster: Cluster
    compute: Compute
    gradient_accumulation_steps: int = 1
    shard_group_size: int = 0
    split: Split = field(default_factory=Split)
    reduces_every_micro_batch: bool = True
    host_optimizer_bytes: int = 0
    is_compiled: bool = False
    num_active_parameters: int = 0
    num_trainable: int = 0
    num_layers: int = 0
    hidden_size: int = 0


def simulate_time(program: StepProgram, point: Point, *, job: Job) -> StepTime:
    """One optimizer step: the time of all its micro-batches and of the optimizer.

    Formula: ``(G - 1) × micro-batch + (last micro-batch and optimizer)``. ``compute_seconds`` is the time that kernels
    run, a CPU optimizer's included; ``exposed_communication_seconds`` is all the rest: collectives and copies that
    nothing hid. Omits: the data loader, pipeline bubbles, stragglers. ``validated`` is False: nothing here was measured
    on the user's hardware.
    """
    durations = _Durations(program, point, job)
    micro_batch = [stage for stage in program.stages if stage.phase is not Phase.OPTIMIZER]
    last = _run(program.stages, durations, is_last=True)
    earlier = _run(micro_batch, durations, is_last=False)
    num_earlier = job.gradient_accumulation_steps - 1
    host = job.host_optimizer_bytes * job.cluster.node.num_gpus / HOST_MEMORY_BYTES_PER_S
    seconds = last.seconds + num_earlier * earlier.seconds + host
    compute_seconds = last.compute_seconds + num_earlier * earlier.compute_seconds + host
    tokens = point.micro_batch * point.seq_len * job.gradient_accumulation_steps / job.split.num_ranks
    flops = model_flops(job, num_tokens=tokens, seq_len=point.seq_len)
    return StepTime(
        seconds=seconds,
        compute_seconds=compute_seconds,
        exposed_communication_seconds=max(0.0, seconds - compute_seconds),
        tokens_per_second_per_gpu=tokens / seconds if seconds else 0.0,
        mfu=flops / (peak_flops_per_s(job) * seconds) if seconds else 0.0,
    )


def model_flops(job: Job, *, num_tokens: float, seq_len: int) -> float:
    """FLOPs that the model itself asks for, per GPU and step; what checkpointing computes again is not counted.

    Formula: ``(4 × active + 2 × min(trainable, active) + 12 × layers × hidden × seq_len) × tokens``: the usual ``6 N``
    where all is trained; where weights are frozen (LoRA) their gradients are never computed. The last term is attention
    without a causal discount. Source: PaLM (arXiv:2204.02311), appendix B.
    """
    trained = min(job.num_trainable, job.num_active_parameters)
    per_token = 4.0 * job.num_active_parameters + 2.0 * trained
    return (per_token + 12.0 * job.num_layers * job.hidden_size * seq_len) * num_tokens


def peak_flops_per_s(job: Job) -> float:
    """The GPU's dense peak in the dtype that the blocks compute in; fp32's where it has none in that dtype."""
    gpu = job.cluster.gpu
    peak: float = getattr(gpu, _PEAK_FIELDS[job.compute])
    return peak or gpu.fp32_flops_per_s or 1e12


def efficiency_of(gpu: Gpu) -> Efficiency:
    """The row of ``EFFICIENCIES`` for ``gpu``."""
    rows = (row for prefix, row in EFFICIENCIES.items() if gpu.architecture.startswith(prefix))
    return next(rows, DEFAULT_EFFICIENCY)


def group_size(job: Job, group: Group) -> int:
    """How many ranks take part in a collective of ``group``."""
    num_sharing = job.cluster.num_gpus // job.split.tp
    shard = min(job.shard_group_size or num_sharing, num_sharing)
    sizes = {
        Group.WORLD: job.cluster.num_gpus,
        Group.SHARD: shard,
        Group.REPLICATE: num_sharing // shard,
        Group.COPY: job.split.num_ranks,
    }
    return sizes[group]


def collective_seconds(job: Job, kind: CollectiveKind, num_bytes: int, *, group: Group = Group.WORLD) -> float:
    """One collective of ``num_bytes`` full payload over its group.

    Formula: ``passes × (n - 1) / n × bytes / rate + base + passes × (n - 1) × hop``, with 2 passes for an all-reduce
    and 1 else. The rate is that of the slowest link on the ring: the GPU's own within a node; over the network the
    node's, divided among the groups that cross it side by side. Source: nccl-tests, ``doc/PERFORMANCE.md``.
    """
    size = group_size(job, group)
    if size <= 1 or num_bytes <= 0:
        return 0.0
    passes = _RING_PASSES[kind]
    links = list(_links_of(job, group, size))
    rate = min(link.efficiency * bytes_per_s for link, bytes_per_s in links)
    slowest = max((link for link, _ in links), key=lambda link: link.base_seconds)
    latency = slowest.base_seconds + passes * (size - 1) * slowest.hop_seconds
    return passes * (size - 1) / size * num_bytes / rate + latency


def _links_of(job: Job, group: Group, size: int) -> Iterator[tuple[Link, float]]:
    """The kinds of link on a ring of ``size`` ranks, each with its nominal rate for this ring.

    Ranks that share matrices are neighbours, then those of a shard group (they fill nodes first); replicas are as far
    apart as a shard group is large.
    """
    cluster = job.cluster
    per_node = cluster.node.num_gpus
    shard = group_size(job, Group.SHARD)
    stride = {Group.SHARD: job.split.tp, Group.REPLICATE: shard * job.split.tp}.get(group, 1)
    ranks_in_node = max(1, min(size, per_node // stride))
    if ranks_in_node > 1:
        pcie = cluster.gpu.pcie_bytes_per_s or ASSUMED_PCIE_BYTES_PER_S
        yield _node_link(cluster), cluster.node.gpu_link_bytes_per_s or pcie
    if size > ranks_in_node:
        network = cluster.network_bytes_per_s or ASSUMED_NETWORK_BYTES_PER_S
        yield LINKS["network"], network * ranks_in_node / per_node


def _node_link(cluster: Cluster) -> Link:
    """The row for the link within a node; other fabrics behave as NVLink does."""
    if cluster.gpu.backend is Backend.CPU:
        return LINKS["shared memory"]
    return LINKS.get(cluster.node.gpu_link, LINKS["NVLink"])


class _Work(NamedTuple):
    """Seconds on each stream that one section asks for, by moment."""

    compute: float
    communication: Mapping[Moment, float]
    reductions: Mapping[Moment, float]  # the part of ``communication`` that ``no_sync`` leaves out
    copies: Mapping[Moment, float]


class _Durations:
    """The work of each section, worked out once for all its layers."""

    def __init__(self, program: StepProgram, point: Point, job: Job) -> None:
        self.program = program
        self.point = point
        self.job = job
        gpu = job.cluster.gpu
        efficiency = efficiency_of(gpu)
        ceiling = gpu.matmul_efficiency or DEFAULT_MATMUL_CEILING
        self.matmul_flops_per_s = peak_flops_per_s(job) * ceiling * efficiency.matmul
        self.float8_flops_per_s = (gpu.fp8_flops_per_s or peak_flops_per_s(job)) * ceiling * efficiency.matmul
        self.vector_flops_per_s = (gpu.fp32_flops_per_s or peak_flops_per_s(job)) * efficiency.matmul
        self.memory_bytes_per_s = (gpu.memory_bandwidth_bytes_per_s or 1e11) * efficiency.memory
        self.copy_bytes_per_s = (gpu.pcie_bytes_per_s or ASSUMED_PCIE_BYTES_PER_S) * PCIE_COPY_EFFICIENCY
        self.works: dict[int, _Work] = {}

    def of(self, number: int) -> _Work:
        if number not in self.works:
            self.works[number] = self._work(self.program.sections[number])
        return self.works[number]

    def _work(self, section: Section) -> _Work:
        reductions = [collective for collective in section.collectives if collective.kind in _REDUCTIONS]
        return _Work(
            self._kernels(section.kernels),
            self._collectives(section.collectives),
            self._collectives(reductions),
            self._copies(section.copies),
        )

    def _kernels(self, kernels: Sequence[Kernel]) -> float:
        """Device time, or the host's time to launch it all where that is longer."""
        num_launches = sum(kernel.count for kernel in kernels)
        device = sum(kernel.count * self._kernel(kernel) for kernel in kernels) + num_launches * GPU_LAUNCH_SECONDS
        per_launch = COMPILED_HOST_LAUNCH_SECONDS if self.job.is_compiled else HOST_LAUNCH_SECONDS
        return max(device, num_launches * per_launch)

    def _kernel(self, kernel: Kernel) -> float:
        flops_per_s = self.matmul_flops_per_s if kernel.tensor_cores else self.vector_flops_per_s
        if kernel.float8:
            flops_per_s = self.float8_flops_per_s
        compute = kernel.flops.at(self.point) / flops_per_s
        return max(compute, kernel.num_bytes.at(self.point) / self.memory_bytes_per_s)

    def _collectives(self, collectives: Sequence[Collective]) -> dict[Moment, float]:
        seconds = dict.fromkeys(Moment, 0.0)
        for kind, size, moment, group in collectives:
            seconds[moment] += collective_seconds(self.job, kind, size.at(self.point), group=group)
        return seconds

    def _copies(self, copies: Sequence[Copy]) -> dict[Moment, float]:
        seconds = dict.fromkeys(Moment, 0.0)
        for _, size, moment in copies:
            seconds[moment] += size.at(self.point) / self.copy_bytes_per_s
        return seconds


class _Elapsed(NamedTuple):
    seconds: float
    compute_seconds: float


def _run(stages: Sequence[Stage], durations: _Durations, *, is_last: bool) -> _Elapsed:
    """Play the sections of ``stages`` on the three streams; ``is_last`` when gradients are reduced whatever happens."""
    streams = _Streams()
    with_reductions = is_last or durations.job.reduces_every_micro_batch
    sections = [(stage, durations.of(stage.layers[layer])) for stage in stages for layer in stage.order()]
    for index, (stage, work) in enumerate(sections):
        communication = work.communication
        if not with_reductions:
            communication = {moment: communication[moment] - work.reductions[moment] for moment in Moment}
        if stage.phase is Phase.OPTIMIZER:
            streams.synchronize()
        if index == 0 or stage.phase is Phase.OPTIMIZER:
            streams.prefetch(work)
        ahead = sections[index + 1] if index + 1 < len(sections) else None
        prefetched = ahead[1] if ahead is not None and ahead[0].phase is not Phase.OPTIMIZER else None
        streams.play(work, communication=communication, ahead=prefetched)
    streams.synchronize()
    return _Elapsed(streams.compute, streams.busy)


class _Streams:
    """When each stream is free again, and for how long kernels ran so far."""

    def __init__(self) -> None:
        self.compute = 0.0
        self.communication = 0.0
        self.copy = 0.0
        self.busy = 0.0
        self.arrival = 0.0  # of what the next section waits for

    def synchronize(self) -> None:
        """Everything waits for everything."""
        self.compute = self.communication = self.copy = max(self.compute, self.communication, self.copy)

    def prefetch(self, work: _Work) -> None:
        """Issue what ``work`` waits for, now."""
        now = self.compute
        if seconds := work.communication[Moment.BEFORE]:
            self.communication = max(self.communication, now) + seconds
            self.arrival = max(self.arrival, self.communication)
        if seconds := work.copies[Moment.BEFORE]:
            self.copy = max(self.copy, now) + seconds
            self.arrival = max(self.arrival, self.copy)

    def play(self, work: _Work, *, communication: Mapping[Moment, float], ahead: _Work | None) -> None:
        """Run a section once what it waits for is there, while the one ``ahead`` of it fetches."""
        self.compute = max(self.compute, self.arrival)
        if ahead is not None:
            self.prefetch(ahead)
        self.compute += work.compute
        self.busy += work.compute
        if seconds := communication[Moment.AFTER]:
            self.communication = max(self.communication, self.compute) + seconds
        if seconds := work.copies[Moment.AFTER]:
            self.copy = max(self.copy, self.compute) + seconds
        if seconds := communication[Moment.BLOCKING]:
            self.compute = self.communication = max(self.communication, self.compute) + seconds
        if seconds := work.copies[Moment.BLOCKING]:
            self.compute = self.copy = max(self.copy, self.compute) + seconds
