"""4-bit weights as bitsandbytes keeps and uses them, without quantising anything.

A linear layer becomes bitsandbytes' own ``Linear4bit``, so that PEFT puts its 4-bit adapter on it, with a forward and
backward that hold what bitsandbytes 0.50's ``MatMul4Bit`` holds on CUDA: the packed weight, and for the time of a
matrix product the weight unpacked into the compute dtype. The scales are counted beside the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from launchkit.errors import MissingExtraError
from launchkit.scenario import DeviceKind
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
    """``x @ W.T`` with ``W`` unpacked for the product and dropped again; the backward unpacks it once more.

    Source: bitsandbytes 0.50.2 ``autograd/_functions.py`` and, for what lives beside the product, the
    ``gemm_4bit`` of ``backends/cuda/ops.py`` (``_dequant_linear_fallback``) and of ``backends/default/ops.py``. Omits:
    CUDA's fused kernel, which may serve micro-batches of up to 1536 tokens and unpacks nothing in the forward.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        first = torch.empty(weight.num_blocks, dtype=torch.float32)
        scales = first + 0.0  # their common offset
        if not weight.on_cuda:
            del first  # an intermediate of the expression there, a variable on CUDA
        unpacked = torch.empty(weight.shape, dtype=x.dtype)
        out = nn.functional.linear(x, unpacked, bias)
        del scales
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        (gradient,) = gradients
        needs_x, _, needs_bias = ctx.needs_input_grad
        bias_gradient = gradient.sum(0) if needs_bias else None
        x_gradient = torch.matmul(gradient, ctx.weight.unpack(gradient.device).to(gradient.dtype)) if needs_x else None
        return x_gradient, None, bias_gradient


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A 4-bit weight as its layer's products see it. ``dtype`` is what it was quantised from, and is unpacked into."""

    shape: tuple[int, int]
    dtype: torch.dtype
    on_cuda: bool

    @property
    def num_blocks(self) -> int:
        return divide_up(self.shape[0] * self.shape[1], _BLOCK)

    def unpack(self, device: torch.device) -> torch.Tensor:
        """``functional.dequantize_4bit``: the scales in fp32 first, gone when the weight is there."""
        scales = torch.empty(self.num_blocks, dtype=torch.float32, device=device)
        weight = torch.empty(self.shape, dtype=self.dtype, device=device)
        del scales
        return weight


def quantise_linears(model: PreTrainedModel, *, dtype: torch.dtype, device: DeviceKind) -> None:
    """Replaces, in place and on the meta device, every linear layer that transformers would quantise from ``dtype``.

    Left alone: what is tied, output embeddings and the last module (transformers' ``get_keys_to_not_convert``), what
    the model's class wants in fp32 (T5's ``wo``; ``HfQuantizer.get_modules_to_not_convert``), and experts held as one
    three-dimensional parameter, which bitsandbytes does not quantise. Products compute in ``dtype`` too. Raises
    ``MissingExtraError`` where bitsandbytes is missing.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        raise MissingExtraError(
            "the catalogue does not hold this step, and --method qlora is traced with bitsandbytes, which is not "
            "installed; pip install 'launchkit-planner[qlora]'"
        ) from None

    class TracedLinear4bit(Linear4bit):  # type: ignore[misc]
        packed: Packed

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _MatMul4Bit.apply(x.to(dtype), self.packed, self.bias).to(x.dtype)  # type: ignore[no-any-return]

    for name, module in list(_quantised(model)):
        shape = tuple(module.weight.shape)
        rows, columns = shape[::-1] if isinstance(module, Conv1D) else shape
        layer = TracedLinear4bit(
            columns, rows, bias=module.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        layer.packed = Packed(shape=(rows, columns), dtype=dtype, on_cuda=device is DeviceKind.CUDA)
        layer._parameters["weight"] = _packed_parameter(rows, columns)
        if module.bias is not None:
            layer._parameters["bias"] = module.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def _quantised(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept):
            yield name, module


def quantises_head(model: PreTrainedModel) -> bool:
    """Whether a layer of the classifier is among them, which PEFT trains beside adapters and so fails on.

    Source: peft 0.21 ``PeftModelForSequenceClassification``, whose ``classifier`` and ``score`` are saved modules. A
    last layer with a bias is not spared: transformers compares names of layers with that of the last parameter.
    """
    return any(name.partition(".")[0] in ("classifier", "score") for name, _ in _quantised(model))


def _packed_parameter(rows: int, columns: int) -> nn.Parameter:
    data = torch.empty(packed_bytes(rows * columns), 1, dtype=torch.uint8, device="meta")
    weight = nn.Parameter(data, requires_grad=False)
    weight.compress_statistics, weight.quant_type = True, "nf4"  # type: ignore[attr-defined]
    weight.logical_shape = (rows, columns)  # type: ignore[attr-defined]
    return weight


def prepare_for_kbit_training(model: nn.Module, *, upcast: bool) -> None:
    """PEFT's ``prepare_model_for_kbit_training``: everything frozen, what is still 16-bit upcast to fp32.

    An engine that computes on 16-bit copies of all parameters (FSDP's mixed precision, DeepSpeed's bf16) undoes the
    upcast; it is left out for those. The bias of a 4-bit layer is undone by the layer itself: its first forward puts
    it into the compute dtype for good (bitsandbytes ``Linear4bit.forward``).
    """
    biases = {id(module.bias) for module in model.modules() if hasattr(module, "packed")}
    for parameter in model.parameters():
        parameter.requires_grad = False
        if upcast and id(parameter) not in biases and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
