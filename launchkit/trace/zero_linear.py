"""ZeRO-3's own linear layer, which DeepSpeed puts in the place of torch's.

Source: DeepSpeed 0.19.8 ``deepspeed/runtime/zero/linear.py`` (``LinearFunctionForZeroStage3``, in force through
``memory_efficient_linear``, on by default). torch's keeps its input where the weight is trained; this one always does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.autograd import Function
from torch.nn import functional

from launchkit.scenario import TraceKey

_linear = functional.linear


class _InputKept(Function):
    """``functional.linear`` that keeps its input whatever is trained."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(features, weight, bias)
        return _linear(features, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, weight, bias = ctx.saved_tensors
        (gradient,) = gradients
        rows = gradient.reshape(-1, gradient.shape[-1])
        needs_features, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            gradient.matmul(weight) if needs_features else None,
            rows.t().matmul(features.reshape(-1, features.shape[-1])) if needs_weight else None,
            rows.sum(0) if bias is not None and needs_bias else None,
        )


def _kept(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    kept: torch.Tensor = _InputKept.apply(features, weight, bias)
    return kept


@contextmanager
def kept_linear_inputs(key: TraceKey) -> Iterator[None]:
    """While active, linear layers keep their inputs as under ZeRO-3, where ``key`` says so."""
    if not key.keeps_linear_inputs:
        yield
        return
    with mock.patch.object(functional, "linear", _kept):
        yield
