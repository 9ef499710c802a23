"""Random batches for what a model is trained on: text, a class per text or image, a transcript, text about an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.accuracy.cell import Cell

Batch = dict[str, torch.Tensor]


def task_batches(cell: Cell, config: Any) -> Iterator[Batch]:
    """One micro-batch after another, labels in a tensor of their own as collators make them."""
    name = (cell.config.get("architectures") or ["ForCausalLM"])[0]
    make = next((make for suffix, make in _BY_CLASS.items() if name.endswith(suffix)), _text)
    if hasattr(config, "num_mel_bins"):
        make = _speech
    elif cell.images:
        make = _text_about_an_image
    while True:
        yield make(cell, config) | (_mask(cell) if cell.padding else {})


def _mask(cell: Cell) -> Batch:
    mask = torch.ones(cell.micro_batch, cell.seq_len, dtype=torch.int64)
    mask[min(1, cell.micro_batch - 1) :, -5:] = 0
    return {"attention_mask": mask}


def _tokens(cell: Cell, config: Any) -> torch.Tensor:
    vocab_size = config.get_text_config().vocab_size
    return torch.randint(0, min(vocab_size, 490), (cell.micro_batch, cell.seq_len))


def _text(cell: Cell, config: Any) -> Batch:
    ids = _tokens(cell, config)
    return {"input_ids": ids, "labels": ids.clone()}


def _classes(cell: Cell) -> torch.Tensor:
    return torch.randint(0, 2, (cell.micro_batch,))


def _classified_text(cell: Cell, config: Any) -> Batch:
    return {"input_ids": _tokens(cell, config), "labels": _classes(cell)}


def _image(cell: Cell, vision: Any) -> torch.Tensor:
    return torch.rand(cell.micro_batch, vision.num_channels, vision.image_size, vision.image_size)


def _classified_image(cell: Cell, config: Any) -> Batch:
    return {"pixel_values": _image(cell, config), "labels": _classes(cell)}


def _speech(cell: Cell, config: Any) -> Batch:
    features = torch.rand(cell.micro_batch, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "labels": _tokens(cell, config)}


def _text_about_an_image(cell: Cell, config: Any) -> Batch:
    """The image's tokens come first in each sequence, and are as many as ``mm_tokens_per_image`` says."""
    if cell.image_size:
        return _text_about_an_image_of_any_size(cell, config)
    batch = _text(cell, config)
    image_tokens = cell.config.get("mm_tokens_per_image") or cell.config["image_seq_length"]
    batch["input_ids"][:, :image_tokens] = config.image_token_id
    batch["pixel_values"] = _image(cell, config.vision_config)
    if "gemma" in config.model_type:
        batch["token_type_ids"] = (batch["input_ids"] == config.image_token_id).long()
    return batch


def _text_about_an_image_of_any_size(cell: Cell, config: Any) -> Batch:
    """The image's tokens are behind the one that tells its start."""
    height, width = (int(side) for side in cell.image_size.split("x"))
    pixels, num_tokens = _PROCESSED[config.model_type](cell, config, height, width)
    batch, where = _text(cell, config), slice(1, 1 + num_tokens)
    batch["input_ids"][:, where] = config.image_token_id
    if "image_grid_thw" in pixels:
        kinds = torch.zeros_like(batch["input_ids"])
        kinds[:, where] = 1
        batch["mm_token_type_ids"] = kinds
    return batch | pixels


def _patches(cell: Cell, config: Any, height: int, width: int) -> tuple[Batch, int]:
    """As Qwen's processors have it, of images whose sides are whole tokens: a row of pixels per patch."""
    vision = config.vision_config
    high, wide = height // vision.patch_size, width // vision.patch_size
    pixels = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    tensors = {
        "pixel_values": torch.rand(cell.micro_batch * high * wide, pixels),
        "image_grid_thw": torch.tensor([[1, high, wide]] * cell.micro_batch),
    }
    return tensors, high * wide // vision.spatial_merge_size**2


def _in_one_piece(cell: Cell, config: Any, height: int, width: int) -> tuple[Batch, int]:
    """As Pixtral's processor has it, of images whose sides are whole tokens."""
    tensors = {
        "pixel_values": torch.rand(cell.micro_batch, 3, height, width),
        "image_sizes": torch.tensor([[height, width]] * cell.micro_batch),
    }
    return tensors, height * width // (config.vision_config.patch_size * config.spatial_merge_size) ** 2


def _seventeen_tiles(cell: Cell, config: Any, height: int, width: int) -> tuple[Batch, int]:
    """As SmolVLM's processor has it, of square images: four by four and the whole."""
    side = config.vision_config.image_size
    tensors = {
        "pixel_values": torch.rand(cell.micro_batch, 17, 3, side, side),
        "pixel_attention_mask": torch.ones(cell.micro_batch, 17, side, side, dtype=torch.int64),
    }
    return tensors, 17 * (side // config.vision_config.patch_size // config.scale_factor) ** 2


def _five_tiles(cell: Cell, config: Any, height: int, width: int) -> tuple[Batch, int]:
    """As InternVL's processor has it, of images of two by two tiles."""
    side, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    return {"pixel_values": torch.rand(5 * cell.micro_batch, 3, side, side)}, 5 * (side // patch // 2) ** 2


def _tiles_with_rows(cell: Cell, config: Any, height: int, width: int) -> tuple[Batch, int]:
    """As LLaVA-NeXT's processor has it, of images of two by two tiles, each row of whose patches a token ends."""
    side, per_side = config.vision_config.image_size, config.vision_config.image_size // config.vision_config.patch_size
    tensors = {
        "pixel_values": torch.rand(cell.micro_batch, 5, 3, side, side),
        "image_sizes": torch.tensor([[height, width]] * cell.micro_batch),
    }
    return tensors, per_side**2 + 2 * per_side * (2 * per_side + 1)


# What a processor makes of an image, and how many tokens, by type of model.
_PROCESSED: dict[str, Callable[[Cell, Any, int, int], tuple[Batch, int]]] = {
    "qwen2_vl": _patches,
    "qwen2_5_vl": _patches,
    "qwen3_vl": _patches,
    "mistral3": _in_one_piece,
    "idefics3": _seventeen_tiles,
    "smolvlm": _seventeen_tiles,
    "internvl": _five_tiles,
    "llava_next": _tiles_with_rows,
}


_BY_CLASS: dict[str, Callable[[Cell, Any], Batch]] = {
    "ForSequenceClassification": _classified_text,
    "ForImageClassification": _classified_image,
}
