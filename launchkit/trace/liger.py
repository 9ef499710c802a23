"""Liger's layer kernels, which ``use_liger_kernel`` puts in with its loss: norms, gated activations, rotary embeddings.

Each is an autograd function over fake tensors that holds what the Triton kernel's wrapper holds. Source: liger-kernel
0.8.5, ``transformers/monkey_patch.py`` for what is replaced, ``ops/`` for what is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd import Function

from launchkit.errors import TraceError
from launchkit.scenario import Loss, TraceKey, Trainer
from launchkit.trace.recorder import launch

# Of the dense models that Liger patches: whether a norm's gradient is written over the one that arrives, which Gemma 2
# and 3 rule out since their residuals need it.
_NORM_IN_PLACE: Mapping[str, bool] = {
    "llama": True,
    "mistral": True,
    "qwen2": True,
    "qwen3": True,
    "gemma": True,
    "phi3": True,
    "smollm3": True,
    "gemma2": False,
    "gemma3_text": False,
}

# The backward of a norm keeps one partial sum of the weight's gradient per multiprocessor: 108 on an A100, 132 on an
# H100, 128 on a 4090.
_NUM_MULTIPROCESSORS = 132


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, in_place: bool) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        inverse = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
        ctx.save_for_backward(x, weight, inverse)
        ctx.in_place = in_place
        launch("rms_norm", num_bytes=2 * x.numel() * x.element_size())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        _, weight, _ = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        needs_weight = ctx.needs_input_grad[1]
        partial = weight.new_empty((_NUM_MULTIPROCESSORS, len(weight)), dtype=torch.float32) if needs_weight else None
        out = gradient if ctx.in_place else torch.zeros_like(gradient)
        launch("rms_norm_backward", num_bytes=3 * gradient.numel() * gradient.element_size())
        return out, None if partial is None else partial.sum(dim=0).to(weight.dtype), None


class _GatedProduct(Function):
    """``activation(gate) × up``; the backward writes both gradients over the two factors."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        launch("gated_product", num_bytes=3 * gate.numel() * gate.element_size())
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        gradients[0].contiguous()
        launch("gated_product_backward", num_bytes=5 * gate.numel() * gate.element_size())
        return gate, up


class _Rotary(Function):
    """Rotates queries and keys where they lie."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return _rotated(query), _rotated(key)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        query, key = gradients
        return _rotated(query), _rotated(key), None, None


def _rotated(tensor: torch.Tensor) -> torch.Tensor:
    """Heads and tokens change places, which is a copy unless that is how they lie in memory."""
    launch("rotary", num_bytes=2 * tensor.numel() * tensor.element_size())
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _rotary(query: Any, key: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
    return _Rotary.apply(query, key, cos, sin)


def _norm_forward(in_place: bool) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return _RmsNorm.apply(hidden_states, self.weight, in_place)  # type: ignore[no-any-return]

    return forward


def _mlp_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if hasattr(self, "gate_up_proj"):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
    else:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
    return self.down_proj(_GatedProduct.apply(gate, up))  # type: ignore[no-any-return]


@contextmanager
def liger_kernels(key: TraceKey, model_class: type[nn.Module], model_type: str) -> Iterator[None]:
    """While active, models of ``model_class`` run Liger's layer kernels where ``key`` has them.

    The files for Axolotl ask its Liger plugin for the loss alone. Raises ``TraceError`` for an architecture whose
    patches are not in the table.
    """
    if key.loss is not Loss.LIGER:
        yield
        return
    if model_type not in _NORM_IN_PLACE:
        known = ", ".join(_NORM_IN_PLACE)
        raise TraceError(f"Liger's kernels for {model_type} are not modelled, those of {known} are; use --loss plain")
    modeling = sys.modules[model_class.__module__]
    with ExitStack() as stack:
        if key.trainer is not Trainer.AXOLOTL:
            for part in {m for m in vars(modeling).values() if isinstance(m, type) and issubclass(m, nn.Module)}:
                if part.__name__.endswith("RMSNorm"):
                    norm = _norm_forward(_NORM_IN_PLACE[model_type])
                    stack.enter_context(mock.patch.object(part, "forward", norm))
                elif part.__name__.endswith("MLP"):
                    stack.enter_context(mock.patch.object(part, "forward", _mlp_forward))
            stack.enter_context(mock.patch.object(modeling, "apply_rotary_pos_emb", _rotary))
        yield
