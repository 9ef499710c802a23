"""4-bit weights as bitsandbytes keeps and uses them, without quantising anything.

A linear layer becomes bitsandbytes' own ``Linear4bit``, so that PEFT puts its 4-bit adapter on it, with a forward and
backward that hold what bitsandbytes 0.50's ``MatMul4Bit`` holds on CUDA: the packed weight, and for the time of a
matrix product the weight unpacked into the compute dtype. The scales are counted beside the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launchkit.errors import MissingExtraError
from launchkit.units import divide_up

# bitsandbytes' defaults under transformers' BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
# bnb_4bit_use_double_quant=True): one scale per 64 weights, itself in 8 bits with one fp32 scale per 256 scales.
_BLOCK, _NESTED_BLOCK = 64, 256
_CODE_BYTES = 16 * 4 + 256 * 4 + 4  # nf4's table, the scales' table, their offset


def packed_bytes(numel: int) -> int:
    """Bytes of a 4-bit weight of ``numel`` elements: two to a byte."""
    return divide_up(numel, 2)


def scale_bytes(numel: int) -> int:
    """Bytes of a 4-bit weight's scales under double quantisation.

    Formula: numel/64 bytes + numel/(64·256) fp32 + tables. Source: bitsandbytes ``functional.quantize_4bit``.
    """
    blocks = divide_up(numel, _BLOCK)
    return blocks + divide_up(blocks, _NESTED_BLOCK) * 4 + _CODE_BYTES


class _MatMul4Bit(torch.autograd.Function):
    """``x @ W.T`` with ``W`` unpacked for the product and dropped again; the backward unpacks it once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.packed, ctx.shape = packed, shape
        return nn.functional.linear(x, _unpacked(packed, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (gradient,) = gradients
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return torch.matmul(gradient, _unpacked(ctx.packed, ctx.shape, gradient.dtype)), None, None


def _unpacked(packed: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The dequantised weight; its scales are unpacked to fp32 first, and gone when it is there."""
    scales = torch.empty(divide_up(shape[0] * shape[1], _BLOCK), dtype=torch.float32)
    weight = torch.empty(shape, dtype=dtype)
    del scales
    return weight


def quantise_linears(model: nn.Module, *, compute_dtype: torch.dtype) -> None:
    """Replaces, in place and on the meta device, every linear layer that transformers would quantise.

    Left alone: output embeddings and the last module (transformers' ``get_keys_to_not_convert``), and experts held as
    one three-dimensional parameter, which bitsandbytes does not quantise. Raises ``MissingExtraError`` where
    bitsandbytes is missing.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        raise MissingExtraError(
            "--method qlora of a model that no catalogue knows is traced with bitsandbytes, which is not installed; "
            "pip install 'launchkit-planner[qlora]'"
        ) from None

    class TracedLinear4bit(Linear4bit):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = _MatMul4Bit.apply(x.to(compute_dtype), self.weight, (self.out_features, self.in_features))
            if self.bias is not None:
                out = out + self.bias.to(compute_dtype)
            return out.to(x.dtype)

    heads = {getattr(model, "get_output_embeddings", lambda: None)(), list(model.children())[-1]}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module in heads:
            continue
        quantised = TracedLinear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=compute_dtype,
            quant_type="nf4",
            device="meta",
        )
        numel = module.weight.numel()
        weight = nn.Parameter(
            torch.empty(packed_bytes(numel), 1, dtype=torch.uint8, device="meta"), requires_grad=False
        )
        weight.compress_statistics, weight.quant_type = True, "nf4"  # type: ignore[attr-defined]
        weight.logical_shape = tuple(module.weight.shape)  # type: ignore[attr-defined]
        quantised._parameters["weight"] = weight
        if module.bias is not None:
            quantised._parameters["bias"] = module.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, quantised)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def prepare_for_kbit_training(model: nn.Module, *, upcast: bool) -> None:
    """PEFT's ``prepare_model_for_kbit_training``: everything frozen, what is still 16-bit upcast to fp32.

    An engine that computes on 16-bit copies of all parameters (FSDP's mixed precision, DeepSpeed's bf16) undoes the
    upcast; it is left out for those.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
        if upcast and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
