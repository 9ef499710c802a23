"""Reading and tokenising training examples: JSONL in the usual shapes, to rows of token ids.

=================  ====================================================================
chat               ``{"messages": [{"role": "user", "content": "…"}, …]}``
chat (ShareGPT)    ``{"conversations": [{"from": "human", "value": "…"}, …]}``
prompt             ``{"prompt": "…", "completion": "…"}``
alpaca             ``{"instruction": "…", "input": "…", "output": "…"}``
text               ``{"text": "…"}``
=================  ====================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launchkit.errors import UsageError

IGNORED_LABEL = -100  # what torch's cross-entropy skips
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAPES = "messages, conversations, prompt + completion, instruction + output, or text"

Messages = list[dict[str, str]]


def read_examples(path: str | Path) -> list[Messages | str]:
    """The examples of a JSONL file: a conversation each, or plain text. Names the line of the first bad record."""
    examples: list[Messages | str] = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                examples.append(_read_record(line, where=f"{path}:{number}"))
    if not examples:
        raise UsageError(f"{path} holds no examples; give one JSON object per line with {SHAPES}")
    return examples


def _read_record(line: str, *, where: str) -> Messages | str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON ({error}); write one JSON object per line") from error
    if isinstance(record, dict):
        for keys, read in _READERS:
            if all(key in record for key in keys):
                try:
                    return read(record)
                except (KeyError, TypeError) as error:
                    raise UsageError(f"{where} has a broken {keys[0]!r} ({error!r}); see docs for its shape") from error
    found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise UsageError(f"{where} has the keys {found}; give each record {SHAPES}")


def _chat(record: Mapping[str, Any]) -> Messages:
    return [{"role": turn["role"], "content": turn["content"]} for turn in record["messages"]]


def _sharegpt(record: Mapping[str, Any]) -> Messages:
    return [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]


def _prompt(record: Mapping[str, Any]) -> Messages:
    return [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["completion"]},
    ]


def _alpaca(record: Mapping[str, Any]) -> Messages:
    question = "\n\n".join(part for part in (record["instruction"], record.get("input", "")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _text(record: Mapping[str, Any]) -> str:
    if not isinstance(record["text"], str):
        raise TypeError("text is not a string")
    return record["text"]


_READERS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Messages | str]], ...] = (
    (("messages",), _chat),
    (("conversations",), _sharegpt),
    (("prompt", "completion"), _prompt),
    (("instruction", "output"), _alpaca),
    (("text",), _text),
)


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
