"""Everything about this machine in one value."""

from __future__ import annotations

import os
from pathlib import Path

from launchkit.detection import Detection, Host
from launchkit.probe.host import detect_host
from launchkit.probe.visible import visible_gpus


def detect(directory: Path | None = None) -> Detection:
    """Looks at GPUs, host memory and the free disk of ``directory`` (default: the current one)."""
    from launchkit.probe.nvml import read_nvml  # lazy: not wanted by who names the GPUs to plan for

    host = detect_host(directory)
    reading = read_nvml()
    if not reading.gpus:
        return _without_nvidia(host, problem=reading.problem)
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = visible_gpus(reading.gpus, setting)
    return Detection(
        host=host,
        gpus=reading.gpus,
        pairs=reading.pairs,
        visible=visible.indices,
        visible_mig=visible.mig_uuid,
        visible_devices=setting,
        driver_version=reading.driver_version,
        cuda_version=reading.cuda_version,
        found_by="nvml",
        notes=visible.notes,
    )


def _without_nvidia(host: Host, *, problem: str) -> Detection:
    from launchkit.probe.torch_devices import read_torch  # lazy, as above

    gpus = read_torch(host)
    if not gpus:
        return Detection(host=host, notes=(f"no GPU found: {problem or 'the NVIDIA driver lists none'}",))
    return Detection(host=host, gpus=gpus, visible=tuple(gpu.index for gpu in gpus), found_by="torch")
