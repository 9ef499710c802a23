"""Which GPUs a process sees, from ``CUDA_VISIBLE_DEVICES``."""

from __future__ import annotations

from dataclasses import dataclass

from launchkit.detection import DetectedGpu


@dataclass(frozen=True, kw_only=True)
class Visible:
    """Indices in the order of the variable, or one MIG slice, and what people should know."""

    indices: tuple[int, ...] = ()
    mig_uuid: str = ""
    notes: tuple[str, ...] = ()


def visible_gpus(gpus: tuple[DetectedGpu, ...], setting: str | None) -> Visible:
    """Reads the variable as CUDA does: indices or uuids (a unique beginning is enough), up to the first invalid one.

    Source: CUDA C++ Programming Guide, "CUDA Environment Variables". A process can use one MIG slice and no more.
    """
    if setting is None:
        return _everything(gpus)
    if not setting.strip():
        return Visible(notes=("CUDA_VISIBLE_DEVICES is set to nothing: no GPU will be seen",))
    indices: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.startswith("MIG-"):
            return _mig_slice(gpus, entry)
        index = _index(gpus, entry)
        if index is None or index in indices:
            problem = (
                f"CUDA_VISIBLE_DEVICES names {entry!r}, which is not here (or twice): it and all after it are hidden"
            )
            return _of_indices(gpus, tuple(indices), (problem,))
        indices.append(index)
    return _of_indices(gpus, tuple(indices), _order_notes(gpus, setting))


def _everything(gpus: tuple[DetectedGpu, ...]) -> Visible:
    return _of_indices(gpus, tuple(gpu.index for gpu in gpus), ())


def _of_indices(gpus: tuple[DetectedGpu, ...], indices: tuple[int, ...], notes: tuple[str, ...]) -> Visible:
    """GPUs in MIG mode cannot be used whole: CUDA gives a process their first slice, and only when no GPU is left."""
    chosen = [gpu for index in indices for gpu in gpus if gpu.index == index]
    whole = tuple(gpu.index for gpu in chosen if not gpu.mig_enabled)
    sliced = [gpu for gpu in chosen if gpu.mig_enabled]
    if sliced and whole:
        notes += (f"in MIG mode and left out: GPU {', '.join(str(gpu.index) for gpu in sliced)}",)
    if whole or not sliced:
        return Visible(indices=whole, notes=notes)
    pieces = [piece for gpu in sliced for piece in gpu.mig_instances]
    if not pieces:
        return Visible(
            notes=(*notes, "MIG mode is on and no slice exists; create one with: sudo nvidia-smi mig -cgi 0 -C")
        )
    if len(pieces) > 1:
        notes += (
            f"{len(pieces)} MIG slices are here; one process uses one: choose it with CUDA_VISIBLE_DEVICES=MIG-…",
        )
    return Visible(indices=(sliced[0].index,), mig_uuid=pieces[0].uuid, notes=notes)


def _mig_slice(gpus: tuple[DetectedGpu, ...], entry: str) -> Visible:
    for gpu in gpus:
        for piece in gpu.mig_instances:
            if piece.uuid.startswith(entry):
                return Visible(indices=(gpu.index,), mig_uuid=piece.uuid)
    return Visible(notes=(f"CUDA_VISIBLE_DEVICES names {entry!r}, which is not here: no GPU will be seen",))


def _index(gpus: tuple[DetectedGpu, ...], entry: str) -> int | None:
    if entry.isdecimal():
        return int(entry) if int(entry) in {gpu.index for gpu in gpus} else None
    matching = [gpu.index for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    return matching[0] if len(matching) == 1 else None


def _order_notes(gpus: tuple[DetectedGpu, ...], setting: str) -> tuple[str, ...]:
    if "GPU-" in setting or len({gpu.name for gpu in gpus}) == 1:
        return ()
    return ("numbers in CUDA_VISIBLE_DEVICES count the fastest GPU first unless CUDA_DEVICE_ORDER=PCI_BUS_ID is set",)
