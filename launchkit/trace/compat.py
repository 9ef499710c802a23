"""Answers the few questions that transformers asks of a tensor's *values* while it runs, which a fake tensor cannot.

The answers are those of a batch of full sequences: nothing padded, and either one sequence per row or several packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from transformers import masking_utils


def _several_sequences_per_row(position_ids: torch.Tensor) -> torch.Tensor:
    """transformers' ``find_packed_sequence_indices`` for positions that start anew within a row."""
    return torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1).ne(1).cumsum(-1)


def _one_sequence_per_row(position_ids: torch.Tensor) -> None:
    """The same for positions that count up by one: no packing found."""
    _several_sequences_per_row(position_ids)


@contextmanager
def full_sequences(*, packed: bool = False) -> Iterator[None]:
    """While active, models build the masks that a batch of full sequences gets, as outside a trace."""
    find = _several_sequences_per_row if packed else _one_sequence_per_row
    with (
        mock.patch.object(masking_utils, "find_packed_sequence_indices", find),
        mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: False),
    ):
        yield
