"""The rows that come of examples."""

from __future__ import annotations

from typing import Any

import pytest

from launchkit.finetune.data import fit_rows, tokenise

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
