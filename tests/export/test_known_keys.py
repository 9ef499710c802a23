"""The tables of the lint are those of the installed packages."""

from __future__ import annotations

import pytest

from launchkit.export import known_keys

pytestmark = [pytest.mark.real_loader, pytest.mark.filterwarnings("ignore")]


def test_the_known_keys_are_accelerates_own() -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    options = {action.dest for action in launch.launch_command_parser()._actions}
    old_names = {"fp16", "dynamo_backend"}  # still read, and converted
    assert set(config_args.ClusterConfig.__dataclass_fields__) == known_keys.ACCELERATE - old_names
    fsdp = {name.removeprefix("fsdp_") for name in options if name.startswith("fsdp_")}
    assert fsdp == known_keys.ACCELERATE_FSDP - {"ignored_modules"}  # which only the file has
    assert {name for name in options if name.startswith("parallelism_config_")} == known_keys.ACCELERATE_PARALLELISM
    assert options >= known_keys.ACCELERATE_DEEPSPEED


def test_the_known_keys_are_deepspeeds_own() -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config")
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    names = set(zero.model_fields) | {field.alias for field in zero.model_fields.values() if field.alias}
    assert names == known_keys.DEEPSPEED_ZERO
    assert set(offload.DeepSpeedZeroOffloadOptimizerConfig.model_fields) == known_keys.DEEPSPEED_OFFLOAD_OPTIMIZER
    assert set(offload.DeepSpeedZeroOffloadParamConfig.model_fields) == known_keys.DEEPSPEED_OFFLOAD_PARAM
    assert set(precision.DeepSpeedBF16Config.model_fields) == known_keys.DEEPSPEED_BF16
    assert set(precision.DeepSpeedFP16Config.model_fields) == known_keys.DEEPSPEED_FP16


def test_the_known_optimizers_are_those_of_transformers() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    assert {str(name.value) for name in training_args.OptimizerNames} <= known_keys.AXOLOTL_OPTIMIZERS
