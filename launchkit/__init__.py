"""Will it fit, how fast, and how do I start it: planning and launching fine-tunes.

::

    import launchkit

    plan = launchkit.plan("Qwen/Qwen3-8B", gpus="4x4090", seq_len=4096)
    print(plan.chosen.scenario.strategy.name, plan.chosen.estimate.device_peak_bytes)
    candidate = launchkit.estimate("./model", gpus="2xcpu", strategy="fsdp2")
    check = launchkit.check("axolotl.yml", gpus="4x4090")

``flags`` are the command line's, spelled with underscores, and ``preset`` names those of a published recipe. The values
that come back are ``launchkit.plan``'s classes ``Plan`` and ``Candidate``, and ``launchkit.serialize`` turns them into
the JSON of ``--json``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from launchkit.export.check import FileCheck
    from launchkit.plan import Candidate, Plan

__version__ = "0.1.0"
__all__ = ["__version__", "check", "estimate", "plan"]


class _Package(ModuleType):
    """This package. Importing its submodule ``launchkit.plan`` must not hide the function of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "plan" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def plan(
    model: str,
    *,
    preset: str | None = None,
    trust_remote_code: bool = False,
    in_full: bool = False,
    **flags: str | int | bool | None,
) -> Plan:
    """The best way to fine-tune ``model`` (hub id, directory or ``config.json``) under what ``flags`` ask for."""
    from launchkit import api  # lazy: importing launchkit costs next to nothing

    return api.plan(model, preset=preset, trust_remote_code=trust_remote_code, in_full=in_full, **flags)


def estimate(
    model: str, *, preset: str | None = None, trust_remote_code: bool = False, **flags: str | int | bool | None
) -> Candidate:
    """Memory and speed of exactly one scenario; a flag that is not given has the command line's default."""
    from launchkit import api  # lazy, as above

    return api.estimate(model, preset=preset, trust_remote_code=trust_remote_code, **flags)


def check(
    path: str | Path,
    *,
    model: str | None = None,
    preset: str | None = None,
    trust_remote_code: bool = False,
    **flags: str | int | bool | None,
) -> FileCheck:
    """What a configuration file of Axolotl, accelerate, DeepSpeed or TRL takes, what is wrong in it, what to change."""
    from launchkit import api  # lazy, as above

    return api.check(path, model=model, preset=preset, trust_remote_code=trust_remote_code, **flags)
