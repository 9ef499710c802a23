"""Short text becomes a cluster, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launchkit.catalog.hardware import hardware_table
from launchkit.errors import UnknownGpuError, UsageError
from launchkit.hardware import (
    HOST_UNKNOWN,
    Backend,
    Cluster,
    GpuSpec,
    cpu_cluster,
    format_gpus,
    format_spec,
    name_key,
    parse_gpus,
    parse_spec,
    pcie_bytes_per_s,
    with_host_memory,
)
from launchkit.units import GIB, MIB

TABLE = hardware_table()
CPU = TABLE.gpu("CPU")


@pytest.mark.parametrize(
    ("text", "name", "num_nodes", "num_gpus"),
    [
        ("4x4090", "RTX 4090", 1, 4),
        ("4×4090", "RTX 4090", 1, 4),
        ("4 X 4090", "RTX 4090", 1, 4),
        ("  4x RTX 4090 ", "RTX 4090", 1, 4),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 1, 1),
        ("geforce_rtx-4090:2", "RTX 4090", 1, 2),
        ("T4", "T4", 1, 1),
        ("Tesla T4", "T4", 1, 1),
        ("4xA100-80GB", "A100 SXM 80GB", 1, 4),
        ("4xa100_80gb", "A100 SXM 80GB", 1, 4),
        ("A100-80GB:4", "A100 SXM 80GB", 1, 4),
        ("A100-40G", "A100 SXM 40GB", 1, 1),
        ("8xA100-PCIE-40GB", "A100 PCIe 40GB", 1, 8),
        ("H100:8", "H100 SXM", 1, 8),
        ("H100 PCIe", "H100 PCIe", 1, 1),
        ("h100-94GB", "H100 NVL", 1, 1),
        ("2x8xH100", "H100 SXM", 2, 8),
        ("1x8xH100", "H100 SXM", 1, 8),
        ("16xH100", "H100 SXM", 2, 8),
        ("12xH100", "H100 SXM", 1, 12),
        ("1x16xH100", "H100 SXM", 1, 16),
        ("72xGB200", "GB200", 1, 72),
        ("3080", "RTX 3080 10GB", 1, 1),
        ("3080-12GB", "RTX 3080 12GB", 1, 1),
        ("4060 Ti 8GB", "RTX 4060 Ti 8GB", 1, 1),
        ("A10G-24GB", "A10G", 1, 1),
        ("7900 XTX", "RX 7900 XTX", 1, 1),
        ("2x7900XTX", "RX 7900 XTX", 1, 2),
        ("MI300X:8", "MI300X", 1, 8),
        ("M2 Max 64GB", "Apple M2 Max 64GiB", 1, 1),
        ("24GiB", "24GiB GPU", 1, 1),
        ("2x24GB", "24GB GPU", 1, 2),
        ("2x8x80GiB", "80GiB GPU", 2, 8),
        ("p4d.24xlarge", "A100 SXM 40GB", 1, 8),
        ("P4D_24XLARGE", "A100 SXM 40GB", 1, 8),
        ("2xp5.48xlarge", "H100 SXM", 2, 8),
        ("p5.48xlarge:2", "H100 SXM", 2, 8),
        ("gpu_8x_h100_sxm5", "H100 SXM", 1, 8),
        ("cpu", "CPU", 1, 1),
        ("2xcpu", "CPU", 1, 2),
        ("CPU:2", "CPU", 1, 2),
    ],
)
def test_a_spec_is_read(text: str, name: str, num_nodes: int, num_gpus: int) -> None:
    cluster = parse_gpus(text, TABLE)
    assert (cluster.gpu.name, cluster.num_nodes, cluster.node.num_gpus) == (name, num_nodes, num_gpus)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the GPU spec is empty"),
        ("   ", "the GPU spec is empty"),
        ("0x4090", "'0x4090' asks for 0 GPUs"),
        ("-1x4090", "'-1' in '-1x4090' is not a number"),
        ("4x-1x4090", "'-1' in '4x-1x4090' is not a number"),
        ("1.5x4090", "'1.5' in '1.5x4090' is not a number"),
        ("1e9x4090", "'1e9' in '1e9x4090' is not a number"),
        ("10^9x4090", "'10^9' in '10^9x4090' is not a number"),
        ("1000000000x4090", "asks for 1000000000 GPUs"),
        ("1000x1000x4090", "more than 100000 GPUs"),
        ("٤x4090", "is not a number"),
        ("x4090", "is not a number"),
        ("4x", "names no GPU"),
        ("4x:", "is not a number"),
        ("H100:", "is not a number"),
        ("H100:eight", "'eight' in 'H100:eight' is not a number"),
        ("2xH100:8", "a count too many"),
        ("2x2x2x4090", "a count too many"),
        ("4090x2", "has the count last; write 2x4090"),
        ("-24GB", "names no GPU"),
        ("99999GB", "more memory than any GPU"),
        ("M2 Max", "comes with several memory sizes"),
        ("2x8xp4d.24xlarge", "already is 8 GPUs; write 2xp4d.24xlarge"),
        ("auto", "this machine's hardware"),
        ("4x" + "9" * 500, "no GPU spec: 502 characters"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gpus(text, TABLE)
    assert message in str(caught.value)
    assert "; " in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 160


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4x4091", "did you mean RTX-4090"),
        ("H10O", "did you mean H100"),
        ("p4d.24xlage", "did you mean p4d.24xlarge"),
        ("gizmo", "'launchkit gpus' lists them"),
        ("gizmo-24GB", "no GPU or node is called 'gizmo-24GB'"),
        ("0GB", "no GPU or node is called '0GB'"),
        ("4090-48GB", "no '4090' of 48GiB is known (RTX 4090 24.0 GiB); write 48GiB"),
        ("four\nx4090", "no GPU or node is called"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(text: str, message: str) -> None:
    with pytest.raises(UnknownGpuError) as caught:
        parse_gpus(text, TABLE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60)
@given(st.text(alphabet="0123456789xX×:-_. ^+gGmMiBaAhHtTcpu\n٤é", max_size=20))
def test_any_text_gives_a_cluster_or_a_usage_error(text: str) -> None:
    try:
        cluster = parse_gpus(text, TABLE)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert cluster.num_gpus >= 1 and cluster.gpu.memory_bytes > 0


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("T4", ["host memory unknown"]),
        ("A100", ["'A100' read as A100 SXM 80GB; it could also mean A100 SXM 40GB", "host memory unknown"]),
        ("3080", ["'3080' read as RTX 3080 10GB; it could also mean RTX 3080 12GB", "host memory unknown"]),
        ("3080-12GB", ["host memory unknown"]),
        ("2x4090", ["no peer-to-peer between these cards", "host memory unknown"]),
        ("2xA6000", ["PCIe assumed between GPUs: NVLink bridges join pairs only", "host memory unknown"]),
        ("2xL40S", ["host memory unknown"]),
        ("8xMI300X", ["host memory unknown"]),
        (
            "16xMI300X",
            ["16 GPUs read as 2 nodes of 8", "host memory unknown", "network between nodes assumed: 400 Gb/s"],
        ),
        ("2x8xL4", ["host memory unknown", "network between nodes assumed: 100 Gb/s"]),
        ("24GiB", ["only memory stated (24.0 GiB): speed and compute capability taken from", "host memory unknown"]),
        ("24GB", ["24 GB read as decimal, 22.4 GiB", "only memory stated", "host memory unknown"]),
        ("cpu", ["memory of this machine not read: 16.0 GiB assumed", "cores of this machine not counted"]),
        ("p4d.24xlarge", []),
        ("g5.12xlarge", []),
        ("2xgpu_8x_a100", ["network between nodes assumed: 100 Gb/s"]),
    ],
)
def test_what_had_to_be_assumed_is_said(text: str, notes: list[str]) -> None:
    said = parse_gpus(text, TABLE).notes
    assert len(said) == len(notes)
    assert all(line.startswith(start) for line, start in zip(said, notes, strict=True))


@pytest.mark.parametrize(
    ("text", "link", "gb_per_s", "peer_to_peer"),
    [
        ("8xH100", "NVLink", 450, True),
        ("8xV100", "NVLink", 150, True),
        ("1xH100", "PCIe", 63.0, True),
        ("4x4090", "PCIe", 15.75, False),  # PCIe 4.0 ×16 and back through host memory
        ("4xL40S", "PCIe", 31.5, True),
        ("2x3090", "PCIe", 15.75, False),
        ("8xMI300X", "Infinity Fabric", 448, True),
        ("8xGaudi2", "RoCE", 300, True),
    ],
)
def test_gpus_alone_imply_a_link(text: str, link: str, gb_per_s: float, peer_to_peer: bool) -> None:
    node = parse_gpus(text, TABLE).node
    assert (node.gpu_link, node.peer_to_peer) == (link, peer_to_peer)
    assert node.gpu_link_bytes_per_s == pytest.approx(gb_per_s * 1e9, rel=0.001)


@pytest.mark.parametrize(
    ("generation", "num_lanes", "gb_per_s"),
    [(1, 16, 4.0), (2, 16, 8.0), (3, 16, 15.754), (4, 8, 15.754), (5, 16, 63.015), (0, 16, 0.0)],
)
def test_pcie_rates_are_the_published_ones(generation: int, num_lanes: int, gb_per_s: float) -> None:
    rate = pcie_bytes_per_s(generation=generation, num_lanes=num_lanes)
    assert rate == pytest.approx(gb_per_s * 1e9, rel=1e-3)


def test_cpu_processes_share_memory_and_cores() -> None:
    one = cpu_cluster(CPU, num_processes=1, memory_bytes=64 * GIB, num_cores=8)
    two = cpu_cluster(CPU, num_processes=2, memory_bytes=64 * GIB, num_cores=8)
    assert one.gpu.memory_bytes == 2 * two.gpu.memory_bytes == two.node.host_memory_bytes == 64 * GIB
    assert one.gpu.fp32_flops_per_s == 2 * two.gpu.fp32_flops_per_s == 8 * CPU.fp32_flops_per_s
    assert one.notes == two.notes == ()


def test_a_memory_alone_is_exact_and_slow() -> None:
    gpu = parse_gpus("24GiB", TABLE).gpu
    assert gpu.memory_bytes == 24 * GIB and gpu.confidence == "low"
    assert gpu.bf16_flops_per_s == TABLE.gpu("RTX 3090").bf16_flops_per_s
    assert parse_gpus("24GB", TABLE).gpu.memory_bytes == 24_000_000_000 // MIB * MIB


COUNTS = st.integers(1, 300)
NAMES = st.sampled_from(
    [gpu.name for gpu in TABLE.gpus if gpu.memory_bytes]
    + ["Apple-M2-Max-96GiB", "A100", "3080", "cpu", "24GiB", "40GB", "11264MiB"]
    + [row.text for row in TABLE.shorthands]
)


def without_notes(cluster: Cluster) -> Cluster:
    return replace(cluster, notes=())


@given(name=NAMES, num_gpus=st.none() | COUNTS, num_nodes=st.none() | COUNTS)
def test_a_spec_survives_being_written(name: str, num_gpus: int | None, num_nodes: int | None) -> None:
    spec = GpuSpec(name=name, num_gpus=num_gpus, num_nodes=num_nodes if num_gpus else None)
    assert parse_spec(format_spec(spec)) == spec


@given(name=NAMES, num_gpus=COUNTS, num_nodes=st.none() | COUNTS)
def test_a_cluster_survives_being_written(name: str, num_gpus: int, num_nodes: int | None) -> None:
    cluster = parse_gpus(format_spec(GpuSpec(name=name, num_gpus=num_gpus, num_nodes=num_nodes)), TABLE)
    again = parse_gpus(format_gpus(cluster), TABLE)
    assert without_notes(again) == without_notes(cluster)
    assert parse_gpus(format_gpus(again), TABLE) == again


@given(name=NAMES, num_gpus=st.integers(1, 8), num_nodes=COUNTS)
@example(name="GH200", num_gpus=2, num_nodes=1)
def test_the_printed_text_is_a_spec_too(name: str, num_gpus: int, num_nodes: int) -> None:
    cluster = parse_gpus(format_spec(GpuSpec(name=name, num_gpus=num_gpus, num_nodes=num_nodes)), TABLE)
    assert without_notes(parse_gpus(cluster.text, TABLE)) == without_notes(cluster)


@pytest.mark.parametrize("node", TABLE.nodes, ids=lambda node: node.name)
def test_a_named_node_survives_being_written(node: object) -> None:
    cluster = parse_gpus(node.name, TABLE)  # type: ignore[attr-defined]
    assert parse_gpus(format_gpus(cluster), TABLE) == cluster


@pytest.mark.parametrize(
    ("spelling", "same"),
    [("RTX 4090", "nvidia-geforce_rtx4090"), ("A100 SXM 80GB", "a100sxm80gb"), ("AMD Instinct MI300X", "mi300x")],
)
def test_vendor_words_and_punctuation_do_not_matter(spelling: str, same: str) -> None:
    assert name_key(spelling) == name_key(same)


def test_only_cpu_devices_are_of_the_cpu_kind() -> None:
    assert {gpu.name for gpu in TABLE.gpus if gpu.device_kind.value == "cpu"} == {CPU.name}
    assert CPU.backend is Backend.CPU


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("512GiB", 512 * GIB),
        ("512", 512 * GIB),
        ("512 GB", 512 * 10**9),
        ("1.5tib", 1536 * GIB),
        ("2TB", 2 * 10**12),
        ("65536MiB", 64 * GIB),
    ],
)
def test_host_memory_is_read(text: str, num_bytes: int) -> None:
    stated = parse_gpus("4x4090", hardware_table())
    told = with_host_memory(stated, text)
    assert told.node.host_memory_bytes == num_bytes
    assert set(stated.notes) - set(told.notes) == {HOST_UNKNOWN}


@pytest.mark.parametrize("text", ["", "0", "0GiB", "-4GiB", "lots", "512KiB", "9999999TiB", "1e3GiB", "4x512GiB"])
def test_host_memory_that_no_host_has_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size of a host's memory; write something like 512GiB"):
        with_host_memory(parse_gpus("4x4090", hardware_table()), text)


@pytest.mark.parametrize(
    ("spec", "plausible_gib"),
    [
        ("1x4090", 256),  # a desktop
        ("8xH100", 2048),  # AWS p5.48xlarge
        ("2x8xH100", 2048),  # of each node
        ("4xA100-80GB", 1024),
        ("24GiB", 256),
        ("p4d.24xlarge", 0),  # known
        ("cpu", 0),
    ],
)
def test_a_stated_host_is_as_large_as_known_ones(spec: str, plausible_gib: int) -> None:
    assert parse_gpus(spec, hardware_table()).node.plausible_host_bytes == plausible_gib * GIB
