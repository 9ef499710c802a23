"""Processes of Python's own that do for this one what it had better not do itself."""

from __future__ import annotations

import os
from pathlib import Path


def environment_of_child(**variables: str) -> dict[str, str]:
    """This process's environment, ``variables``, and a search path on which a child finds this same launchkit first."""
    package = str(Path(__file__).resolve().parents[1])
    search = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": search, **variables}
