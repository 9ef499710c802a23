"""Padded sequences under FlashAttention: transformers takes the padding out ahead of the kernel, and puts it back.

Source: transformers 5.24 ``modeling_flash_attention_utils.py`` (``_flash_attention_forward``, ``_upad_input``,
``_pad_input``). Lengths are traced as if no token were padding, which is the most that the copies can hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launchkit.scenario import TraceKey


@contextmanager
def unpadded_flash(key: TraceKey) -> Iterator[None]:
    """While active, a model built with sdpa attends as one with FlashAttention does to padded sequences, torch's flash
    kernel standing for its own."""
    if not (key.padded and key.attention.is_flash):
        yield
        return
    with (
        mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, sdpa=_attend),
        mock.patch.dict(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, sdpa=_mask),
    ):
        yield


def _mask(*arguments: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    """The mask of tokens as it is: none of tokens by tokens is made."""
    return attention_mask


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, **options)  # type: ignore[return-value]
    batch, _, length, _ = query.shape
    lengths = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    cumulative = functional.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))

    def without_padding(states: torch.Tensor) -> torch.Tensor:
        rows = states.transpose(1, 2).flatten(0, 1)[indices]
        return rows.unflatten(0, (batch, length)).transpose(1, 2)

    key, value, query = without_padding(key), without_padding(value), without_padding(query)
    out, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    del query, key, value, cumulative
    rows = out.flatten(0, 1)
    padded = torch.zeros_like(rows)
    padded[indices] = rows
    return padded.unflatten(0, (batch, length)), None
