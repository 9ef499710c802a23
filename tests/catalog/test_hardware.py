"""The tables that ship: complete, sourced, and free of names that mean two things."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from launchkit.catalog import files
from launchkit.catalog.files import profiles_directory
from launchkit.catalog.hardware import hardware_table
from launchkit.hardware import Backend, Fabric, Gpu, NodeType, format_gpus, name_key, parse_gpus
from launchkit.units import GIB, MIB

TABLE = hardware_table()


def test_the_tables_are_as_large_as_promised() -> None:
    assert len(TABLE.gpus) >= 60 and len(TABLE.nodes) >= 25
    assert {gpu.backend for gpu in TABLE.gpus} == set(Backend)


@pytest.mark.parametrize("row", [*TABLE.gpus, *TABLE.nodes], ids=lambda row: row.name)
def test_every_row_says_where_it_comes_from_and_how_far_to_trust_it(row: Gpu | NodeType) -> None:
    assert len(row.source) > 10
    assert row.confidence in ("high", "medium", "low")


@pytest.mark.parametrize("gpu", TABLE.gpus, ids=lambda gpu: gpu.name)
def test_a_device_is_physically_plausible(gpu: Gpu) -> None:
    assert gpu.memory_bytes == 0 or 5 * GIB <= gpu.memory_bytes <= 300 * GIB
    assert gpu.reserved_by_driver_bytes < gpu.memory_bytes / 20 or gpu.reserved_by_driver_bytes == 0
    assert 0 <= gpu.matmul_efficiency < 1
    assert gpu.pcie_bytes_per_s > 0 and gpu.memory_bandwidth_bytes_per_s > 0
    assert (gpu.fabric is Fabric.NONE) == (gpu.nvlink_bytes_per_s == 0)
    rates = [gpu.bf16_flops_per_s, gpu.fp16_flops_per_s, gpu.fp32_flops_per_s]
    assert any(rates) and max(rates) < 5e15


@pytest.mark.parametrize("gpu", [gpu for gpu in TABLE.gpus if gpu.backend is Backend.CUDA], ids=lambda gpu: gpu.name)
def test_bf16_and_fp8_follow_the_compute_capability(gpu: Gpu) -> None:
    assert gpu.supports_bf16 == (gpu.compute_capability >= (8, 0))
    assert (gpu.fp8_flops_per_s > 0) == (gpu.compute_capability >= (8, 9)) == gpu.supports_fp8


@pytest.mark.parametrize(
    ("name", "memory_mib", "bf16_tflops", "link_gb_per_s"),
    [
        ("RTX 4090", 24564, 165.2, 0),
        ("A100 SXM 80GB", 81920, 312, 300),
        ("H100 SXM", 81559, 989, 450),
        ("H200 SXM", 143771, 989, 450),
        ("B200", 183359, 2250, 900),
        ("A10G", 23028, 70, 0),
        ("MI300X", 196288, 1307.4, 448),
    ],
)
def test_well_known_figures(name: str, memory_mib: int, bf16_tflops: float, link_gb_per_s: float) -> None:
    gpu = TABLE.gpu(name)
    assert gpu.memory_bytes == memory_mib * MIB
    assert gpu.bf16_flops_per_s == pytest.approx(bf16_tflops * 1e12)
    assert gpu.nvlink_bytes_per_s == pytest.approx(link_gb_per_s * 1e9)


def test_no_two_rows_share_a_name() -> None:
    names = Counter(name_key(row.name) for row in (*TABLE.gpus, *TABLE.nodes))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_name_of_several_devices_has_a_stated_default() -> None:
    shared = Counter(key for gpu in TABLE.gpus for key in {name_key(name) for name in (gpu.name, *gpu.aliases)})
    stated = {name_key(row.text) for row in TABLE.shorthands}
    assert {key for key, count in shared.items() if count > 1} <= stated


def test_no_node_hides_behind_the_name_of_a_device() -> None:
    devices = {name_key(name) for gpu in TABLE.gpus for name in (gpu.name, *gpu.aliases)}
    devices |= {name_key(row.text) for row in TABLE.shorthands}
    assert devices.isdisjoint(name_key(name) for node in TABLE.nodes for name in (node.name, *node.aliases))


def test_shorthands_and_nodes_refer_to_devices_of_the_table() -> None:
    known = {gpu.name for gpu in TABLE.gpus}
    assert {node.gpu for node in TABLE.nodes} <= known
    assert {name for row in TABLE.shorthands for name in (row.gpu, *row.others)} <= known


@pytest.mark.parametrize("node", TABLE.nodes, ids=lambda node: node.name)
def test_a_node_name_is_a_spec(node: NodeType) -> None:
    cluster = parse_gpus(f"2x{node.name}", TABLE)
    assert (cluster.num_nodes, cluster.node.num_gpus) == (2, node.num_gpus)
    assert cluster.node.host_memory_bytes == node.host_memory_bytes >= 12 * GIB
    assert format_gpus(cluster) == f"2x{node.name}"


@pytest.mark.parametrize(
    ("name", "num_gpus", "host_gib", "network_gbit", "link"),
    [
        ("p4d.24xlarge", 8, 1152, 400, "NVLink"),
        ("p5.48xlarge", 8, 2048, 3200, "NVLink"),
        ("g5.12xlarge", 4, 192, 40, "PCIe"),
        ("a3-highgpu-8g", 8, 1872, 1000, "NVLink"),
        ("Standard_ND96isr_H100_v5", 8, 1900, 3200, "NVLink"),
        ("gpu_8x_a100", 8, 1800, 100, "NVLink"),
    ],
)
def test_well_known_nodes(name: str, num_gpus: int, host_gib: int, network_gbit: float, link: str) -> None:
    cluster = parse_gpus(f"2x{name}", TABLE)
    assert cluster.node.num_gpus == num_gpus and cluster.node.gpu_link == link
    assert cluster.node.host_memory_bytes == host_gib * GIB
    assert cluster.network_bytes_per_s * 8 / 1e9 == pytest.approx(network_gbit)


def test_profiles_are_found_beside_the_package_and_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads((profiles_directory() / "gpus" / "nvidia.json").read_text())["devices"]
    module = tmp_path / "launchkit" / "catalog" / "files.py"
    monkeypatch.setattr(files, "__file__", str(module))
    assert profiles_directory() == tmp_path / "profiles"
    (tmp_path / "launchkit" / "profiles").mkdir(parents=True)
    assert profiles_directory() == tmp_path / "launchkit" / "profiles"
