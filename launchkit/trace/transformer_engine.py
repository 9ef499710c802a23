"""Transformer Engine's linear layers and norms as accelerate puts them in, whose products are of 8-bit copies.

Transformer Engine needs CUDA, so its layers stand here again, allocating, keeping and dropping what its own do, in
their order; accelerate's own ``convert_model`` puts them in. Source: Transformer Engine 2.18
``pytorch/module/linear.py`` (``_linear_forward_impl``, ``_linear_backward``), ``module/base.py`` (``quantize_weight``,
``grad_output_preprocess``), ``csrc/quantizer.cpp`` (``Float8Quantizer::create_tensor``), ``csrc/extensions/bias.cpp``,
``ops/basic/layer_norm.py``; accelerate 1.15 ``utils/transformer_engine.py``, ``TERecipeKwargs``, whose recipe is
delayed scaling.

A weight stays in its own dtype. Nobody passes ``is_first_microbatch``, so its 8-bit copy is made anew in every forward
pass and waits for the backward one. Omits: the concatenated maxima of one update of the scales, 4 bytes per tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional

from launchkit.errors import TraceError
from launchkit.scenario import TraceKey
from launchkit.trace.kernels import SCALED_PRODUCT
from launchkit.trace.recorder import launch

_HISTORY = 1024  # maxima kept per tensor: DelayedScaling's amax_history_len, and TERecipeKwargs'
_NUM_QUANTISED = (3, 2)  # tensors of a linear layer with a scale of their own, forwards and backwards

_ROW_MULTIPLE = 8  # ``pytorch/utils.py``, ``assert_dim_for_fp8_exec``

# Rows of a gradient to a partial sum of the bias's, the last of which may be of fewer: of ``cast_transpose_fusion.cu``
# with its widest stores, and ``FP8_CHUNK_DIM_Y`` of ``quantize_fp8.cuh``.
_ROWS_PER_SUM_TRANSPOSING = 256
_ROWS_PER_SUM = 128


class Quantised(NamedTuple):
    """A matrix in 8 bits: as it is, transposed, or both, with one inverse scale."""

    scale: torch.Tensor
    data: torch.Tensor | None
    transpose: torch.Tensor | None

    def kept_for(self, *, columnwise: bool) -> Quantised:
        """Without the transpose, or where there is one without the rest (``update_usage``)."""
        if self.transpose is None:
            return self
        return self._replace(data=None) if columnwise else self._replace(transpose=None)


def _quantise(source: torch.Tensor, *, transposed: bool) -> Quantised:
    """One pass over ``source`` in whatever dtype it is in: no copy of it is made in another."""
    source = source.contiguous()
    scale = torch.empty(1, dtype=torch.float32, device=source.device)
    data = torch.empty(source.shape, dtype=torch.uint8, device=source.device)
    shape = (source.shape[-1], source.numel() // source.shape[-1])
    transpose = torch.empty(shape, dtype=torch.uint8, device=source.device) if transposed else None
    launch("quantise", num_bytes=source.nbytes)
    return Quantised(scale, data, transpose)


def _product(rows: int, inner: int, columns: int, factor: Quantised, *, dtype: torch.dtype) -> torch.Tensor:
    """What ``general_gemm`` returns, computed in a workspace that outlives it."""
    launch(SCALED_PRODUCT, flops=2 * rows * inner * columns, num_bytes=(rows + columns) * inner)
    return torch.empty(rows, columns, dtype=dtype, device=factor.scale.device)


class LinearProducts(Function):
    """``_Linear`` under ``fp8_autocast``. ``transposes`` is the GPU's: one layout of 8-bit products only."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, transposes: bool
    ) -> torch.Tensor:
        needs_weight, needs_x = weight.requires_grad, x.requires_grad
        dtype = _activation_dtype(x)
        rows, (columns, inner) = x.numel() // x.shape[-1], weight.shape
        if rows % _ROW_MULTIPLE:
            raise TraceError(
                f"Transformer Engine multiplies {_ROW_MULTIPLE} rows at a time, and a layer of this model takes one "
                "per sequence, not per token; use --fp8-backend ao"
            )
        narrow_x = _quantise(x, transposed=transposes and needs_weight)
        narrow_weight = _quantise(weight, transposed=transposes and needs_x)
        if bias is not None:
            bias = bias.to(torch.bfloat16 if dtype is torch.float32 else dtype)
        out = _product(rows, inner, columns, narrow_x, dtype=dtype)
        narrow_x = narrow_x.kept_for(columnwise=True)
        ctx.save_for_backward(*(narrow_x if needs_weight else (None,) * 3), *narrow_weight, weight)
        ctx.transposes, ctx.dtype, ctx.shape = transposes, dtype, x.shape
        return out.view(*x.shape[:-1], columns)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_weight, needs_x, needs_bias, _ = ctx.needs_input_grad
        *kept, weight = ctx.saved_tensors
        columns, inner = weight.shape
        gradient = gradients[0].reshape(-1, columns).contiguous()
        rows, transposes = len(gradient), ctx.transposes
        bias_gradient = gradient.new_empty(columns) if needs_bias else None
        narrow = _quantise(gradient, transposed=transposes and (needs_weight or needs_bias))
        if needs_bias:
            sums = 4 * rows * columns // (_ROWS_PER_SUM_TRANSPOSING if transposes else _ROWS_PER_SUM)
            gradient.new_empty(sums, dtype=torch.uint8)  # in fp32
        x_gradient = _product(rows, columns, inner, narrow, dtype=ctx.dtype).view(ctx.shape) if needs_x else None
        weight_gradient = _product(columns, rows, inner, narrow, dtype=ctx.dtype) if needs_weight else None
        _clear(*kept[1:3])  # the input's, ahead of what autograd makes of the gradients
        return weight_gradient, x_gradient, bias_gradient, None


def _clear(*tensors: torch.Tensor | None) -> None:
    """``clear_tensor_data``: gives the memory back whoever holds the tensors."""
    for tensor in tensors:
        if tensor is not None:
            tensor.data = tensor.new_empty(0)


def _activation_dtype(x: torch.Tensor) -> torch.dtype:
    """``set_activation_dtype``: autocast's where it is on, else that of ``x``. It is asked of the CPU that stands for
    CUDA."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class Linear(nn.Module):
    """``te.Linear``; an evaluation, which accelerate runs without ``fp8_autocast``, multiplies in 16 bits."""

    transposes = True

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, params_dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device="meta"))
        made = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device="meta")) if bias else None
        self.register_parameter("bias", made)
        for direction, count in zip(("forward", "backward"), _NUM_QUANTISED, strict=True):
            scale = torch.empty(count, dtype=torch.float32, device="meta")
            self.register_buffer(f"{direction}_scale", scale, persistent=False)
            history = torch.empty(_HISTORY, count, dtype=torch.float32, device="meta")
            self.register_buffer(f"{direction}_amax_history", history, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            dtype = _activation_dtype(x)
            bias = None if self.bias is None else self.bias.to(dtype)
            return functional.linear(x.to(dtype), self.weight.to(dtype), bias)
        if not torch.is_grad_enabled():
            return LinearProducts.forward(_Unkept(), self.weight, x, self.bias, False)
        return LinearProducts.apply(self.weight, x, self.bias, self.transposes)  # type: ignore[no-any-return]


class _Unkept:
    """The context of a forward pass that nothing follows."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass


class Normalised(Function):
    """``te.LayerNorm``, all of it in autocast's dtype: the output too, which torch's own leaves in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        dtype = _activation_dtype(weight)
        shape = x.shape
        x = x.contiguous().to(dtype).view(-1, len(weight))
        factors = weight.to(dtype), bias.to(dtype)
        moments = [torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2)]
        out = torch.empty_like(x)
        launch("layer_norm", num_bytes=x.nbytes)
        del factors
        ctx.save_for_backward(x, *moments, weight)
        ctx.dtype = dtype
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, *moments, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous().to(ctx.dtype).view(x.shape)
        factor = weight.to(ctx.dtype)
        out, of_weight, of_bias = torch.empty_like(x), torch.empty_like(factor), torch.empty_like(factor)
        launch("layer_norm_backward", num_bytes=2 * gradient.nbytes)
        _clear(*moments)
        return out.view(gradients[0].shape), of_weight, of_bias


class LayerNorm(nn.Module):
    def __init__(self, normalized_shape: int, eps: float = 1e-5, *, params_dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, dtype=params_dtype, device="meta"))
        self.bias = nn.Parameter(torch.empty(normalized_shape, dtype=params_dtype, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Normalised.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]


def convert_modules(model: nn.Module, key: TraceKey) -> None:
    """Puts these layers in, in place and on the meta device, as accelerate does it, where ``key`` says so.

    It takes the children of a module in their order, and stops among them at a linear layer with a side that 16 does
    not divide. Raises ``TraceError`` where that leaves no linear layer, or unties the head, whose copy no optimizer
    has.
    """
    if not key.transformer_engine:
        return
    from accelerate.utils.transformer_engine import convert_model

    tied = _uses(model)
    linear = type("Linear", (Linear,), {"transposes": key.transposes_float8})
    with _in_place_of_te(linear), torch.no_grad():
        convert_model(model)
    if not any(isinstance(module, Linear) for module in model.modules()):
        raise TraceError(
            f"--precision fp8 --fp8-backend te changes nothing in {type(model).__name__}: accelerate finds no linear "
            "layer that it takes; use --precision bf16"
        )
    if _uses(model) != tied:
        raise TraceError(
            f"accelerate copies the head of {type(model).__name__}, which is tied to its embeddings, and the copy "
            "is never trained; use --fp8-backend ao"
        )


def _uses(model: nn.Module) -> int:
    """How often parameters are used again."""
    every = sum(len(list(module.parameters(recurse=False))) for module in model.modules())
    return every - len(list(model.parameters()))


@contextmanager
def _in_place_of_te(linear: type[nn.Module]) -> Iterator[None]:
    """While active, accelerate finds these layers where it looks for Transformer Engine's."""
    package, stand_in = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    layers: dict[str, Any] = {"Linear": linear, "LayerNorm": LayerNorm}
    for name, layer in layers.items():
        setattr(stand_in, name, layer)
    package.pytorch = stand_in  # type: ignore[attr-defined]
    modules = {"transformer_engine": package, "transformer_engine.pytorch": stand_in}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch("accelerate.utils.transformer_engine.is_transformer_engine_available", lambda: True),
        mock.patch("accelerate.utils.transformer_engine.GatheredParameters", lambda *_, **__: nullcontext()),
    ):
        yield
