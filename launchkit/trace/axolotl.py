"""What Axolotl does to the formats of a model's weights once it is loaded.

Source: axolotl 0.19 ``loaders/model.py`` (``_configure_embedding_dtypes``, ``_convert_embedding_modules_dtype``) and
``loaders/utils.py`` (``get_linear_embedding_layers``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from launchkit.scenario import Widened

_EMBEDDINGS: Mapping[str, tuple[str, ...]] = {
    "gpt_neox": ("embed_in", "embed_out"),
    "falcon": ("word_embeddings", "lm_head"),
    "nemotron_h": ("embeddings", "lm_head"),
}
_USUAL_EMBEDDINGS = ("embed_tokens", "lm_head")


def widen(model: nn.Module, widened: Widened) -> None:
    """Routers to fp32, by their names, and with them norms, embeddings and the head unless they are narrowed again."""
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.to(torch.float32)
    if widened is Widened.EMBEDDINGS:
        convert_embeddings(model, torch.float32)


def convert_embeddings(model: nn.Module, dtype: torch.dtype) -> None:
    """Norms, embeddings and the head, as far as their names say."""
    config: Any = getattr(model, "config", None)
    parts = _EMBEDDINGS.get(getattr(config, "model_type", ""), _USUAL_EMBEDDINGS)
    for name, module in model.named_modules():
        if "norm" in name or (any(part in name for part in parts) and hasattr(module, "weight")):
            module.to(dtype)
