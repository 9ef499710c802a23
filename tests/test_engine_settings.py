"""``--ddp-settings``, ``--fsdp-settings`` and ``--zero-settings``: an engine's keys as text, there and back."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

import launchkit
from launchkit.engine_settings import DDP, FSDP, ZERO, EngineSettings, auto_sizes
from launchkit.errors import IllegalScenarioError, UsageError
from launchkit.request import Request, resolve, scenario_flags
from launchkit.scenario import BackwardPrefetch, CommHook, DdpSettings, FsdpSettings, StrategyKind, ZeroSettings
from tests.builders import cluster, profile


def _read(text: str) -> ZeroSettings:
    return ZeroSettings(**ZERO.read(text, auto=auto_sizes(64)))


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
    assert _read(text) == settings
    assert _read(ZERO.text(settings, kind=StrategyKind.ZERO3)) == settings


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
        _read(text)


@pytest.mark.parametrize(
    ("option", "kind", "text", "changed"),
    [
        (DDP, "ddp", "bucket_cap_mb=50", {"bucket_cap_bytes": 50 * 2**20}),
        (
            DDP,
            "ddp",
            "find_unused_parameters=true,static_graph=true",
            {"find_unused_parameters": True, "static_graph": True},
        ),
        (DDP, "ddp", "gradient_as_bucket_view=TRUE", {"gradient_as_bucket_view": True}),
        (
            DDP,
            "ddp",
            "comm_hook=FP16, broadcast_buffers=false",
            {"comm_hook": CommHook.FP16, "broadcast_buffers": False},
        ),
        (DDP, "ddp", "comm_hook=no", {}),
        (FSDP, "fsdp", "fsdp_backward_prefetch=NO_PREFETCH", {"backward_prefetch": BackwardPrefetch.NONE}),
        (FSDP, "fsdp", "backward_prefetch=backward_post", {"backward_prefetch": BackwardPrefetch.POST}),
        (
            FSDP,
            "fsdp",
            "forward_prefetch=true,use_orig_params=false",
            {"forward_prefetch": True, "use_orig_params": False},
        ),
        (FSDP, "fsdp", "limit_all_gathers=false", {"limit_all_gathers": False}),
        (FSDP, "fsdp2", "fsdp_state_dict_type=SHARDED_STATE_DICT", {"full_state_dict": False}),
        (FSDP, "hsdp", "cpu_ram_efficient_loading=false", {"cpu_ram_efficient_loading": False}),
    ],
)
def test_other_engines_are_read_and_written(
    option: EngineSettings, kind: str, text: str, changed: dict[str, object]
) -> None:
    settings = replace(option.default, **changed)
    strategy = StrategyKind(kind)
    assert replace(option.default, **option.read(text, kind=strategy)) == settings
    assert replace(option.default, **option.read(option.text(settings, kind=strategy), kind=strategy)) == settings


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        (DdpSettings, {key.field for key in DDP.keys.values()} | {"first_bucket_bytes"}),  # torch has it as a constant
        (
            FsdpSettings,  # what is left has a flag of its own, or follows from the parallelism that was asked for
            {key.field for key in FSDP.keys.values()}
            | {"sharding", "offload_params", "shard_group_size", "float8_all_gather"},
        ),
        (ZeroSettings, {key.field for key in ZERO.keys.values()}),
    ],
)
def test_every_setting_can_be_typed(settings: type, known: set[str]) -> None:
    assert {field.name for field in fields(settings)} == known


@pytest.mark.parametrize(
    ("option", "kind", "text", "message"),
    [
        (DDP, "fsdp2", "bucket_cap_mb=50", "--ddp-settings says nothing under --strategy fsdp2; add --strategy ddp"),
        (DDP, "ddp", "bucket_cap=50", "did you mean bucket_cap_mb"),
        (DDP, "ddp", "bucket_cap_mb=0", "is not a whole number of MiB"),
        (DDP, "ddp", "bucket_cap_mb=inf", "is not a whole number of MiB"),
        (FSDP, "fsdp", "auto_wrap_policy=SIZE_BASED_WRAP", "one of transformer_based_wrap, no_wrap"),
        (DDP, "ddp", "comm_hook=power_sgd", "write comm_hook= and one of no, none, fp16, bf16"),
        (FSDP, "zero3", "use_orig_params=true", "--fsdp-settings says nothing under --strategy zero3"),
        (FSDP, "fsdp2", "use_orig_params=true", "leave it out, or add --strategy fsdp"),
        (FSDP, "fsdp", "backward_prefetch=later", "one of backward_pre, backward_post, no_prefetch"),
        (FSDP, "fsdp", "fsdp_sharding_strategy=FULL_SHARD", "type --fsdp-sharding"),
        (FSDP, "fsdp2", "reshard_after_forward=2", "type --fsdp-sharding"),
        (FSDP, "fsdp", "offload_params=true", "type --offload params"),
    ],
)
def test_nonsense_of_other_engines_is_refused(option: EngineSettings, kind: str, text: str, message: str) -> None:
    with pytest.raises((UsageError, IllegalScenarioError)) as raised:
        option.read(text, kind=StrategyKind(kind))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("strategy", "name", "text"),
    [
        ("ddp", "ddp_settings", "bucket_cap_mb=50,gradient_as_bucket_view=true,comm_hook=bf16"),
        ("fsdp", "fsdp_settings", "backward_prefetch=no_prefetch,use_orig_params=false"),
        ("fsdp2", "fsdp_settings", "state_dict_type=sharded_state_dict"),
    ],
)
def test_a_scenario_says_what_to_type_again(strategy: str, name: str, text: str) -> None:
    gpus, model = cluster(num_gpus=2), profile()
    request = Request.from_flags({"strategy": strategy, name: text})
    found = resolve(request, model=model, cluster=gpus).scenario
    assert scenario_flags(found, cluster=gpus)[name] == text


def test_a_setting_changes_the_estimate() -> None:
    arguments = {"gpus": "2x4090", "strategy": "ddp", "seq_len": 64}
    plain = launchkit.estimate("Qwen/Qwen3-0.6B", **arguments)
    views = launchkit.estimate("Qwen/Qwen3-0.6B", **arguments, ddp_settings="gradient_as_bucket_view=true")
    assert views.estimate.allocated_peak_bytes < plain.estimate.allocated_peak_bytes
