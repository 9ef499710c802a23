"""What a look at the machine found, as values. ``launchkit.probe`` fills them, reports and tests read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from launchkit.hardware import Backend


class Topology(StrEnum):
    """The nearest thing that two GPUs share, in ``nvidia-smi topo``'s words, nearest first."""

    SAME_BOARD = "INT"
    ONE_SWITCH = "PIX"
    SWITCHES = "PXB"
    HOST_BRIDGE = "PHB"
    NUMA_NODE = "NODE"
    SYSTEM = "SYS"
    UNKNOWN = "?"


@dataclass(frozen=True, kw_only=True)
class MigInstance:
    """One slice of a GPU in Multi-Instance mode."""

    uuid: str
    name: str
    memory_bytes: int
    used_bytes: int


@dataclass(frozen=True, kw_only=True)
class DetectedGpu:
    """One GPU as its driver describes it; zero and empty mean that the driver would not say.

    ``index`` is the driver's own count. ``used_bytes`` is what processes hold, ``reserved_bytes`` what the driver keeps
    for itself. ``pcie_generation`` is the best that GPU and slot agree on, since an idle link drops to a lower one.
    ``nvlink_peers`` are indices of GPUs at the other end of a link.
    """

    index: int
    name: str
    memory_bytes: int
    backend: Backend = Backend.CUDA
    uuid: str = ""
    used_bytes: int = 0
    reserved_bytes: int = 0
    compute_capability: tuple[int, int] = (0, 0)
    pcie_generation: int = 0
    pcie_lanes: int = 0
    num_nvlinks: int = 0
    nvlink_peers: tuple[int, ...] = ()
    nvlink_to_switch: bool = False
    mig_enabled: bool = False
    mig_instances: tuple[MigInstance, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GpuPair:
    """How two GPUs of one machine reach each other; ``peer_to_peer`` is None where the driver would not say."""

    first: int
    second: int
    topology: Topology
    peer_to_peer: bool | None


class ComputeMode(StrEnum):
    """Who may compute on a GPU."""

    DEFAULT = "default"
    EXCLUSIVE = "exclusive"
    PROHIBITED = "prohibited"


@dataclass(frozen=True, kw_only=True)
class GpuHealth:
    """What can keep a GPU from working; ``None`` and 0 where the driver would not say. ``pids`` compute on it now."""

    index: int
    num_uncorrected_errors: int = 0
    compute_mode: ComputeMode = ComputeMode.DEFAULT
    persistence: bool | None = None
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine around the GPUs. ``memory_limit_bytes`` is a container's limit, 0 without one."""

    memory_bytes: int
    memory_available_bytes: int
    memory_limit_bytes: int
    num_cpu_cores: int
    disk_free_bytes: int

    @property
    def usable_memory_bytes(self) -> int:
        """What processes here can hold together."""
        return min(self.memory_bytes, self.memory_limit_bytes) if self.memory_limit_bytes else self.memory_bytes


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Everything found on this machine.

    ``visible`` are the indices of the GPUs that a process started here would see, in its order; with MIG,
    ``visible_mig`` is the uuid of the slice instead. ``notes`` are sentences for people.
    """

    host: Host
    gpus: tuple[DetectedGpu, ...] = ()
    pairs: tuple[GpuPair, ...] = ()
    visible: tuple[int, ...] = ()
    visible_mig: str = ""
    visible_devices: str | None = None  # CUDA_VISIBLE_DEVICES as it was set
    driver_version: str = ""
    cuda_version: str = ""
    found_by: str = ""  # nvml | torch, empty when nothing was found
    notes: tuple[str, ...] = field(default=())

    @property
    def visible_gpus(self) -> tuple[DetectedGpu, ...]:
        return tuple(self.gpu(index) for index in self.visible)

    def gpu(self, index: int) -> DetectedGpu:
        return next(gpu for gpu in self.gpus if gpu.index == index)

    @property
    def mig_instance(self) -> MigInstance | None:
        """The slice that a process would run on."""
        slices = (piece for gpu in self.gpus for piece in gpu.mig_instances)
        return next((piece for piece in slices if piece.uuid == self.visible_mig), None)
