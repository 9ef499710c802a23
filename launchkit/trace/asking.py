"""What this machine's own kernels take while they run: each is run once on real tensors, watched by torch's profiler.

oneDNN, from which torch's CPU build takes products in 16 bits and convolutions, packs a factor, or holds a result in a
layout of its own. How much goes by the shapes, the processor's instructions and the number of threads, in steps, so
that no polynomial in batch and length tells it. A program of one point needs none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_flatten, tree_unflatten

from launchkit.trace.kernels import Scratch

# Operators whose CPU kernels hold more than their results.
MEASURED = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::convolution",
        "aten::convolution_backward",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    }
)
# Factors beyond this are not run: seconds of work and gigabytes, beside which what a kernel takes is little.
_MOST_BYTES = 1 << 28


class OwnKernels(NamedTuple):
    """What decides which kernels run in this process."""

    num_threads: int
    uses_onednn: bool


def own_kernels() -> OwnKernels:
    return OwnKernels(torch.get_num_threads(), torch.backends.mkldnn.enabled)


class _Shape(tuple[Any, ...]):
    """Shape, strides and dtype of an argument that is a tensor."""


def measured_scratch(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, kernels: OwnKernels
) -> Scratch | None:
    """Bytes that ``func`` holds at most beyond its results; None where its arguments are too large to try."""
    leaves, tree = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if sum(tensor.untyped_storage().nbytes() for tensor in tensors) > _MOST_BYTES:
        return None
    told = tuple(
        _Shape((tuple(leaf.shape), leaf.stride(), leaf.dtype)) if isinstance(leaf, torch.Tensor) else _hashable(leaf)
        for leaf in leaves
    )
    most = _rise(func, told, tree, kernels)
    return ((most,),) if most else ()


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=10_000)
def _rise(func: Any, told: tuple[Any, ...], tree: Any, kernels: OwnKernels) -> int:
    """How far live bytes rise, while ``func`` runs, above where they end with its results held."""
    with unset_fake_temporarily(), torch.no_grad():
        leaves = [_zeros(part) if isinstance(part, _Shape) else part for part in told]
        args, kwargs = tree_unflatten(leaves, tree)
        func(*args, **kwargs)  # what is made once
        with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            held = func(*args, **kwargs)
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    levels = list(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    del held
    return max(levels, default=0) - levels[-1] if levels else 0


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps off the terminal what torch's profiler writes there from C++."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _zeros(shape: _Shape) -> torch.Tensor:
    size, stride, dtype = shape
    return torch.empty_strided(size, stride, dtype=dtype).zero_()
