"""One image for each sequence of a batch, as the processor of a model of images and text would give it.

What a processor makes of an image is in no ``config.json``. Assumed is one square image of the size that the vision
tower was made for, in one piece. The image's tokens are part of the sequence.
"""

from __future__ import annotations

import inspect

import torch

from launchkit.errors import TraceError
from launchkit.trace.build import Built


def image_inputs(built: Built, *, num_images: int, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What goes into a step beside the tokens ``token_ids``.

    Raises ``TraceError`` for a model that sees no images, or that reads from tensors how many patches there are.
    """
    model_type, vision = built.config.model_type, getattr(built.config, "vision_config", None)
    if vision is None:
        raise TraceError(f"a model of type {model_type} sees no images; drop --images")
    size = getattr(vision, "image_size", None)
    if not isinstance(size, int) or hasattr(vision, "max_num_tiles"):
        raise TraceError(
            f"{model_type} cuts images into patches or tiles whose number only the image tells, which is not traced; "
            "drop --images to plan for its text"
        )
    model = built.model.get_submodule(built.prefix[:-1]) if built.prefix else built.model
    inputs = {"pixel_values": torch.zeros(num_images, vision.num_channels, size, size)}
    if "token_type_ids" in inspect.signature(model.forward).parameters:  # tells image tokens from text (Gemma 3)
        inputs["token_type_ids"] = torch.zeros_like(token_ids)
    return inputs
