"""Host memory as containers limit it, and devices that only torch knows, on described machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from launchkit.catalog.hardware import hardware_table
from launchkit.detection import DetectedGpu, Detection, Host
from launchkit.errors import UnknownGpuError
from launchkit.hardware import Backend
from launchkit.probe.cluster import cluster_from
from launchkit.probe.host import detect_host, memory_limit_bytes
from launchkit.probe.spec import cluster_for
from launchkit.probe.torch_devices import apple_gpus, rocm_gpus
from launchkit.units import GIB, MIB

HOST = Host(
    memory_bytes=64 * GIB, memory_available_bytes=60 * GIB, memory_limit_bytes=0, num_cpu_cores=8, disk_free_bytes=0
)


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/box\n", {"box/memory.max": "1073741824\n"}, GIB),
        ("0::/pod/box\n", {"pod/box/memory.max": "max\n", "pod/memory.max": "2147483648\n"}, 2 * GIB),
        ("0::/pod/box\n", {"pod/box/memory.max": "4294967296", "memory.max": "1073741824"}, GIB),
        ("0::/\n", {"memory.max": "max\n"}, 0),
        ("0::/\n", {}, 0),
        ("5:memory:/box\n3:cpu:/other\n", {"memory/box/memory.limit_in_bytes": "1073741824\n"}, GIB),
        ("5:cpu,memory:/box\n", {"memory/memory.limit_in_bytes": "2147483648\n"}, 2 * GIB),  # the group is not mounted
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 0),
    ],
)
def test_the_smallest_control_group_limit_counts(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int
) -> None:
    described = {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in described.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit_bytes(tmp_path) == limit


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path) == 0


def test_this_machine_is_described_as_psutil_sees_it(tmp_path: Path) -> None:
    host = detect_host(tmp_path)
    assert host.memory_bytes == psutil.virtual_memory().total
    assert 1 <= host.num_cpu_cores <= (psutil.cpu_count() or 1)
    assert 0 < host.disk_free_bytes <= psutil.disk_usage(str(tmp_path)).total


def test_a_container_limit_is_the_memory_that_cpu_processes_share() -> None:
    limited = Detection(host=replace(HOST, memory_limit_bytes=16 * GIB))
    cluster = cluster_from(limited, hardware_table(), num_gpus=2)
    assert (cluster.gpu.memory_bytes, cluster.node.host_memory_bytes, cluster.num_gpus) == (8 * GIB, 16 * GIB, 2)
    assert "limited to 16.0 GiB of 64.0 GiB" in cluster.notes[0]


@pytest.mark.parametrize(("spec", "num_processes"), [("cpu", 1), ("2xcpu", 2), ("4× CPU process", 4)])
def test_cpu_specs_have_this_machines_memory(spec: str, num_processes: int) -> None:
    host = detect_host()
    cluster = cluster_for(spec, hardware_table())
    assert cluster.num_gpus == num_processes
    assert cluster.gpu.memory_bytes == host.usable_memory_bytes // num_processes
    assert cluster.node.host_memory_bytes == host.usable_memory_bytes


def test_a_stated_cluster_is_not_mixed_with_this_machine() -> None:
    cluster = cluster_for("4x4090", hardware_table())
    assert not cluster.detected and cluster.node.host_memory_bytes == 0


def test_some_of_the_gpus_found_can_be_asked_for() -> None:
    gpus = tuple(DetectedGpu(index=index, name="NVIDIA L4", memory_bytes=23034 * MIB) for index in range(4))
    found = Detection(host=HOST, gpus=gpus, visible=(0, 1, 2, 3))
    assert cluster_from(found, hardware_table(), num_gpus=2).text == "2× L4"
    with pytest.raises(UnknownGpuError, match="5 GPUs were asked for and 4 are here"):
        cluster_from(found, hardware_table(), num_gpus=5)


def test_an_apple_gpu_has_the_machines_memory() -> None:
    torch: Any = SimpleNamespace(backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: True)))
    gpus = apple_gpus(torch, HOST, chip="Apple M2 Max")
    cluster = cluster_from(Detection(host=HOST, gpus=gpus, visible=(0,), found_by="torch"), hardware_table())
    assert (cluster.gpu.name, cluster.gpu.backend, cluster.gpu.memory_bytes) == ("Apple M2 Max", Backend.MPS, 64 * GIB)


def test_amd_gpus_are_listed_by_torch() -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda _: SimpleNamespace(name="AMD Instinct MI300X", total_memory=192 * GIB),
        mem_get_info=lambda _: (190 * GIB, 192 * GIB),
    )
    gpus = rocm_gpus(SimpleNamespace(version=SimpleNamespace(hip="6.2"), cuda=cuda))
    cluster = cluster_from(Detection(host=HOST, gpus=gpus, visible=(0, 1), found_by="torch"), hardware_table())
    assert (cluster.text, cluster.node.gpu_link, cluster.used_bytes) == ("2× MI300X", "Infinity Fabric", 2 * GIB)
    assert rocm_gpus(SimpleNamespace(version=SimpleNamespace(hip=None), cuda=cuda)) == ()
