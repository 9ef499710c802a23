"""Every architecture traces, with its parameters counted: a few always, all of them with ``LAUNCHKIT_LONG_TESTS=1``."""

from __future__ import annotations

import os
from typing import Any

import pytest

from bench.accuracy.architectures import ARCHITECTURES, IMAGE_SIZES
from launchkit.errors import TraceError
from launchkit.program import Point
from launchkit.scenario import Attention, Checkpointing, Compute, DeviceKind, TraceKey
from launchkit.trace import profile_model, trace_model
from tests.trace.models import LLAMA, key

pytestmark = pytest.mark.filterwarnings("ignore")

SEEN_IN_TILES: dict[str, Any] = {
    "model_type": "mllama",
    "text_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96,
        "num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 2,
        "attention_heads": 2, "intermediate_layers_indices": [0], "vision_output_dim": 64,
    },
    "architectures": ["MllamaForConditionalGeneration"],
}  # fmt: skip
QUICK = ("smollm3", "bert", "whisper", "lfm2")
LONG = pytest.mark.skipif("LAUNCHKIT_LONG_TESTS" not in os.environ, reason="a minute; set LAUNCHKIT_LONG_TESTS")
SEEING = ("gemma3", "llava", "llama4", "paligemma")
OF_ANY_SIZE = tuple(IMAGE_SIZES)
CASES = [pytest.param(name, marks=() if name in QUICK else LONG) for name in ARCHITECTURES]


def key_of(name: str, **overrides: Any) -> TraceKey:
    """On CUDA, checkpointed where nothing else is asked, with an attention that the architecture has."""
    attentions = profile_model(ARCHITECTURES[name], name=name).attentions
    attention = Attention.SDPA if Attention.SDPA in attentions else Attention.EAGER
    return key(attention=attention, **overrides)


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_traces_with_all_its_parameters(name: str) -> None:
    overrides = {"device": DeviceKind.CUDA, "compute": Compute.BF16_AUTOCAST, "checkpointing": Checkpointing.FULL}
    program = trace_model(ARCHITECTURES[name], key_of(name, **overrides))
    assert program.num_parameters() == profile_model(ARCHITECTURES[name], name=name).num_parameters
    assert any(stage.stack for stage in program.stages)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "llava" else LONG) for name in SEEING])
def test_an_image_goes_through_the_vision_tower(name: str) -> None:
    towers = [
        {stage.stack for stage in trace_model(ARCHITECTURES[name], key_of(name, images=images)).stages if stage.stack}
        for images in (False, True)
    ]
    assert len(towers[1] - towers[0]) == 1 and "vision" in str(towers[1] - towers[0])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "qwen2_5_vl" else LONG) for name in OF_ANY_SIZE]
)
def test_an_image_of_any_size_goes_through_the_vision_tower(name: str) -> None:
    overrides = {"images": True, "image_size": IMAGE_SIZES[name], "at": Point(2, 128, 0)}
    program = trace_model(ARCHITECTURES[name], key_of(name, **overrides))
    assert len({stage.stack for stage in program.stages if stage.stack}) == 2
    assert all(p.has_gradient for group in program.groups.values() for p in group.parameters if p.trainable) or (
        name == "llava_next"  # whose tower's last layer is left out
    )


def test_a_vision_tower_without_images_has_no_gradients() -> None:
    program = trace_model(ARCHITECTURES["llava"], key_of("llava"))
    trained = {
        name: any(p.has_gradient for p in group.parameters) for name, group in program.groups.items() if name != "root"
    }
    assert trained == {"CLIPEncoderLayer": False, "LlamaDecoderLayer": True}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LLAMA, "sees no images; drop --images"),
        (ARCHITECTURES["bert"], "without images; drop --images"),
        (SEEN_IN_TILES, "how the processor of mllama cuts images .* drop --images to plan for its text"),
        (
            ARCHITECTURES["qwen2_vl"],
            "an image of 1024x1024 pixels is 1,369 tokens, which do not fit a sequence of 64; use",
        ),
    ],
    ids=["llama", "bert", "mllama", "qwen2_vl"],
)
def test_a_model_without_images_says_so(config: dict[str, Any], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        trace_model(config, key(images=True))
