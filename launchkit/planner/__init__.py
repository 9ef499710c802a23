"""Enumerate, judge, rank: from a model, a cluster and a request to a Plan. Pure: equal arguments, equal plans."""

from __future__ import annotations

from launchkit.planner.choose import plan
from launchkit.planner.data import fit_to_data
from launchkit.planner.evaluate import program_key
from launchkit.planner.one import estimate

__all__ = ["estimate", "fit_to_data", "plan", "program_key"]
