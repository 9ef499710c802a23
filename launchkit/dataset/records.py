"""Training examples as they lie in a file: JSON lines in the usual shapes, or a JSON array of the same records.

=================  ====================================================================
chat               ``{"messages": [{"role": "user", "content": "…"}, …]}``
chat (ShareGPT)    ``{"conversations": [{"from": "human", "value": "…"}, …]}``
prompt             ``{"prompt": "…", "completion": "…"}``
alpaca             ``{"instruction": "…", "input": "…", "output": "…"}``
text               ``{"text": "…"}``
=================  ====================================================================

A name that ends in ``.gz`` is read as compressed.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from launchkit.errors import UsageError

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAPES = "messages, conversations, prompt + completion, instruction + output, or text"

Messages = list[dict[str, str]]


class Record(NamedTuple):
    """One example, and how much of the file was read with it."""

    example: Messages | str
    num_bytes_read: int


def read_examples(path: str | Path) -> list[Messages | str]:
    """The examples of a file: a conversation each, or plain text. Names the line of the first bad record."""
    return [record.example for record in read_records(path)]


def read_records(path: str | Path) -> Iterator[Record]:
    """The examples of a file, one by one. Raises ``UsageError``, also where there is none."""
    is_empty = True
    for written, where, num_bytes in _written(Path(path)):
        is_empty = False
        yield Record(_read_record(written, where=where), num_bytes)
    if is_empty:
        raise UsageError(f"{path} holds no examples; give one JSON object per line with {SHAPES}")


def _written(path: Path) -> Iterator[tuple[Any, str, int]]:
    """Each record as JSON has it, where it stands, and how many bytes were read up to its end."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory; give a file with one JSON object per line")
    num_bytes = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if num_bytes == 0 and line.lstrip(_MARK).startswith(b"["):
                    yield from _array(line + lines.read(), path=path)
                    return
                num_bytes += len(line)
                if line.strip():
                    yield _json(line, where=f"{path}:{number}"), f"{path}:{number}", num_bytes
    except (gzip.BadGzipFile, EOFError) as error:
        raise UsageError(f"{path} is not gzip ({error}); unpack it, or leave out .gz") from None


_MARK = b"\xef\xbb\xbf \t\r\n"  # of the byte order, which some editors write, and blanks


def _array(text: bytes, *, path: Path) -> Iterator[tuple[Any, str, int]]:
    records = _json(text, where=str(path))
    for index, record in enumerate(records):
        yield record, f"{path}[{index}]", len(text)


def _json(text: bytes, *, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}); write one JSON object per line") from error


def _read_record(record: Any, *, where: str) -> Messages | str:
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
