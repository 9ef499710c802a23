"""What names of frozen parts mean."""

from __future__ import annotations

import pytest

from launchkit.errors import TraceError
from launchkit.frozen import check_whole_stacks, frozen_names

LAYERS = [f"model.layers.{layer}.{part}.weight" for layer in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")]
PARAMETERS = ["model.embed_tokens.weight", *LAYERS, "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("freeze", "number"),
    [
        ("embed_tokens", 1),
        ("embed_tokens, lm_head", 2),
        ("model", 26),
        ("self_attn.q_proj", 12),
        ("layers.1", 2),  # not those of 10 and 11
        ("*_proj", 24),
        ("model.norm.weight", 1),
    ],
)
def test_names(freeze: str, number: int) -> None:
    assert len(frozen_names(PARAMETERS, freeze)) == number


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("embed_token", "--freeze embed_token names no part of the model; it has embed_tokens"),
        ("vision_tower", "it has model, embed_tokens, layers, self_attn"),
        ("model,lm_head", "--freeze model,lm_head leaves nothing to train; freeze less"),
        ("q_proj.self_attn", "names no part"),
    ],
)
def test_what_names_nothing(freeze: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        frozen_names(PARAMETERS, freeze)


def test_layers_are_frozen_all_or_none() -> None:
    check_whole_stacks(PARAMETERS, frozen_names(PARAMETERS, "mlp"))
    with pytest.raises(TraceError, match=r"takes some layers of model.layers and not others.*or layers as a whole"):
        check_whole_stacks(PARAMETERS, frozen_names(PARAMETERS, "layers.3"))
