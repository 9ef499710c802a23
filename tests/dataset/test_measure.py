"""Counting a data set's tokens: by a real tokenizer in a process of its own, or by bytes."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from launchkit.dataset import measure, measure_lengths
from launchkit.finetune.count import tokenizer_source
from launchkit.hub.remote import is_reachable

WORDS = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(WORDS[:1] * count)}) + "\n" for count in (3, 1, 2)))
    return path


def word_model(directory: Path) -> Path:
    """A directory with a tokenizer that has a token for each word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("</s>", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="[UNK]").save_pretrained(directory)
    return directory


def test_a_tokenizer_counts_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = word_model(tmp_path / "model")
    found = measure_lengths(str(data), model=str(model))
    assert found.quantiles == (2, 3, 4)  # with the end mark, as the built-in fine-tune trains
    assert not found.is_estimated

    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("counted again")

    monkeypatch.setattr(measure, "_count_tokens", refuse)
    assert measure_lengths(str(data), model=str(model)) == found
    data.write_text('{"text": "red"}\n')
    with pytest.raises(AssertionError, match="counted again"):
        measure_lengths(str(data), model=str(model))


def test_without_a_tokenizer_bytes_tell(data: Path, tmp_path: Path) -> None:
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 400}]}) + "\n")
    found = measure_lengths(str(data), model="nobody/nothing")
    assert found.is_estimated and found.longest == 400 // 4 + 5
    assert not list((tmp_path / "home").rglob("*.json"))  # a tokenizer may be there the next time


def test_of_many_examples_some_are_counted(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [*range(1, 10_000), 50_000]
    data.write_text("".join(json.dumps({"text": "x" * size}) + "\n" for size in sizes))
    asked: list[int] = []

    def count(_path: str, chosen: Sequence[int], *, model: str) -> list[int]:
        asked.extend(chosen)
        return [sizes[index] // 2 for index in chosen]

    monkeypatch.setattr(measure, "_count_tokens", count)
    found = measure_lengths(str(data), model="nobody/nothing")
    assert len(asked) < 4200 and len(sizes) - 1 in asked  # the largest is among them
    assert found.longest == 25_000 and found.num_examples == len(sizes)
    assert found.total_tokens == pytest.approx(sum(sizes) / 2, rel=0.01)


def test_where_a_tokenizer_is(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    assert tokenizer_source(str(bare)) is None
    (bare / "model.gguf").touch()
    assert tokenizer_source(str(bare)) == {"pretrained_model_name_or_path": str(bare), "gguf_file": "model.gguf"}
    (bare / "tokenizer.json").touch()
    assert tokenizer_source(str(bare / "config.json")) == {"pretrained_model_name_or_path": str(bare)}
    assert tokenizer_source("nobody/nothing") is None


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_reachable()  # offline by its variable
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert is_reachable()
    assert not is_reachable()
