"""Whether this host has the devices that the plan is for."""

from __future__ import annotations

import os

import torch

from launchkit.errors import LaunchError
from launchkit.launch.environment import DEVICE_VARIABLE


def check_devices() -> None:
    """Raises ``LaunchError`` when a plan for GPUs meets a host without them, or with fewer than local processes."""
    wanted = os.environ.get(DEVICE_VARIABLE, "cpu")
    if wanted not in ("cuda", "rocm"):
        return
    available = torch.cuda.device_count()
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    if available < needed:
        what = "GPU" if needed == 1 else "GPUs"
        raise LaunchError(
            f"the plan uses {needed} {what} here and torch sees {available}; plan again with --gpus auto, or check "
            "nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
