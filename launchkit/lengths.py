"""How long the examples of a data set are: all that a plan needs to know of it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

MOST_QUANTILES = 1001
COUNTED_BY_TOKENIZER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths of a data set's examples, in tokens.

    ``quantiles`` are those of examples evenly spread over all of them in the order of their length, the shortest and
    the longest among them. ``counted_by`` says how: ``COUNTED_BY_TOKENIZER``, or by which rule they are estimated.
    """

    path: str
    num_examples: int
    total_tokens: int
    quantiles: tuple[int, ...]
    counted_by: str = COUNTED_BY_TOKENIZER

    @classmethod
    def of(cls, lengths: list[int], *, path: str, counted_by: str) -> Lengths:
        """The summary of one length for each example."""
        ordered = sorted(lengths)
        chosen = [ordered[_place(index, of=len(ordered))] for index in range(min(len(ordered), MOST_QUANTILES))]
        return cls(
            path=path,
            num_examples=len(ordered),
            total_tokens=sum(ordered),
            quantiles=tuple(chosen),
            counted_by=counted_by,
        )

    @property
    def is_estimated(self) -> bool:
        return self.counted_by != COUNTED_BY_TOKENIZER

    @property
    def longest(self) -> int:
        return self.quantiles[-1]

    @property
    def mean(self) -> float:
        return self.total_tokens / self.num_examples

    def quantile(self, share: float) -> int:
        """The length that ``share`` of the examples do not exceed."""
        return self.quantiles[max(0, ceil(share * len(self.quantiles)) - 1)]

    def num_longer(self, seq_len: int) -> int:
        """How many examples have more than ``seq_len`` tokens, or a few less where they are many: those from the first
        quantile that has."""
        first = bisect_right(self.quantiles, seq_len)
        return self.num_examples - _place(first, of=self.num_examples) if first < len(self.quantiles) else 0

    def padded_tokens(self, num_sequences: int, *, seq_len: int) -> int:
        """The usual width of a batch of examples picked at random, padded to its longest, cut at ``seq_len``.

        Formula: the expected maximum of ``num_sequences`` draws, Σ q_i ((i/n)^b − ((i−1)/n)^b) over the quantiles.
        """
        number = len(self.quantiles)
        steps = [(index / number) ** num_sequences for index in range(number + 1)]
        weights = (after - before for before, after in pairwise(steps))
        return max(1, round(sum(min(q, seq_len) * weight for q, weight in zip(self.quantiles, weights, strict=True))))

    def num_rows(self, *, seq_len: int, packing: bool) -> int:
        """Sequences in one pass over the data: the examples, or those that they fill end to end."""
        return max(1, self.total_tokens // seq_len) if packing else self.num_examples


def _place(index: int, *, of: int) -> int:
    """Which of ``of`` ordered examples a quantile is."""
    return round(index * (of - 1) / max(1, min(of, MOST_QUANTILES) - 1))
