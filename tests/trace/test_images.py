"""What processors make of an image. The sizes are those that transformers 5.24's own processors returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from launchkit.images import OF_ANY_SIZE, ImageSize
from launchkit.trace.images import _CUTTERS

pytestmark = pytest.mark.filterwarnings("ignore")

SMOLVLM = {"vision_config": {"model_type": "smolvlm_vision", "image_size": 512, "patch_size": 16}, "scale_factor": 4}
IDEFICS3 = {"vision_config": {"model_type": "idefics3_vision", "image_size": 364, "patch_size": 14}}


@pytest.mark.parametrize(
    ("model_type", "fields", "size", "shape", "num_tokens"),
    [
        ("qwen2_5_vl", {}, "1024x1024", (5476, 1176), 1369),
        ("qwen2_5_vl", {}, "480x640", (1564, 1176), 391),
        ("qwen2_5_vl", {}, "50x50", (16, 1176), 4),
        ("qwen3_vl", {}, "1024x1024", (4096, 1536), 1024),
        ("qwen3_vl", {}, "50x50", (256, 1536), 64),
        ("mistral3", {}, "480x640", (1, 3, 504, 644), 414),
        ("mistral3", {}, "3000x2000", (1, 3, 1540, 1036), 2035),
        ("idefics3", IDEFICS3, "1024x1024", (1, 17, 3, 364, 364), 2873),
        ("smolvlm", SMOLVLM, "480x640", (1, 13, 3, 512, 512), 832),
        ("smolvlm", SMOLVLM, "200x1500", (1, 5, 3, 512, 512), 320),
        ("internvl", {}, "1024x1024", (10, 3, 448, 448), 2560),
        ("internvl", {}, "3000x2000", (7, 3, 448, 448), 1792),
        ("internvl", {}, "50x50", (1, 3, 448, 448), 256),
        ("llava_next", {}, "480x640", (1, 5, 3, 336, 336), 2340),
        ("llava_next", {}, "200x1500", (1, 4, 3, 336, 336), 1306),
    ],
)
def test_an_image_is_cut_as_its_processor_does(
    model_type: str, fields: dict[str, Any], size: str, shape: tuple[int, ...], num_tokens: int
) -> None:
    cut = _CUTTERS[model_type](AutoConfig.for_model(model_type, **fields), ImageSize.parse(size), 1)
    assert tuple(cut.tensors["pixel_values"].shape) == shape
    assert cut.num_tokens == num_tokens


def test_the_largest_image_is_scaled_down() -> None:
    cut = _CUTTERS["qwen2_vl"](AutoConfig.for_model("qwen2_vl"), ImageSize(9000, 9000), 1)
    (grid,) = cut.tensors["image_grid_thw"]
    assert torch.equal(grid, torch.tensor([1, 256, 256]))


def test_every_model_that_takes_any_size_has_its_cut() -> None:
    assert set(_CUTTERS) == OF_ANY_SIZE
