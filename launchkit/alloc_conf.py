"""``PYTORCH_ALLOC_CONF``: what torch's caching allocator is told, as text and as sizes.

Source: pytorch ``c10/core/AllocatorConfig.cpp`` and ``c10/cuda/CUDAAllocatorConfig.cpp``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launchkit.errors import UsageError
from launchkit.units import MIB, round_up

VARIABLE = "PYTORCH_ALLOC_CONF"
OLDER_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"  # which torch reads where the other is not set, and before 2.9 alone
EXPANDABLE = "expandable_segments:True"

MIN_BLOCK_BYTES = 512
LARGE_SEGMENT_BYTES = 20 * MIB
NUM_ROUNDUP_INTERVALS = 16  # powers of two from 1 MiB to 64 GiB


def round_block(num_bytes: int) -> int:
    """What a request takes of a block with the default settings: the next multiple of 512 B; nothing for nothing."""
    return -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


@dataclass(frozen=True, kw_only=True)
class AllocatorSettings:
    """What ``PYTORCH_ALLOC_CONF`` says, in bytes. ``None`` for ``max_split_size_bytes`` means unlimited.

    ``roundup_power2_divisions`` has one entry for each power of two from 1 MiB to 32 GiB and above; 0 and 1 round to
    512 B. ``garbage_collection_threshold`` acts, as in PyTorch, only where the process has a limit
    (``set_per_process_memory_fraction`` there, ``capacity_bytes`` here).
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    max_non_split_rounding_bytes: int = LARGE_SEGMENT_BYTES
    roundup_power2_divisions: tuple[int, ...] = ()
    garbage_collection_threshold: float = 0.0

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """The settings in the text of ``PYTORCH_ALLOC_CONF``, such as
        ``expandable_segments:True,max_split_size_mb:128``; nothing for torch's own. Raises ``UsageError``."""
        values: dict[str, Any] = {}
        for option in _split_options(text.replace(" ", "")):
            name, _, value = option.partition(":")
            if name in _IGNORED_OPTIONS:
                continue
            if name not in _PARSERS:
                known = ", ".join(sorted(_PARSERS))
                raise UsageError(f"{VARIABLE} has an option {name!r} that is not modelled; use {known}")
            field, parser = _PARSERS[name]
            try:
                values[field] = parser(value)
            except ValueError as error:
                raise UsageError(f"{VARIABLE} has {option!r}; {error}") from None
        return cls(**values)

    def round(self, num_bytes: int) -> int:
        """The size of the block for a request of ``num_bytes`` > 0, before any remainder too small to split off."""
        if not self.roundup_power2_divisions or num_bytes < MIN_BLOCK_BYTES:
            return round_block(num_bytes)
        interval = min(max(num_bytes.bit_length() - MIB.bit_length(), 0), NUM_ROUNDUP_INTERVALS - 1)
        divisions = self.roundup_power2_divisions[interval]
        if divisions <= 1 or num_bytes <= MIN_BLOCK_BYTES * divisions:
            return round_block(num_bytes)
        return round_up(num_bytes, (1 << (num_bytes.bit_length() - 1)) // divisions)


def _split_options(text: str) -> Iterator[str]:
    """Split at the commas outside brackets."""
    depth, start = 0, 0
    for index, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == "," and not depth:
            yield text[start:index]
            start = index + 1
    if text[start:]:
        yield text[start:]


def _parse_bool(value: str) -> bool:
    if value not in ("True", "False"):
        raise ValueError("write True or False")
    return value == "True"


def _parse_split_size(value: str) -> int:
    if not value.isdigit() or int(value) * MIB < LARGE_SEGMENT_BYTES:
        raise ValueError(f"write a number of MiB, at least {LARGE_SEGMENT_BYTES // MIB}")
    return int(value) * MIB


def _parse_threshold(value: str) -> float:
    try:
        threshold = float(value)
    except ValueError:
        threshold = 0.0
    if not 0.0 < threshold < 1.0:
        raise ValueError("write a fraction between 0 and 1")
    return threshold


def _parse_power_of_two(value: str, *, zero: bool) -> int:
    if not value.isdigit() or int(value).bit_count() > 1 or (int(value) == 0 and not zero):
        raise ValueError("write powers of two, such as 4 or [256:1,512:2,>:8]")
    return int(value)


def _parse_divisions(value: str) -> tuple[int, ...]:
    """``4`` for all sizes, or ``[256:1,512:2,>:8]``: divisions from each size in MiB, the first one's below it too."""
    if not value.startswith("["):
        return (_parse_power_of_two(value, zero=False),) * NUM_ROUNDUP_INTERVALS
    divisions = [0] * NUM_ROUNDUP_INTERVALS
    last = -1
    for pair in value.strip("[]").split(","):
        boundary, _, count = pair.partition(":")
        parts = _parse_power_of_two(count, zero=True)
        if boundary == ">":
            divisions[last + 1 :] = [parts] * (NUM_ROUNDUP_INTERVALS - last - 1)
            continue
        interval = min(_parse_power_of_two(boundary, zero=False).bit_length() - 1, NUM_ROUNDUP_INTERVALS - 1)
        if last < 0:
            divisions[:interval] = [parts] * interval
        divisions[interval] = parts
        last = interval
    return tuple(divisions)


_PARSERS: Mapping[str, tuple[str, Any]] = {
    "expandable_segments": ("expandable_segments", _parse_bool),
    "max_split_size_mb": ("max_split_size_bytes", _parse_split_size),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _parse_split_size),
    "roundup_power2_divisions": ("roundup_power2_divisions", _parse_divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", _parse_threshold),
}

# Options that change how long an allocation takes, not where it lies.
_IGNORED_OPTIONS = frozenset(
    {
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "release_lock_on_cudamalloc",
    }
)


def read_variable(environment: Mapping[str, str]) -> tuple[str, str]:
    """The variable that tells torch something, the newer one first, and what; nothing where none does."""
    return next(
        ((name, text) for name in (VARIABLE, OLDER_VARIABLE) if (text := environment.get(name))), (VARIABLE, "")
    )
