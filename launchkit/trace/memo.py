"""What operators make of their arguments, remembered by how those look.

A step runs few different operators: each layer's again in the next, the forward's again under checkpointing, a
program's again in that of another key. What a fake tensor mode does for each, its own cache included, takes some ten
times as long as to make the tensor that comes of it. What an operator returns depends on shapes, strides, dtypes and
plain values alone, so it is told once and then made from that.

Left to the mode is whatever might depend on more: arguments with values (a constant), arguments that are no fake
tensors, operators that are not torch's own or change what a tensor is a view of, outputs that are a part of a larger
storage of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Look = tuple[Any, ...]

_CPU, _META = torch.device("cpu"), torch.device("meta")
_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format})


class Made(NamedTuple):
    """How one output comes about: from input ``source`` (-1: from none), as that itself or as a view of it."""

    source: int
    is_itself: bool
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32


class Recipe(NamedTuple):
    """The outputs of an operator in order, whole numbers as they are (an attention kernel's longest sequence), and the
    type of the sequence that holds them, None for a single tensor."""

    outputs: tuple[Made | int | None, ...]
    sequence: type[tuple[Any, ...]] | type[list[Any]] | None


def look_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Look | None, list[torch.Tensor]]:
    """All that the outputs of ``func`` depend on, None where that cannot be told, and the tensors among its arguments
    in order."""
    tensors: list[torch.Tensor] = []
    look: list[Any] = [func, torch.get_default_dtype()]
    told = _tell(args, look, tensors)
    if told and kwargs:
        look.extend(kwargs)
        told = _tell(kwargs.values(), look, tensors)
    return tuple(look) if told else None, tensors


def _tell(values: Iterable[Any], look: list[Any], tensors: list[torch.Tensor]) -> bool:
    """Adds to ``look`` and ``tensors``. Numbers go with their type, since 1 and 1.0 are equal and make other dtypes."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.layout is not torch.strided or value.is_neg():
                return False
            tensors.append(value)
            look += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        elif kind in _PLAIN:
            look += (kind, value)
        elif kind is list or kind is tuple:
            look += (kind, len(value))
            if not _tell(value, look, tensors):
                return False
        else:
            return False
    return True


class FakeMaker:
    """Makes fake tensors of ``mode`` on the CPU, with the state of one that torch made."""

    def __init__(self, mode: FakeTensorMode) -> None:
        with torch._C._DisableTorchDispatch():
            empty = torch.empty(0, device=_META)
        self._state = dict(vars(FakeTensor(mode, empty, _CPU)))

    def make(self, recipe: Recipe, inputs: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        """What the operator returns, and the tensors in it."""
        outputs: list[Any] = [self._tensor(made, inputs) if type(made) is Made else made for made in recipe.outputs]
        tensors = [out for out in outputs if isinstance(out, torch.Tensor)]
        return (outputs[0] if recipe.sequence is None else recipe.sequence(outputs)), tensors

    def _tensor(self, made: Made, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        source, is_itself, shape, stride, offset, dtype = made
        if is_itself:
            return inputs[source]
        with torch._C._DisableTorchDispatch():
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=_META)
            if source >= 0:
                tensor.set_(inputs[source].untyped_storage(), offset, shape, stride)
        fake = torch.Tensor._make_subclass(
            FakeTensor, tensor, False, dispatch_device=True, device_for_backend_keys=_CPU
        )
        vars(fake).update(self._state)
        return fake

    def recipe(self, func: Any, inputs: Sequence[torch.Tensor], out: Any) -> Recipe | None:
        """How to make ``out``, which ``func`` returned for ``inputs``; None where that is better left to the mode."""
        if func.namespace != "aten" or torch.Tag.inplace_view in func.tags:
            return None
        sequence = type(out) if isinstance(out, (tuple, list)) else None
        outputs = out if sequence else (out,)
        if sequence not in (None, tuple, list) or not all(type(o) in (type(None), int, FakeTensor) for o in outputs):
            return None
        recipe = Recipe(tuple(_made(o, inputs) if type(o) is FakeTensor else o for o in outputs), sequence)
        return recipe if self._makes(recipe, inputs, outputs) else None

    def _makes(self, recipe: Recipe, inputs: Sequence[torch.Tensor], outputs: Sequence[Any]) -> bool:
        """Whether ``recipe`` makes what looks like ``outputs`` in all that torch or the recorder ask of a tensor."""
        made, tensors = self.make(recipe, inputs)[1], [out for out in outputs if type(out) is FakeTensor]
        alike = all(_alike(a, b) for a, b in zip(made, tensors, strict=True))
        return alike and _sharing(made, inputs) == _sharing(tensors, inputs)


def _made(tensor: torch.Tensor, inputs: Sequence[torch.Tensor]) -> Made:
    storage = tensor.untyped_storage()._cdata
    sources = [i for i, t in enumerate(inputs) if t.untyped_storage()._cdata == storage]
    itself = next((i for i in sources if inputs[i] is tensor), -1)
    if itself >= 0:
        return Made(itself, True)
    source = sources[0] if len(sources) == 1 else -1
    return Made(source, False, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)


def _alike(a: Any, b: Any) -> bool:
    return (
        look_of(None, (a,), {})[0] == look_of(None, (b,), {})[0] is not None
        and a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
        and torch._C._dispatch_key_set(a) == torch._C._dispatch_key_set(b)
        and vars(a) == vars(b)
    )


def _sharing(outputs: Sequence[Any], inputs: Sequence[torch.Tensor]) -> list[int]:
    """For each tensor the first with the same storage, by place."""
    storages = [t.untyped_storage()._cdata for t in (*inputs, *outputs)]
    return [storages.index(storage) for storage in storages]
