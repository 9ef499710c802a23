"""Gradients that meet: autograd adds them up in place where it alone holds the first, which no trace would see.

Where a tensor is used twice, its two gradients are added when the second arrives. torch's engine adds into the first if
nothing else holds it, but never under a dispatch mode or among tensor subclasses, which a trace has. The difference is
one gradient's size; in a loop over the tokens (a state-space scan), of the whole sequence.

Source: torch 2.13, ``torch/csrc/autograd/input_buffer.cpp``, ``can_accumulate_inplace``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ADD = torch.ops.aten.add.Tensor
_ADD_IN_PLACE = torch.ops.aten.add_.Tensor


def as_the_engine_adds(func: Any, args: tuple[Any, ...], *, sole: tuple[int, int]) -> Any:
    """``func``, or the addition in place where the engine would have chosen it.

    That is where the first argument has the holders of a ``sole`` gradient. To be called from ``__torch_dispatch__``,
    with no reference to the arguments held besides.
    """
    if func is not _ADD or torch.is_grad_enabled() or not _are_alike(args):
        return func
    return _ADD_IN_PLACE if _holders(args) == sole else func


def _are_alike(args: tuple[Any, ...]) -> bool:
    """Two tensors of one shape and dtype, as the gradients of one tensor are, the first dense."""
    if len(args) != 2 or not isinstance(args[1], torch.Tensor):
        return False
    alike = args[0].shape == args[1].shape and args[0].dtype == args[1].dtype
    return alike and _is_dense(args[0])


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their stretch of memory, each once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _holders(args: tuple[Any, ...]) -> tuple[int, int]:
    """References to the first argument and to its storage, those of the call itself included."""
    storage = args[0].untyped_storage()
    return args[0]._use_count(), torch._C._storage_Use_Count(storage._cdata)


@cache
def holders_of_a_sole_gradient() -> tuple[int, int]:
    """The references that are counted where only the engine holds a gradient, seen in a sum of which that is known.

    Not to be called within a backward pass.
    """
    seen: list[tuple[int, int]] = []

    class Probe(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is _ADD and not torch.is_grad_enabled():
                seen.append(_holders(args))
            return func(*args, **(kwargs or {}))

    with torch._subclasses.fake_tensor.unset_fake_temporarily(), Probe(), torch.enable_grad():
        x = torch.ones(2, requires_grad=True) * 1
        (x.sin() + x.cos()).sum().backward()
    return seen[0]
