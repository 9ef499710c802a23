"""A model that nobody traced: its size is an argument, its programs are written out.

Blocks of one tall matrix, an embedding and a head. A block keeps eight vectors per token, or one when checkpointed;
the logits are fp32. What trains is everything, or adapters on the blocks' matrices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from launchkit.errors import TraceError
from launchkit.model import ModelProfile
from launchkit.program import (
    Alloc,
    Anchor,
    Event,
    Free,
    Kernel,
    Owner,
    Parameter,
    ParameterGroup,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    TensorRef,
    Term,
)
from launchkit.scenario import Checkpointing, Compute, Method, TraceKey
from tests.builders import profile

WIDTH = 2048
ROWS = 32 * WIDTH
VOCABULARY = 1000
_WEIGHT_BYTES = {Compute.FP32: 4, Compute.AUTOCAST_BF16: 4}


@dataclass
class WrittenSource:
    """A model of ``num_layers`` blocks of 134M parameters. ``asked`` are the programs that were wanted, in order,
    ``expected`` those that were said to be; those of a method in ``untraceable`` cannot be had."""

    num_layers: int = 8
    untraceable: tuple[Method, ...] = ()
    asked: list[TraceKey] = field(default_factory=list)
    expected: list[TraceKey] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        return self.num_layers * ROWS * WIDTH + 2 * WIDTH * VOCABULARY

    @property
    def profile(self) -> ModelProfile:
        return profile(
            num_parameters=self.num_parameters,
            num_layers=self.num_layers,
            hidden_size=WIDTH,
            vocab_size=VOCABULARY,
            block_classes=("Block",),
        )

    def expect(self, keys: Iterable[TraceKey]) -> None:
        self.expected += keys

    def program(self, key: TraceKey) -> StepProgram:
        self.asked.append(key)
        if key.method in self.untraceable:
            raise TraceError(f"a step of {key.method} cannot be traced")
        return written(key, num_layers=self.num_layers)

    def has_program(self, key: TraceKey) -> bool:
        return not key.evaluation


def written(key: TraceKey, *, num_layers: int) -> StepProgram:
    """The program that a trace under ``key`` would give."""
    item = _WEIGHT_BYTES.get(key.compute, 2)
    full = key.method is Method.FULL
    kept = per_token((1 if key.checkpointing is Checkpointing.FULL else 8) * WIDTH * 2)
    logits = per_token(VOCABULARY * 4)
    block_gradients = (
        [weight_gradient(0, 0, item)] if full else [adapter_gradient(0, 1, WIDTH), adapter_gradient(1, 2, ROWS)]
    )
    root_gradient = (lambda index: (root(0, index, item),)) if full else (lambda index: ())
    kept_end = Free(TensorRef("forward.layers", Anchor.RELATIVE, 0, 0), kept)
    logits_end = Free(TensorRef("forward.1", Anchor.FIRST, 0, 0), logits)
    again = 2 if key.checkpointing is Checkpointing.FULL else 1
    block_uses = (0,) if full else (0, 1, 2)
    sections = (
        section(uses=(0,)),
        section(Alloc(0, kept, Owner.ACTIVATIONS), group="Block", uses=block_uses, products=1),
        section(Alloc(0, logits, Owner.LOGITS), uses=(1,), products=1),
        section(logits_end, *root_gradient(1), uses=(1,), products=2),
        section(*block_gradients, kept_end, group="Block", uses=block_uses, products=1 + again),
        section(*root_gradient(0), uses=(0,)),
    )
    return StepProgram(
        stages=stages(num_layers),
        sections=sections,
        groups={
            "root": ParameterGroup(
                name="root", parameters=tuple(parameter(n, VOCABULARY, WIDTH, item, full) for n in ("embed", "head"))
            ),
            "Block": ParameterGroup(name="Block", parameters=block_parameters(key.method, item)),
        },
        group_counts={"root": 1, "Block": num_layers},
        minimum_micro_batch=1 if key.single_sequence else 2,
    )


def stages(num_layers: int) -> tuple[Stage, ...]:
    return (
        Stage(name="forward.0", phase=Phase.FORWARD, layers=(0,)),
        Stage(name="forward.layers", phase=Phase.FORWARD, layers=(1,) * num_layers, stack="layers"),
        Stage(name="forward.1", phase=Phase.LOSS, layers=(2,)),
        Stage(name="backward.1", phase=Phase.BACKWARD, layers=(3,)),
        Stage(name="backward.layers", phase=Phase.BACKWARD, layers=(4,) * num_layers, stack="layers", reverse=True),
        Stage(name="backward.0", phase=Phase.BACKWARD, layers=(5,)),
    )


def block_parameters(method: Method, item: int) -> tuple[Parameter, ...]:
    if method is Method.FULL:
        return (parameter("weight", ROWS, WIDTH, item, True),)
    packed = ROWS * WIDTH // 2 if method is Method.QLORA else 0
    base = Parameter(name="weight", shape=(ROWS, WIDTH), itemsize=item, trainable=False, packed_bytes=packed)
    adapters = [
        Parameter(name=f"lora_{name}", shape=shape, itemsize=4, lora_rank_axis=axis)
        for name, shape, axis in (("A", (1, WIDTH), 0), ("B", (ROWS, 1), 1))
    ]
    return (base, *adapters)


def parameter(name: str, rows: int, columns: int, item: int, trainable: bool) -> Parameter:
    return Parameter(name=name, shape=(rows, columns), itemsize=item, trainable=trainable)


def per_token(num_bytes: int) -> Size:
    return Size((Term(num_bytes, 1, 1),))


def weight_gradient(slot: int, index: int, item: int) -> Alloc:
    return Alloc(slot, Size.constant(ROWS * WIDTH * item), Owner.GRADIENTS, index)


def adapter_gradient(slot: int, index: int, numel_per_rank: int) -> Alloc:
    return Alloc(slot, Size((Term(numel_per_rank * 4, 0, 0, 1),)), Owner.GRADIENTS, index)


def root(slot: int, index: int, item: int) -> Alloc:
    return Alloc(slot, Size.constant(VOCABULARY * WIDTH * item), Owner.GRADIENTS, index)


def section(*events: Event, group: str = "root", uses: tuple[int, ...] = (), products: int = 0) -> Section:
    """``products`` matrix products of each token with the group's matrix."""
    numel = ROWS * WIDTH if group == "Block" else WIDTH * VOCABULARY
    kernel = Kernel(products, per_token(2 * numel), per_token(4 * WIDTH), True)
    return Section(events=events, group=group, uses=uses, kernels=(kernel,) if products else ())
