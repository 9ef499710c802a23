"""What operators cost beyond their outputs: FLOPs that torch's own registry lacks, and scratch memory that a
kernel takes and returns inside one call, which no dispatch mode can see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

SCALED_PRODUCT = "aten::_scaled_mm"  # of 8-bit factors; torch's own registry has its FLOPs


def in_autocast_dtype(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """What autocast hands an attention kernel, if it is on: floating-point tensors in its dtype."""
    is_on, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return (tensor.to(dtype) if is_on and tensor.is_floating_point() else tensor for tensor in tensors)


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas by overload packet, called as torch's are: the operator's arguments and ``out_val``."""
    return {
        aten.addmm_: flop_registry[aten.addmm],
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_flash_backward_flops,
    }


def _cpu_flash_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _cpu_flash_backward_flops(
    grad_out: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape))


def _grouped_mm(mat_a: Any, mat_b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:
    """``aten::_grouped_mm`` for dtypes that its meta function refuses and its kernels take (fp32, fp16).

    Rows of ``mat_a`` go to the matrix of their group: (tokens, k) × (groups, k, n) → (tokens, n). Its backward for the
    weights groups the inner dimension: (m, tokens) × (tokens, n) → (groups, m, n).
    """
    groups = offs.shape[0] if offs is not None else mat_a.shape[0]
    both_flat = mat_a.dim() == 2 and mat_b.dim() == 2
    shape = (groups, mat_a.shape[0], mat_b.shape[1]) if both_flat else (*mat_a.shape[:-1], mat_b.shape[-1])
    return mat_a.new_empty(shape, dtype=out_dtype or mat_a.dtype)


def _layer_norm(input: Any, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[torch.Tensor, ...]:
    """``aten::native_layer_norm`` of 16-bit tensors with weights in fp32, whose statistics are in fp32; the meta
    function gives them the input's dtype.

    Source: ``aten/src/ATen/native/layer_norm.cpp`` (``param_scalar_type``).
    """
    out, *statistics = aten.native_layer_norm.default(input, shape, weight, bias, eps)
    is_mixed = any(part is not None and part.dtype != input.dtype for part in (weight, bias))
    return (out, *(statistic.float() if is_mixed else statistic for statistic in statistics))


# Operators whose own fake implementation is narrower than the real kernel, or gives other dtypes.
SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    aten._grouped_mm.default: _grouped_mm,
    aten.native_layer_norm.default: _layer_norm,
}


Tensors = list[torch.Tensor]


Scratch = tuple[tuple[int, ...], ...]  # bytes of the tensors that are there together, moment after moment


def scratch(name: str, inputs: Tensors, outputs: Tensors, *, on_cpu: bool) -> Scratch:
    """What the kernel ``name`` holds beside its outputs only while it runs; nothing for all but a few."""
    rule = (_CPU_SCRATCH if on_cpu else _CUDA_SCRATCH).get(name)
    return rule(inputs, outputs) if rule else ()


def _flash_backward_scratch(inputs: Tensors, outputs: Tensors) -> Scratch:
    """A row sum and an fp32 accumulator of the queries' gradient; under grouped queries the keys' and values' gradients
    per query head before they are summed.

    Source: flash-attention's ``mha_bwd`` (``dq_accum``, ``softmax_d``, ``dk_expanded``). Omits: rounding of the length
    up to 128.
    """
    _, query, key = inputs[:3]
    batch, heads, length, head = query.shape
    rows = batch * heads * length * 4
    expanded = batch * heads * key.shape[2] * head * query.element_size()
    return ((rows, rows * head, *((expanded, expanded) if key.shape[1] != heads else ())),)


def _efficient_backward_scratch(inputs: Tensors, outputs: Tensors) -> Scratch:
    """A row sum, and for 16-bit tensors an fp32 accumulator of the queries' gradient.

    Source: ``aten/src/ATen/native/transformers/cuda/attention_backward.cu``, ``delta`` and the kernel's workspace.
    """
    query = inputs[1]
    batch, heads, length, head = query.shape
    rows = batch * heads * length * 4
    return ((rows, *((rows * head,) if query.element_size() == 2 else ())),)


def _unfolded(source: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> tuple[int, ...]:
    """Every patch that a kernel of ``weight`` meets in ``source``, in columns. Grouped convolutions work group by
    group, with next to nothing at a time.

    Source: ``aten/src/ATen/native/ConvolutionMM2d.cpp`` and ``ConvolutionMM3d.cpp`` (``compute_columns``); confirmed on
    timelines. Omits: what oneDNN takes in their place, which ``trace.asking`` sees.
    """
    is_grouped = source.shape[1] != weight.shape[1]
    patches = math.prod(weight.shape[1:]) * result.shape[0] * math.prod(result.shape[2:])
    return () if is_grouped else (patches * source.element_size(),)


def _convolution_scratch(inputs: Tensors, outputs: Tensors) -> Scratch:
    source, weight = inputs[:2]
    return (_unfolded(source, weight, outputs[0]),)


def _convolution_backward_scratch(inputs: Tensors, outputs: Tensors) -> Scratch:
    """As forwards, and a copy of a gradient that does not lie in order."""
    gradient, source, weight = inputs[:3]
    copied = () if gradient.is_contiguous() else (gradient.nbytes,)
    return ((*copied, *_unfolded(source, weight, gradient)),)


def _promotion_scratch(inputs: Tensors, outputs: Tensors) -> Scratch:
    """Copies, in the dtype that two operands have in common, of those that have another, and of a result that is
    written into one of another. CUDA casts while it computes.

    Source: ``aten/src/ATen/TensorIterator.cpp`` (``compute_types``).
    """
    operands = inputs[-2:]
    if len(inputs) < 2 or operands[0].dtype == operands[1].dtype:
        return ()
    common = torch.result_type(*operands)
    is_in_place = outputs[0].untyped_storage()._cdata == operands[0].untyped_storage()._cdata
    cast = [part for part in (*operands, *(outputs if is_in_place else ())) if part.dtype != common]
    return (tuple(part.numel() * common.itemsize for part in cast),) if cast else ()


def _layer_norm_scratch(inputs: Tensors, outputs: Tensors) -> Scratch:
    """A copy of an input that does not lie in order. Source: ``layer_norm.cpp`` (``expect_contiguous``)."""
    return () if inputs[0].is_contiguous() else ((inputs[0].nbytes,),)


def _layer_norm_backward_scratch(inputs: Tensors, outputs: Tensors) -> Scratch:
    """Copies of a gradient and of an input that do not lie in order."""
    copied = tuple(part.nbytes for part in inputs[:2] if not part.is_contiguous())
    return (copied,) if copied else ()


def _scaled_product_scratch(inputs: Tensors, outputs: Tensors) -> Scratch:
    """The second factor in order, both in fp32, each scaled out of place, and the product in fp32 and in its own dtype.

    Source: ``aten/src/ATen/native/Blas.cpp`` (``_scaled_mm_out_cpu_emulated``); confirmed on timelines.
    """
    ordered = inputs[1].nbytes
    left, right = (4 * factor.numel() for factor in inputs[:2])
    (product,) = outputs
    narrow = (product.nbytes,) if product.element_size() < 4 else ()
    factors = (ordered, left, right)
    return ((ordered, left, left), (*factors, right), (*factors, 4 * product.numel(), *narrow))


_Rules = Mapping[str, Callable[[Tensors, Tensors], Scratch]]
_CUDA_SCRATCH: _Rules = {
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward_scratch,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward_scratch,
}
_PROMOTING = (
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "pow",
    "maximum",
    "minimum",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "where",
)
_CPU_SCRATCH: _Rules = {
    **{f"aten::{name}{place}": _promotion_scratch for name in _PROMOTING for place in ("", "_")},
    "aten::convolution": _convolution_scratch,
    "aten::convolution_backward": _convolution_backward_scratch,
    "aten::native_layer_norm": _layer_norm_scratch,
    "aten::native_layer_norm_backward": _layer_norm_backward_scratch,
    SCALED_PRODUCT: _scaled_product_scratch,
}
