"""Apple and AMD GPUs, which only torch can ask about."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
from pathlib import Path
from typing import Any

from launchkit.detection import DetectedGpu, Host
from launchkit.hardware import Backend


def read_torch(host: Host) -> tuple[DetectedGpu, ...]:
    """The devices that the installed torch can use besides CUDA's.

    Importing torch takes seconds, so it is left alone on machines that can have no such device.
    """
    on_apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    has_rocm_driver = Path("/dev/kfd").exists()
    if not (on_apple or has_rocm_driver) or importlib.util.find_spec("torch") is None:
        return ()
    try:
        import torch  # lazy: seconds, and only where it can find something
    except (ImportError, OSError):  # a torch built for other libraries than are here
        return ()
    if on_apple:
        return apple_gpus(torch, host, chip=_apple_chip())
    return rocm_gpus(torch)


def apple_gpus(torch: Any, host: Host, *, chip: str) -> tuple[DetectedGpu, ...]:
    """The one GPU of an Apple chip; its memory is the machine's."""
    if not torch.backends.mps.is_available():
        return ()
    return (DetectedGpu(index=0, name=chip, backend=Backend.MPS, memory_bytes=host.usable_memory_bytes),)


def rocm_gpus(torch: Any) -> tuple[DetectedGpu, ...]:
    """AMD GPUs, which torch lists under ``torch.cuda``."""
    if not torch.version.hip or not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        found.append(
            DetectedGpu(
                index=index,
                name=properties.name,
                backend=Backend.ROCM,
                memory_bytes=properties.total_memory,
                used_bytes=total_bytes - free_bytes,
            )
        )
    return tuple(found)


def _apple_chip() -> str:
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "Apple GPU"
