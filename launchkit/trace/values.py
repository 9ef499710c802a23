"""Whole numbers that keep their values on fake tensors, for models that read from tensors how to go on.

A model that sees images of any size reads from a tensor how many patches each has, splits by them, looks for the image
tokens among the others, and numbers positions from what it finds. Torch's fake tensors carry the value of a single
number made from a literal (``FakeTensor.constant``) and compute with it. Here they do so for more numbers than one, and
for those that come of no tensor: each operator on known values alone is run on them too. Weights and what is computed
from them have no values, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# More numbers than the tokens of a micro-batch, fewer than the mask of a long sequence, which nobody reads.
_MOST_NUMBERS = 1 << 20

# What makes tensors out of plain numbers. Others of them ask for values that are not said (empty) or drawn (rand).
FACTORIES = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.full.default,
        aten.ones.default,
        aten.scalar_tensor.default,
        aten.zeros.default,
    }
)


class _Valued(TorchDispatchMode):
    """Makes tensors of whole numbers with their values, for the fake mode beneath to compute with."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten.eq.Scalar and args[0].is_floating_point():
            out.constant = _no_pixel_is_zero(out)
        if func not in FACTORIES or out.is_floating_point() or out.numel() > _MOST_NUMBERS:
            return out
        with unset_fake_temporarily():
            real = func(*args, **(kwargs or {}))
        return self._mode.fake_tensor_converter.from_real_tensor(self._mode, real, make_constant=True)


def _no_pixel_is_zero(compared: torch.Tensor) -> torch.Tensor:
    """What a comparison with a number says of an image: Idefics 3 and SmolVLM take one of zeros for padding."""
    with unset_fake_temporarily():
        return torch.zeros((), dtype=torch.bool).expand(compared.shape)


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The numbers that a fake tensor stands for, None where they are not known."""
    return tensor.constant if isinstance(tensor, FakeTensor) else None


def _listed(tensor: FakeTensor) -> Any:
    """``Tensor.tolist``, which torch reads number by number from a fake tensor."""
    known = value_of(tensor)
    if known is None:
        return _LIST(tensor)
    with unset_fake_temporarily():
        return known.tolist()


def _from_numbers(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch.tensor``, which reads the memory of tensors in a list, where a fake tensor has none."""

    def tensor(data: Any, *args: Any, **options: Any) -> torch.Tensor:
        return make(_plain(data), *args, **options)

    return tensor


def _plain(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return [item.tolist() if isinstance(item, FakeTensor) else _plain(item) for item in data]
    return data


_LIST = FakeTensor.tolist
_KNOWN: ContextVar[bool] = ContextVar("known", default=False)


@contextmanager
def known_numbers(mode: FakeTensorMode) -> Iterator[None]:
    """While active under ``mode``, tensors of whole numbers made from plain ones have values."""
    with (
        _flag(),
        mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", _MOST_NUMBERS),
        mock.patch.object(FakeTensor, "tolist", _listed),
        mock.patch.object(torch, "tensor", _from_numbers(torch.tensor)),
        mock.patch.object(torch, "as_tensor", _from_numbers(torch.as_tensor)),
        _Valued(mode),
    ):
        yield


@contextmanager
def _flag() -> Iterator[None]:
    token = _KNOWN.set(True)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def numbers_are_known() -> bool:
    """Whether tensors of whole numbers have values."""
    return _KNOWN.get()
