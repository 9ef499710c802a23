"""What ``launchkit doctor`` knows of a machine. Checks read these values, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from launchkit.detection import Detection, GpuHealth


@dataclass(frozen=True, kw_only=True)
class System:
    """The interpreter and what it runs on. ``container`` names its kind, empty outside of one."""

    python: str
    python_prefix: str = ""
    platform: str = "Linux"
    machine: str = "x86_64"
    is_wsl: bool = False
    container: str = ""


@dataclass(frozen=True, kw_only=True)
class Need:
    """One requirement: ``wanted`` (``transformers>=5.0``) of ``by``, an extra of launchkit's or another package."""

    by: str
    package: str
    wanted: str
    installed: str = ""
    is_met: bool = False


@dataclass(frozen=True, kw_only=True)
class Torch:
    """What the installed torch says of itself. ``cuda`` and ``hip`` are what it was built for, empty for neither;
    ``architectures`` are its kernels' (``sm_90``, ``compute_120``). ``error`` is why it cannot be imported."""

    version: str = ""
    cuda: str = ""
    hip: str = ""
    architectures: tuple[str, ...] = ()
    num_devices: int = 0
    broken_extensions: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Directory:
    """A place that runs write to."""

    purpose: str
    path: str
    free_bytes: int
    is_writable: bool
    setting: str  # the variable, or the flag, that names another


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the system lets a process have; -1 is no limit, 0 is not known."""

    shared_memory_bytes: int = 0
    open_files: int = 0
    locked_memory_bytes: int = -1
    processes: int = -1


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Paths of what builds extensions, empty where there is none; ``nvcc_version`` is its CUDA release."""

    nvcc: str = ""
    nvcc_version: str = ""
    ninja: str = ""
    compiler: str = ""
    stale_locks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Hub:
    """``token_from`` says where a token was found, never the token. ``answer`` is what the hub said, if it was asked:
    empty for well."""

    endpoint: str
    token_from: str = ""
    was_asked: bool = False
    answer: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything together. ``versions`` are those of installed packages; ``hidden_files`` are configurations that act
    unasked, by what reads them."""

    system: System
    detection: Detection
    health: tuple[GpuHealth, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    torch: Torch | None = None
    limits: Limits = field(default_factory=Limits)
    directories: tuple[Directory, ...] = ()
    tools: Tools = field(default_factory=Tools)
    hub: Hub = field(default_factory=lambda: Hub(endpoint="https://huggingface.co"))
    environment: Mapping[str, str] = field(default_factory=dict)
    hidden_files: Mapping[str, str] = field(default_factory=dict)
    interfaces: tuple[str, ...] = ()
    has_infiniband: bool = False
    bitsandbytes_cuda: tuple[str, ...] = ()

    @property
    def has_nvidia(self) -> bool:
        return self.detection.found_by == "nvml"
