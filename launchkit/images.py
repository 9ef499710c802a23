"""The size of an image that a sequence is about, and the models that take one of any size."""

from __future__ import annotations

import re
from typing import NamedTuple

from launchkit.errors import UsageError

# Models whose processors keep an image about as large as it is, so that its size is the user's to tell. They read from
# tensors how many patches each image has and loop over the images, so that no two batches run the same operators: each
# batch has a program of its own.
OF_ANY_SIZE = frozenset(
    {"idefics3", "internvl", "llava_next", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm"}
)


class ImageSize(NamedTuple):
    """Pixels of an image as it is in the data, before a processor resizes it."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> ImageSize:
        """``"1024x768"``, height first. Raises ``UsageError``."""
        found = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", text.strip().lower())
        if found is None:
            raise UsageError(f"--image-size {text} is no height x width in pixels; write --image-size {DEFAULT_SIZE}")
        return cls(int(found[1]), int(found[2]))


DEFAULT_SIZE = ImageSize(1024, 1024)  # no source: about what a photograph is scaled down to, or a page
SMALL_SIZE = ImageSize(64, 64)  # of which a processor makes about as little as of any

# What a plan without images takes for granted of a model that sees some.
TEXT_ALONE = "sequences are of text alone; --images adds an image to each, whose tokens count as its length"
