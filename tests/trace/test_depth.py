"""A program traced with a few layers is, request for request, that of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from bench.accuracy.architectures import ARCHITECTURES, IMAGE_SIZES
from launchkit.program import Point
from launchkit.scenario import Attention, Compute
from launchkit.trace import trace_model
from tests.trace.models import CUDA_CHECKPOINTED, GPT2, LLAMA, LORA, MIXTRAL, T5, gemma3, key, requests, whole_stacks

pytestmark = pytest.mark.filterwarnings("ignore")

LORA_BF16 = LORA | {"compute": Compute.BF16}
WINDOWED = {"beyond_window": True}
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "architectures": ["Gemma4ForCausalLM"],
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 32,
    "num_kv_shared_layers": 12,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 6,
}
CASES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "llama": (LLAMA, {}),
    "llama, checkpointed on CUDA": (LLAMA, CUDA_CHECKPOINTED),
    "llama, LoRA": (LLAMA, LORA_BF16),
    "llama, one sequence": (LLAMA, {"single_sequence": True}),
    "gpt2": (GPT2, {}),
    "mixtral": (MIXTRAL, {}),
    "t5": (T5, {}),
    "gemma3, two periods": (gemma3(*"ssfssfs"), WINDOWED),
}
MIXED: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "gemma3, every other": (gemma3(*"sfsfsfsf"), WINDOWED),
    "gemma3, every sixth": (gemma3(*"sssssfsssssfss"), WINDOWED),
    "gemma3, eager and checkpointed": (
        gemma3(*"sfsfsfsf"),
        WINDOWED | CUDA_CHECKPOINTED | {"attention": Attention.EAGER},
    ),
    "gemma4, keys and values shared": (GEMMA4, {"single_sequence": True}),
}
SEEING: Mapping[str, Mapping[str, Any]] = {
    "qwen2_5_vl": {"fullatt_block_indexes": [3, 7, 11]},
    "qwen3_vl": {"deepstack_visual_indexes": [3, 6, 9]},
}
POINTS = (Point(2, 96, 8), Point(5, 256, 4))


@pytest.mark.parametrize("name", [*CASES, *MIXED])
def test_depth_can_be_left_out(name: str) -> None:
    config, overrides = (CASES | MIXED)[name]
    wanted = key(**overrides)
    cut = trace_model(config, wanted)
    with whole_stacks():
        whole = trace_model(config, wanted)
    assert len(cut.sections) <= len(whole.sections)
    assert cut.group_counts == whole.group_counts
    assert cut.persistent == whole.persistent
    for point in POINTS:
        if wanted.single_sequence:
            point = point._replace(micro_batch=1)
        assert requests(cut, point) == requests(whole, point)


@pytest.mark.parametrize("name", SEEING)
def test_depth_can_be_left_out_of_a_vision_tower_that_names_layers(name: str) -> None:
    """Full attention among windows; layers whose output the first layers of the text model get."""
    config = copy.deepcopy(ARCHITECTURES[name])
    config["vision_config"] |= {"depth": 12} | SEEING[name]
    config["text_config"]["num_hidden_layers"] = 9
    point = Point(2, 96, 0)
    wanted = key(images=True, image_size=IMAGE_SIZES[name], at=point)
    cut = trace_model(config, wanted)
    with whole_stacks():
        whole = trace_model(config, wanted)
    assert len(cut.sections) <= len(whole.sections)
    assert cut.group_counts == whole.group_counts
    assert requests(cut, point) == requests(whole, point)


def test_a_deeper_model_is_the_same_sections_more_often() -> None:
    shallow, deep = (trace_model({**LLAMA, "num_hidden_layers": depth}, key()) for depth in (7, 30))
    assert deep.sections == shallow.sections
    assert len(deep.stage("forward.model.layers").layers) == 30
