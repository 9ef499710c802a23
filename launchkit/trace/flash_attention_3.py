"""FlashAttention 3 (``flash_attn_interface``, for Hopper): what it takes, and what its kernels hold while they run.

What it saves for the backward pass is what torch's flash kernel saves, which stands for it in a trace: queries, keys,
values, the output and a log-sum-exp per row. Its backward accumulates otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from launchkit.errors import TraceError
from launchkit.trace.kernels import Scratch, in_autocast_dtype
from launchkit.units import divide_up

aten = torch.ops.aten

LARGEST_HEAD = 256
# Elements that a head's size is a multiple of. FlashAttention 2 and torch pad others.
HEAD_STEP = 8


class Blocks(NamedTuple):
    """How the backward cuts its work: queries and keys at a time, and what a head's size is rounded up to."""

    queries: int
    keys: int
    head: int

    @property
    def stride(self) -> int:
        """The lengths that are whole blocks are the multiples of this."""
        return math.lcm(self.queries, self.keys)


_CAUSAL = (Blocks(128, 128, 64), Blocks(64, 128, 96), Blocks(64, 128, 128), Blocks(64, 96, 192), Blocks(64, 80, 256))
_FULL = (*_CAUSAL[:2], Blocks(80, 128, 128), *_CAUSAL[3:])


def blocks_of(head: int, *, is_causal: bool) -> Blocks:
    """Source: flash-attention at 0251105a, ``hopper/flash_api.cpp``: ``mha_bwd`` (``kBlockM_sm90``, ``kBlockN_sm90``),
    ``round_up_headdim``. Omits: soft caps, which no model has under this attention here."""
    return next(blocks for blocks in (_CAUSAL if is_causal else _FULL) if head <= blocks.head)


def forward_scratch() -> Scratch:
    """The scheduler's counter; in one split, as in training, nothing is accumulated. Source: ``mha_fwd``
    (``tile_count_semaphore``)."""
    return ((4,),)


def backward_scratch(query: torch.Tensor, key: torch.Tensor, *, is_causal: bool) -> Scratch:
    """Two numbers per row, and the queries' gradient in fp32, with lengths and heads rounded up; under grouped queries
    the keys' and values' gradients in fp32, per head of their own; a counter per block and head.

    Units: bytes of fp32 and int32. Source: ``mha_bwd`` (``softmax_d``, ``softmax_lse_log2``, ``dq_accum``,
    ``dk_accum``, ``dv_accum``, ``dq_semaphore``). Omits: up to a block for each of the sequences that are packed into
    one row.
    """
    batch, heads, length, head = query.shape
    _, key_heads, key_length, _ = key.shape
    blocks = blocks_of(head, is_causal=is_causal)
    num_blocks = divide_up(length, blocks.queries)
    rows = 4 * batch * heads * num_blocks * blocks.queries
    keys = 4 * batch * key_heads * divide_up(key_length, blocks.keys) * blocks.keys * blocks.head
    grouped = (keys, keys) if key_heads != heads else ()
    return ((rows, rows, rows * blocks.head, *grouped, 4 * num_blocks * batch * heads),)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` by torch's flash kernel, for all that FlashAttention 3 takes: it knows neither
    masks nor dropout. Narrower values are padded, as transformers' models with latent attention do.

    Raises ``TraceError`` for heads that it refuses. Source: ``mha_fwd`` and ``mha_bwd`` (``TORCH_CHECK``).
    """
    head = query.shape[-1]
    if head % HEAD_STEP or head > LARGEST_HEAD:
        raise TraceError(
            f"flash_attention_3 takes heads of up to {LARGEST_HEAD} numbers, in multiples of {HEAD_STEP}, and this "
            f"model has some of {head}; use --attention sdpa"
        )
    query, key, value = in_autocast_dtype(query, key, value)
    narrower = head - value.shape[-1]
    padded = functional.pad(value, (0, narrower)) if narrower else value
    scale = head**-0.5 if scale is None else scale
    out = aten._scaled_dot_product_flash_attention(query, key, padded, 0.0, is_causal, False, scale=scale)[0]
    return out[..., : value.shape[-1]] if narrower else out


def scratch_of(name: str, args: Sequence[Any]) -> Scratch | None:
    """What FlashAttention 3 holds in place of torch's operator ``name``; None for operators that it is not."""
    match name:
        case "aten::_scaled_dot_product_flash_attention":
            return forward_scratch()
        case "aten::_scaled_dot_product_flash_attention_backward":
            return backward_scratch(args[1], args[2], is_causal=args[11])
    return None
