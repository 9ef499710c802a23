"""What a run record keeps of the environment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchkit.launch.environment import device_environment, recorded_environment
from tests.builders import candidate, cluster


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


def test_the_allocator_is_told_by_both_names() -> None:
    """torch before 2.9 knows only the older one."""
    chosen, gpus = candidate(strategy="ddp"), cluster()
    told = device_environment(chosen, gpus)
    scenario = replace(chosen.scenario, alloc_conf="expandable_segments:True")
    changed = device_environment(replace(chosen, scenario=scenario), gpus)
    assert changed.items() - told.items() == {
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
    }
