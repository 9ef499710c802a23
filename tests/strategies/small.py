"""A step small enough to count by hand, and what is read off its rewrites.

Outside the blocks an embedding and a head of 100 elements each, in each of three blocks a matrix of 60 and a norm of 4:
392 elements. A block keeps 40 bytes of activations, the logits take 24. A gradient's operator frees its
input behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from launchkit.hardware import Backend, Cluster
from launchkit.program import (
    Alloc,
    Anchor,
    Event,
    Free,
    Owner,
    Parameter,
    ParameterGroup,
    Phase,
    Point,
    Section,
    Size,
    Stage,
    StepProgram,
    TensorRef,
    local,
)
from launchkit.scenario import Scenario
from launchkit.simulate.expand import expand
from tests.builders import cluster, scenario

NUM_LAYERS = 3
NUM_ELEMENTS = 2 * 100 + NUM_LAYERS * 64
POINT = Point(2, 8)


def _gradient(slot: int, index: int, numel: int, itemsize: int) -> tuple[Event, ...]:
    """An operator's input, the gradient, and the input's end."""
    incoming = Size.constant(8)
    return (
        Alloc(slot, incoming, Owner.TEMPORARIES),
        Alloc(slot + 1, Size.constant(numel * itemsize), Owner.GRADIENTS, index),
        Free(local("", slot), incoming),
    )


def _placed(stage: str, events: tuple[Event, ...]) -> tuple[Event, ...]:
    """Events whose local references mean ``stage``."""
    return tuple(
        e._replace(ref=e.ref._replace(stage=stage)) if isinstance(e, Free) and not e.ref.stage else e for e in events
    )


def program(*, itemsize: int = 4, frozen: bool = False) -> StepProgram:
    """The step; with ``frozen`` only the norms are trained."""
    act, logits = Size.constant(40), Size.constant(24)

    def parameter(name: str, *shape: int, trainable: bool = True) -> Parameter:
        return Parameter(name=name, shape=shape, itemsize=itemsize, trainable=trainable)

    whole = not frozen
    block_gradients = _gradient(0, 1, 4, itemsize) + (_gradient(2, 0, 60, itemsize) if whole else ())
    block_end = Free(TensorRef("forward.layers", Anchor.RELATIVE, 0, 0), act)
    logits_end = Free(TensorRef("forward.1", Anchor.FIRST, 0, 0), logits)
    sections = (
        Section(events=(), uses=(0,)),
        Section(events=(Alloc(0, act, Owner.ACTIVATIONS),), group="Block", uses=(0, 1)),
        Section(events=(Alloc(0, logits, Owner.LOGITS),), uses=(1,)),
        Section(
            events=(logits_end, *_placed("backward.1", _gradient(0, 1, 100, itemsize) if whole else ())), uses=(1,)
        ),
        Section(events=(*_placed("backward.layers", block_gradients), block_end), group="Block", uses=(0, 1)),
        Section(events=_placed("backward.0", _gradient(0, 0, 100, itemsize) if whole else ()), uses=(0,)),
    )
    root = (parameter("embed.weight", 25, 4, trainable=whole), parameter("head.weight", 25, 4, trainable=whole))
    block = (parameter("mlp.weight", 15, 4, trainable=whole), parameter("norm.weight", 4))
    layers = {"stack": "layers"}
    return StepProgram(
        stages=(
            Stage(name="forward.0", phase=Phase.FORWARD, layers=(0,)),
            Stage(name="forward.layers", phase=Phase.FORWARD, layers=(1,) * NUM_LAYERS, **layers),
            Stage(name="forward.1", phase=Phase.LOSS, layers=(2,)),
            Stage(name="backward.1", phase=Phase.BACKWARD, layers=(3,)),
            Stage(name="backward.layers", phase=Phase.BACKWARD, layers=(4,) * NUM_LAYERS, reverse=True, **layers),
            Stage(name="backward.0", phase=Phase.BACKWARD, layers=(5,)),
        ),
        sections=sections,
        groups={
            "root": ParameterGroup(name="root", parameters=root),
            "Block": ParameterGroup(name="Block", parameters=block),
        },
        group_counts={"root": 1, "Block": NUM_LAYERS},
    )


def plain(**overrides: Any) -> Scenario:
    """fp32 in a plain loop with fused AdamW, unless told otherwise."""
    return scenario(**({"trainer": "loop", "precision": "fp32", "optimizer": "adamw_torch_fused"} | overrides))


def ranks(num_gpus: int, *, cpu: bool = False) -> Cluster:
    return cluster(num_gpus=num_gpus, **({"backend": Backend.CPU} if cpu else {}))


def peak(rewritten: StepProgram) -> int:
    return max(accumulate(event.delta_bytes for event in expand(rewritten, POINT)))


def end(rewritten: StepProgram) -> int:
    return sum(event.delta_bytes for event in expand(rewritten, POINT))


def most(rewritten: StepProgram, owner: Owner) -> int:
    """The most that is ever live of one owner."""
    deltas = (event.delta_bytes for event in expand(rewritten, POINT) if event.owner is owner)
    return max(accumulate(deltas), default=0)


def start(rewritten: StepProgram) -> Mapping[Owner, int]:
    """Bytes of each owner before the step begins."""
    totals: dict[Owner, int] = {}
    for size, owner, count in rewritten.persistent:
        totals[owner] = totals.get(owner, 0) + size.at(POINT) * count
    return totals
