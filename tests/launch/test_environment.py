"""What a run record keeps of the environment."""

from __future__ import annotations

import pytest

from launchkit.launch.environment import recorded_environment


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("NCCL_DEBUG", True),
        ("CUDA_VISIBLE_DEVICES", True),
        ("HF_HOME", True),
        ("OMP_NUM_THREADS", True),
        ("HF_TOKEN", False),
        ("HF_API_KEY", False),
        ("TORCH_SECRET", False),
        ("WANDB_API_KEY", False),
        ("EDITOR", False),
    ],
)
def test_recorded_environment(name: str, kept: bool) -> None:
    assert (name in recorded_environment({}, {name: "value"})) is kept


def test_changes_are_always_recorded_but_no_secret_among_them() -> None:
    assert recorded_environment({"MINE": "1", "MY_PASSWORD": "x"}, {"MINE": "0"}) == {"MINE": "1"}
