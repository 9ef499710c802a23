"""The presets that ship: sourced, free of double names, and nothing that would be refused."""

from __future__ import annotations

from collections import Counter

import pytest

from launchkit import strategies
from launchkit.catalog.hardware import hardware_table
from launchkit.catalog.presets import find_preset, load_presets
from launchkit.errors import UsageError
from launchkit.hardware import Cluster, parse_gpus
from launchkit.request import Preset, Request, resolve
from launchkit.scenario import Checkpointing, Method, Precision, StrategyKind
from tests.builders import profile

PRESETS = load_presets()
EIGHT, ONE = (parse_gpus(spec, hardware_table()) for spec in ("8xH100", "1xH100"))
each_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)


def test_there_are_presets_of_every_method() -> None:
    methods = Counter(preset.flags["method"] for preset in PRESETS)
    assert len(PRESETS) >= 20
    assert set(methods) == set(Method)


def test_no_two_presets_share_a_name_or_all_their_flags() -> None:
    assert len({preset.name for preset in PRESETS}) == len(PRESETS)
    assert len({tuple(sorted(preset.flags.items())) for preset in PRESETS}) == len(PRESETS)


@each_preset
def test_a_preset_is_found_by_its_name_and_says_what_it_is_from(preset: Preset) -> None:
    assert find_preset(preset.name) is preset
    assert find_preset(preset.name.upper().replace("-", "_")) is preset
    assert len(preset.description) > 20
    repository, _, paths = preset.source.partition(" ")
    assert "/" in repository and "@" in repository and "." in paths


@each_preset
def test_a_preset_fixes_the_step_and_leaves_machine_and_kernels_open(preset: Preset) -> None:
    always = {"method", "precision", "micro_batch", "seq_len", "checkpointing"}
    adapters = {"lora_rank", "lora_targets"} if preset.flags["method"] != "full" else set()
    optional = {"optimizer", "global_batch", "packing", "strategy", "offload"}
    assert always | adapters <= set(preset.flags) <= always | adapters | optional


@each_preset
def test_no_preset_is_refused(preset: Preset) -> None:
    request = Request.from_flags(preset.flags)
    cluster = _cluster(request)
    scenario = resolve(request, model=profile(), cluster=cluster).scenario
    assert strategies.refusal(scenario, profile(), cluster) is None


def _cluster(request: Request) -> Cluster:
    """One GPU where the recipe spreads nothing, else as many of eight as its batch has room for."""
    if request.strategy is None:
        return ONE
    assert request.micro_batch is not None
    room = (request.global_batch or EIGHT.num_gpus * request.micro_batch) // request.micro_batch
    return parse_gpus(f"{min(room, EIGHT.num_gpus)}xH100", hardware_table())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "zephyr-7b-sft",
            {
                "method": Method.FULL,
                "strategy": StrategyKind.ZERO3,
                "micro_batch": 16,
                "global_batch": 128,
                "seq_len": 2048,
                "checkpointing": Checkpointing.FULL,
            },
        ),
        (
            "guanaco-qlora",
            {
                "method": Method.QLORA,
                "lora_rank": 64,
                "optimizer": "paged_adamw_32bit",
                "seq_len": 528,
                "packing": False,
            },
        ),
        ("axolotl-8b-full", {"precision": Precision.BF16_PARAMS, "optimizer": "paged_adamw_8bit", "seq_len": 8192}),
    ],
)
def test_well_known_recipes(name: str, expected: dict[str, object]) -> None:
    request = Request.from_flags(find_preset(name).flags)
    assert {flag: getattr(request, flag) for flag in expected} == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zephyr-7b-stf", r"--preset zephyr-7b-stf is unknown; did you mean zephyr-7b-sft\?"),
        ("qqqq", "--preset qqqq is unknown; launchkit explain presets lists them all"),
        ("", "--preset  is unknown; launchkit explain presets lists them all"),
    ],
)
def test_an_unknown_preset_is_one_line(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_preset(name)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"method": "lora", "seq_len": 64}),
        ({"seq-len": 128, "method": None}, {"method": "lora", "seq_len": 128}),
        ({"gpus": "cpu"}, {"method": "lora", "seq_len": 64, "gpus": "cpu"}),
    ],
)
def test_what_was_given_stands_above_a_preset(given: dict[str, object], expected: dict[str, object]) -> None:
    preset = Preset(name="x", description="", flags={"method": "lora", "seq_len": 64}, source="")
    assert preset.below(given) == expected
