"""Installed packages and what they want of each other, read from their metadata: nothing is imported."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import launchkit
from launchkit.checkup.facts import Need

DISTRIBUTION = "launchkit-planner"
EXTRAS = ("trace", "train", "deepspeed", "qlora", "fp8")
REPORTED = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "huggingface-hub",
    "nvidia-ml-py",
)
# Besides, those that break when they were made for other versions of these.
WATCHED = (
    *REPORTED,
    "axolotl",
    "flash-attn",
    "flash-attn-3",
    "liger-kernel",
    "numpy",
    "pynvml",
    "safetensors",
    "tokenizers",
    "torchao",
    "torchaudio",
    "torchvision",
    "triton",
    "unsloth",
    "xformers",
)


def installed_version(package: str) -> str:
    """Empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def installed_versions() -> dict[str, str]:
    """The watched packages that are installed."""
    return {name: version for name in WATCHED if (version := installed_version(name))}


def needs(versions: Mapping[str, str]) -> tuple[Need, ...]:
    """launchkit's extras, and what each watched package wants of another one."""
    own = (need for extra in EXTRAS for need in _extra_needs(extra))
    others = (need for package in versions for need in _package_needs(package))
    return (*own, *others)


def _extra_needs(extra: str) -> Iterator[Need]:
    for text in _extras().get(extra, ()):
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) != DISTRIBUTION:
            yield _need(requirement, by=f"{DISTRIBUTION}[{extra}]")


def _extras() -> dict[str, list[str]]:
    """The extras of this checkout, else of the installed distribution."""
    checkout = Path(launchkit.__file__).parents[1] / "pyproject.toml"
    if checkout.is_file():
        project: dict[str, Any] = tomllib.loads(checkout.read_text(encoding="utf-8")).get("project", {})
        return dict(project.get("optional-dependencies", {}))
    found: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    for text in _requires(DISTRIBUTION):
        requirement = Requirement(text)
        for extra in EXTRAS:
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                found[extra].append(text)
    return found


def _package_needs(package: str) -> Iterator[Need]:
    for text in _requires(package):
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # older packages wrote versions that no parser takes today
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.specifier and canonicalize_name(requirement.name) in WATCHED:
            yield _need(requirement, by=f"{package} {installed_version(package)}")


def _requires(package: str) -> list[str]:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def _need(requirement: Requirement, *, by: str) -> Need:
    installed = installed_version(requirement.name)
    return Need(
        by=by,
        package=requirement.name,
        wanted=f"{requirement.name}{requirement.specifier}",
        installed=installed,
        is_met=bool(installed) and requirement.specifier.contains(installed, prereleases=True),
    )
