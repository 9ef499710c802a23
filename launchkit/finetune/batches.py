"""From rows of token ids to the batches of a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from launchkit.finetune.data import IGNORED_LABEL


class TokenRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows of token ids as a dataset."""

    def __init__(self, rows: Sequence[list[int]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self._rows[index]}


@dataclass(kw_only=True)
class RightPadded:
    """Pads on the right, to the longest row of the batch or to ``length`` if that is not 0.

    There is no attention mask: in a causal model no token sees what is to its right, and padding is not scored. A mask
    would only take attention off its fast path. TRL counts tokens by ``position_ids``, hence ``with_positions``. Where
    ranks share sequences, the positions of a share count on from those of another or jump, which transformers takes for
    packed sequences unless there is a mask: ``with_mask`` gives it one that hides nothing. ``hides_padding`` gives one
    that hides what is padded, as most collators do.
    ``num_tokens``, ``num_batches`` and ``longest_tokens`` tell the meter what was seen.
    """

    pad_token_id: int
    length: int = 0
    with_positions: bool = False
    with_mask: bool = False
    hides_padding: bool = False
    num_tokens: int = field(default=0, init=False)
    num_batches: int = field(default=0, init=False)
    longest_tokens: int = field(default=0, init=False)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [list(row["input_ids"]) for row in rows]
        longest = max(len(sequence) for sequence in sequences)
        width = max(self.length, longest)
        input_ids = torch.full((len(sequences), width), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(sequences), width), IGNORED_LABEL, dtype=torch.long)
        for index, sequence in enumerate(sequences):
            tokens = torch.tensor(sequence, dtype=torch.long)
            input_ids[index, : len(sequence)] = tokens
            labels[index, : len(sequence)] = tokens
        self.num_tokens += input_ids.numel()
        self.num_batches += 1
        self.longest_tokens = max(self.longest_tokens, width)
        batch = {"input_ids": input_ids, "labels": labels}
        if self.with_positions:
            batch["position_ids"] = torch.arange(width).repeat(len(sequences), 1)
        if self.with_mask:
            batch["attention_mask"] = torch.ones_like(input_ids)
        if self.hides_padding:
            batch["attention_mask"] = labels.ne(IGNORED_LABEL).long()
        return batch
