"""NVIDIA GPUs as their management library describes them.

Every answer is optional: virtual machines, containers and old drivers refuse some of them, which leaves a zero in the
description and never stops the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from launchkit.detection import ComputeMode, DetectedGpu, GpuHealth, GpuPair, MigInstance, Topology

_T = TypeVar("_T")

_TOPOLOGIES = {
    pynvml.NVML_TOPOLOGY_INTERNAL: Topology.SAME_BOARD,
    pynvml.NVML_TOPOLOGY_SINGLE: Topology.ONE_SWITCH,
    pynvml.NVML_TOPOLOGY_MULTIPLE: Topology.SWITCHES,
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: Topology.HOST_BRIDGE,
    pynvml.NVML_TOPOLOGY_NODE: Topology.NUMA_NODE,
    pynvml.NVML_TOPOLOGY_SYSTEM: Topology.SYSTEM,
}
# nvml.h: NVML_P2P_CAPS_INDEX_READ is 0; nvidia-ml-py 12 and 13 define it as the tuple (0,), which no call accepts.
_P2P_READ = 0


@dataclass(frozen=True, kw_only=True)
class NvmlReading:
    """What the library said of the whole machine; ``problem`` is a sentence when it said nothing."""

    gpus: tuple[DetectedGpu, ...] = ()
    pairs: tuple[GpuPair, ...] = ()
    driver_version: str = ""
    cuda_version: str = ""
    problem: str = ""


def read_nvml() -> NvmlReading:
    """Asks the library about every GPU of the machine, whatever ``CUDA_VISIBLE_DEVICES`` says."""
    try:
        with _session():
            return _read()
    except pynvml.NVMLError as error:
        return NvmlReading(problem=_PROBLEMS.get(error.value, f"the NVIDIA driver gave no answer ({error})"))


_PROBLEMS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver is installed (libnvidia-ml.so.1 was not found)",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed but not loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA driver was updated and not reloaded; restart the machine",
    pynvml.NVML_ERROR_NO_PERMISSION: "the NVIDIA driver may not be used by this user",
}


_COMPUTE_MODES = {
    pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: ComputeMode.EXCLUSIVE,
    pynvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD: ComputeMode.EXCLUSIVE,
    pynvml.NVML_COMPUTEMODE_PROHIBITED: ComputeMode.PROHIBITED,
}


def read_health() -> tuple[GpuHealth, ...]:
    """What may keep each GPU from working; nothing where there is no driver."""
    try:
        with _session():
            handles = ((index, _ask(pynvml.nvmlDeviceGetHandleByIndex, index)) for index in range(_count()))
            return tuple(_health(index, handle) for index, handle in handles if handle is not None)
    except pynvml.NVMLError:
        return ()


def _health(index: int, handle: Any) -> GpuHealth:
    errors = _ask(
        pynvml.nvmlDeviceGetTotalEccErrors, handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    )
    mode, persistence = _ask(pynvml.nvmlDeviceGetComputeMode, handle), _ask(pynvml.nvmlDeviceGetPersistenceMode, handle)
    processes = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    return GpuHealth(
        index=index,
        num_uncorrected_errors=errors or 0,
        compute_mode=_COMPUTE_MODES.get(mode, ComputeMode.DEFAULT),
        persistence=None if persistence is None else bool(persistence),
        pids=tuple(process.pid for process in processes),
    )


def _count() -> int:
    return _ask(pynvml.nvmlDeviceGetCount) or 0


@contextmanager
def _session() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _read() -> NvmlReading:
    handles = {index: _ask(pynvml.nvmlDeviceGetHandleByIndex, index) for index in range(pynvml.nvmlDeviceGetCount())}
    present = {index: handle for index, handle in handles.items() if handle is not None}
    buses = {_bus_id(handle): index for index, handle in present.items()}
    cuda = _ask(pynvml.nvmlSystemGetCudaDriverVersion_v2) or 0
    return NvmlReading(
        gpus=tuple(_gpu(index, handle, buses) for index, handle in present.items()),
        pairs=tuple(
            _pair(first, second, present) for first in sorted(present) for second in sorted(present) if first < second
        ),
        driver_version=_ask(pynvml.nvmlSystemGetDriverVersion) or "",
        cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
    )


def _ask(function: Callable[..., _T], *arguments: Any) -> _T | None:
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _gpu(index: int, handle: Any, buses: dict[str, int]) -> DetectedGpu:
    total, used, reserved = _memory(handle)
    links = _active_links(handle)
    peers = {buses[bus] for link in links if (bus := _remote_bus(handle, link)) in buses}
    return DetectedGpu(
        index=index,
        name=_ask(pynvml.nvmlDeviceGetName, handle) or "unknown NVIDIA GPU",
        uuid=_ask(pynvml.nvmlDeviceGetUUID, handle) or "",
        memory_bytes=total,
        used_bytes=used,
        reserved_bytes=reserved,
        compute_capability=_ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle) or (0, 0),
        pcie_generation=_ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle) or 0,
        pcie_lanes=_ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle) or 0,
        num_nvlinks=len(links),
        nvlink_peers=tuple(sorted(peers)),
        nvlink_to_switch=any(_leads_to_switch(handle, link) for link in links),
        mig_enabled=(_ask(pynvml.nvmlDeviceGetMigMode, handle) or [0])[0] == pynvml.NVML_DEVICE_MIG_ENABLE,
        mig_instances=tuple(_mig_instances(handle)),
    )


def _memory(handle: Any) -> tuple[int, int, int]:
    """Total, used by processes, reserved by the driver. The first version of the call counts reserved as used."""
    newer = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    if newer is not None:
        return newer.total, newer.used, newer.reserved
    older = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return (older.total, older.used, 0) if older is not None else (0, 0, 0)


def _active_links(handle: Any) -> list[int]:
    links = range(pynvml.NVML_NVLINK_MAX_LINKS)
    return [link for link in links if _ask(pynvml.nvmlDeviceGetNvLinkState, handle, link)]


def _remote_bus(handle: Any, link: int) -> str:
    info = _ask(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
    return _text(info.busId).lower() if info is not None else ""


def _leads_to_switch(handle: Any, link: int) -> bool:
    kind = _ask(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
    return bool(kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH)


def _bus_id(handle: Any) -> str:
    info = _ask(pynvml.nvmlDeviceGetPciInfo, handle)
    return _text(info.busId).lower() if info is not None else ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _mig_instances(handle: Any) -> Iterator[MigInstance]:
    for number in range(_ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        piece = _ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        if piece is None:
            continue
        total, used, _ = _memory(piece)
        yield MigInstance(
            uuid=_ask(pynvml.nvmlDeviceGetUUID, piece) or "",
            name=_ask(pynvml.nvmlDeviceGetName, piece) or "MIG slice",
            memory_bytes=total,
            used_bytes=used,
        )


def _pair(first: int, second: int, handles: dict[int, Any]) -> GpuPair:
    level = _ask(pynvml.nvmlDeviceGetTopologyCommonAncestor, handles[first], handles[second])
    status = _ask(pynvml.nvmlDeviceGetP2PStatus, handles[first], handles[second], _P2P_READ)
    return GpuPair(
        first=first,
        second=second,
        topology=Topology.UNKNOWN if level is None else _TOPOLOGIES.get(level, Topology.UNKNOWN),
        peer_to_peer=None if status is None else status == pynvml.NVML_P2P_STATUS_OK,
    )
