"""What a process takes beside torch's segments, and the range of the device's peak."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchkit.hardware import Backend, Cluster, Gpu, Node
from launchkit.program import Owner, Phase, Size
from launchkit.simulate.memory import MemoryReading
from launchkit.simulate.overheads import (
    COMMUNICATORS,
    CONTEXTS,
    MEMORY_MODEL_ERROR,
    UNKNOWN_CONTEXT,
    ByteRange,
    communicator_buffers,
    cublas_workspace_bytes,
    cublas_workspaces,
    cuda_context,
    device_peak,
    reservable_bytes,
)
from launchkit.units import GIB, MIB


def gpu(*capability: int, backend: Backend = Backend.CUDA, architecture: str = "") -> Gpu:
    return Gpu(
        name="GPU", backend=backend, compute_capability=(capability[0], capability[1]), architecture=architecture
    )


def cluster(num_gpus: int, *, num_nodes: int = 1, link: str = "NVLink", device: Gpu | None = None) -> Cluster:
    node = Node(num_gpus=num_gpus, gpu_link_bytes_per_s=3e11, gpu_link=link)
    return Cluster(gpu=device or gpu(9, 0), node=node, num_nodes=num_nodes)


def reading(allocated_bytes: int, reserved_bytes: int) -> MemoryReading:
    return MemoryReading(
        allocated_peak_bytes=allocated_bytes,
        reserved_peak_bytes=reserved_bytes,
        reserved_first_step_bytes=reserved_bytes,
        resident_peak_bytes=0,
        at_peak={Owner.WEIGHTS: allocated_bytes},
        peak_stage="",
        peak_phase=Phase.FORWARD,
        steady_bytes=allocated_bytes,
        num_steps=2,
    )


@pytest.mark.parametrize(
    "row", [*CONTEXTS.values(), *COMMUNICATORS.values(), UNKNOWN_CONTEXT], ids=lambda row: row.source
)
def test_rows_are_ordered_and_sourced(row: object) -> None:
    """Low, typical and high are in this order, and each row says where it is from."""
    low, typical, high, source = row  # type: ignore[misc]
    assert 0 < low <= typical <= high and source


@pytest.mark.parametrize(
    ("device", "typical_mib"),
    [
        (gpu(8, 0), 600),
        (gpu(8, 6), 320),
        (gpu(6, 1), 250),
        (gpu(9, 0), 650),
        (gpu(3, 7), 600),
        (gpu(0, 0, backend=Backend.ROCM), 600),
        (gpu(0, 0, backend=Backend.CPU), 0),
    ],
)
def test_context(device: Gpu, typical_mib: int) -> None:
    """A context goes by the exact compute capability, then by its generation, then by the span of all."""
    assert cuda_context(device).typical == typical_mib * MIB


@pytest.mark.parametrize(
    ("device", "num_bytes"),
    [
        (gpu(8, 0), 8519680),
        (gpu(12, 0), 8519680),
        (gpu(9, 0), 32 * MIB),
        (gpu(10, 0), 32 * MIB),
        (gpu(0, 0, backend=Backend.ROCM, architecture="CDNA3 (gfx942)"), 128 * MIB),
        (gpu(0, 0, backend=Backend.ROCM, architecture="CDNA2 (gfx90a)"), 32 * MIB),
        (gpu(0, 0, backend=Backend.CPU), 0),
    ],
)
def test_cublas_workspace(device: Gpu, num_bytes: int) -> None:
    """The workspace follows the architecture; two of them persist."""
    assert cublas_workspace_bytes(device) == num_bytes
    expected = ((Size.constant(num_bytes), Owner.TEMPORARIES, 2),) if num_bytes else ()
    assert cublas_workspaces(device) == expected


@pytest.mark.parametrize(
    ("capability", "num_bytes"),
    [((8, 9), 4 * MIB), ((9, 0), 32 * MIB + 1024), ((10, 0), 32 * MIB + 1024), ((12, 0), 32 * MIB + 1024)],
)
def test_transformer_engine_has_a_workspace_of_its_own(capability: tuple[int, int], num_bytes: int) -> None:
    device = gpu(*capability)
    *others, own = cublas_workspaces(device, transformer_engine=True)
    assert tuple(others) == cublas_workspaces(device)
    assert own == (Size.constant(num_bytes), Owner.TEMPORARIES, 1)


def test_communicators_grow_with_the_cluster() -> None:
    """Nothing for one GPU; more for more GPUs, for a faster link, for a network, for each process group."""
    sizes = [
        communicator_buffers(some).typical
        for some in (cluster(1), cluster(8, link="PCIe"), cluster(2), cluster(8), cluster(8, num_nodes=2))
    ]
    assert sizes[0] == 0
    assert sizes == sorted(set(sizes))
    assert communicator_buffers(cluster(8), num_communicators=3).high == 3 * communicator_buffers(cluster(8)).high
    assert communicator_buffers(cluster(4, device=gpu(0, 0, backend=Backend.CPU))).high == 0
    assert communicator_buffers(cluster(1, num_nodes=2)).typical == COMMUNICATORS["network"].range.typical


def test_device_peak_adds_up() -> None:
    """Reserved, context and communicators make the peak; reserved over allocated is fragmentation."""
    peak = device_peak(reading(30 * GIB, 32 * GIB), cluster(8))
    assert peak.typical_bytes == 32 * GIB + peak.cuda_context_bytes + peak.nccl_bytes
    assert peak.fragmentation_bytes == 2 * GIB
    assert peak.low_bytes < peak.typical_bytes < peak.high_bytes


@pytest.mark.parametrize(("reserved_gib", "num_gpus"), [(10, 1), (20, 1), (30, 8), (70, 8)])
def test_the_range_is_narrow_where_it_can_be(reserved_gib: int, num_gpus: int) -> None:
    """Within 8 % of the typical peak on a GPU that is reasonably full."""
    peak = device_peak(reading(reserved_gib * GIB, reserved_gib * GIB), cluster(num_gpus))
    assert peak.high_bytes <= 1.08 * peak.typical_bytes
    assert peak.low_bytes >= 0.92 * peak.typical_bytes


def test_fragmentation_may_be_less_than_modelled() -> None:
    """The low end follows the reserved peak down, but stays by what is allocated."""
    little, much = (device_peak(reading(allocated * GIB, 40 * GIB), cluster(1)) for allocated in (39, 20))
    context = CONTEXTS[9,].range
    assert little.low_bytes == ByteRange(round(39 * GIB * 0.98), 40 * GIB, 40 * GIB).plus(context).low
    assert much.low_bytes == ByteRange(round(40 * GIB * 0.92), 40 * GIB, 40 * GIB).plus(context).low


@given(
    reserved=st.integers(0, 200 * GIB),
    usable=st.integers(0, 200 * GIB),
    outside=st.tuples(*[st.integers(0, 2 * GIB)] * 2).map(lambda pair: ByteRange(0, pair[0], sum(pair))),
)
def test_what_may_be_reserved(reserved: int, usable: int, outside: ByteRange) -> None:
    """As much as leaves the top of the range within what is usable, and no more."""
    room = reservable_bytes(usable, outside)

    def top(reserved: int) -> int:
        return ByteRange(reserved, reserved, round(reserved * (1 + MEMORY_MODEL_ERROR))).plus(outside).high

    assert room == 0 or abs(top(room) - usable) <= 8
    assert (top(reserved) <= usable) == (reserved <= room) or abs(reserved - room) <= 8


def test_spreads_add_in_quadrature() -> None:
    """Two quantities that may each be off are seldom off together."""
    assert ByteRange(70, 100, 130).plus(ByteRange(60, 100, 140)) == ByteRange(150, 200, 250)


def test_cpu_has_no_overheads() -> None:
    """For CPU processes only the model's own error remains."""
    peak = device_peak(reading(GIB, GIB), cluster(2, device=gpu(0, 0, backend=Backend.CPU)))
    assert (peak.typical_bytes, peak.cuda_context_bytes, peak.nccl_bytes) == (GIB, 0, 0)
