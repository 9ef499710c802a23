"""Answers the few questions that transformers asks of a tensor's *values* while it runs, which a fake tensor cannot.

The answers are those of a batch of full sequences: nothing padded, one sequence per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from transformers import masking_utils


def _one_sequence_per_row(position_ids: torch.Tensor) -> None:
    """transformers' ``find_packed_sequence_indices`` for positions that count up by one: no packing found."""
    torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1).ne(1).cumsum(-1)


@contextmanager
def full_sequences() -> Iterator[None]:
    """While active, models build the masks that a batch of full sequences gets, as outside a trace."""
    with (
        mock.patch.object(masking_utils, "find_packed_sequence_indices", _one_sequence_per_row),
        mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: False),
    ):
        yield
