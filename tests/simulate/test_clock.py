"""The clock: rooflines, rings and streams, each worked out by hand, and its laws."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchkit.hardware import Backend, Cluster, Gpu, Node
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
    Size,
    Stage,
    StepProgram,
    Term,
)
from launchkit.scenario import Compute
from launchkit.simulate.clock import (
    DEFAULT_EFFICIENCY,
    EFFICIENCIES,
    GPU_LAUNCH_SECONDS,
    HOST_LAUNCH_SECONDS,
    HOST_MEMORY_BYTES_PER_S,
    LINKS,
    PCIE_COPY_EFFICIENCY,
    Job,
    collective_seconds,
    efficiency_of,
    group_size,
    model_flops,
    peak_flops_per_s,
    simulate_time,
)
from tests.simulate.programs import tiny_program

POINT = Point(1, 1000)
GPU = Gpu(
    name="GPU",
    architecture="Ampere",
    memory_bandwidth_bytes_per_s=2e12,
    fp32_flops_per_s=2e13,
    bf16_flops_per_s=3e14,
    pcie_bytes_per_s=3e10,
    matmul_efficiency=0.9,
)
AMPERE = EFFICIENCIES["Ampere"]


def job(num_gpus: int = 8, *, num_nodes: int = 1, link: str = "NVLink", compute: Compute = Compute.BF16) -> Job:
    node = Node(num_gpus=num_gpus, gpu_link_bytes_per_s=3e11, gpu_link=link)
    cluster = Cluster(gpu=GPU, node=node, num_nodes=num_nodes, network_bytes_per_s=5e10)
    return Job(cluster=cluster, compute=compute, num_active_parameters=10**9, num_trainable=10**9)


def constant_kernel(milliseconds: float) -> Kernel:
    """One matrix product that takes so long on ``GPU``, its launch included."""
    seconds = milliseconds / 1e3 - GPU_LAUNCH_SECONDS
    return Kernel(1, Size.constant(round(seconds * 3e14 * 0.9 * AMPERE.matmul)), Size.constant(0), True)


def collective(milliseconds: float, moment: Moment) -> Collective:
    """An all-gather over 8 GPUs that takes so long, its latency included."""
    link = LINKS["NVLink"]
    seconds = milliseconds / 1e3 - link.base_seconds - 7 * link.hop_seconds
    num_bytes = round(seconds * 3e11 * link.efficiency * 8 / 7)
    return Collective(CollectiveKind.ALL_GATHER, Size.constant(num_bytes), moment)


def copy(milliseconds: float, moment: Moment) -> Copy:
    return Copy(True, Size.constant(round(milliseconds / 1e3 * 3e10 * PCIE_COPY_EFFICIENCY)), moment)


def program(*sections: Section, phases: tuple[Phase, ...] = ()) -> StepProgram:
    """One stage per section, all forward unless told otherwise."""
    stages = tuple(
        Stage(name=f"stage.{index}", phase=phases[index] if phases else Phase.FORWARD, layers=(index,))
        for index in range(len(sections))
    )
    return replace(tiny_program(), stages=stages, sections=sections)


def milliseconds(*sections: Section, phases: tuple[Phase, ...] = ()) -> float:
    return simulate_time(program(*sections, phases=phases), POINT, job=job()).seconds * 1e3


def section(
    compute_ms: float, *collectives: Collective, copies: tuple[Copy, ...] = (), kernels: tuple[Kernel, ...] = ()
) -> Section:
    own = (constant_kernel(compute_ms),) if compute_ms else ()
    return Section(events=(), kernels=own + kernels, collectives=collectives, copies=copies)


@pytest.mark.parametrize(
    ("kernel", "seconds"),
    [
        (Kernel(1, Size((Term(10**12, 0, 1),)), Size.constant(1), True), 1e15 / (3e14 * 0.9 * AMPERE.matmul)),
        (Kernel(1, Size.constant(1), Size((Term(10**9, 0, 1),)), True), 1e12 / (2e12 * AMPERE.memory)),
        (Kernel(1, Size.constant(10**13), Size.constant(1), False), 1e13 / (2e13 * AMPERE.matmul)),
        (Kernel(4, Size.constant(0), Size.constant(10**9), False), 4e9 / (2e12 * AMPERE.memory)),
    ],
)
def test_a_kernel_runs_at_its_roof(kernel: Kernel, seconds: float) -> None:
    """Bound by FLOPs or by memory traffic, whichever takes longer."""
    result = simulate_time(program(Section(events=(), kernels=(kernel,))), POINT, job=job())
    assert result.seconds == pytest.approx(seconds + kernel.count * GPU_LAUNCH_SECONDS, rel=1e-6)
    assert result.compute_seconds == result.seconds


@pytest.mark.parametrize(("peak", "expected"), [(6e14, 6e14), (0.0, 3e14)])
def test_products_of_8_bit_factors_have_their_own_peak(peak: float, expected: float) -> None:
    """Where the table has none, bf16's."""
    some = job(compute=Compute.AUTOCAST_FP8)
    some = replace(some, cluster=replace(some.cluster, gpu=replace(some.cluster.gpu, fp8_flops_per_s=peak)))
    product = Kernel(1, Size.constant(10**15), Size.constant(1), True, True)
    step = simulate_time(program(section(0, kernels=(product,))), POINT, job=some)
    assert step.seconds == pytest.approx(1e15 / (expected * 0.9 * AMPERE.matmul), rel=1e-3)


def test_small_kernels_are_bound_by_the_host() -> None:
    """A thousand kernels of nothing take as long as it takes to launch them, less when compiled."""
    nothing = Kernel(1000, Size.constant(0), Size.constant(0), False)
    launches = program(Section(events=(), kernels=(nothing,)))
    assert simulate_time(launches, POINT, job=job()).seconds == pytest.approx(1000 * HOST_LAUNCH_SECONDS)
    assert simulate_time(launches, POINT, job=replace(job(), is_compiled=True)).seconds < 500 * HOST_LAUNCH_SECONDS


@pytest.mark.parametrize(
    ("sections", "phases", "expected"),
    [
        ((section(10), section(10)), (), 20),
        ((section(10), section(10, collective(4, Moment.BEFORE))), (), 20),  # fetched ahead, hidden
        ((section(10), section(10, collective(14, Moment.BEFORE))), (), 24),  # hidden for 10 of 14
        ((section(10, collective(4, Moment.BEFORE)),), (), 14),  # nothing to hide the first behind
        ((section(10, collective(4, Moment.AFTER)), section(10)), (), 20),
        ((section(10, collective(14, Moment.AFTER)), section(10)), (), 24),  # the step waits for it in the end
        ((section(10, collective(4, Moment.BLOCKING)), section(10)), (), 24),
        ((section(10, copies=(copy(14, Moment.AFTER),)), section(10)), (), 24),
        ((section(10), section(10, copies=(copy(14, Moment.BEFORE),))), (), 24),
        ((section(10, copies=(copy(3, Moment.BLOCKING),)), section(10)), (), 23),
        (  # the optimizer waits for what is still on its way
            (section(10, collective(6, Moment.AFTER)), section(5)),
            (Phase.BACKWARD, Phase.OPTIMIZER),
            21,
        ),
        (  # one stream for both: the fetch for the next section goes ahead of the reduction of this one
            (section(10, collective(8, Moment.AFTER)), section(10, collective(8, Moment.BEFORE)), section(1)),
            (),
            21,
        ),
    ],
)
def test_streams(sections: tuple[Section, ...], phases: tuple[Phase, ...], expected: float) -> None:
    """What overlaps with what, in milliseconds."""
    assert milliseconds(*sections, phases=phases) == pytest.approx(expected, rel=1e-4)


def test_exposed_communication_is_what_was_not_hidden() -> None:
    """Seconds are compute and what stands beside it."""
    result = simulate_time(program(section(10), section(10, collective(14, Moment.BEFORE))), POINT, job=job())
    assert result.compute_seconds * 1e3 == pytest.approx(20, rel=1e-4)
    assert result.exposed_communication_seconds * 1e3 == pytest.approx(4, rel=1e-3)
    assert not result.validated


def ring(kind: CollectiveKind, some: Job, group: Group = Group.WORLD) -> float:
    """Seconds per byte, latency taken off."""
    return (
        collective_seconds(some, kind, 2 * 10**9, group=group) - collective_seconds(some, kind, 10**9, group=group)
    ) / 1e9


@pytest.mark.parametrize(
    ("kind", "some", "group", "expected"),
    [
        (CollectiveKind.ALL_REDUCE, job(8), Group.WORLD, 2 * 7 / 8 / (3e11 * 0.80)),
        (CollectiveKind.ALL_GATHER, job(8), Group.WORLD, 7 / 8 / (3e11 * 0.80)),
        (CollectiveKind.REDUCE_SCATTER, job(4), Group.WORLD, 3 / 4 / (3e11 * 0.80)),
        (CollectiveKind.ALL_GATHER, job(2, link="PCIe"), Group.WORLD, 1 / 2 / (3e11 * 0.75)),
        (CollectiveKind.ALL_GATHER, job(2, link="Infinity Fabric"), Group.WORLD, 1 / 2 / (3e11 * 0.80)),
        # over the network the node's whole rate serves the one ring
        (CollectiveKind.ALL_GATHER, job(8, num_nodes=2), Group.WORLD, 15 / 16 / (5e10 * 0.85)),
        (
            CollectiveKind.ALL_GATHER,
            replace(job(8, num_nodes=2), shard_group_size=8),
            Group.SHARD,
            7 / 8 / (3e11 * 0.80),
        ),
        # eight rings of replicas share it
        (
            CollectiveKind.ALL_REDUCE,
            replace(job(8, num_nodes=2), shard_group_size=8),
            Group.REPLICATE,
            2 / 2 / (5e10 * 0.85 / 8),
        ),
        (
            CollectiveKind.ALL_REDUCE,
            replace(job(8, num_nodes=2), shard_group_size=4),
            Group.REPLICATE,
            2 * 3 / 4 / (5e10 * 0.85 / 4),
        ),
        (CollectiveKind.ALL_REDUCE, job(1), Group.WORLD, 0.0),
    ],
)
def test_rings(kind: CollectiveKind, some: Job, group: Group, expected: float) -> None:
    """Seconds per byte of a ring over the slowest of its links."""
    assert ring(kind, some, group) == pytest.approx(expected, rel=1e-6)


def test_groups_multiply_to_the_world() -> None:
    """Shard groups and replicas cover all ranks."""
    some = replace(job(8, num_nodes=4), shard_group_size=8)
    assert [group_size(some, group) for group in (Group.WORLD, Group.SHARD, Group.REPLICATE)] == [32, 8, 4]


def test_an_unknown_network_is_assumed() -> None:
    """Nodes without a stated network are joined at 100 Gb/s, GPUs without a stated link by PCIe."""
    some = job(8, num_nodes=2)
    assert ring(CollectiveKind.ALL_GATHER, replace(some, cluster=replace(some.cluster, network_bytes_per_s=0.0))) == (
        pytest.approx(15 / 16 / (12.5e9 * 0.85))
    )


def test_accumulation_repeats_the_micro_batch() -> None:
    """Four micro-batches and one optimizer; without no_sync every one of them reduces."""
    reduce = collective(4, Moment.BLOCKING)._replace(kind=CollectiveKind.REDUCE_SCATTER)
    step = program(section(10, reduce), section(5), phases=(Phase.BACKWARD, Phase.OPTIMIZER))
    some = replace(job(), gradient_accumulation_steps=4)
    assert simulate_time(step, POINT, job=some).seconds * 1e3 == pytest.approx(4 * 14 + 5, rel=1e-4)
    lazy = replace(some, reduces_every_micro_batch=False)
    assert simulate_time(step, POINT, job=lazy).seconds * 1e3 == pytest.approx(4 * 10 + 4 + 5, rel=1e-4)
    assert simulate_time(step, POINT, job=lazy).tokens_per_second_per_gpu == pytest.approx(4000 / 49e-3, rel=1e-4)


def test_an_optimizer_on_the_host_shares_its_memory() -> None:
    """Its traffic takes the node's bandwidth, which the node's processes share."""
    step = program(section(10))
    some = replace(job(8), host_optimizer_bytes=10**9)
    added = simulate_time(step, POINT, job=some).seconds - simulate_time(step, POINT, job=job(8)).seconds
    assert added == pytest.approx(8e9 / HOST_MEMORY_BYTES_PER_S)


@pytest.mark.parametrize(
    ("num_trainable", "num_layers", "expected"),
    [(10**9, 0, 6e12), (10**7, 0, 4.02e12), (2 * 10**9, 0, 6e12), (10**9, 10, 6e12 + 12 * 10 * 100 * 50 * 1000)],
)
def test_model_flops(num_trainable: int, num_layers: int, expected: float) -> None:
    """Six per parameter and token in full training, four where frozen, and attention; experts only as active."""
    some = replace(job(), num_trainable=num_trainable, num_layers=num_layers, hidden_size=100)
    assert model_flops(some, num_tokens=1000, seq_len=50) == pytest.approx(expected)


def test_mfu_is_model_flops_over_the_peak() -> None:
    """A step of exactly a second with 6e12 model FLOPs on a peak of 3e14 has 2 %."""
    result = simulate_time(program(section(1000)), POINT, job=job())
    assert result.mfu == pytest.approx(6e12 / 3e14, rel=1e-4)


@pytest.mark.parametrize(
    ("compute", "peak"),
    [(Compute.FP32, 2e13), (Compute.AUTOCAST_BF16, 3e14), (Compute.BF16, 3e14), (Compute.FP16, 2e13)],
)
def test_peaks_follow_the_dtype(compute: Compute, peak: float) -> None:
    """The dense peak of the compute dtype; fp32's on a GPU that has none."""
    assert peak_flops_per_s(job(compute=compute)) == peak


def test_efficiency_goes_by_family() -> None:
    """The start of the architecture decides; what is unknown gets the cautious row."""
    assert efficiency_of(replace(GPU, architecture="Ada Lovelace")) is EFFICIENCIES["Ada"]
    assert efficiency_of(replace(GPU, architecture="Gaudi")) is DEFAULT_EFFICIENCY
    assert all(0 < row.matmul <= 1 and 0 < row.memory <= 1 and row.source for row in EFFICIENCIES.values())


def test_a_cpu_joins_its_processes_through_memory() -> None:
    """Two CPU processes use the row of gloo, whatever their node calls the link."""
    cpu = replace(GPU, backend=Backend.CPU)
    some = job(2)
    some = replace(some, cluster=replace(some.cluster, gpu=cpu))
    expected = 1 / 2 / (3e11 * LINKS["shared memory"].efficiency)
    assert ring(CollectiveKind.ALL_GATHER, some) == pytest.approx(expected)
