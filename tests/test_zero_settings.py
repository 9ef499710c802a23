"""``--zero-settings``: DeepSpeed's keys as text, there and back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchkit.errors import UsageError
from launchkit.scenario import ZeroSettings
from launchkit.zero_settings import read_zero_settings, zero_settings_text


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("", {}),
        ("reduce_bucket_size=5e7", {"reduce_bucket_size": 50_000_000}),
        ("overlap_comm=false, round_robin_gradients=TRUE", {"overlap_comm": False, "round_robin_gradients": True}),
        ("nvme_path=/local/nvme", {"nvme_path": "/local/nvme"}),
        ("reduce_bucket_size=auto", {"reduce_bucket_size": 64 * 64}),
        ("stage3_prefetch_bucket_size=auto", {"stage3_prefetch_bucket_size": 3686}),
        ("stage3_param_persistence_threshold=auto", {"stage3_param_persistence_threshold": 640}),
        ("zero_quantized_weights=true,mics_shard_size=4", {"zero_quantized_weights": True, "mics_shard_size": 4}),
    ],
)
def test_settings_are_read_and_written(text: str, changed: dict[str, object]) -> None:
    settings = replace(ZeroSettings(), **changed)  # type: ignore[arg-type]
    assert read_zero_settings(text, hidden_size=64) == settings
    assert read_zero_settings(zero_settings_text(settings), hidden_size=64) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reduce_bucket=1", "did you mean reduce_bucket_size?"),
        ("stage3_gather_everything=1", "is unknown"),
        ("overlap_comm=maybe", "write overlap_comm=true or overlap_comm=false"),
        ("reduce_bucket_size=many", "is not a whole number of elements"),
        ("reduce_bucket_size=-1", "is not a whole number of elements"),
        ("sub_group_size=auto", "is not a whole number of elements"),
        ("reduce_bucket_size=0.5", "is not a whole number of elements"),
    ],
)
def test_nonsense_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        read_zero_settings(text, hidden_size=64)
