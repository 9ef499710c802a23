"""Answers the few questions that transformers asks of a tensor's *values* while it runs, which a fake tensor cannot.

The answers are those of a batch of full sequences: nothing padded, and either one sequence per row or several packed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel, masking_utils

from launchkit.scenario import DeviceKind
from launchkit.trace.values import value_of

_NONZERO = torch.Tensor.nonzero


def _several_sequences_per_row(position_ids: torch.Tensor) -> torch.Tensor:
    """transformers' ``find_packed_sequence_indices`` for positions that start anew within a row."""
    return torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1).ne(1).cumsum(-1)


def _one_sequence_per_row(position_ids: torch.Tensor) -> None:
    """The same for positions that count up by one: no packing found."""
    _several_sequences_per_row(position_ids)


def _asked(question: str, *, padded: bool) -> AbstractContextManager[Any]:
    """transformers' ``question`` whether sdpa's mask may be left out, answered for a mask with or without padding."""
    ignores = getattr(masking_utils, question)

    def ask(padding_mask: torch.Tensor | None, *arguments: Any, **options: Any) -> bool:
        has_padding = padded and padding_mask is not None
        return not has_padding and bool(ignores(None, *arguments, **options))

    return mock.patch.object(masking_utils, question, ask)


def _no_padding(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """transformers' warning of padding that no mask tells of: there is none (RoFormer and others look)."""


def _every_index(tensor: torch.Tensor, **options: Any) -> Any:
    """``Tensor.nonzero`` of a vector whose entries all count, where they are not known: every label is one that is
    scored (DeBERTa asks)."""
    if value_of(tensor) is not None:
        return _NONZERO(tensor, **options)
    return torch.zeros(tensor.numel(), tensor.dim(), dtype=torch.int64)


def _never_dropped(random: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor | float]:
    """``torch.rand`` whose single number is 1: LayerDrop asks for one per layer, and drops none (BART, Whisper)."""

    def rand(*size: Any, **options: Any) -> torch.Tensor | float:
        return 1.0 if size == ([],) else random(*size, **options)

    return rand


@contextmanager
def full_sequences(*, packed: bool = False, padded: bool = False) -> Iterator[None]:
    """While active, models build the masks that a batch of full sequences gets, or of padded ones, as outside a
    trace."""
    find = _several_sequences_per_row if packed else _one_sequence_per_row
    with (
        mock.patch.object(masking_utils, "find_packed_sequence_indices", find),
        mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: False),
        _asked("_ignore_causal_mask_sdpa", padded=padded),
        _asked("_ignore_bidirectional_mask_sdpa", padded=padded),
        mock.patch.object(torch.Tensor, "nonzero", _every_index),
        mock.patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask", _no_padding),
        mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"),  # image tokens are as many as the features
        mock.patch.object(torch, "rand", _never_dropped(torch.rand)),
    ):
        yield


@contextmanager
def random_states(device: DeviceKind) -> Iterator[None]:
    """While active, the state of the CPU's random generator that ``torch.utils.checkpoint`` keeps for each block is a
    tensor of the step on a CPU; beside a GPU it lies on the host and stays out of the step."""
    if device is not DeviceKind.CPU:
        yield
        return
    num_bytes = torch.get_rng_state().numel()
    with (
        mock.patch.object(torch, "get_rng_state", lambda: torch.empty(num_bytes, dtype=torch.uint8)),
        mock.patch.object(torch, "set_rng_state", lambda state: None),
    ):
        yield
