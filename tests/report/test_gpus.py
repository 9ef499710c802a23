"""The gpus screen and document, of a machine described by hand."""

from __future__ import annotations

import json

import pytest

from launchkit.catalog.hardware import hardware_table
from launchkit.detection import DetectedGpu, Detection, GpuPair, Host, MigInstance, Topology
from launchkit.hardware import parse_gpus
from launchkit.report.gpus import gpus_document, render_gpus
from launchkit.units import GIB

TABLE = hardware_table()
HOST = Host(
    memory_bytes=256 * GIB,
    memory_available_bytes=200 * GIB,
    memory_limit_bytes=128 * GIB,
    num_cpu_cores=32,
    disk_free_bytes=10**12,
)
SLICE = MigInstance(uuid="MIG-0", name="NVIDIA A100 MIG 1g.5gb", memory_bytes=5 * GIB, used_bytes=0)
MACHINE = Detection(
    host=HOST,
    gpus=(
        DetectedGpu(index=0, name="NVIDIA A100-SXM4-40GB", memory_bytes=40 * GIB, used_bytes=GIB, num_nvlinks=12),
        DetectedGpu(
            index=1, name="NVIDIA A100-SXM4-40GB", memory_bytes=40 * GIB, mig_enabled=True, mig_instances=(SLICE,)
        ),
    ),
    pairs=(GpuPair(first=0, second=1, topology=Topology.SYSTEM, peer_to_peer=None),),
    visible=(0,),
    driver_version="550.54.15",
    cuda_version="12.4",
    found_by="nvml",
    notes=("in MIG mode and left out: GPU 1",),
)


def test_what_was_found_stands_first() -> None:
    assert render_gpus(MACHINE, TABLE, width=120).splitlines()[:6] == [
        "Found here",
        "  driver NVIDIA 550.54.15, CUDA up to 12.4",
        "  GPU 0  NVIDIA A100-SXM4-40GB, 40.0 GiB, 1.0 GiB in use, 12 NVLinks",
        "  GPU 1  NVIDIA A100-SXM4-40GB, 40.0 GiB, MIG: NVIDIA A100 MIG 1g.5gb, not visible",
        "  host   256.0 GiB (128.0 GiB for this container), 32 cores, 1.0 TB free on disk",
        "  note   in MIG mode and left out: GPU 1",
    ]


@pytest.mark.parametrize(("width", "has_link"), [(120, True), (79, False), (60, False)])
def test_a_narrow_screen_loses_columns_and_no_rows(width: int, has_link: bool) -> None:
    text = render_gpus(MACHINE, TABLE, width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert ("Infinity Fabric" in text) == has_link
    lines = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert all(node.name in lines for node in TABLE.nodes)
    assert lines.count("RTX-4090") == 1 and lines.count("cpu") == 1


def test_every_name_shown_can_be_typed() -> None:
    for row in gpus_document(MACHINE, TABLE)["gpus"]:
        spec = row["spec"] if row["memory_bytes"] or row["backend"] == "cpu" else f"{row['spec']}-32GiB"
        assert parse_gpus(spec, TABLE).gpu.name.startswith(row["name"])


def test_the_document_is_plain_json() -> None:
    document = gpus_document(MACHINE, TABLE)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert list(document) == ["schema_version", "detected", "gpus", "nodes", "shorthands"]
    assert document["detected"]["gpus"][1]["mig_instances"][0]["name"] == SLICE.name
    assert document["detected"]["pairs"] == [{"gpus": [0, 1], "topology": "SYS", "peer_to_peer": None}]
    assert document["detected"]["host"]["memory_limit_bytes"] == 128 * GIB
    assert len(document["gpus"]) == len(TABLE.gpus) and len(document["nodes"]) == len(TABLE.nodes)
