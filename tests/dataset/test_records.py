"""Records of a data file: every accepted shape, every refused one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from launchkit.dataset import read_examples, read_records
from launchkit.errors import UsageError

QUESTION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


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
        ("[1]", r"\[0\] has the keys int"),
        ("[[1]", r"a.jsonl is not JSON"),
        ("3", r":1 has the keys int"),
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


def test_other_files_of_the_same_records(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text(json.dumps([{"text": "Once"}, {"messages": QUESTION}], indent=1))
    marked = tmp_path / "b.jsonl"
    marked.write_bytes(b'\xef\xbb\xbf{"text": "Once"}\r\n')  # as some editors write it
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "Once"}\n{"text": "more"}\n'))
    assert read_examples(array) == ["Once", QUESTION]
    assert read_examples(marked) == ["Once"]
    assert read_examples(packed) == ["Once", "more"]


def test_what_is_no_file_of_records(tmp_path: Path) -> None:
    not_packed = tmp_path / "a.jsonl.gz"
    not_packed.write_text('{"text": "Once"}')
    with pytest.raises(UsageError, match="is not gzip"):
        read_examples(not_packed)
    with pytest.raises(UsageError, match="is a directory; give a file"):
        read_examples(tmp_path)
    table = tmp_path / "a.parquet"
    table.write_bytes(b"PAR1\x15\x04\xff\xfe")
    with pytest.raises(UsageError, match=r"a.parquet:1 is not JSON"):
        read_examples(table)


def test_how_far_it_has_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    far = [record.num_bytes_read for record in read_records(path)]
    assert far[0] < far[1] <= path.stat().st_size


def test_the_example_data_is_64_conversations() -> None:
    path = Path(__file__).parents[2] / "examples" / "data" / "chat.jsonl"
    examples = read_examples(path)
    assert len(examples) == 64
    assert all(isinstance(example, list) and len(example) == 2 for example in examples)
