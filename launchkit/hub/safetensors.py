"""How many weights a checkpoint holds, and in which format: read from the headers of its safetensors files.

A file begins with eight bytes, the length of a JSON header that names every tensor's dtype and shape; nothing behind
the header is read. Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchkit.errors import ModelConfigError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEMSIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1} | {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """What the files of one checkpoint hold together."""

    num_elements: int
    num_elements_by_dtype: dict[str, int]

    @property
    def dtype(self) -> str:
        """The dtype of most elements, in safetensors' spelling."""
        return max(self.num_elements_by_dtype, key=lambda dtype: self.num_elements_by_dtype[dtype])

    @property
    def itemsize(self) -> int:
        return ITEMSIZES.get(self.dtype, 1)

    @property
    def is_quantized(self) -> bool:
        """Whether most elements are packed or 8-bit, so that their number is not the number of parameters."""
        return self.dtype not in FLOATS


def read_stored_weights(directory: Path) -> StoredWeights | None:
    """The weights in ``directory``'s ``*.safetensors``, None where there are none. Raises ``ModelConfigError`` where
    a header is damaged or a shard of the index is missing."""
    files = _weight_files(directory)
    if not files:
        return None
    elements: Counter[str] = Counter()
    for file in files:
        for tensor in _read_header(file).values():
            elements[tensor["dtype"]] += math.prod(tensor["shape"])
    if not elements:
        return None
    return StoredWeights(num_elements=sum(elements.values()), num_elements_by_dtype=dict(elements))


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        return [single] if single.is_file() else []
    try:
        names = sorted({Path(str(name)).name for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelConfigError(f"{index} is no index of weights; download the model again") from error
    missing = [name for name in names if not (directory / name).is_file()]
    # An index alone, without any shard, is a model whose weights were not downloaded: nothing to cross-check.
    if missing and len(missing) < len(names):
        raise ModelConfigError(
            f"{directory} lacks {len(missing)} of {len(names)} weight files, the first {missing[0]}; "
            "download the model again"
        )
    return [] if missing else [directory / name for name in names]


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Each tensor's ``dtype`` and ``shape``."""
    try:
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            if num_bytes > min(MAX_HEADER_BYTES, path.stat().st_size):
                raise ValueError("a header longer than the file")
            header = json.loads(file.read(num_bytes))
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        for tensor in tensors.values():
            if not isinstance(tensor["dtype"], str) or not all(isinstance(n, int) and n >= 0 for n in tensor["shape"]):
                raise ValueError("a tensor without dtype or shape")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelConfigError(f"{path} has no safetensors header; download the file again") from error
    return tensors
