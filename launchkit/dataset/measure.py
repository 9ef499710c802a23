"""The lengths of a data set's examples in a model's tokens, remembered for as long as the file stays as it is.

Tokens are counted by the model's own tokenizer and chat template, in a process of its own that may import transformers
(``launchkit.finetune.count``), the way the built-in fine-tune makes its rows. Where that cannot be had they are
estimated from bytes, and the result says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from launchkit import __version__
from launchkit.catalog.cache import cache_directory, write_atomically
from launchkit.catalog.models import Progress
from launchkit.children import environment_of_child
from launchkit.dataset.records import Messages, read_records
from launchkit.lengths import COUNTED_BY_TOKENIZER, Lengths

# Examples whose tokens are counted: all of as many, else these spread over the file and the largest. The others' tokens
# follow from their bytes, at the rate of those counted.
MOST_SPREAD, MOST_LARGEST = 4000, 100
# Where there is no tokenizer: a rule of thumb. English text takes somewhat more bytes per token than this, code and
# most other scripts fewer; the role and the marks of a turn take about five tokens (ChatML's).
BYTES_PER_TOKEN = 4
TOKENS_PER_TURN = 5
ESTIMATED = f"estimated as 1 token per {BYTES_PER_TOKEN} bytes"
TIMEOUT_SECONDS = 600
_LINES_PER_REPORT = 2000


def measure_lengths(path: str, *, model: str, progress: Progress | None = None) -> Lengths:
    """The lengths of the examples in ``path`` for ``model``: a hub id, a directory or a GGUF file.

    Raises ``UsageError`` for a file that holds no examples, or other records than those known.
    """
    kept = _cache_path(path, model=model)
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = json.loads(kept.read_bytes())
        return Lengths(**{**found, "path": path, "quantiles": tuple(found["quantiles"])})
    sizes = _sizes(path, progress=progress)
    lengths = _counted(path, sizes, model=model, progress=progress)
    if not lengths.is_estimated:  # else the tokenizer may be there the next time
        with contextlib.suppress(OSError):
            write_atomically(kept, json.dumps(asdict(lengths)).encode())
    return lengths


def _cache_path(path: str, *, model: str) -> Path:
    """By everything that the result depends on."""
    file = Path(path)
    status = file.stat()
    own = Path(model).expanduser()
    stamp = str(own.resolve()) if own.exists() else model
    parts = (__version__, file.resolve(), status.st_size, status.st_mtime_ns, stamp)
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    return cache_directory() / "lengths" / f"{digest}.json"


def _can_count() -> bool:
    return find_spec("transformers") is not None


def _sizes(path: str, *, progress: Progress | None) -> list[tuple[int, int]]:
    """Bytes of text and number of turns of each example."""
    total = os.path.getsize(path)
    sizes: list[tuple[int, int]] = []
    for record in read_records(path):
        sizes.append(_size(record.example))
        if progress and len(sizes) % _LINES_PER_REPORT == 0:
            progress(min(record.num_bytes_read, total), total, f"reading {Path(path).name}")
    return sizes


def _size(example: Messages | str) -> tuple[int, int]:
    if isinstance(example, str):
        return len(example.encode(errors="replace")), 0
    return sum(len(str(turn["content"]).encode(errors="replace")) for turn in example), len(example)


def _counted(path: str, sizes: Sequence[tuple[int, int]], *, model: str, progress: Progress | None) -> Lengths:
    estimates = [max(1, num_bytes // BYTES_PER_TOKEN + TOKENS_PER_TURN * turns) for num_bytes, turns in sizes]
    chosen = _chosen([num_bytes for num_bytes, _ in sizes])
    if progress:
        progress(0, 0, "counting tokens")
    counts = _count_tokens(path, chosen, model=model) if _can_count() else None
    if counts is None:
        return Lengths.of(estimates, path=path, counted_by=ESTIMATED)
    rate = sum(counts) / max(1, sum(estimates[index] for index in chosen))
    lengths = [max(1, round(estimate * rate)) for estimate in estimates]
    for index, count in zip(chosen, counts, strict=True):
        lengths[index] = max(1, count)
    return Lengths.of(lengths, path=path, counted_by=COUNTED_BY_TOKENIZER)


def _chosen(num_bytes: Sequence[int]) -> list[int]:
    """Which examples' tokens are counted, in the order of the file."""
    number = len(num_bytes)
    if number <= MOST_SPREAD + MOST_LARGEST:
        return list(range(number))
    spread = {index * number // MOST_SPREAD for index in range(MOST_SPREAD)}
    largest = sorted(range(number), key=num_bytes.__getitem__)[-MOST_LARGEST:]
    return sorted(spread.union(largest))


def _count_tokens(path: str, chosen: Sequence[int], *, model: str) -> list[int] | None:
    """Tokens of the chosen examples; None where the model's tokenizer cannot be had."""
    question = json.dumps({"path": str(Path(path).resolve()), "model": model, "chosen": list(chosen)})
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", "launchkit.finetune.count"],
            input=question,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            env=environment_of_child(),
            check=True,
        )
        counts = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return counts if isinstance(counts, list) and len(counts) == len(chosen) else None
