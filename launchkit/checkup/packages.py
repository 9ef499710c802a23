"""Python and its packages: versions, and torch beside the driver."""

from __future__ import annotations

from collections.abc import Iterator

from launchkit.checkup.facts import Facts, Need, Torch
from launchkit.checkup.rows import Row, ok, problem, warning

EXTRA_PREFIX = "launchkit-planner"
GET_TORCH = "the torch for this driver, chosen at https://pytorch.org/get-started/locally"
SHOWN_VERSIONS = ("torch", "transformers", "accelerate", "peft", "trl", "deepspeed", "bitsandbytes", "datasets")


def check_python(facts: Facts) -> Iterator[Row]:
    system = facts.system
    yield ok(f"Python {system.python} in {system.python_prefix} on {system.platform} {system.machine}")
    shown = [f"{name} {facts.versions[name]}" for name in SHOWN_VERSIONS if name in facts.versions]
    if shown:
        yield ok(", ".join(shown))


def check_needs(facts: Facts) -> Iterator[Row]:
    """launchkit's extras, then what installed packages want of each other."""
    extras = dict.fromkeys(need.by for need in facts.needs if need.by.startswith(EXTRA_PREFIX))
    for extra in extras:
        yield from _extra(extra, [need for need in facts.needs if need.by == extra])
    for need in facts.needs:
        if need.by not in extras and need.installed and not need.is_met:
            yield warning(
                f"{need.by} wants {need.wanted}, {need.installed} is installed", f"pip install '{need.wanted}'"
            )


def _extra(extra: str, needs: list[Need]) -> Iterator[Row]:
    missing = [need for need in needs if not need.installed]
    for need in needs:
        if need.installed and not need.is_met:
            yield problem(
                f"{need.package} {need.installed} is installed, {extra} wants {need.wanted}",
                f"pip install --upgrade '{need.wanted}'",
            )
    if missing:
        names = ", ".join(need.package for need in missing)
        yield ok(
            f"{extra} is not whole: {names} {'is' if len(missing) == 1 else 'are'} not installed",
            f"pip install '{extra}'",
        )


def check_pynvml(facts: Facts) -> Iterator[Row]:
    """PyPI's ``pynvml`` is no longer made and puts its own module over that of ``nvidia-ml-py``."""
    if "pynvml" in facts.versions:
        yield warning(
            f"the package pynvml {facts.versions['pynvml']} is no longer made and stands in for nvidia-ml-py",
            "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py",
        )


def check_torch(facts: Facts) -> Iterator[Row]:
    torch = facts.torch
    if torch is None:
        yield ok("torch is not installed: catalogued models can be planned, nothing can be run", "pip install torch")
    elif torch.error:
        yield problem(f"torch cannot be imported: {torch.error}", "pip install --force-reinstall torch")
    elif facts.has_nvidia:
        yield from _beside_the_driver(torch, facts)
    else:
        built = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "the CPU"
        yield ok(f"torch {torch.version} is built for {built}")


def _beside_the_driver(torch: Torch, facts: Facts) -> Iterator[Row]:
    driver, driver_cuda = facts.detection.driver_version, facts.detection.cuda_version
    if not torch.cuda:
        yield problem(f"torch {torch.version} is built without CUDA, and an NVIDIA GPU is here", GET_TORCH)
    elif driver_cuda and _major(torch.cuda) > _major(driver_cuda):
        yield problem(
            f"torch is built for CUDA {torch.cuda}, the driver {driver} has CUDA {driver_cuda}",
            f"a newer driver, or {GET_TORCH}",
        )
    elif facts.detection.visible and not torch.num_devices:
        yield problem(
            f"torch {torch.version} sees none of the {len(facts.detection.visible)} GPUs",
            "python -c 'import torch; torch.cuda.init()', which says why",
        )
    else:
        yield ok(f"torch is built for CUDA {torch.cuda}, the driver {driver} has CUDA {driver_cuda}")


def _major(version: str) -> int:
    head = version.split(".", 1)[0]
    return int(head) if head.isdecimal() else 0


def check_extensions(facts: Facts) -> Iterator[Row]:
    """Compiled packages that were tried beside torch."""
    if facts.torch is None:
        return
    for package, error in facts.torch.broken_extensions.items():
        yield problem(
            f"{package} cannot be loaded: {error}",
            f"pip install --force-reinstall --no-cache-dir --no-build-isolation {package}",
        )


def check_bitsandbytes(facts: Facts) -> Iterator[Row]:
    """bitsandbytes ships one library per CUDA and takes a near one where torch's is missing."""
    torch = facts.torch
    if "bitsandbytes" not in facts.versions or torch is None or not torch.cuda:
        return
    wanted = "".join(torch.cuda.split(".")[:2])
    if wanted not in facts.bitsandbytes_cuda:
        there = ", ".join(facts.bitsandbytes_cuda) or "none"
        yield warning(
            f"bitsandbytes {facts.versions['bitsandbytes']} has no library for CUDA {torch.cuda} (there are: {there})",
            "pip install --upgrade bitsandbytes",
        )
