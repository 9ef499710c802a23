"""What each optimizer holds per parameter, and what its step allocates on the way.

A row describes one optimizer by *variants*: the first whose ``applies`` is true of a tensor says which states that
tensor gets and which temporaries its update makes. Temporaries are written as the Python variables of the optimizer's
own code, because that is what decides their lifetime: binding a name frees what it held before, and everything
is freed when the step returns. In a *loop* the names are rebound tensor by tensor; under *foreach* one name holds a
list over all tensors of one dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from math import prod
from typing import NamedTuple

from launchkit.errors import IllegalScenarioError
from launchkit.program import Alloc, Event, Free, Owner, Parameter, Size, local
from launchkit.scenario import DeviceKind, Trainer
from launchkit.units import divide_up

FP32_BYTES = 4
BF16_BYTES = 2
OWN_DTYPE = 0  # as an item size: the width of the parameter's own dtype


class LocalTensor(NamedTuple):
    """A trainable tensor as the optimizer of one rank sees it: a whole parameter, a shard, or a flat buffer.

    ``in_block`` is false outside the stack of blocks (embeddings, head), where Muon hands over to AdamW. ``is_split``
    where the ranks of a tensor-parallel group have other parts of it: no kernel takes such tensors with others.
    ``is_kept_wide`` where the states are in fp32 whatever the optimizer's bits.
    """

    shape: tuple[int, ...]
    itemsize: int
    in_block: bool = True
    is_split: bool = False
    is_kept_wide: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.itemsize


def local_tensor(
    parameter: Parameter,
    *,
    lora_rank: int = 0,
    itemsize: int = 0,
    in_block: bool = True,
    trainer: Trainer = Trainer.LOOP,
) -> LocalTensor:
    """``parameter`` unsharded, the LoRA rank put in; ``itemsize`` where it is held in another dtype.

    The Trainer and those built on it have bitsandbytes keep the states of embeddings in fp32. Source: transformers 5.24
    ``Trainer.create_optimizer`` (``register_module_override``).
    """
    is_kept_wide = parameter.is_embedding and trainer is not Trainer.LOOP
    return LocalTensor(
        parameter.sizes(lora_rank), itemsize or parameter.itemsize, in_block, parameter.is_split, is_kept_wide
    )


class Extent(StrEnum):
    """How many entries a state or temporary has, given its parameter's shape."""

    ELEMENTS = "elements"
    ROWS = "rows"  # all dimensions but the last
    COLUMNS = "columns"  # all dimensions but the last but one
    SQUARE = "square"  # a square matrix of the smaller side
    SINGULAR_VECTORS = "singular_vectors"  # the smaller side by GaLore's rank, which it bounds
    ON_SINGULAR_VECTORS = "on_singular_vectors"  # of a matrix projected on these: the larger side by the rank
    RANDOM_VECTORS = "random_vectors"  # the same with APOLLO's rank, which nothing bounds
    ON_RANDOM_VECTORS = "on_random_vectors"
    LONGER_SIDE = "longer_side"
    RANK = "rank"  # GaLore's, which the smaller side bounds
    ONE = "one"


_PROJECTED_RANK = 128  # the Trainer's default for GaLore and APOLLO


_ENTRIES: dict[Extent, Callable[[tuple[int, ...]], int]] = {
    Extent.ELEMENTS: prod,
    Extent.ROWS: lambda shape: prod(shape[:-1]),
    Extent.COLUMNS: lambda shape: prod((*shape[:-2], *shape[-1:])),
    Extent.SQUARE: lambda shape: min(shape) ** 2,
    Extent.SINGULAR_VECTORS: lambda shape: min(shape) * min(_PROJECTED_RANK, *shape),
    Extent.ON_SINGULAR_VECTORS: lambda shape: max(shape) * min(_PROJECTED_RANK, *shape),
    Extent.RANDOM_VECTORS: lambda shape: min(shape) * _PROJECTED_RANK,
    Extent.ON_RANDOM_VECTORS: lambda shape: max(shape) * _PROJECTED_RANK,
    Extent.LONGER_SIDE: max,
    Extent.RANK: lambda shape: min(_PROJECTED_RANK, *shape),
    Extent.ONE: lambda shape: 1,
}


class Place(StrEnum):
    """Where a state lives when the parameters are on a GPU. Everything is on the device when that is the CPU."""

    DEVICE = "device"
    HOST = "host"
    PAGED = "paged"  # CUDA managed memory: counted on the host, migrates to the GPU while it has room


class StateTensor(NamedTuple):
    """One state of a parameter: ``ceil(entries / elements_per_entry)`` items."""

    extent: Extent = Extent.ELEMENTS
    itemsize: int = OWN_DTYPE
    elements_per_entry: int = 1
    place: Place = Place.DEVICE

    def num_bytes(self, tensor: LocalTensor) -> int:
        entries = divide_up(_ENTRIES[self.extent](tensor.shape), self.elements_per_entry)
        return entries * (self.itemsize or tensor.itemsize)

    def is_on(self, place: Place, device: DeviceKind) -> bool:
        return (Place.DEVICE if device is DeviceKind.CPU else self.place) is place


class Bind(NamedTuple):
    """``variable = <a new tensor>``: what the name held before is freed once the new one exists.

    The tensor has ``ceil(entries / elements_per_entry)`` items. ``from_host`` where it is a state's copy, made only
    where the parameters are on a GPU and the states are not.
    """

    variable: str
    extent: Extent = Extent.ELEMENTS
    itemsize: int = OWN_DTYPE
    elements_per_entry: int = 1
    from_host: bool = False


class Drop(NamedTuple):
    """The variable lets go of its tensor (an intermediate of an expression, ``del``, or rebinding to a state)."""

    variable: str


Temporary = Bind | Drop


def _always(tensor: LocalTensor) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Variant:
    """States and temporaries of the tensors for which ``applies`` is true.

    ``loop`` are the temporaries of the update written tensor by tensor, ``foreach`` those of the multi-tensor one,
    which torch prefers on CUDA; None where there is no multi-tensor form (a fused kernel, or a loop everywhere), empty
    where CUDA has a kernel that updates a tensor in place and the CPU a loop.
    """

    applies: Callable[[LocalTensor], bool] = _always
    states: tuple[StateTensor, ...] = ()
    loop: tuple[Temporary, ...] = ()
    foreach: tuple[Temporary, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One row. ``name`` is what ``--optimizer`` takes; ``hf_name`` and ``hf_args`` what ``TrainingArguments`` takes as
    ``optim`` and ``optim_args`` (empty where the Trainer does not know the optimizer).

    ``target_modules`` is what ``optim_target_modules`` says of the layers that are treated apart, behind all others: a
    regular expression over module names. ``in_backward`` is true where each parameter is updated as soon as its
    gradient is complete, and the gradient dropped; ``updates_late`` where that waits for the next gradient and takes an
    fp32 copy of a 16-bit one, which is dropped before the rest. ``foreach_on_cpu`` where the multi-tensor form is not
    left to CUDA.
    ``shared_state_bytes`` are allocations made once (bitsandbytes' code books). ``states_before_step`` is true where
    the states exist from construction on; ``states_interleaved`` where each is made just before its tensor's update,
    not all of them before the first.
    """

    name: str
    hf_name: str
    variants: tuple[Variant, ...]
    source: str
    hf_args: str = ""
    target_modules: str = ""
    in_backward: bool = False
    updates_late: bool = False
    foreach_on_cpu: bool = False
    needs: str = ""  # the package it comes from, besides torch and transformers
    shared_state_bytes: tuple[int, ...] = ()
    states_before_step: bool = False
    states_interleaved: bool = False

    @property
    def trainer_arguments(self) -> dict[str, str]:
        """``optim`` and what goes with it, as ``TrainingArguments`` takes them. Empty where the Trainer lacks it."""
        if not self.hf_name:
            return {}
        extra = {"optim_args": self.hf_args, "optim_target_modules": self.target_modules}
        return {"optim": self.hf_name} | {name: value for name, value in extra.items() if value}

    def variant(self, tensor: LocalTensor) -> Variant:
        return next(variant for variant in self.variants if variant.applies(tensor))

    def state_bytes(self, tensor: LocalTensor, *, device: DeviceKind, place: Place = Place.DEVICE) -> tuple[int, ...]:
        """Bytes of each state storage of ``tensor`` that lives at ``place``."""
        states = self.variant(tensor).states
        return tuple(state.num_bytes(tensor) for state in states if state.is_on(place, device))

    def total_state_bytes(
        self, tensors: Sequence[LocalTensor], *, device: DeviceKind, place: Place = Place.DEVICE
    ) -> int:
        """Bytes of all states of ``tensors`` that live at ``place``; tensors alike, one per layer, are read once."""
        counts = Counter(tensors)
        return sum(count * sum(self.state_bytes(t, device=device, place=place)) for t, count in counts.items())

    @property
    def fetches_states(self) -> bool:
        """Whether states wait on the host, and each step copies them to the GPU and back."""
        return any(isinstance(t, Bind) and t.from_host for variant in self.variants for t in variant.loop)

    def host_state_bytes(self, tensors: Sequence[LocalTensor], *, device: DeviceKind) -> int:
        """Bytes of paged states, which live in host memory when the GPU has no room, and of those that stay there.
        Scalars are left out."""
        counts = Counter(tensors)
        return sum(
            count * state.num_bytes(tensor)
            for tensor, count in counts.items()
            for state in self.variant(tensor).states
            if state.extent is not Extent.ONE and any(state.is_on(place, device) for place in _ON_HOST)
        )


_ON_HOST = (Place.HOST, Place.PAGED)


def find(name: str) -> Optimizer:
    """The row called ``name`` (or by the Trainer's alias of it). Names of the Trainer's that no row describes say why,
    and what serves in their place."""
    row = OPTIMIZERS.get(ALIASES.get(name, name))
    if row is None and name in UNPLANNED:
        raise IllegalScenarioError(f"{name} {UNPLANNED[name]}")
    if row is None:
        import difflib  # lazy: needed only on the way to an error

        close = difflib.get_close_matches(name, OPTIMIZERS, n=3, cutoff=0.4) or ["adamw_torch_fused"]
        raise IllegalScenarioError(f"unknown optimizer {name!r}; try --optimizer {', '.join(close)}")
    return row


def step_events(
    optimizer: Optimizer,
    tensors: Sequence[LocalTensor],
    *,
    device: DeviceKind,
    first_step: bool,
    stage: str = "optimizer",
    slot: int = 0,
) -> tuple[Event, ...]:
    """The allocations of one ``optimizer.step()`` over ``tensors``, in a stage called ``stage``, from ``slot`` on.

    With ``first_step`` the states are allocated too, and stay.
    """
    writer = _Writer(stage=stage, slot=slot)
    if optimizer.target_modules:
        tensors = sorted(tensors, key=_is_block_matrix)
    makes_states = first_step and not optimizer.states_before_step
    interleaved = makes_states and optimizer.states_interleaved
    if makes_states:
        for num_bytes in optimizer.shared_state_bytes:
            writer.allocate(num_bytes, Owner.OPTIMIZER_STATES)
    if makes_states and not interleaved:
        for tensor in tensors:
            writer.states(optimizer.state_bytes(tensor, device=device))
    is_split = False
    for temporaries, batch in _updates(optimizer, tensors, device=device):
        if batch[0].is_split is not is_split:  # a group of parameters, and so a call, of its own
            writer.drop_everything()
            is_split = batch[0].is_split
        if interleaved:
            for tensor in batch:
                writer.states(optimizer.state_bytes(tensor, device=device))
        for temporary in temporaries:
            writer.apply(temporary, batch)
    writer.drop_everything()
    return tuple(writer.events)


def traffic_bytes(optimizer: Optimizer, tensors: Sequence[LocalTensor], *, device: DeviceKind) -> int:
    """Bytes that one step must move: gradient read, parameter and states read and written. Omits temporaries."""
    weights = sum(count * tensor.num_bytes for tensor, count in Counter(tensors).items())
    return 3 * weights + 2 * optimizer.total_state_bytes(tensors, device=device)


def _updates(
    optimizer: Optimizer, tensors: Sequence[LocalTensor], *, device: DeviceKind
) -> Iterator[tuple[tuple[Temporary, ...], Sequence[LocalTensor]]]:
    """The update in units of what one pass of the optimizer's code handles: a tensor, or all tensors of one dtype
    that are split alike."""
    alike: dict[tuple[int, bool, tuple[Temporary, ...]], list[LocalTensor]] = {}
    for tensor in tensors:
        variant = optimizer.variant(tensor)
        if variant.foreach is None or (device is DeviceKind.CPU and not optimizer.foreach_on_cpu):
            on_host = device is DeviceKind.CPU
            yield tuple(t for t in variant.loop if not (on_host and isinstance(t, Bind) and t.from_host)), (tensor,)
        elif not variant.foreach:
            yield (), (tensor,)
        else:
            alike.setdefault((tensor.itemsize, tensor.is_split, variant.foreach), []).append(tensor)
    for (*_, temporaries), batch in alike.items():
        yield temporaries, batch


class _Writer:
    """Turns bindings of variables into allocations and frees."""

    def __init__(self, *, stage: str, slot: int) -> None:
        self.events: list[Event] = []
        self._stage = stage
        self._slot = slot
        self._held: dict[str, list[Alloc]] = {}

    def allocate(self, num_bytes: int, owner: Owner) -> Alloc:
        alloc = Alloc(self._slot, Size.constant(num_bytes), owner)
        self._slot += 1
        self.events.append(alloc)
        return alloc

    def states(self, sizes: Sequence[int]) -> None:
        for num_bytes in sizes:
            self.allocate(num_bytes, Owner.OPTIMIZER_STATES)

    def apply(self, temporary: Temporary, batch: Sequence[LocalTensor]) -> None:
        if isinstance(temporary, Drop):
            self._release(self._held.pop(temporary.variable, []))
            return
        replaced = self._held.get(temporary.variable, [])
        self._held[temporary.variable] = [self._temporary(temporary, tensor) for tensor in batch]
        self._release(replaced)

    def drop_everything(self) -> None:
        for allocs in self._held.values():
            self._release(allocs)
        self._held.clear()

    def _temporary(self, bind: Bind, tensor: LocalTensor) -> Alloc:
        entries = divide_up(_ENTRIES[bind.extent](tensor.shape), bind.elements_per_entry)
        num_bytes = entries * (bind.itemsize or tensor.itemsize)
        return self.allocate(num_bytes, Owner.TEMPORARIES)

    def _release(self, allocs: Sequence[Alloc]) -> None:
        self.events.extend(Free(local(self._stage, alloc.slot), alloc.size) for alloc in allocs)


def _is_half(tensor: LocalTensor) -> bool:
    return tensor.itemsize == BF16_BYTES


def _is_matrix(tensor: LocalTensor) -> bool:
    return len(tensor.shape) >= 2


def _is_small_8bit(tensor: LocalTensor) -> bool:
    return tensor.numel < 4096


def _is_unpaged(tensor: LocalTensor) -> bool:
    return tensor.numel < 100_000


_STEP_ON_HOST = StateTensor(Extent.ONE, FP32_BYTES, 1, Place.HOST)
_STEP_ON_DEVICE = StateTensor(Extent.ONE, FP32_BYTES)

# torch.optim.adam: exp_avg and exp_avg_sq are zeros_like(param), so they have the parameter's dtype. The loop's
# `denom = (exp_avg_sq.sqrt() / bias_correction2_sqrt).add_(eps)` keeps the previous tensor's denom until it is done.
_ADAM = Variant(
    states=(_STEP_ON_HOST, StateTensor(), StateTensor()),
    loop=(Bind("sqrt"), Bind("denom"), Drop("sqrt")),
    foreach=(Bind("exp_avg_sq_sqrt"),),
)
_ADAM_FUSED = Variant(states=(_STEP_ON_DEVICE, StateTensor(), StateTensor()))

_ADAFACTOR_HALF = (Drop("grad"), Bind("grad", itemsize=FP32_BYTES), Drop("p"), Bind("p", itemsize=FP32_BYTES))


_NEGATED = (Bind("negative", itemsize=FP32_BYTES), Drop("negative"))


def _second_moment(
    *, factored: bool, of: Extent = Extent.ELEMENTS, sides: tuple[Extent, Extent] = (Extent.ROWS, Extent.COLUMNS)
) -> tuple[Temporary, ...]:
    """What Adafactor makes of the squared gradient, in fp32: of the whole one, or of one projected to ``of`` entries
    with rows and columns of ``sides``."""
    square = (Bind("square", of, FP32_BYTES), Bind("update", of, FP32_BYTES), Drop("square"))
    if not factored:
        return (*square, Bind("update", of, FP32_BYTES))
    rows, columns = sides
    return (
        *square,
        Bind("mean", rows, FP32_BYTES),
        Drop("mean"),
        Bind("mean", columns, FP32_BYTES),
        Drop("mean"),
        Bind("r_factor", rows, FP32_BYTES),
        Bind("c_factor", columns, FP32_BYTES),
        Bind("update", of, FP32_BYTES),
        Drop("r_factor"),
        Drop("c_factor"),
    )


def _adafactor_update(*, factored: bool) -> tuple[Temporary, ...]:
    """The variables of transformers' ``Adafactor.step``; all its arithmetic is in fp32."""
    return (*_second_moment(factored=factored), *_NEGATED)


_FACTORED_STATES = (StateTensor(Extent.ROWS, FP32_BYTES), StateTensor(Extent.COLUMNS, FP32_BYTES))
_UNFACTORED_STATES = (StateTensor(itemsize=FP32_BYTES),)

_ADAFACTOR = (
    Variant(
        applies=lambda tensor: _is_matrix(tensor) and _is_half(tensor),
        states=_FACTORED_STATES,
        loop=_ADAFACTOR_HALF + _adafactor_update(factored=True),
    ),
    Variant(applies=_is_matrix, states=_FACTORED_STATES, loop=_adafactor_update(factored=True)),
    Variant(
        applies=_is_half,
        states=_UNFACTORED_STATES,
        loop=_ADAFACTOR_HALF + _adafactor_update(factored=False),
    ),
    Variant(states=_UNFACTORED_STATES, loop=_adafactor_update(factored=False)),
)

# torch.optim._muon: Newton-Schulz on a bf16 copy, five rounds; the second round holds the most.
_NEWTON_SCHULZ_ROUND = (
    Bind("gram_matrix", Extent.SQUARE, BF16_BYTES),
    Bind("gram_update", Extent.SQUARE, BF16_BYTES),
    Bind("ortho_grad", itemsize=BF16_BYTES),
)
_MUON_END = (Drop("update"), Drop("gram_matrix"), Drop("gram_update"))
_MUON_HIDDEN = (
    Variant(
        applies=lambda tensor: tensor.in_block and _is_matrix(tensor) and not _is_half(tensor),
        states=(StateTensor(),),
        loop=(Bind("update"), Drop("ortho_grad"), Bind("ortho_grad", itemsize=BF16_BYTES))
        + _NEWTON_SCHULZ_ROUND * 5
        + _MUON_END,
    ),
    Variant(
        applies=lambda tensor: tensor.in_block and _is_matrix(tensor),
        states=(StateTensor(),),
        # `.bfloat16()` of a bf16 tensor is the tensor itself: the lerp's result is orthogonalised in place.
        loop=(Bind("update"), Drop("ortho_grad")) + _NEWTON_SCHULZ_ROUND * 5 + _MUON_END,
    ),
)


def _is_block_matrix(tensor: LocalTensor) -> bool:
    return tensor.in_block and len(tensor.shape) == 2


# The AdamW that GaLore and APOLLO share: what follows on `grad`, the gradient or its projection.
_OWN_ADAMW = Variant(
    states=(StateTensor(), StateTensor()),
    loop=(Drop("grad"), Bind("denom"), Bind("norm_grad")),
)


def _projected_adamw(projected: Extent) -> tuple[Temporary, ...]:
    return (Drop("grad"), Bind("grad", projected), Bind("denom", projected), Bind("norm_grad", projected))


# Projected back, the update is scaled into a tensor of its own.
_GALORE_LOOP = (
    *_projected_adamw(Extent.ON_SINGULAR_VECTORS),
    Bind("full_rank_grad"),
    Bind("norm_grad"),
    Drop("full_rank_grad"),
)
_GALORE_STATES = (StateTensor(Extent.ON_SINGULAR_VECTORS),) * 2
_GALORE = (
    Variant(
        applies=lambda tensor: _is_block_matrix(tensor) and not _is_half(tensor),
        # The projector is a view of the factor that the decomposition made, which it keeps whole.
        states=(StateTensor(Extent.SQUARE), *_GALORE_STATES),
        loop=_GALORE_LOOP,
    ),
    Variant(
        applies=_is_block_matrix, states=(StateTensor(Extent.SINGULAR_VECTORS), *_GALORE_STATES), loop=_GALORE_LOOP
    ),
    _OWN_ADAMW,
)

# GaLore's Adafactor works on an fp32 gradient whatever the parameter is, so that its projector is one too.
_PROJECTED_SIDES = (Extent.LONGER_SIDE, Extent.RANK)
_GALORE_ADAFACTOR_UPDATE = (
    Bind("grad", Extent.ON_SINGULAR_VECTORS, FP32_BYTES),
    *_second_moment(factored=True, of=Extent.ON_SINGULAR_VECTORS, sides=_PROJECTED_SIDES),
    Bind("full_rank_grad", itemsize=FP32_BYTES),
    Bind("update", itemsize=FP32_BYTES),
    Drop("full_rank_grad"),
    *_NEGATED,
)
_GALORE_ADAFACTOR_STATES = (
    StateTensor(Extent.SQUARE, FP32_BYTES),
    *(StateTensor(side, FP32_BYTES) for side in _PROJECTED_SIDES),
)
_GALORE_ADAFACTOR = (
    Variant(
        applies=lambda tensor: _is_block_matrix(tensor) and _is_half(tensor),
        states=_GALORE_ADAFACTOR_STATES,
        loop=(*_ADAFACTOR_HALF, *_GALORE_ADAFACTOR_UPDATE),
    ),
    Variant(applies=_is_block_matrix, states=_GALORE_ADAFACTOR_STATES, loop=(Drop("grad"), *_GALORE_ADAFACTOR_UPDATE)),
    *_ADAFACTOR,
)
_APOLLO = (
    Variant(
        applies=_is_block_matrix,
        states=(StateTensor(Extent.RANDOM_VECTORS), *(StateTensor(Extent.ON_RANDOM_VECTORS),) * 2),
        loop=(
            *_projected_adamw(Extent.ON_RANDOM_VECTORS),
            Bind("grad_scaling_factor", Extent.LONGER_SIDE),
            Bind("scaled_grad"),
            Bind("scaled_grad"),
            Drop("norm_grad"),
        ),
    ),
    _OWN_ADAMW,
)

# schedulefree's foreach is its default on the CPU too; gradients are overwritten.
_SCHEDULE_FREE_ADAMW = Variant(
    states=(StateTensor(), StateTensor()),
    foreach=(Bind("denom"),),
)

# Its squared mean is a scratch scalar of the Triton kernel that CUDA takes, which updates in place.
_STABLE_STATES = (StateTensor(), StateTensor(), StateTensor(Extent.ONE), StateTensor(Extent.ONE, FP32_BYTES))
_STABLE_SQUARE = (Bind("square"), Bind("maximum"), Drop("maximum"))
_STABLE_MEAN_OF_HALF = (Bind("wide", itemsize=FP32_BYTES), Drop("wide"))  # torch's CPU kernel takes the mean in fp32
_STABLE_END = (Drop("square"), Bind("denominator"), Drop("denominator"))
_STABLE_ADAMW = (
    Variant(
        applies=_is_half,
        states=(*_STABLE_STATES, StateTensor()),
        loop=(*_STABLE_SQUARE, *_STABLE_MEAN_OF_HALF, *_STABLE_END),
        foreach=(),
    ),
    Variant(states=(*_STABLE_STATES, StateTensor(Extent.ONE, 1)), loop=(*_STABLE_SQUARE, *_STABLE_END), foreach=()),
)

# GrokAdamW keeps its states on the host, and fetches those of one parameter at a time.
_GROKADAMW = Variant(
    states=(StateTensor(place=Place.HOST),) * 3,
    loop=(
        Bind("exp_avg", from_host=True),
        Bind("exp_avg_sq", from_host=True),
        Bind("grok_ema", from_host=True),
        Bind("amplified"),
        Bind("grok_grad"),
        Drop("amplified"),
        Bind("root"),
        Drop("root"),
    ),
)

_LOMO_HALF = (Bind("grad_fp32", itemsize=FP32_BYTES),)
_LOMO_END = (Bind("p_fp32", itemsize=FP32_BYTES),)
_LOMO = (Variant(applies=_is_half, loop=(*_LOMO_HALF, *_LOMO_END)), Variant())
_ADALOMO = (
    Variant(
        applies=lambda tensor: _is_matrix(tensor) and _is_half(tensor),
        states=_FACTORED_STATES,
        loop=(*_LOMO_HALF, *_second_moment(factored=True), *_LOMO_END),
    ),
    Variant(applies=_is_matrix, states=_FACTORED_STATES, loop=_second_moment(factored=True)),
    Variant(
        applies=_is_half,
        states=_UNFACTORED_STATES,
        loop=(*_LOMO_HALF, *_second_moment(factored=False), *_LOMO_END),
    ),
    Variant(states=_UNFACTORED_STATES, loop=_second_moment(factored=False)),
)

_CODE_BOOK_BYTES = 256 * FP32_BYTES
_BNB_BLOCK = 256


def _bnb_states(num_states: int, *, bits: int, place: Place = Place.DEVICE) -> tuple[StateTensor, ...]:
    """bitsandbytes' states: fp32, or one byte per element with an fp32 maximum per block of 256."""
    if bits == 32:
        return (StateTensor(Extent.ELEMENTS, FP32_BYTES, 1, place),) * num_states
    codes = (StateTensor(Extent.ELEMENTS, 1, 1, place),) * num_states
    return codes + (StateTensor(Extent.ELEMENTS, FP32_BYTES, _BNB_BLOCK),) * num_states


_AS_CODES = {
    "maxima": Bind("maxima", itemsize=FP32_BYTES, elements_per_entry=_BNB_BLOCK),
    "codes": Bind("codes", itemsize=1),
}


def _variables(text: str) -> tuple[Temporary, ...]:
    """A function's variables in order, in fp32 but for codes: ``x`` is bound, ``-x`` let go of, as are all that are
    left when the function returns."""
    words = text.split()
    left = [f"-{word}" for word in words if not word.startswith("-") and f"-{word}" not in words]
    return tuple(
        Drop(word[1:]) if word.startswith("-") else _AS_CODES.get(word, Bind(word, itemsize=FP32_BYTES))
        for word in (*words, *left)
    )


# bitsandbytes' updates on a CPU, which are torch code; its CUDA kernels work in place. By the states' bits: what is
# dequantised ahead of the gradient, and what follows on it. Source: bitsandbytes 0.50.2 backends/cpu/ops.py,
# ``_optimizer_update_32bit_cpu`` and ``_optimizer_update_8bit_blockwise_cpu``. Omits: states on their way back into
# codes where less is held then than before.
_BNB_ON_CPU: dict[tuple[str, int], tuple[str, str]] = {
    ("adam", 32): ("", "sqrt denominator -sqrt update -denominator"),
    ("adam", 8): ("state1 state2", "sqrt denominator -sqrt"),
    ("rmsprop", 32): ("", "sqrt denominator -sqrt update -denominator"),
    ("rmsprop", 8): ("state1", "sqrt -sqrt"),
    ("lion", 32): ("", "scaled update -scaled sign -sign"),
    ("lion", 8): ("state1", "scaled scaled_gradient sum -scaled -scaled_gradient update -sum"),
    ("ademamix", 32): (
        "",
        "fast slow mixed -fast -slow sqrt corrected -sqrt denominator -corrected quotient -quotient",
    ),
    ("ademamix", 8): (
        "fast slow stacked_fast stacked_slow state2",
        "scaled_fast scaled_slow mixed -scaled_fast -scaled_slow sqrt corrected -sqrt denominator -corrected update "
        "-mixed -denominator new_fast new_slow maxima codes",
    ),
}


def _bnb_on_cpu(algorithm: str, *, bits: int, is_half: bool) -> tuple[Temporary, ...]:
    """Weights in 16 bits are widened, and so is their gradient before it is scaled out of place."""
    states, update = _BNB_ON_CPU[algorithm, bits]
    return _variables(f"{states} {'wide gradient -wide weights' if is_half else 'gradient'} {update}")


def _bnb(algorithm: str, *, bits: int, paged: bool = False) -> tuple[Variant, ...]:
    """bitsandbytes keeps small tensors in fp32, and such as it is told to, and pages only those of 100 000 elements and
    more."""
    num_states = {"adam": 2, "ademamix": 3}.get(algorithm, 1)
    large = Place.PAGED if paged else Place.DEVICE
    kinds: list[tuple[Callable[[LocalTensor], bool], int, Place]] = []
    if bits == 8:
        kinds.append((_is_small_8bit, 32, Place.DEVICE))
        kinds.append((lambda tensor: tensor.is_kept_wide and _is_unpaged(tensor), 32, Place.DEVICE))
        kinds.append((lambda tensor: tensor.is_kept_wide, 32, large))
    kinds += [(_is_unpaged, bits, Place.DEVICE), (_always, bits, large)]
    return tuple(
        Variant(
            applies=partial(_is_kind, applies=applies, is_half=is_half),
            states=_bnb_states(num_states, bits=held_bits, place=place),
            loop=_bnb_on_cpu(algorithm, bits=held_bits, is_half=is_half),
            foreach=(),
        )
        for applies, held_bits, place in kinds
        for is_half in (True, False)
    )


def _is_kind(tensor: LocalTensor, *, applies: Callable[[LocalTensor], bool], is_half: bool) -> bool:
    return applies(tensor) and _is_half(tensor) is is_half


# Bytes per element that the compiled update holds on a CPU, by elements to a byte of state: both moments in fp32, and
# for 4 bits the distances to the code book. Measured (inductor of torch 2.13, torchao 0.18); not on a GPU.
_TORCHAO_BUFFER_BYTES = {1: 8, 2: 26}


def _torchao(*, elements_per_byte: int) -> tuple[Variant, ...]:
    """torchao quantises tensors of at least 4096 elements whose count is a multiple of the block (256, as the
    Trainer passes it); each quantised state has a code book of its own."""
    codes = StateTensor(Extent.ELEMENTS, 1, elements_per_byte)
    scales = StateTensor(Extent.ELEMENTS, FP32_BYTES, 256)
    book = StateTensor(Extent.ONE, (256 if elements_per_byte == 1 else 16) * FP32_BYTES)
    buffers = Bind("buffers", itemsize=_TORCHAO_BUFFER_BYTES[elements_per_byte])
    return (
        Variant(
            applies=lambda tensor: tensor.numel < 4096 or tensor.numel % 256 != 0,
            states=(_STEP_ON_HOST, StateTensor(), StateTensor()),
        ),
        Variant(
            states=(_STEP_ON_HOST, codes, scales, book, codes, scales, book),
            loop=(buffers, Drop("buffers")),
            foreach=(),
        ),
    )


_TORCH = "torch 2.13 torch/optim"
_BNB = "bitsandbytes 0.50.2 bitsandbytes/optim/optimizer.py"
_TORCHAO = "torchao 0.18.0 torchao/optim/adam.py and subclass_*.py; what the compiled update holds on a GPU is left out"


def _bnb_row(name: str, algorithm: str, *, bits: int, source: str = _BNB) -> Optimizer:
    """``algorithm`` is bitsandbytes' own name of the update."""
    num_code_books = 2 if algorithm in ("adam", "ademamix") else 1
    return Optimizer(
        name=name,
        hf_name=name,
        needs="bitsandbytes",
        source=source,
        variants=_bnb(algorithm, bits=bits, paged=name.startswith("paged")),
        shared_state_bytes=(_CODE_BOOK_BYTES,) * num_code_books if bits == 8 else (),
        states_interleaved=True,
    )


# The linear layers of the blocks, whatever the model: their names hold the block's number.
_BLOCK_LINEARS = r".*\.\d+\..*"
_GALORE_SOURCE = "galore-torch 1.0 galore_torch/adamw.py, rank 128, between two renewals of the projection"
_GALORE_ADAFACTOR_SOURCE = "galore-torch 1.0 galore_torch/adafactor.py, rank 128, between two renewals"
_APOLLO_SOURCE = "apollo-torch 1.0.3 apollo_torch/apollo.py, random projection of rank 128, steady steps"


def _projecting_row(name: str, variants: tuple[Variant, ...], *, needs: str, source: str) -> Optimizer:
    return Optimizer(
        name=name,
        hf_name=name,
        needs=needs,
        source=source,
        variants=variants,
        target_modules=_BLOCK_LINEARS,
        in_backward=name.endswith("layerwise"),
        states_interleaved=True,
    )


def _lomo_row(name: str, variants: tuple[Variant, ...]) -> Optimizer:
    """Omits the states of frozen parameters, which AdaLomo makes too."""
    return Optimizer(
        name=name,
        hf_name=name,
        needs="lomo-optim",
        source=f"lomo-optim 0.1.1 lomo_optim/{name}.py, as the Trainer makes it: without a limit on the norm",
        variants=variants,
        in_backward=True,
        updates_late=True,
        states_before_step=True,
    )


# AdEMAMix stacks its two moving averages in one state of twice the size, so it counts as three.
_ADEMAMIX = "bitsandbytes 0.50.2 bitsandbytes/optim/ademamix.py"

_ROWS = (
    Optimizer(name="adamw_torch", hf_name="adamw_torch", variants=(_ADAM,), source=f"{_TORCH}/adam.py"),
    Optimizer(
        name="adamw_torch_fused", hf_name="adamw_torch_fused", variants=(_ADAM_FUSED,), source=f"{_TORCH}/adam.py"
    ),
    Optimizer(
        name="adamw_torch_8bit",
        hf_name="adamw_torch_8bit",
        needs="torchao",
        variants=_torchao(elements_per_byte=1),
        source=_TORCHAO,
        states_interleaved=True,
    ),
    Optimizer(
        name="adamw_torch_4bit",
        hf_name="adamw_torch_4bit",
        needs="torchao",
        variants=_torchao(elements_per_byte=2),
        source=_TORCHAO,
        states_interleaved=True,
    ),
    Optimizer(
        name="adafactor",
        hf_name="adafactor",
        variants=_ADAFACTOR,
        source="transformers 5.23.0 transformers/optimization.py, without a first moment as the Trainer sets it",
        states_interleaved=True,
    ),
    Optimizer(name="sgd", hf_name="sgd", variants=(Variant(),), source=f"{_TORCH}/sgd.py"),
    Optimizer(
        name="sgd_momentum",
        hf_name="sgd",
        hf_args="momentum=0.9",
        variants=(Variant(states=(StateTensor(),)),),
        source=f"{_TORCH}/sgd.py",
    ),
    Optimizer(
        name="rmsprop",
        hf_name="rmsprop",
        variants=(
            Variant(
                states=(_STEP_ON_HOST, StateTensor()),
                loop=(Bind("avg"),),
                foreach=(Bind("avg"),),
            ),
        ),
        source=f"{_TORCH}/rmsprop.py",
    ),
    Optimizer(
        name="adagrad",
        hf_name="adagrad",
        variants=(
            Variant(
                states=(_STEP_ON_HOST, StateTensor()),
                loop=(Bind("std"),),
                foreach=(Bind("std"), Bind("numerator")),
            ),
        ),
        source=f"{_TORCH}/adagrad.py",
        states_before_step=True,
    ),
    Optimizer(
        name="muon",
        hf_name="",
        variants=(*_MUON_HIDDEN, _ADAM_FUSED),
        source=f"{_TORCH}/_muon.py for matrices of the blocks, fused AdamW for everything else",
    ),
    _projecting_row("galore_adamw", _GALORE, needs="galore-torch", source=_GALORE_SOURCE),
    _projecting_row("galore_adafactor", _GALORE_ADAFACTOR, needs="galore-torch", source=_GALORE_ADAFACTOR_SOURCE),
    _projecting_row("galore_adamw_layerwise", _GALORE, needs="galore-torch", source=_GALORE_SOURCE),
    _projecting_row("apollo_adamw", _APOLLO, needs="apollo-torch", source=_APOLLO_SOURCE),
    _projecting_row("apollo_adamw_layerwise", _APOLLO, needs="apollo-torch", source=_APOLLO_SOURCE),
    Optimizer(
        name="schedule_free_adamw",
        hf_name="schedule_free_adamw",
        needs="schedulefree",
        variants=(_SCHEDULE_FREE_ADAMW,),
        source="schedulefree 1.4.1 schedulefree/adamw_schedulefree.py",
        foreach_on_cpu=True,
    ),
    Optimizer(
        name="schedule_free_radam",
        hf_name="schedule_free_radam",
        needs="schedulefree",
        variants=(_SCHEDULE_FREE_ADAMW,),
        source="schedulefree 1.4.1 schedulefree/radam_schedulefree.py, from the fifth step on",
        foreach_on_cpu=True,
    ),
    Optimizer(
        name="schedule_free_sgd",
        hf_name="schedule_free_sgd",
        needs="schedulefree",
        variants=(Variant(states=(StateTensor(),)),),
        source="schedulefree 1.4.1 schedulefree/sgd_schedulefree.py",
    ),
    Optimizer(
        name="stable_adamw",
        hf_name="stable_adamw",
        needs="torch-optimi",
        variants=_STABLE_ADAMW,
        source="torch-optimi 0.3.3 optimi/stableadamw.py",
    ),
    Optimizer(
        name="grokadamw",
        hf_name="grokadamw",
        needs="grokadamw",
        variants=(_GROKADAMW,),
        source="grokadamw 0.1.2 grokadamw/grokadamw.py",
        states_interleaved=True,
    ),
    _lomo_row("lomo", _LOMO),
    _lomo_row("adalomo", _ADALOMO),
    _bnb_row("adamw_bnb_8bit", "adam", bits=8),
    _bnb_row("paged_adamw_8bit", "adam", bits=8),
    _bnb_row("paged_adamw_32bit", "adam", bits=32),
    _bnb_row("lion_8bit", "lion", bits=8),
    _bnb_row("lion_32bit", "lion", bits=32),
    _bnb_row("paged_lion_8bit", "lion", bits=8),
    _bnb_row("paged_lion_32bit", "lion", bits=32),
    _bnb_row("rmsprop_bnb", "rmsprop", bits=32),
    _bnb_row("rmsprop_bnb_8bit", "rmsprop", bits=8),
    _bnb_row("rmsprop_bnb_32bit", "rmsprop", bits=32),
    _bnb_row("ademamix", "ademamix", bits=32, source=_ADEMAMIX),
    _bnb_row("ademamix_8bit", "ademamix", bits=8, source=_ADEMAMIX),
    _bnb_row("paged_ademamix_32bit", "ademamix", bits=32, source=_ADEMAMIX),
    _bnb_row("paged_ademamix_8bit", "ademamix", bits=8, source=_ADEMAMIX),
)

OPTIMIZERS = {row.name: row for row in _ROWS}
ALIASES = {
    "adamw_8bit": "adamw_bnb_8bit",
    "adamw": "adamw_torch",
    "lion": "lion_32bit",
    "paged_adamw": "paged_adamw_32bit",
}

# Names of ``transformers.training_args.OptimizerNames`` (5.23) that no row describes: why, and what to use.
UNPLANNED = {
    "adamw_torch_xla": "is for TPUs; use --optimizer adamw_torch_fused",
    "adamw_torch_npu_fused": "is for Ascend NPUs; use --optimizer adamw_torch_fused",
    "adamw_anyprecision": "needs torchdistX, which is no longer built; use --optimizer adamw_torch",
    "galore_adamw_8bit": "is not modelled; use --optimizer galore_adamw, or adamw_bnb_8bit",
    "galore_adamw_8bit_layerwise": "is not modelled; use --optimizer galore_adamw_layerwise",
    "galore_adafactor_layerwise": "cannot be made by transformers 5.23, which hands it a learning rate beside "
    "relative_step; use --optimizer galore_adafactor, or galore_adamw_layerwise",
}
