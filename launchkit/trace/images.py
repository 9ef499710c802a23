"""One image for each sequence of a batch, as the processor of a model of images and text would give it.

What a processor makes of an image is in no ``config.json``. A model with images of one size gets one
square image of the size that its vision tower was made for, in one piece; others (``launchkit.images``) get an image of
the size asked for, as the processor resizes and cuts it. The image's tokens are part of the sequence.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers.image_processing_utils import select_best_resolution

from launchkit.errors import TraceError
from launchkit.images import ImageSize
from launchkit.trace.build import Built


class _Cut(NamedTuple):
    """An image as its model sees it: tokens it has in the sequence, and the tensors of ``num_images`` of them."""

    num_tokens: int
    tensors: dict[str, torch.Tensor]


_Cutter = Callable[[Any, ImageSize, int], _Cut]  # of a model's configuration, for so many images


def image_inputs(built: Built, *, num_images: int, token_ids: torch.Tensor, size: ImageSize) -> dict[str, torch.Tensor]:
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
        found = cut(config, size, num_images)
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


def _grid_of(pixels: tuple[int, int]) -> _Cutter:
    """One row per patch, two frames deep, and how many patches high and wide each image is; ``spatial_merge_size``
    squared patches make a token.

    Source: transformers 5.24 ``Qwen2VLImageProcessor`` (``smart_resize``, ``_preprocess``).
    """
    least, most = pixels

    def cut(config: Any, size: ImageSize, num_images: int) -> _Cut:
        vision = config.vision_config
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
    """The nearest multiples of ``step``, or those in about that proportion which have ``least`` to ``most`` pixels."""
    height, width = (round(side / step) * step for side in size)
    if height * width > most:
        scale = math.sqrt(size.height * size.width / most)
        height, width = (max(step, math.floor(side / scale / step) * step) for side in size)
    elif height * width < least:
        scale = math.sqrt(least / (size.height * size.width))
        height, width = (math.ceil(side * scale / step) * step for side in size)
    return height, width


def _whole(config: Any, size: ImageSize, num_images: int) -> _Cut:
    """The image in one piece, up to whole tokens of ``spatial_merge_size`` squared patches, and its size beside it; no
    side is longer than the tower's ``image_size``. A token ends each row.

    Source: transformers 5.24 ``PixtralImageProcessor.resize``, ``PixtralProcessor``.
    """
    vision, merge = config.vision_config, config.spatial_merge_size
    step = vision.patch_size * merge
    shrink = max(1.0, *(side / vision.image_size for side in size))
    height, width = (-(-math.floor(side / shrink) // step) for side in size)
    tensors = {
        "pixel_values": torch.zeros(num_images, vision.num_channels, height * step, width * step),
        "image_sizes": torch.tensor([[height * step, width * step]] * num_images),
    }
    return _Cut(height * width, tensors)


# How many tiles long the longer side is made. Source: preprocessor_config.json of HuggingFaceM4/Idefics3-8B-Llama3
# (4 × 364), HuggingFaceTB/SmolVLM-Instruct (4 × 384) and SmolVLM-256M-Instruct (4 × 512).
_LONGEST_IN_TILES = 4


def _scaled_tiles(config: Any, size: ImageSize, num_images: int) -> _Cut:
    """Square tiles of the image scaled to a length in tiles, and the whole image as one tile more, with a mask.

    Source: transformers 5.24 ``SmolVLMImageProcessor`` and ``Idefics3ImageProcessor`` (``resize_for_vision_encoder``,
    ``split_images``).
    """
    vision = config.vision_config
    high, wide = (math.ceil(_LONGEST_IN_TILES * side / max(size)) for side in size)
    num_tiles, side = high * wide + 1, vision.image_size
    tensors = {
        "pixel_values": torch.zeros(num_images, num_tiles, vision.num_channels, side, side),
        "pixel_attention_mask": torch.zeros(num_images, num_tiles, side, side, dtype=torch.int64),
    }
    return _Cut(num_tiles * (side // vision.patch_size) ** 2 // config.scale_factor**2, tensors)


_MOST_TILES = 12  # Source: transformers 5.24 ``GotOcr2ImageProcessor.max_patches``, ``InternVLProcessorKwargs``


def _tiles_of_like_shape(config: Any, size: ImageSize, num_images: int) -> _Cut:
    """Square tiles, in the rows and columns whose proportion is nearest the image's, and of those of one proportion the
    most that it fills by half; the whole image as one tile more where there are several.

    Source: transformers 5.24 ``get_optimal_tiled_canvas``, ``GotOcr2ImageProcessor.crop_image_to_patches``.
    """
    vision = config.vision_config
    side, patch = vision.image_size[0], vision.patch_size[0]
    grids = [(w, h) for h in range(1, _MOST_TILES + 1) for w in range(1, _MOST_TILES // h + 1)]

    def fitness(grid: tuple[int, int]) -> tuple[float, int]:
        num_tiles = grid[0] * grid[1]
        is_filled = size.height * size.width > side**2 * num_tiles / 2
        return abs(size.width / size.height - grid[0] / grid[1]), -num_tiles if is_filled else num_tiles

    wide, high = min(grids, key=fitness)
    num_tiles = wide * high + (wide * high > 1)
    tokens = int((side // patch) ** 2 * config.downsample_ratio**2)
    return _Cut(
        num_tiles * tokens, {"pixel_values": torch.zeros(num_images * num_tiles, vision.num_channels, side, side)}
    )


def _pinned_tiles(config: Any, size: ImageSize, num_images: int) -> _Cut:
    """Square tiles of the image scaled into the best of ``image_grid_pinpoints``, and the whole image as one tile more;
    what pads it is cut from the features, and a token ends each of their rows.

    Source: transformers 5.24 ``LlavaNextImageProcessor``, ``LlavaNextProcessor._get_number_of_features``.
    """
    side, per_side = config.vision_config.image_size, config.vision_config.image_size // config.vision_config.patch_size
    canvas = select_best_resolution(size, config.image_grid_pinpoints)
    high, wide = (length // side for length in canvas)
    rows, columns = high * per_side, wide * per_side
    if size.width * rows > size.height * columns:
        rows -= (rows - int(round(size.height * columns / size.width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(size.width * rows / size.height, 7))) // 2 * 2
    num_tiles = high * wide + 1
    tensors = {
        "pixel_values": torch.zeros(num_images, num_tiles, config.vision_config.num_channels, side, side),
        "image_sizes": torch.tensor([list(size)] * num_images),
    }
    return _Cut(rows * (columns + 1) + per_side**2, tensors)


# How the image of each type of model is cut, for those that take images of any size.
_CUTTERS: Mapping[str, _Cutter] = {
    "idefics3": _scaled_tiles,
    "internvl": _tiles_of_like_shape,
    "llava_next": _pinned_tiles,
    "mistral3": _whole,
    "qwen2_vl": _grid_of(_QWEN2_PIXELS),
    "qwen2_5_vl": _grid_of(_QWEN2_PIXELS),
    "qwen3_vl": _grid_of(_QWEN3_PIXELS),
    "qwen3_vl_moe": _grid_of(_QWEN3_PIXELS),
    "smolvlm": _scaled_tiles,
}
