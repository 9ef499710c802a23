"""The batch that a step sees, by task. Sequences are full, and no mask is passed but where the key says of padding."""

from __future__ import annotations

import torch

from launchkit.errors import TraceError
from launchkit.images import DEFAULT_SIZE, ImageSize
from launchkit.program import Point
from launchkit.scenario import TraceKey, Trainer
from launchkit.trace.build import Built
from launchkit.trace.images import image_inputs
from launchkit.trace.sequences import share_of


def make_batch(built: Built, point: Point, key: TraceKey) -> dict[str, torch.Tensor]:
    """Fake input tensors of ``point.micro_batch`` sequences; call it under the fake mode.

    Source of TRL's: trl 1.16 ``DataCollatorForLanguageModeling``.
    """
    if key.images and built.task != "causal-lm":
        raise TraceError(f"{type(built.model).__name__} is trained on {built.task}, without images; drop --images")
    batch = _task_batch(built, point, casts_inputs=key.compute.is_autocast)
    if key.images:
        size = ImageSize.parse(key.image_size) if key.image_size else DEFAULT_SIZE
        batch |= image_inputs(built, num_images=point.micro_batch, token_ids=batch["input_ids"], size=size)
    tokens = batch.get("input_ids")
    if tokens is not None and key.packed:
        batch["position_ids"] = torch.zeros_like(tokens)
        if key.trainer is Trainer.TRL:
            batch["seq_idx"] = torch.zeros_like(tokens, dtype=torch.int32)
    elif tokens is not None and (key.padded or key.trainer is Trainer.TRL):
        batch["attention_mask"] = torch.ones_like(tokens)
    return share_of(batch, key)


def unused(key: TraceKey) -> tuple[str, ...]:
    """What TRL's collator puts beside the tokens and its loss or sdpa do not use. With a mask of ones models build the
    same mask as with none, which they find out from its values."""
    return ("seq_idx",) if key.padded else ("attention_mask", "seq_idx")


def _task_batch(built: Built, point: Point, *, casts_inputs: bool) -> dict[str, torch.Tensor]:
    batch, length = point.micro_batch, point.seq_len
    tokens = lambda: torch.zeros(batch, length, dtype=torch.int64)  # noqa: E731
    match built.task:
        case "causal-lm" | "masked-lm" | "seq2seq-lm":
            return {"input_ids": tokens(), "labels": tokens()}
        case "sequence-classification":
            return {"input_ids": tokens(), "labels": torch.zeros(batch, dtype=torch.int64)}
        case "image-classification":
            size = built.config.image_size
            return {
                "pixel_values": torch.zeros(batch, built.config.num_channels, size, size),
                "labels": torch.zeros(batch, dtype=torch.int64),
            }
        case "speech-seq2seq":
            frames = 2 * built.config.max_source_positions
            features = torch.zeros(batch, built.config.num_mel_bins, frames)
            # A model in 16 bits wants its features so; under autocast its first convolution casts them.
            weights = next(built.model.parameters()).dtype
            return {"input_features": features if casts_inputs else features.to(weights), "labels": tokens()}
    raise TraceError(f"no batch is known for the task {built.task!r}")
