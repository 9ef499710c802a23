"""The size of an image, as it is typed and as it is decided."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchkit.errors import UsageError
from launchkit.images import ImageSize
from launchkit.request import Request, decisions, resolve
from tests.report.plans import CLUSTER, MODEL

SEEING = replace(MODEL, model_type="qwen2_5_vl")


@pytest.mark.parametrize(("text", "size"), [("1024x768", (1024, 768)), (" 28X28 ", (28, 28)), ("640×480", (640, 480))])
def test_a_size_is_height_and_width(text: str, size: tuple[int, int]) -> None:
    assert ImageSize.parse(text) == size
    assert ImageSize.parse(str(ImageSize(*size))) == size


@pytest.mark.parametrize("text", ["1024", "0x28", "28x0", "28x", "axb", "28x28x3", "-1x28", "100000x28"])
def test_what_is_no_size_says_what_to_type(text: str) -> None:
    with pytest.raises(UsageError, match="is no height x width in pixels; write --image-size 1024x1024"):
        ImageSize.parse(text)


@pytest.mark.parametrize(
    ("request_", "has_images", "size", "is_noted"),
    [
        (Request(), False, "", False),
        (Request(images=True), True, "1024x1024", True),
        (Request(images=True, image_size="448x448"), True, "448x448", False),
        (Request(image_size="448x448"), True, "448x448", False),
    ],
)
def test_a_size_that_is_not_said_is_noted(request_: Request, has_images: bool, size: str, is_noted: bool) -> None:
    resolution = resolve(request_, model=SEEING, cluster=CLUSTER)
    training = resolution.scenario.training
    assert (training.images, training.image_size) == (has_images, size)
    assert any("--image-size" in note for note in resolution.notes) is is_noted
    assert any("--image-size" in note for note in decisions(request_, model=SEEING)) is is_noted


def test_a_model_whose_images_have_one_size_takes_no_other() -> None:
    gemma = replace(MODEL, model_type="gemma3")
    assert resolve(Request(images=True), model=gemma, cluster=CLUSTER).scenario.training.image_size == ""
    with pytest.raises(UsageError, match=r"--image-size 448x448 changes nothing .* gemma3 .*; write --images alone"):
        resolve(Request(image_size="448x448"), model=gemma, cluster=CLUSTER)
