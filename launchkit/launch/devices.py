"""Whether a plan's GPUs are the ones of the machine that is to carry it out."""

from __future__ import annotations

from collections.abc import Sequence

from launchkit.detection import DetectedGpu, Detection
from launchkit.errors import UsageError
from launchkit.hardware import Backend, Cluster, Gpu, format_gpus
from launchkit.units import gib

# Drivers differ by this share in what they report of the same card; less is another card.
LEAST_MEMORY_SHARE = 0.95


def require_devices(cluster: Cluster, detection: Detection, *, num_processes: int, model: str) -> None:
    """Raises ``UsageError`` where this node's ``num_processes`` would not find the GPUs that ``cluster`` says: too few,
    with less memory, or of an older generation. Larger ones will do."""
    if cluster.gpu.backend is Backend.CPU:
        return
    here, plan = detection.visible_gpus, f"launchkit plan {model} --gpus"
    if not here:
        raise UsageError(
            f"the plan is for {cluster.text} and no GPU is seen here; launch it where they are, or plan for this "
            f"machine: {plan} cpu"
        )
    used = here[:num_processes]
    if len(used) < num_processes or not all(_will_do(gpu, cluster.gpu, detection) for gpu in used):
        wanted = f"{num_processes} GPU{'s' * (num_processes > 1)} per node"
        raise UsageError(
            f"the plan is for {format_gpus(cluster)}, {wanted}, and here {_text(here)}; launch it where those are, or "
            f"plan for these: {plan} auto"
        )


def _will_do(found: DetectedGpu, planned: Gpu, detection: Detection) -> bool:
    slice_of_it = detection.mig_instance
    memory_bytes = slice_of_it.memory_bytes if slice_of_it else found.memory_bytes
    is_smaller = memory_bytes < LEAST_MEMORY_SHARE * planned.memory_bytes
    is_older = (0, 0) < found.compute_capability < planned.compute_capability
    return found.backend is planned.backend and not is_smaller and not is_older


def _text(gpus: Sequence[DetectedGpu]) -> str:
    """``is 1 × Tesla T4 (15.0 GiB)``; kinds that differ one after the other."""
    kinds: dict[tuple[str, int], int] = {}
    for gpu in gpus:
        kinds[gpu.name, gpu.memory_bytes] = kinds.get((gpu.name, gpu.memory_bytes), 0) + 1
    parts = [f"{number} × {name} ({gib(memory_bytes)})" for (name, memory_bytes), number in kinds.items()]
    return f"{'is' if len(gpus) == 1 else 'are'} {' and '.join(parts)}"
