"""From examples to rows of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from launchkit.dataset.records import Messages

IGNORED_LABEL = -100  # what torch's cross-entropy skips


def tokenise(examples: Iterable[Messages | str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each example; conversations through the tokenizer's chat template, text with an end mark."""
    rows = []
    for example in examples:
        if isinstance(example, str):
            ids = tokenizer(example)["input_ids"]
            rows.append([*ids, tokenizer.eos_token_id] if ids[-1:] != [tokenizer.eos_token_id] else ids)
        else:
            rows.append(tokenizer(_render(example, tokenizer), add_special_tokens=False)["input_ids"])
    return rows


def _render(messages: Messages, tokenizer: Any) -> str:
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    turns = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return f"{turns}{tokenizer.eos_token or ''}"


def fit_rows(rows: Sequence[Sequence[int]], *, seq_len: int, packing: bool) -> list[list[int]]:
    """Rows of at most ``seq_len`` tokens: cut, or packed end to end into rows of exactly that length.

    Packed examples see each other through causal attention; the last, short row is dropped unless it is the only one.
    """
    if not packing:
        return [list(row[:seq_len]) for row in rows]
    stream = [token for row in rows for token in row]
    packed = [stream[start : start + seq_len] for start in range(0, len(stream), seq_len)]
    return packed[:-1] if len(packed) > 1 and len(packed[-1]) < seq_len else packed
