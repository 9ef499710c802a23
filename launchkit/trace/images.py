"""One image for each sequence of a batch, as the processor of a model of images and text would give it.

What a processor makes of an image is in no ``config.json``. Of a model with images of one size assumed is one square
image of the size that the vision tower was made for, in one piece; of others (``launchkit.images``) an image of the size
asked for, as the processor resizes and cuts it. The image's tokens are part of the sequence.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from launchkit.errors import TraceError
from launchkit.images import ImageSize
from launchkit.trace.build import Built


class _Cut(NamedTuple):
    """An image as its model sees it: tokens it has in the sequence, and the tensors of ``num_images`` of them."""

    num_tokens: int
    tensors: dict[str, torch.Tensor]


def image_inputs(
    built: Built, *, num_images: int, token_ids: torch.Tensor, size: ImageSize
) -> dict[str, torch.Tensor]:
    """What goes into a step beside the tokens ``token_ids``, among which the image's are put in place.

    Raises ``TraceError`` for a model that sees no images, or one whose images are cut in a way that is not known here.
    """
    config = built.config
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise TraceError(f"a model of type {config.model_type} sees no images; drop --images")
    takes = inspect.signature(_transformers_model(built).forward).parameters
    cut = _CUTTERS.get(config.model_type)
    if cut is None:
        inputs = _of_one_size(config.model_type, vision, num_images)
    else:
        found = cut(vision, size, num_images)
        inputs = found.tensors | _placed(found, config, token_ids, size, takes)
    if "token_type_ids" in takes:  # tells image tokens from text (Gemma 3)
        inputs["token_type_ids"] = torch.zeros_like(token_ids)
    return inputs


def _transformers_model(built: Built) -> Any:
    return built.model.get_submodule(built.prefix[:-1]) if built.prefix else built.model


def _of_one_size(model_type: str, vision: Any, num_images: int) -> dict[str, torch.Tensor]:
    size = getattr(vision, "image_size", None)
    if not isinstance(size, int) or hasattr(vision, "max_num_tiles"):
        raise TraceError(
            f"how the processor of {model_type} cuts images into patches or tiles is not known here; "
            "drop --images to plan for its text"
        )
    return {"pixel_values": torch.zeros(num_images, vision.num_channels, size, size)}


def _placed(
    found: _Cut, config: Any, token_ids: torch.Tensor, size: ImageSize, takes: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Puts the image's tokens behind each sequence's first one, in place; what tells them apart where that is asked."""
    length = token_ids.shape[1]
    if found.num_tokens >= length:
        raise TraceError(
            f"an image of {size} pixels is {found.num_tokens:,} tokens, which do not fit a sequence of {length:,}; "
            "use a longer --seq-len or a smaller --image-size"
        )
    where = slice(1, 1 + found.num_tokens)
    token_ids[:, where] = config.image_token_id
    if "mm_token_type_ids" not in takes:
        return {}
    kinds = torch.zeros_like(token_ids)
    kinds[:, where] = 1
    return {"mm_token_type_ids": kinds}


# Pixels that the published processors leave an image, by model type: less is scaled up, more down.
# Source: preprocessor_config.json of Qwen/Qwen2-VL-7B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-8B-Instruct.
_QWEN2_PIXELS = (56 * 56, 28 * 28 * 16384)
_QWEN3_PIXELS = (256 * 256, 4096 * 4096)


def _grid_of(pixels: tuple[int, int]) -> Callable[[Any, ImageSize, int], _Cut]:
    """One row per patch, two frames deep, and how many patches high and wide each image is; ``spatial_merge_size``
    squared patches make a token.

    Source: transformers 5.24 ``Qwen2VLImageProcessor`` (``smart_resize``, ``_preprocess``).
    """
    least, most = pixels

    def cut(vision: Any, size: ImageSize, num_images: int) -> _Cut:
        patch, merge = vision.patch_size, vision.spatial_merge_size
        height, width = (side // patch for side in _resized(size, step=patch * merge, least=least, most=most))
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        row = channels * vision.temporal_patch_size * patch**2
        tensors = {
            "pixel_values": torch.zeros(num_images * height * width, row),
            "image_grid_thw": torch.tensor([[1, height, width]] * num_images),
        }
        return _Cut(height * width // merge**2, tensors)

    return cut


def _resized(size: ImageSize, *, step: int, least: int, most: int) -> tuple[int, int]:
    """The nearest multiples of ``step`` with ``least`` to ``most`` pixels between them, in about the same proportion."""
    height, width = (round(side / step) * step for side in size)
    if height * width > most:
        scale = math.sqrt(size.height * size.width / most)
        height, width = (max(step, math.floor(side / scale / step) * step) for side in size)
    elif height * width < least:
        scale = math.sqrt(least / (size.height * size.width))
        height, width = (math.ceil(side * scale / step) * step for side in size)
    return height, width


# How the image of each type of model is cut, for those that take images of any size.
_CUTTERS: Mapping[str, Callable[[Any, ImageSize, int], _Cut]] = {
    "qwen2_vl": _grid_of(_QWEN2_PIXELS),
    "qwen2_5_vl": _grid_of(_QWEN2_PIXELS),
    "qwen3_vl": _grid_of(_QWEN3_PIXELS),
    "qwen3_vl_moe": _grid_of(_QWEN3_PIXELS),
}
