"""Examples: every accepted shape, every refused one, and the rows that come of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launchkit.errors import UsageError
from launchkit.finetune.data import fit_rows, read_examples, tokenise

QUESTION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


class WordTokenizer:
    """One token per word; 0 ends a text."""

    eos_token = "</s>"
    eos_token_id = 0

    def __init__(self, *, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [0 if word == "</s>" else len(word) for word in text.replace("</s>", " </s>").split()]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_options: Any) -> str:
        return " ".join(f"<{message['role']}> {message['content']}" for message in messages)


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": QUESTION}, QUESTION),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, QUESTION),
        ({"prompt": "Why?", "completion": "Because."}, QUESTION),
        ({"instruction": "Why?", "output": "Because."}, QUESTION),
        ({"instruction": "Why?", "input": "", "output": "Because."}, QUESTION),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"text": "Once"}, "Once"),
    ],
)
def test_shapes(record: dict[str, Any], expected: object, tmp_path: Path) -> None:
    assert read_examples(write(tmp_path / "a.jsonl", record)) == [expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no examples"),
        ("\n\n", "holds no examples"),
        ('{"text": "a"}\nnot json', r":2 is not JSON"),
        ('{"question": "a"}', r":1 has the keys question; give each record messages"),
        ("[1]", r":1 has the keys list"),
        ('{"messages": [{"role": "user"}]}', r":1 has a broken 'messages'"),
        ('{"messages": "hello"}', r":1 has a broken 'messages'"),
        ('{"conversations": [{"from": "nobody", "value": "x"}]}', r":1 has a broken 'conversations'"),
        ('{"text": 3}', r":1 has a broken 'text'"),
    ],
)
def test_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_examples(path)


@pytest.mark.parametrize(
    ("example", "template", "expected"),
    [
        ("one three", None, [3, 5, 0]),
        ("one </s>", None, [3, 0]),
        (QUESTION, "set", [6, 4, 11, 8]),
        (QUESTION, None, [5, 4, 10, 8, 0]),
    ],
)
def test_tokenise(example: Any, template: str | None, expected: list[int]) -> None:
    assert tokenise([example], WordTokenizer(chat_template=template)) == [expected]


@pytest.mark.parametrize(
    ("rows", "packing", "expected"),
    [
        ([[1, 2, 3, 4], [5]], False, [[1, 2, 3], [5]]),
        ([[1, 2, 3, 4], [5, 6]], True, [[1, 2, 3], [4, 5, 6]]),
        ([[1, 2, 3, 4], [5]], True, [[1, 2, 3]]),
        ([[1], [2]], True, [[1, 2]]),
    ],
)
def test_fit_rows(rows: list[list[int]], packing: bool, expected: list[list[int]]) -> None:
    assert fit_rows(rows, seq_len=3, packing=packing) == expected


def test_the_example_data_is_64_conversations() -> None:
    path = Path(__file__).parents[2] / "examples" / "data" / "chat.jsonl"
    examples = read_examples(path)
    assert len(examples) == 64
    assert all(isinstance(example, list) and len(example) == 2 for example in examples)
