"""Will it fit, how fast, and how do I start it: planning and launching fine-tunes.

::

    import launchkit

    plan = launchkit.plan("Qwen/Qwen3-8B", gpus="4x4090", seq_len=4096)
    print(plan.chosen.scenario.strategy.name, plan.chosen.estimate.device_peak_bytes)
    candidate = launchkit.estimate("./model", gpus="2xcpu", strategy="fsdp2")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

# First, so that a later import of the submodule does not put it in the place of the function below.
import launchkit.plan

if TYPE_CHECKING:
    from launchkit.plan import Candidate, Plan

__version__ = "0.1.0"
