"""A process that counts tokens as the built-in fine-tune makes its rows: ``python -m launchkit.finetune.count``.

Standard input brings JSON: the ``path`` of a data set, the ``model`` whose tokenizer is meant, and which examples are
``chosen``, by their places in the file. Standard output takes the list of their lengths. Whoever starts it is
``launchkit.dataset``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from launchkit.dataset import read_examples
from launchkit.finetune.data import tokenise
from launchkit.hub.local import gguf_in
from launchkit.hub.remote import is_reachable
from launchkit.launch.job import split_gguf

# One of these is in every directory that AutoTokenizer can read, whose import takes seconds.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def main() -> None:
    """Answers once. What fails, fails by its exit code: the caller estimates instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may come between
    question = json.load(sys.stdin)
    source = tokenizer_source(question["model"])
    if source is None:
        sys.exit(f"the tokenizer of {question['model']} is not at hand")
    examples = read_examples(question["path"])
    rows = tokenise([examples[index] for index in question["chosen"]], _load_tokenizer(source))
    json.dump([len(row) for row in rows], answers)
    answers.close()


def tokenizer_source(model: str) -> dict[str, Any] | None:
    """The arguments of ``AutoTokenizer.from_pretrained`` for a hub id, a directory, a ``config.json`` in one, or a GGUF
    file; None where no tokenizer is there, nor to be had from the hub."""
    path = Path(model).expanduser()
    if not path.exists():
        is_cached = any(_is_cached(model, name) for name in TOKENIZER_FILES)
        known = is_cached or is_reachable()
        return {"pretrained_model_name_or_path": model, "local_files_only": is_cached} if known else None
    if path.is_file() and path.suffix == ".json":
        path = path.parent
    if path.is_dir() and any((path / name).is_file() for name in TOKENIZER_FILES):
        return {"pretrained_model_name_or_path": str(path)}
    gguf = gguf_in(path) if path.is_dir() else path
    if gguf is None:
        return None
    directory, name = split_gguf(str(gguf))
    return {"pretrained_model_name_or_path": directory, "gguf_file": name}


def _is_cached(model: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model, name), str)
    except HFValidationError:
        return False


def _load_tokenizer(source: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(**source)


if __name__ == "__main__":
    main()
