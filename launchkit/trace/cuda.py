"""What CUDA does differently from the CPU that a trace runs on, every rule with its source.

A trace runs on fake CPU tensors. On CUDA the same model casts other operators under autocast, picks another attention
kernel, and keeps dropout's mask in another form. ``faithful_to_cuda`` makes those choices while it is active; the
scratch memory of CUDA's attention kernels is in ``trace.kernels``.

Omits: Volta and Turing, which have no flash kernel, take the memory-efficient one; the two hold the same tensors but
for the padding of the log-sum-exp. Hopper's cuDNN attention is traced as flash for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from launchkit.scenario import Attention
from launchkit.trace import flash_attention_3
from launchkit.trace.kernels import in_autocast_dtype

aten = torch.ops.aten

# Source: torch 2.13, ATen/autocast_mode.h. CUDA runs these in fp32 (AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE);
# CPU autocast leaves them in the dtype of their inputs. Of the list, those that occur in transformers' models.
_FP32_ON_CUDA = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "cosine_similarity", "nll_loss", "nll_loss2d", "kl_div", "mse_loss", "l1_loss",
    "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits", "logsumexp", "prod", "prod.dim_int",
    "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "sum", "sum.dim_IntList",
)  # fmt: skip


def _in_fp32(operator: Any) -> Any:
    def cast(value: Any) -> Any:
        wide = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.to(torch.float32) if wide else value

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            return operator(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return call


@contextmanager
def _cuda_autocast_lists() -> Iterator[None]:
    """CPU autocast with CUDA's list of operators kept in fp32."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in _FP32_ON_CUDA:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(aten, packet), overload or "default")
            library.impl(name, _in_fp32(operator), "AutocastCPU", allow_override=True)
        yield
    finally:
        library._destroy()


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that CUDA would choose for these tensors on compute capability 8.0 or later.

    Source: ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``: flash for 16-bit tensors of equal head sizes up to
    256 without a mask; memory-efficient for the rest, without grouped queries, with aligned head sizes; else math.
    """
    query, key, value = in_autocast_dtype(query, key, value)
    head = query.shape[-1]
    same_heads = head == key.shape[-1] == value.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and attn_mask is None and same_heads and head <= 256:
        padded = [functional.pad(t, (0, -head % 8)) if head % 8 else t for t in (query, key, value)]
        scale = scale if scale is not None else head**-0.5
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :head] if head % 8 else out
    aligned = head % (8 if half else 4) == 0 and value.shape[-1] % (8 if half else 4) == 0
    if aligned and head == key.shape[-1] and not enable_gqa:
        bias = _as_bias(attn_mask, query)
        return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _as_bias(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """A boolean mask becomes an additive one in the query's dtype, expanded over heads without a copy.

    Source: ``aten/src/ATen/native/transformers/attention.cpp``, ``convert_boolean_attn_mask``, ``preprocess_mask``.
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return mask.to(query.dtype).expand(query.shape[0], query.shape[1], query.shape[2], mask.shape[-1])


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA's fused dropout keeps a byte per element; the CPU's a number in the input's dtype.

    Source: ``aten/src/ATen/native/Dropout.cpp``, ``is_fused_kernel_acceptable``.
    """
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


@contextmanager
def faithful_to_cuda(attention: Attention = Attention.SDPA) -> Iterator[None]:
    """While active, what runs on fake CPU tensors allocates as it would on CUDA, with ``attention`` in place of the
    kernels among which SDPA chooses, where it is one of them."""
    attend = flash_attention_3.attend if attention is Attention.FLASH_ATTENTION_3 else scaled_dot_product_attention
    with ExitStack() as stack:
        stack.enter_context(_cuda_autocast_lists())
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attend))
        stack.enter_context(mock.patch.object(functional, "dropout", _dropout))
        yield
