"""The real detection code against a management library that describes chosen machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytest

from launchkit.units import GIB, MIB

Detect = Callable[..., dict[str, Any]]


class Machine(Protocol):
    def detect(self, **variables: str) -> dict[str, Any]: ...


A100 = "NVIDIA A100-SXM4-40GB,40960,{used},8.0,4,16,ssssssssssss,{mig}"
RTX_4090 = "NVIDIA GeForce RTX 4090,24564,0,8.9,4,16,-,-"
RTX_3090 = "NVIDIA GeForce RTX 3090,24576,0,8.6,4,16,{links},-"


def a100(*, used: int = 0, mig: str = "-") -> str:
    return A100.format(used=used, mig=mig)


def test_everything_the_driver_says_of_a_gpu_is_recorded(detect_with: Detect) -> None:
    found = detect_with(FAKE_NVML=f"{a100(used=1024)};{a100()}")["detected"]
    assert found["gpus"][0] == {
        "index": 0,
        "name": "NVIDIA A100-SXM4-40GB",
        "uuid": "GPU-aafake",
        "backend": "cuda",
        "memory_bytes": 40 * GIB,
        "used_bytes": GIB,
        "reserved_bytes": 500 * MIB,
        "compute_capability": "8.0",
        "pcie_generation": 4,
        "pcie_lanes": 16,
        "num_nvlinks": 12,
        "nvlink_peers": [],
        "nvlink_to_switch": True,
        "mig_enabled": False,
        "mig_instances": [],
    }
    assert (found["found_by"], found["driver_version"], found["cuda_version"]) == ("nvml", "550.54.15", "12.4")
    assert found["pairs"] == [{"gpus": [0, 1], "topology": "PIX", "peer_to_peer": True}]


def test_the_cluster_takes_the_fullest_gpu_and_the_links_that_are_up(detect_with: Detect) -> None:
    cluster = detect_with(FAKE_NVML=f"{a100(used=1024)};{a100(used=3000)}")["cluster"]
    assert (cluster["text"], cluster["link"], cluster["link_bytes_per_s"]) == ("2× A100 SXM 40GB", "NVLink", 300e9)
    assert (cluster["used_bytes"], cluster["reserved_by_driver_bytes"]) == (3000 * MIB, 500 * MIB)
    assert cluster["detected"] and not cluster["notes"]


def test_an_old_driver_counts_its_own_memory_as_used(detect_with: Detect) -> None:
    found = detect_with(FAKE_NVML=a100(used=1024), FAKE_NVML_OLD="1")["detected"]["gpus"][0]
    assert (found["used_bytes"], found["reserved_bytes"]) == (1524 * MIB, 0)


@pytest.mark.parametrize(
    ("answer", "peer_to_peer", "rate"),
    [("yes", True, 31.5e9), ("no", False, 15.75e9), ("mute", False, 15.75e9)],  # mute: the table's word for GeForce
)
def test_peer_to_peer_is_the_drivers_word_then_the_tables(
    detect_with: Detect, answer: str, peer_to_peer: bool, rate: float
) -> None:
    cluster = detect_with(FAKE_NVML=f"{RTX_4090};{RTX_4090}", FAKE_NVML_P2P=answer)["cluster"]
    assert (cluster["link"], cluster["peer_to_peer"]) == ("PCIe", peer_to_peer)
    assert cluster["link_bytes_per_s"] == pytest.approx(rate, rel=0.001)


@pytest.mark.parametrize(
    ("links", "link"),
    [
        (("1111", "0000"), "NVLink"),
        (("1111", "0000", "3333", "2222"), "PCIe"),  # two bridged pairs: the others are reached over PCIe
        (("-", "-"), "PCIe"),
    ],
)
def test_a_bridge_counts_only_where_it_joins_all(detect_with: Detect, links: tuple[str, ...], link: str) -> None:
    machine = ";".join(RTX_3090.format(links=ends) for ends in links)
    cluster = detect_with(FAKE_NVML=machine)["cluster"]
    assert cluster["link"] == link
    assert cluster["link_bytes_per_s"] == (56.25e9 if link == "NVLink" else pytest.approx(31.5e9, rel=0.001))


@pytest.mark.parametrize(
    ("setting", "visible"),
    [
        ("1", [1]),
        ("2,0", [2, 0]),
        ("GPU-bbfake,GPU-a", [1, 0]),
        ("0,7,1", [0]),  # CUDA stops at the first invalid entry
        ("-1", []),
        ("", []),
        ("GPU-", []),  # not unique
        ("0,0", [0]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_does(detect_with: Detect, setting: str, visible: list[int]) -> None:
    found = detect_with(FAKE_NVML=";".join([a100()] * 3), CUDA_VISIBLE_DEVICES=setting)
    assert found["detected"]["visible"] == visible
    assert found["cluster"]["backend"] == ("cuda" if visible else "cpu")
    if visible:
        assert found["cluster"]["text"] == f"{len(visible)}× A100 SXM 40GB"
    else:
        assert "CUDA_VISIBLE_DEVICES" in found["cluster"]["notes"][0]


def test_a_process_gets_one_mig_slice(detect_with: Detect) -> None:
    found = detect_with(FAKE_NVML=a100(mig="1g.5gb:4864+3g.20gb:19968"), CUDA_VISIBLE_DEVICES="MIG-01")
    cluster = found["cluster"]
    assert [piece["memory_bytes"] for piece in found["detected"]["gpus"][0]["mig_instances"]] == [
        4864 * MIB,
        19968 * MIB,
    ]
    assert (cluster["text"], cluster["memory_bytes"]) == ("1× A100 SXM 40GB MIG 3g.20gb", 19968 * MIB)
    assert cluster["bf16_flops_per_s"] == pytest.approx(312e12 * 3 / 7)


@pytest.mark.parametrize(
    ("gpus", "text", "note"),
    [
        ([a100(mig="1g.5gb:4864+1g.5gb:4864")], "1× A100 SXM 40GB MIG 1g.5gb", "2 MIG slices are here"),
        ([a100(mig="+")], "CPU", "no slice exists"),
        ([a100(), a100(mig="1g.5gb:4864")], "1× A100 SXM 40GB", "in MIG mode and left out: GPU 1"),
    ],
)
def test_mig_mode_says_what_is_left(detect_with: Detect, gpus: list[str], text: str, note: str) -> None:
    cluster = detect_with(FAKE_NVML=";".join(gpus))["cluster"]
    assert cluster["text"] == text
    assert note in cluster["notes"][0]


def test_unlike_gpus_are_planned_as_the_smallest(detect_with: Detect) -> None:
    cluster = detect_with(FAKE_NVML=f"{a100()};{RTX_4090}")["cluster"]
    assert cluster["text"] == "2× RTX 4090"
    assert "these GPUs differ" in cluster["notes"][0]


def test_one_name_with_two_memory_sizes_is_told_apart_by_memory(detect_with: Detect) -> None:
    assert (
        detect_with(FAKE_NVML="NVIDIA GeForce RTX 3080,12288,0,8.6,4,16,-,-")["cluster"]["text"] == "1× RTX 3080 12GB"
    )


def test_a_gpu_that_no_table_knows_borrows_speed_and_says_so(detect_with: Detect) -> None:
    cluster = detect_with(FAKE_NVML="NVIDIA Z9000,65536,0,11.0,0,0,-,-")["cluster"]
    assert (cluster["text"], cluster["memory_bytes"]) == ("1× NVIDIA Z9000", 64 * GIB)
    assert cluster["bf16_flops_per_s"] > 0
    assert "NVIDIA Z9000 is not in the table" in cluster["notes"][0]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"FAKE_NVML_INIT": "9"}, "the NVIDIA driver is installed but not loaded"),
        ({"FAKE_NVML_INIT": "18"}, "the NVIDIA driver was updated and not reloaded"),
        ({"FAKE_NVML_INIT": "999"}, "the NVIDIA driver gave no answer"),
        ({"FAKE_NVML": ""}, "the NVIDIA driver lists none"),
    ],
)
def test_a_driver_that_does_not_answer_is_a_sentence(
    detect_with: Detect, variables: dict[str, str], sentence: str
) -> None:
    found = detect_with(**variables)
    assert found["cluster"]["backend"] == "cpu"
    assert sentence in found["detected"]["notes"][0]


def test_a_machine_without_a_driver_is_a_sentence(bare_machine: Machine) -> None:
    found = bare_machine.detect()
    if found["detected"]["found_by"]:
        pytest.skip("this machine has a GPU")
    assert (found["cluster"]["text"], found["cluster"]["detected"]) == ("CPU", True)
    assert found["detected"]["notes"][0].startswith("no GPU found: ")


def test_what_can_keep_a_gpu_from_working_is_recorded(detect_with: Detect) -> None:
    health = detect_with(FAKE_NVML=f"{a100()};{a100()}", FAKE_NVML_HEALTH="2,3,0,4242")["health"]
    assert health == [
        {"index": 0, "num_uncorrected_errors": 2, "compute_mode": "exclusive", "persistence": False, "pids": [4242]},
        {"index": 1, "num_uncorrected_errors": 0, "compute_mode": "default", "persistence": None, "pids": []},
    ]


@pytest.mark.parametrize(("mode", "text"), [(0, "default"), (1, "exclusive"), (2, "prohibited")])
def test_every_compute_mode_is_told(mode: int, text: str, detect_with: Detect) -> None:
    assert detect_with(FAKE_NVML=a100(), FAKE_NVML_HEALTH=f"0,{mode},1,1")["health"][0]["compute_mode"] == text


def test_without_a_driver_there_is_no_health(detect_with: Detect) -> None:
    assert detect_with(FAKE_NVML=a100(), FAKE_NVML_INIT="9")["health"] == []
