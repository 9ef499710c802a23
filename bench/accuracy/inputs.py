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
        yield make(cell, config)


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
        return _text_about_a_grid(cell, config)
    batch = _text(cell, config)
    image_tokens = cell.config.get("mm_tokens_per_image") or cell.config["image_seq_length"]
    batch["input_ids"][:, :image_tokens] = config.image_token_id
    batch["pixel_values"] = _image(cell, config.vision_config)
    if "gemma" in config.model_type:
        batch["token_type_ids"] = (batch["input_ids"] == config.image_token_id).long()
    return batch


def _text_about_a_grid(cell: Cell, config: Any) -> Batch:
    """As Qwen's processors have it: a row of pixels per patch, and what kind of token each is. The image's are behind
    the one that tells its start."""
    batch, vision = _text(cell, config), config.vision_config
    high, wide = (int(side) // vision.patch_size for side in cell.image_size.split("x"))
    channels = getattr(vision, "in_channels", 3)
    where = slice(1, 1 + high * wide // vision.spatial_merge_size**2)
    batch["input_ids"][:, 0] = config.vision_start_token_id
    batch["input_ids"][:, where] = config.image_token_id
    kinds = torch.zeros_like(batch["input_ids"])
    kinds[:, where] = 1
    pixels = channels * vision.temporal_patch_size * vision.patch_size**2
    return batch | {
        "mm_token_type_ids": kinds,
        "pixel_values": torch.rand(cell.micro_batch * high * wide, pixels),
        "image_grid_thw": torch.tensor([[1, high, wide]] * cell.micro_batch),
    }


_BY_CLASS: dict[str, Callable[[Cell, Any], Batch]] = {
    "ForSequenceClassification": _classified_text,
    "ForImageClassification": _classified_image,
}
