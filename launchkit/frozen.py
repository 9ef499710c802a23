"""Which parameters of a full fine-tune are frozen, by names as they are typed.

A name is a run of components of a parameter's path, wherever it stands: ``embed_tokens``, ``model.vision_tower``. ``*``
stands for any text within a component. A weight that is tied to another has the path that ``named_parameters()`` gives
it, which is the first one.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from launchkit.errors import TraceError
from launchkit.scenario import names_in

_NUM_NEAR = 6


def freeze_parts(model: Any, freeze: str) -> frozenset[str]:
    """Freezes what the names mean in a torch module; returns the paths of those parameters. Raises ``TraceError``."""
    named = dict(model.named_parameters())
    frozen = frozen_names(named, freeze) if freeze else frozenset()
    for name in frozen:
        named[name].requires_grad_(False)
    return frozen


def frozen_names(parameters: Collection[str], freeze: str) -> frozenset[str]:
    """Those of ``parameters`` that the names in ``freeze``, separated by commas, mean.

    Raises ``TraceError`` for a name that means none of them, and where nothing is left to train.
    """
    found: set[str] = set()
    for name in names_in(freeze):
        meant = {parameter for parameter in parameters if _is_meant(name.split("."), parameter.split("."))}
        if not meant:
            raise TraceError(f"--freeze {name} names no part of the model; it has {', '.join(_near(name, parameters))}")
        found |= meant
    if found == set(parameters):
        raise TraceError(f"--freeze {freeze} leaves nothing to train; freeze less")
    return frozenset(found)


def check_whole_stacks(parameters: Collection[str], frozen: Collection[str]) -> None:
    """Layers of a stack stand for each other in a trace, and are frozen all or none. Raises ``TraceError``."""
    states: dict[str, set[bool]] = defaultdict(set)
    for parameter in parameters:
        states[re.sub(r"\.\d+\.", ".*.", parameter)].add(parameter in frozen)
    mixed = next((path for path, found in states.items() if len(found) > 1), None)
    if mixed is not None:
        stack = mixed.partition(".*.")[0]
        raise TraceError(
            f"--freeze takes some layers of {stack} and not others, which is not modelled; name what all of them have, "
            f"or {stack.rpartition('.')[2]} as a whole"
        )


def _is_meant(name: Sequence[str], path: Sequence[str]) -> bool:
    starts = range(len(path) - len(name) + 1)
    return any(all(map(fnmatchcase, path[start : start + len(name)], name)) for start in starts)


def _near(name: str, parameters: Collection[str]) -> list[str]:
    """What the model has that is called something like ``name``, else its parts from the outermost on."""
    parts = dict.fromkeys(
        part for parameter in parameters for part in parameter.split(".")[:-1] if not part.isdecimal()
    )
    return difflib.get_close_matches(name.rpartition(".")[2], parts, n=_NUM_NEAR) or list(parts)[:_NUM_NEAR]
