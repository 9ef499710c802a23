"""The tables of the lint are those of the installed packages."""

from __future__ import annotations

import dataclasses

import pytest

from launchkit.export import known_keys, layout

KNOWN = ("bloom", "falcon", "gpt2", "gpt_neox", "opt", "phi")
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


def test_the_known_keys_are_trls_own() -> None:
    trl = pytest.importorskip("trl")
    owners = (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, trl.DatasetMixtureConfig)
    names = {field.name for owner in owners for field in dataclasses.fields(owner) if field.init}
    assert names == known_keys.TRL
    launch = pytest.importorskip("accelerate.commands.launch")
    options = {action.dest for action in launch.launch_command_parser()._actions}
    assert known_keys.TRL_LAUNCH - options == {"accelerate_config"}  # TRL's own


@pytest.mark.parametrize("model_type", layout.USUAL_MODELS)
def test_usual_models_have_the_usual_linear_layers(model_type: str) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 64)
    counts = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2)
    config = transformers.AutoConfig.for_model(model_type, **sizes, **counts, pad_token_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linear - {"lm_head"} == set(layout.USUAL_LINEAR_MODULES)


def test_the_default_targets_are_pefts() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    defaults = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = {
        name: list(layout.default_lora_modules(name)) for name in defaults if name in (*KNOWN, *layout.USUAL_MODELS)
    }
    assert ours == {name: defaults[name] for name in ours}
