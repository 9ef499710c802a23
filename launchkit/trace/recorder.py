"""Records the storages that come and go, and the kernels that run, while a step executes on fake tensors.

One dispatch mode, constant work per operator. A storage is noticed when an operator first returns a tensor
over it and is gone when its finaliser runs, so the log is what the real allocator would be asked for, in order.
What a kernel allocates inside itself and frees again before it returns is not seen here; the kernels where that
matters have their scratch stated in ``trace.kernels``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from launchkit.program import CollectiveKind, Tiles
from launchkit.scenario import Attention, DeviceKind
from launchkit.trace.accumulate import as_the_engine_adds, holders_of_a_sole_gradient
from launchkit.trace.asking import MEASURED, OwnKernels, measured_scratch, own_kernels
from launchkit.trace.flash_attention_3 import scratch_of
from launchkit.trace.float8 import float8_types
from launchkit.trace.kernels import SUBSTITUTES, Scratch, flop_formulas, scratch
from launchkit.trace.memo import FakeMaker, Look, Recipe, look_of
from launchkit.trace.values import FACTORIES, numbers_are_known


class Place(NamedTuple):
    """Where in the step something happens: the stage's name and the layer within its stack."""

    stage: str
    layer: int


class Tile(NamedTuple):
    """The one pass, of a loop over ``num_rows`` rows, that a trace runs: it works on ``rows`` of them at this point.

    ``most`` and ``parts`` are ``program.Tiles``'. What is allocated in it with a dimension of ``rows`` goes with the
    tile. Kernels count for all passes, with what they read besides the rows (a weight) counted once.
    """

    num_rows: int
    most: int = 0
    parts: int = 0

    @property
    def rows(self) -> int:
        return Tiles(1, self.most, self.parts).rows(self.num_rows)


class AllocRecord(NamedTuple):
    storage: int
    num_bytes: int
    place: Place
    op: str
    last_dim: int
    tile: Tile | None = None


class FreeRecord(NamedTuple):
    storage: int
    place: Place


class KernelRecord(NamedTuple):
    place: Place
    op: str
    flops: int
    num_bytes: int


class CopyRecord(NamedTuple):
    place: Place
    to_device: bool
    num_bytes: int


class CollectiveRecord(NamedTuple):
    """A message among the ranks that share one copy's step; ``num_bytes`` is the whole payload."""

    place: Place
    kind: CollectiveKind
    num_bytes: int


@dataclass
class Log:
    """Everything seen at one point. ``uses`` maps a place to the parameter storages that its operators read."""

    memory: list[AllocRecord | FreeRecord] = field(default_factory=list)
    kernels: list[KernelRecord] = field(default_factory=list)
    copies: list[CopyRecord] = field(default_factory=list)
    collectives: list[CollectiveRecord] = field(default_factory=list)
    uses: dict[Place, set[int]] = field(default_factory=dict)
    gradients: dict[int, str] = field(default_factory=dict)  # storage -> parameter name
    wide_gradients: dict[str, int] = field(default_factory=dict)  # parameter name -> elements, more than its own
    inputs: list[int] = field(default_factory=list)  # bytes of each input tensor


_TILE: ContextVar[Tile | None] = ContextVar("tile", default=None)
_ACTIVE: ContextVar[StepRecorder | None] = ContextVar("recorder", default=None)


def launch(name: str, *, flops: int = 0, num_bytes: int = 0) -> None:
    """Notes a kernel that no operator stands for: nothing is allocated. Outside of a trace it does nothing."""
    recorder = _ACTIVE.get()
    if recorder is not None:
        recorder.log.kernels.append(KernelRecord(recorder.place, name, flops, num_bytes))


def note_copy(*, to_device: bool, num_bytes: int) -> None:
    """Notes bytes that cross the host link. Outside of a trace it does nothing."""
    recorder = _ACTIVE.get()
    if recorder is not None and recorder.recording:
        recorder.log.copies.append(CopyRecord(recorder.place, to_device, num_bytes))


@contextmanager
def one_pass(tile: Tile) -> Iterator[Tile]:
    """While active, what runs is the first pass of a loop over rows and stands for all of them."""
    token = _TILE.set(tile)
    try:
        yield tile
    finally:
        _TILE.reset(token)


# This machine's, or what is told of a CPU's (true), of CUDA's, and of CUDA's with this attention.
Kernels = OwnKernels | bool | Attention


class _Operator(NamedTuple):
    """What the recorder notes of an operator besides its tensors: its scratch, and the FLOPs and traffic of its kernel,
    which one that only makes views has none of."""

    name: str
    scratch: Scratch
    flops: int
    num_bytes: int
    is_free: bool
    is_mutable: bool


_DEVICE_OF = torch.ops.prim.device.default

# What operators did, by how their arguments looked, for all traces of this process. A model's programs have some
# thousands, of about a kilobyte.
_KNOWN: dict[tuple[Look, Tile | None, Kernels], tuple[_Operator, Recipe]] = {}
_MOST_KNOWN = 50_000

# Operators whose outputs share their inputs' storage or touch no data; they cost nothing on a device. What is sent is
# timed as a message.
_FREE_OPS = frozenset({"aten::detach", "aten::alias", "aten::lift_fresh", "aten::view", "aten::_unsafe_view"})
_MESSAGE_NAMESPACES = ("_c10d_functional::", "c10d::", "deepspeed::")


class StepRecorder(TorchDispatchMode):
    """Use as a context around a step; ``place`` says where the step has got to and is set by the tracer's hooks."""

    def __init__(
        self,
        *,
        known: Iterable[torch.Tensor],
        parameters: Iterable[torch.Tensor],
        device: DeviceKind = DeviceKind.CUDA,
        asks_kernels: bool = False,
        attention: Attention = Attention.SDPA,
    ) -> None:
        super().__init__()
        self._on_cpu = device is DeviceKind.CPU
        self._has_flash_3 = attention is Attention.FLASH_ATTENTION_3
        self._kernels: Kernels = own_kernels() if asks_kernels else attention if self._has_flash_3 else self._on_cpu
        self.log = Log()
        self.place = Place("forward.0", 0)
        self.recording = False
        self._numbers: dict[int, int] = {}
        self._next = 0
        self._sole = holders_of_a_sole_gradient()
        self._wrappers = float8_types()  # an operator on those is none on a device, only what they make of it is
        self._flops: dict[Any, Callable[..., int]] = {**flop_registry, **flop_formulas()}
        for tensor in known:
            self._number_of(tensor.untyped_storage())
        self._parameters = {self.number(p): i for i, p in enumerate(parameters)}

    def __enter__(self) -> Self:
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        self._maker = None if mode is None else FakeMaker(mode)
        self._token = _ACTIVE.set(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.reset(self._token)
        super().__exit__(*error)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under this mode, so its dispatch needs no shield from dynamo, a tenth of its cost."""
        return False

    def number(self, tensor: torch.Tensor) -> int:
        """The recorder's number of a tensor's storage, -1 if it never saw it."""
        return self._numbers.get(tensor.untyped_storage()._cdata, -1)

    def _number_of(self, storage: torch.UntypedStorage) -> tuple[int, bool]:
        key = storage._cdata
        number = self._numbers.get(key)
        if number is not None:
            return number, False
        number = self._next
        self._next += 1
        self._numbers[key] = number
        finalizer = weakref.finalize(storage, self._gone, key, number)
        finalizer.atexit = False
        return number, True

    def _gone(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        if self.recording:
            self.log.memory.append(FreeRecord(number, self.place))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE_OF:
            return args[0].fake_device  # two of three dispatches ask for nothing else
        if not self._wrappers.isdisjoint(types):
            return NotImplemented
        kwargs = kwargs or {}
        func = as_the_engine_adds(func, args, sole=self._sole)
        if self._maker is None or (func in FACTORIES and numbers_are_known()):
            return self._run(func, args, kwargs)
        look, inputs = look_of(func, args, kwargs)
        if look is None:
            return self._run(func, args, kwargs)
        known = _KNOWN.get((look, _TILE.get(), self._kernels))
        if known is None:
            out = self._run(func, args, kwargs)
            self._remember(look, func, args, kwargs, out)
            return out
        operator, recipe = known
        out, outputs = self._maker.make(recipe, inputs)
        self._note(operator, inputs, outputs)
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = SUBSTITUTES.get(func, func)(*args, **kwargs)
        self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(out))
        self._note(self._operator(func, args, kwargs, out), inputs, outputs)

    def _remember(self, look: Look, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Keeps what ``func`` did, where the like of it will do the same."""
        after, inputs = look_of(func, args, kwargs)
        assert self._maker is not None
        recipe = self._maker.recipe(func, inputs, out) if after == look else None
        if recipe is None:
            return
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[look, _TILE.get(), self._kernels] = self._operator(func, args, kwargs, out), recipe

    def _operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> _Operator:
        inputs, tile, name = list(_tensors((args, kwargs))), _TILE.get(), func._schema.name
        formula = self._flops.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        return _Operator(
            name=name,
            scratch=self._scratch(func, args, kwargs, out),
            flops=flops * tile.num_rows // tile.rows if tile else flops,
            num_bytes=sum(_traffic_bytes(t, tile) for t in (*inputs, *_tensors(out))),
            is_free=name in _FREE_OPS or name.startswith(_MESSAGE_NAMESPACES),
            is_mutable=func._schema.is_mutable,
        )

    def _scratch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Scratch:
        name = func._schema.name
        if isinstance(self._kernels, OwnKernels) and name in MEASURED:
            found = measured_scratch(func, args, kwargs, kernels=self._kernels)
            if found is not None:
                return found
        if self._has_flash_3 and (own := scratch_of(name, args)) is not None:
            return own
        return scratch(name, list(_tensors((args, kwargs))), list(_tensors(out)), on_cpu=self._on_cpu)

    def _note(
        self, operator: _Operator, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor | None]
    ) -> None:
        memory, place, tile = self.log.memory, self.place, _TILE.get()
        fresh = False
        for tensor in outputs:
            if tensor is None:
                continue
            storage = tensor.untyped_storage()
            number, is_new = self._number_of(storage)
            if is_new:
                fresh = True
                last_dim = tensor.shape[-1] if tensor.dim() else 0
                own = tile if tile and tile.rows in tensor.shape else None
                memory.append(AllocRecord(number, storage.nbytes(), place, operator.name, last_dim, own))
        if operator.scratch:
            self._pass_through(operator.scratch, operator.name)
        self._note_uses(inputs)
        if not operator.is_free and (fresh or operator.is_mutable):
            self.log.kernels.append(KernelRecord(place, operator.name, operator.flops, operator.num_bytes))

    def _pass_through(self, moments: Scratch, name: str) -> None:
        """Notes the tensors that a kernel holds beside its outputs while it runs."""
        for sizes in moments:
            numbers = range(self._next, self._next + len(sizes))
            self._next += len(sizes)
            memory, place = self.log.memory, self.place
            memory.extend(AllocRecord(n, size, place, name, 0) for n, size in zip(numbers, sizes, strict=True))
            memory.extend(FreeRecord(number, place) for number in numbers)

    def _note_uses(self, inputs: Sequence[torch.Tensor]) -> None:
        used = self.log.uses.setdefault(self.place, set())
        for tensor in inputs:
            index = self._parameters.get(self.number(tensor))
            if index is not None:
                used.add(index)


def _traffic_bytes(tensor: torch.Tensor, tile: Tile | None) -> int:
    """Bytes that a kernel moves for one argument, over all passes of a loop; scalars and seeds do not count."""
    counts = tensor.dim() > 0 and tensor.dtype != torch.uint64
    moved = tensor.numel() * tensor.element_size() if counts else 0
    return moved * tile.num_rows // tile.rows if tile and tile.rows in tensor.shape else moved


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operator's arguments or results, which nest tuples, lists and keyword arguments only."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
