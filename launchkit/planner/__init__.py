"""Enumerate, judge, rank: from a model, a cluster and a request to a Plan. Pure: equal arguments, equal plans."""

from __future__ import annotations

from launchkit.planner.choose import plan
from launchkit.planner.evaluate import estimate, program_key

__all__ = ["estimate", "plan", "program_key"]
