"""A training step as a program of allocations, kernels, collectives and copies.

The program of one rank's optimizer step is a list of *stages* in execution order. A stage either runs once
(the embedding, the head and loss, the optimizer) or once per layer of a stack of blocks (its forward, its
backward). Each layer runs a *section*, a template shared by all layers of the same kind, so a program of
a few kilobytes stands for any depth. Sizes are polynomials in micro-batch ``b``, sequence length ``s`` and
LoRA rank ``r``, so it stands for any batch and length as well.

Tensors are named ``(stage, layer, slot)``; a section frees a tensor of another layer by its distance, or by its
place counted from either end of the stack, so the same template is right at every depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple

from launchkit.errors import ProgramError
from launchkit.units import divide_up


class Owner(StrEnum):
    """What a block of memory is for; the keys of ``at_peak`` in the JSON of ``estimate``."""

    __hash__ = str.__hash__  # enum's own runs in Python, and every event is hashed with its owner

    WEIGHTS = "weights"
    GATHERED_WEIGHTS = "gathered_weights"
    MASTER_WEIGHTS = "master_weights"
    GRADIENTS = "gradients"
    OPTIMIZER_STATES = "optimizer_states"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    TEMPORARIES = "temporaries"
    COMMUNICATION = "communication"
    INPUTS = "inputs"


class Phase(StrEnum):
    """The part of a step that a stage belongs to."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class Point(NamedTuple):
    """Where a size is evaluated: sequences per micro-batch, tokens per sequence, LoRA rank."""

    micro_batch: int
    seq_len: int
    lora_rank: int = 0


class Term(NamedTuple):
    """``coefficient × b^micro_batch × s^seq_len × r^lora_rank``."""

    coefficient: int
    micro_batch: int = 0
    seq_len: int = 0
    lora_rank: int = 0


class Tiles(NamedTuple):
    """How a loop over rows cuts them, where one pass stands for all: at most ``most`` rows at a time, or as many as the
    power of two at or above a ``parts``-th of them; one of the two is 0."""

    row_bytes: int
    most: int = 0
    parts: int = 0

    def rows(self, num_rows: int) -> int:
        """Rows of the first pass over ``num_rows``, which is never smaller than a later one."""
        if self.most:
            return min(num_rows, self.most)
        return min(num_rows, 1 << (max(1, divide_up(num_rows, self.parts)) - 1).bit_length())


class Size(NamedTuple):
    """A number of bytes (or FLOPs) as an exact polynomial with integer coefficients, over ``denominator``.

    With ``tiles`` the polynomial counts rows, and the size is that of the tile which a loop over them holds at a time.
    A named tuple, as events are, because rewrites make and compare them by the hundred thousand.
    """

    terms: tuple[Term, ...]
    denominator: int = 1
    tiles: Tiles | None = None

    @classmethod
    @lru_cache(maxsize=4096)  # rewrites write the same few sizes into every layer
    def constant(cls, value: int) -> Size:
        """A size that depends on nothing."""
        return cls((Term(value),) if value else ())

    def at(self, point: Point) -> int:
        """The value at ``point``, rounded up where the division leaves a remainder."""
        batch, length, rank = point
        total = 0
        for coefficient, batch_power, length_power, rank_power in self.terms:
            total += coefficient * batch**batch_power * length**length_power * rank**rank_power
        if self.tiles is not None:
            return self.tiles.row_bytes * self.tiles.rows(total)
        return total if self.denominator == 1 else -(-total // self.denominator)

    @property
    def is_constant(self) -> bool:
        return all(term[1:] == (0, 0, 0) for term in self.terms)

    def __add__(self, other: Size) -> Size:  # type: ignore[override]  # sizes add up, they are not concatenated
        if self.denominator != 1 or other.denominator != 1 or self.tiles or other.tiles:
            raise ProgramError("sizes over a denominator or of tiles do not add; divide their sum instead")
        powers: dict[tuple[int, int, int], int] = {}
        for term in (*self.terms, *other.terms):
            powers[term[1:]] = powers.get(term[1:], 0) + term.coefficient
        return Size(tuple(Term(value, *key) for key, value in sorted(powers.items()) if value))


class Anchor(StrEnum):
    """How a ``TensorRef`` counts layers."""

    __hash__ = str.__hash__  # as for Owner

    RELATIVE = "~"  # from the layer that holds the reference
    FIRST = "^"  # from the first layer of the named stage
    LAST = "$"  # from the last layer of the named stage, backwards


class TensorRef(NamedTuple):
    """A tensor allocated by some section: the stage's name, the layer (see ``Anchor``), the slot there."""

    stage: str
    anchor: Anchor
    layer: int
    slot: int


class Stream(IntEnum):
    """The CUDA stream that a storage is made on: the allocator keeps the free blocks of each apart."""

    COMPUTE = 0
    SHARD = 1  # what is gathered, where that is not the shard itself
    GATHER = 2
    REDUCE = 3


class Alloc(NamedTuple):
    """A storage comes into being.

    ``parameter`` is the index, in the section's parameter group, of the parameter whose gradient this is, and -1
    elsewhere. ``lag`` is 0 unless another stream may still read the storage when it dies: its block is handed out again
    only when as many gathers have begun, by which the processor, running ahead, has waited for that stream. Gathers are
    the storages on ``Stream.GATHER`` that lag themselves.
    """

    slot: int
    size: Size
    owner: Owner
    parameter: int = -1
    stream: Stream = Stream.COMPUTE
    lag: int = 0


class Free(NamedTuple):
    """A storage dies. ``size`` repeats the allocation's, so that a section can be read on its own."""

    ref: TensorRef
    size: Size


class FreeAll(NamedTuple):
    """Every live storage of one owner dies (``zero_grad(set_to_none=True)``)."""

    owner: Owner


Event = Alloc | Free | FreeAll


class Kernel(NamedTuple):
    """``count`` launches alike: FLOPs and bytes moved by each. ``tensor_cores`` when it is a matrix product or
    attention in the compute dtype, else it is bound by memory traffic. ``float8`` when it is one of 8-bit factors."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nothing here uses
    flops: Size
    num_bytes: Size
    tensor_cores: bool
    float8: bool = False


class CollectiveKind(StrEnum):
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    BROADCAST = "broadcast"
    ALL_TO_ALL = "all_to_all"


class Moment(StrEnum):
    """When a collective or copy runs relative to its section's kernels."""

    BEFORE = "before"  # its kernels wait for it; it may be issued ahead (prefetch)
    AFTER = "after"  # it waits for the section's kernels; nothing waits before the next barrier
    BLOCKING = "blocking"  # it waits for the kernels, and everything later waits for it


class Group(StrEnum):
    """Which ranks take part: all of them, one shard group, the replicas of one shard, or those that share the step of
    one copy of the model (tensor, context or sequence parallelism)."""

    WORLD = "world"
    SHARD = "shard"
    REPLICATE = "replicate"
    COPY = "copy"


class Collective(NamedTuple):
    """A message between GPUs. ``num_bytes`` is the full, unsharded payload."""

    kind: CollectiveKind
    num_bytes: Size
    moment: Moment
    group: Group = Group.WORLD


class Copy(NamedTuple):
    """Bytes over the host link: to the device, or to the host."""

    to_device: bool
    num_bytes: Size
    moment: Moment


# ``embed_tokens``, ``word_embeddings``, ``pos_embed``, GPT-2's ``wte`` and T5's ``shared``, but neither GPT-NeoX's head
# ``embed_out`` nor projections; behind PEFT's name for a module that is trained whole.
_EMBEDDING = re.compile(
    r"(^|\.)(\w*embed(dings?|_in|_tokens\w*|_positions)?|wte|wpe|w|shared|relative_attention_bias)"
    r"(\.modules_to_save\.\w+)?\.weight$"
)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter tensor of a group.

    ``shape`` is the logical shape (what a shard divides); ``num_bytes`` what its storage takes on an
    unsharded device in the dtype in force (4-bit weights are packed, with their scales in ``extra_bytes``).
    ``lora_rank_axis`` is the dimension that is a multiple of the LoRA rank; the shape gives it at rank 1.
    A trainable parameter that no loss depends on (a vision tower in a step without images) has no gradient, and an
    optimizer that takes parameters one by one makes no state for it. ``gradient_numel`` is given where a rank of a
    tensor-parallel group has the gradient of more than its own part (an embedding's, until the optimizer steps).
    ``is_split`` where the ranks of such a group have a part each, rather than the same.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trainable: bool = True
    lora_rank_axis: int | None = None
    packed_bytes: int = 0
    extra_bytes: int = 0
    has_gradient: bool = True
    gradient_numel: int = 0
    is_split: bool = False

    @property
    def is_embedding(self) -> bool:
        """Whether it is the table of an ``nn.Embedding``, as its name and shape tell in transformers' models."""
        return len(self.shape) == 2 and _EMBEDDING.search(self.name) is not None

    def sizes(self, lora_rank: int = 0) -> tuple[int, ...]:
        """The shape, with the LoRA rank put in."""
        axis = self.lora_rank_axis
        if axis is None:
            return self.shape
        return (*self.shape[:axis], self.shape[axis] * lora_rank, *self.shape[axis + 1 :])

    def numel(self, lora_rank: int = 0) -> int:
        """Logical elements, with the LoRA rank put in."""
        return prod(self.sizes(lora_rank))

    def num_bytes(self, lora_rank: int = 0) -> int:
        """Bytes of the unsharded storage, without ``extra_bytes``."""
        return self.packed_bytes or self.numel(lora_rank) * self.itemsize

    def gradient_bytes(self, lora_rank: int = 0) -> int:
        """Bytes of the gradient as the backward pass leaves it, in the parameter's dtype."""
        return (self.gradient_numel or self.numel(lora_rank)) * self.itemsize


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """The parameters that one section owns: one block's, or what lies outside all stacks.

    ``name`` is the block's class for a block, ``root`` for what no block holds. A parameter tied to another
    is listed once, where the model's ``named_parameters()`` lists it first.
    """

    name: str
    parameters: tuple[Parameter, ...]

    def numel(self, lora_rank: int = 0, *, trainable: bool | None = None) -> int:
        """Elements of the group's parameters, of all or only of the trainable (or frozen) ones."""
        return sum(p.numel(lora_rank) for p in self.parameters if trainable is None or p.trainable == trainable)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A template: what one layer (or one single stage) does, in order."""

    events: tuple[Event, ...]
    group: str = "root"
    uses: tuple[int, ...] = ()  # indices, in the group, of the parameters its kernels read
    kernels: tuple[Kernel, ...] = ()
    collectives: tuple[Collective, ...] = ()
    copies: tuple[Copy, ...] = ()

    @cached_property
    def gradients(self) -> tuple[Alloc, ...]:
        """The allocations that bring the gradient of one of the group's parameters into being, in order."""
        return tuple([event for event in self.events if isinstance(event, Alloc) and event.parameter >= 0])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the step: one section per layer, in layer order; ``reverse`` when run from the last layer.

    ``stack`` names the stack of blocks whose layers it runs (``model.layers``), and is empty for a stage that runs
    once. A traced step of a causal model has the stages ``forward.0`` (embedding), ``forward.model.layers``,
    ``forward.1`` (final norm, head and loss, of phase ``loss``), ``backward.1``, ``backward.model.layers``,
    ``backward.0``; an encoder-decoder has a second stack and ``forward.2`` between. Strategies add ``optimizer``.
    """

    name: str
    phase: Phase
    layers: tuple[int, ...]  # indices into StepProgram.sections
    stack: str = ""
    reverse: bool = False

    def order(self) -> Iterator[int]:
        """Layer indices in execution order."""
        return iter(range(len(self.layers) - 1, -1, -1) if self.reverse else range(len(self.layers)))


class Persistent(NamedTuple):
    """``count`` storages alike that are there before the step begins."""

    size: Size
    owner: Owner
    count: int = 1  # type: ignore[assignment]  # hides tuple.count


class Arrival(NamedTuple):
    """How a persistent storage of ``kept`` bytes comes onto the device, and what comes and goes with it; all in bytes.

    In this order: ``pieces`` are allocated one by one, ``passing`` one after the other (two at a time), ``joined`` in
    one piece; then ``kept``; then ``joined`` and ``pieces`` die. ``narrow``, where not empty, is what is kept until
    everything has arrived, and cast into ``kept`` then. Pieces that wait are all there before the first arrival; pieces
    that linger die when the next arrival's are there.
    """

    kept: int = 0
    pieces: tuple[int, ...] = ()
    passing: tuple[int, ...] = ()
    joined: int = 0
    narrow: int = 0
    waits: bool = False
    lingers: bool = False


@dataclass(frozen=True, kw_only=True)
class StepProgram:
    """One rank's optimizer step. See the module's docstring.

    ``groups`` maps a group's name to its parameters; ``group_counts`` says how many times it occurs in the
    model. ``arrivals`` tell how an engine brought weights onto the device, which leaves blocks in the cache.
    ``minimum_micro_batch`` is 1 for a program fitted at a micro-batch of one and 2 for the others: the two are
    different programs.
    """

    stages: tuple[Stage, ...]
    sections: tuple[Section, ...]
    groups: Mapping[str, ParameterGroup]
    group_counts: Mapping[str, int]
    persistent: tuple[Persistent, ...] = ()
    host_persistent_bytes: int = 0
    arrivals: tuple[Arrival, ...] = ()
    minimum_micro_batch: int = 2
    meta: Mapping[str, Any] = field(default_factory=dict)

    def num_parameters(self, lora_rank: int = 0, *, trainable: bool | None = None) -> int:
        """Logical parameters of the whole model (tied ones once)."""
        return sum(
            group.numel(lora_rank, trainable=trainable) * self.group_counts[name] for name, group in self.groups.items()
        )

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ProgramError(f"the program has no stage {name!r}")

    def section_of(self, stage: Stage, layer: int) -> Section:
        return self.sections[stage.layers[layer]]

    def with_sections(self, sections: Iterable[Section]) -> StepProgram:
        return replace(self, sections=tuple(sections))

    def resolve(self, ref: TensorRef, *, layer: int) -> tuple[str, int, int]:
        """The absolute name ``(stage, layer, slot)`` of what ``ref`` means when layer ``layer`` holds it."""
        if ref.anchor is Anchor.RELATIVE:
            return ref.stage, layer + ref.layer, ref.slot
        if ref.anchor is Anchor.FIRST:
            return ref.stage, ref.layer, ref.slot
        return ref.stage, len(self.stage(ref.stage).layers) - 1 - ref.layer, ref.slot


def local(stage: str, slot: int) -> TensorRef:
    """A reference to a tensor of the same stage and layer."""
    return TensorRef(stage, Anchor.RELATIVE, 0, slot)
