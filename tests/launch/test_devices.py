"""A plan made for GPUs, on a machine that has others, fewer or none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from launchkit.catalog.hardware import hardware_table
from launchkit.detection import DetectedGpu, Detection, Host
from launchkit.errors import UsageError
from launchkit.hardware import parse_gpus
from launchkit.launch.devices import require_devices
from launchkit.units import GIB, MIB

HOST = Host(
    memory_bytes=64 * GIB, memory_available_bytes=64 * GIB, memory_limit_bytes=0, num_cpu_cores=8, disk_free_bytes=GIB
)
RTX_4090 = DetectedGpu(index=0, name="RTX 4090", memory_bytes=24_564 * MIB, compute_capability=(8, 9))
RTX_3090 = replace(RTX_4090, name="RTX 3090", memory_bytes=24_576 * MIB, compute_capability=(8, 6))
H100 = replace(RTX_4090, name="H100", memory_bytes=81_559 * MIB, compute_capability=(9, 0))
T4 = replace(RTX_4090, name="Tesla T4", memory_bytes=15_360 * MIB, compute_capability=(7, 5))


def seen(*gpus: DetectedGpu) -> Detection:
    numbered = tuple(replace(gpu, index=index) for index, gpu in enumerate(gpus))
    return Detection(host=HOST, gpus=numbered, visible=tuple(range(len(gpus))))


def require(spec: str, detection: Detection) -> None:
    cluster = parse_gpus(spec, hardware_table())
    require_devices(cluster, detection, num_processes=cluster.node.num_gpus, model="Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("spec", "here"),
    [
        ("2x4090", (RTX_4090, RTX_4090)),
        ("2x4090", (RTX_4090,) * 4),
        ("2x4090", (H100, H100)),
        ("24GiB", (RTX_3090,)),
        ("2x2x4090", (RTX_4090, RTX_4090)),  # this node's
        ("2x4090", (RTX_4090, RTX_4090, T4)),  # the third is not used
        ("2xcpu", ()),
    ],
)
def test_the_planned_gpus_or_larger_ones_will_do(spec: str, here: tuple[DetectedGpu, ...]) -> None:
    require(spec, seen(*here))


@pytest.mark.parametrize(
    ("spec", "here", "message"),
    [
        (
            "2x4090",
            (),
            "2× RTX 4090 and no GPU is seen here; .*: launchkit plan Qwen/Qwen3-8B --gpus cpu",
        ),
        ("2x4090", (RTX_4090,), "2xRTX-4090, 2 GPUs per node, and here is 1 × RTX 4090 (24.0 GiB); .* --gpus auto"),
        ("1x4090", (T4,), "1 GPU per node, and here is 1 × Tesla T4 (15.0 GiB)"),
        ("1x4090", (RTX_3090,), "here is 1 × RTX 3090"),
        ("2xH100", (H100, RTX_4090), "here are 1 × H100 (79.6 GiB) and 1 × RTX 4090 (24.0 GiB)"),
    ],
)
def test_others_are_refused_in_one_line(spec: str, here: tuple[DetectedGpu, ...], message: str) -> None:
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    with pytest.raises(UsageError, match=pattern) as caught:
        require(spec, seen(*here))
    assert "\n" not in str(caught.value)
