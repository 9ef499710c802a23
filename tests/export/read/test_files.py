"""Files as people write them, in the style of each project's own examples, and what is understood of them."""

from __future__ import annotations

from typing import Any

import pytest

from launchkit.errors import ConfigFileError, LaunchkitError
from launchkit.export import known_keys
from launchkit.export.lint import Tool, lint, tool_of
from launchkit.export.read import Place, Reading, parse_config, read_config
from launchkit.export.read.shipped import AXOLOTL_DEEPSPEED, TRL_ACCELERATE
from launchkit.hardware import Cluster
from launchkit.request import Request
from launchkit.scenario import Scenario
from tests.builders import cluster, profile

AXOLOTL_LORA = """
base_model: meta-llama/Llama-3.1-8B
load_in_8bit: false
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
val_set_size: 0.05
output_dir: ./outputs/lora
adapter: lora
lora_model_dir:
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
weight_decay: 0.0
"""
AXOLOTL_FSDP2 = """
base_model: Qwen/Qwen3-8B
datasets: [{path: tatsu-lab/alpaca, type: alpaca}]
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
sequence_len: 2048
micro_batch_size: 1
gradient_accumulation_steps: 8
optimizer: adamw_torch_8bit
learning_rate: 2e-5
bf16: true
attn_implementation: flash_attention_2
fsdp_version: 2
fsdp_config:
  offload_params: true
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: Qwen3DecoderLayer
  state_dict_type: SHARDED_STATE_DICT
  reshard_after_forward: true
  activation_checkpointing: true
"""
AXOLOTL_ZERO = """
base_model: mistralai/Mistral-7B-v0.1
datasets: [{path: a.jsonl, type: completion}]
learning_rate: 0.00001
micro_batch_size: 2
batch_size: 8
bf16: auto
deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
"""
ACCELERATE_FSDP1 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
downcast_bf16: 'no'
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: NO_PREFETCH
  fsdp_forward_prefetch: true
  fsdp_offload_params: false
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_use_orig_params: false
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 4
"""
ACCELERATE_TE = """
distributed_type: MULTI_GPU
fp8_config:
  amax_history_len: 16
  backend: TE
  fp8_format: HYBRID
mixed_precision: fp8
num_processes: 4
"""
ACCELERATE_ZERO = """
compute_environment: LOCAL_MACHINE
deepspeed_config:
  deepspeed_multinode_launcher: standard
  gradient_accumulation_steps: 4
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
mixed_precision: bf16
num_machines: 1
num_processes: 4
"""
DEEPSPEED_ZERO3 = """
{
  "bf16": {"enabled": true},
  "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
  "zero_optimization": {
    "stage": 3,
    "offload_optimizer": {"device": "nvme", "nvme_path": "/local, nvme", "pin_memory": true},
    "offload_param": {"device": "nvme", "nvme_path": "/local, nvme", "pin_memory": true},
    "overlap_comm": true,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": 1e4,
    "stage3_max_live_parameters": 1e9,
    "stage3_gather_16bit_weights_on_model_save": true
  },
  "gradient_accumulation_steps": "auto",
  "gradient_clipping": "auto",
  "steps_per_print": 2000,
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": "auto",
  "wall_clock_breakdown": false
}
"""
DEEPSPEED_NUMBERS = """
{"train_batch_size": 64, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5,
 "fp16": {"enabled": true, "loss_scale": 0}, "zero_optimization": {"stage": 1}}
"""
TRL_QLORA = """
model_name_or_path: Qwen/Qwen3-8B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
dtype: bfloat16
load_in_4bit: true
use_peft: true
lora_r: 8
max_length: 2048
packing: true
attn_implementation: flash_attention_2
per_device_train_batch_size: 4
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: true}
"""
TRL_DEFAULTS = """
model_name_or_path: meta-llama/Llama-3.1-8B
dataset_name: trl-lib/Capybara
accelerate_config: zero3
"""
FILES: list[tuple[str, dict[str, Any]]] = [
    (
        AXOLOTL_LORA,
        {
            "training.method": "lora",
            "training.lora_rank": 32,
            "training.lora_dropout": 0.05,
            "training.lora_targets": "all-linear",
            "training.optimizer": "adamw_bnb_8bit",
            "training.attention": "flash_attention_2",
            "training.packing": True,
            "training.precision": "bf16-params",
            "training.checkpointing": "reentrant",
            "training.trainer": "axolotl",
            "strategy.kind": "ddp",
            "batch.micro_batch": 2,
            "batch.gradient_accumulation_steps": 4,
            "batch.seq_len": 4096,
        },
    ),
    (
        AXOLOTL_FSDP2,
        {
            "training.method": "full",
            "training.optimizer": "adamw_torch_8bit",
            "training.loss": "cce",
            "training.precision": "bf16",
            "training.checkpointing": "full",
            "strategy.kind": "fsdp2",
            "strategy.offload": "params",
            "strategy.fsdp.full_state_dict": False,
        },
    ),
    (
        AXOLOTL_ZERO,
        {
            "strategy.kind": "zero3",
            "strategy.offload": "all",
            "strategy.zero.sub_group_size": 0,
            "strategy.zero.stage3_max_live_parameters": 0,
            "strategy.zero.reduce_bucket_size": 4096 * 4096,
            "training.checkpointing": "full",
            "training.precision": "bf16",
            "batch.seq_len": 512,
            "batch.gradient_accumulation_steps": 4,
        },
    ),
    (
        ACCELERATE_FSDP1,
        {
            "strategy.kind": "fsdp",
            "strategy.fsdp.sharding": "shard_grad_op",
            "strategy.fsdp.backward_prefetch": "none",
            "strategy.fsdp.forward_prefetch": True,
            "strategy.fsdp.use_orig_params": False,
            "strategy.fsdp.full_state_dict": False,
            "training.precision": "bf16",
        },
    ),
    (
        ACCELERATE_TE,
        {"strategy.kind": "ddp", "training.precision": "fp8", "training.fp8_backend": "te"},
    ),
    (
        ACCELERATE_TE,
        {"strategy.kind": "ddp", "training.precision": "fp8", "training.fp8_backend": "te"},
    ),
    (
        ACCELERATE_ZERO,
        {
            "strategy.kind": "zero3",
            "strategy.offload": "optimizer",
            "strategy.zero.offload_pin_memory": False,
            "strategy.zero.reduce_bucket_size": 500_000_000,
            "training.precision": "bf16",
            "batch.gradient_accumulation_steps": 4,
        },
    ),
    (
        DEEPSPEED_ZERO3,
        {
            "strategy.kind": "zero3",
            "strategy.offload": "nvme",
            "strategy.zero.nvme_path": "/local, nvme",
            "strategy.zero.stage3_param_persistence_threshold": 10_000,
            "strategy.zero.stage3_prefetch_bucket_size": int(0.9 * 4096 * 4096),
            "strategy.zero.gather_16bit_weights_on_model_save": True,
            "training.trainer": "hf",
            "training.optimizer": "adamw_torch_fused",
        },
    ),
    (
        DEEPSPEED_NUMBERS,
        {
            "strategy.kind": "zero1",
            "training.precision": "fp16",
            "training.trainer": "loop",
            "training.max_grad_norm": 0.5,
            "batch.micro_batch": 4,
            "batch.gradient_accumulation_steps": 4,
        },
    ),
    (
        TRL_QLORA,
        {
            "training.method": "qlora",
            "training.lora_rank": 8,
            "training.lora_targets": "q_proj,v_proj",
            "training.lora_dropout": 0.05,
            "training.precision": "bf16-params",
            "training.checkpointing": "reentrant",
            "training.loss": "chunked",
            "training.trainer": "trl",
            "training.packing": True,
            "strategy.kind": "ddp",
            "batch.micro_batch": 4,
        },
    ),
    (
        TRL_DEFAULTS,
        {
            "strategy.kind": "zero3",
            "training.method": "full",
            "training.precision": "bf16",
            "training.checkpointing": "full",
            "batch.micro_batch": 8,
            "batch.seq_len": 1024,
        },
    ),
]


def read(text: str, *, gpus: Cluster | None = None, files: dict[str, str] | None = None, **given: Any) -> Reading:
    config = parse_config(text, name="my.yml")
    tool = tool_of(config)
    assert tool is not None
    place = Place(
        file="my.yml",
        cluster=gpus or cluster(),
        given=Request.from_flags(given),
        open_file=(files or {}).get,
    )
    return read_config(config, tool=tool, place=place)


def scenario(text: str, *, gpus: Cluster | None = None, **given: Any) -> Scenario:
    reading = read(text, gpus=gpus, **given)
    request = Request.from_flags(given)
    return reading.scenario(request, model=profile(), cluster=gpus or cluster()).scenario


def at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(("text", "expected"), FILES, ids=lambda value: str(value).split()[0][:30])
def test_a_file_says_what_its_tool_would_do(text: str, expected: dict[str, Any]) -> None:
    found = scenario(text)
    assert {path: at(found, path) for path in expected} == expected


@pytest.mark.parametrize("text", [text for text, _ in FILES])
def test_nothing_of_a_usual_file_is_left_out(text: str) -> None:
    assert read(text).ignored == ()


# What one line more in Axolotl's file makes of the scenario, or what is said of it.
LINES: list[tuple[str, dict[str, Any], str]] = [
    ("adapter: qlora\nload_in_4bit: true\nlora_target_modules: [q_proj, v_proj]", {"training.method": "qlora"}, ""),
    ("adapter: lora\nload_in_4bit: true", {"training.method": "qlora"}, "counted as qlora"),
    ("adapter: lora\nload_in_8bit: true", {"training.method": "lora"}, "load_in_8bit is not modelled"),
    ("adapter: lora\nlora_target_modules: '.*q_proj$'", {"training.lora_targets": "all-linear"}, "is a pattern"),
    (
        "adapter: lora\nlora_target_modules: [k_proj, o_proj, q_proj, v_proj]",
        {"training.lora_targets": "attention"},
        "",
    ),
    (
        "adapter: lora\nlora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]",
        {"training.lora_targets": "all-linear"},
        "",
    ),
    ("adapter: lora\nlora_modules_to_save: [lm_head, embed_tokens]", {}, ""),
    ("lora_r: 16", {"training.method": "full"}, "without adapter nothing comes of lora_r"),
    ("fp16: true", {"training.precision": "fp16"}, ""),
    ("bf16: false", {"training.precision": "fp32"}, ""),
    ("bf16: true\nfp16: true", {"training.precision": "bf16-params"}, ""),
    ("bf16: true\nfp8: true", {"training.precision": "fp8"}, ""),
    ("sdp_attention: true", {"training.attention": "sdpa"}, ""),
    ("attn_implementation: flash_attention_3", {"training.attention": "flash_attention_3"}, ""),
    ("attn_implementation: flash_attention_4", {"training.attention": "flash_attention_2"}, "flash_attention_4"),
    ("plugins: [axolotl.integrations.liger.LigerPlugin]\nliger_rms_norm: true", {"training.loss": "plain"}, ""),
    ("liger_fused_linear_cross_entropy: true", {"training.loss": "plain"}, ""),
    ("chunked_cross_entropy: true", {"training.loss": "plain"}, "chunked_cross_entropy is not modelled"),
    ("gradient_checkpointing: true\nselective_checkpointing: true", {"training.checkpointing": "selective"}, ""),
    ("gradient_checkpointing: true\nactivation_offloading: true", {"training.checkpointing": "offload"}, ""),
    ("gradient_checkpointing: offload", {"training.checkpointing": "offload"}, ""),
    ("optimizer: adamw_8bit", {"training.optimizer": "adamw_bnb_8bit"}, ""),
    ("optimizer: sgd\noptim_args: momentum=0.9", {"training.optimizer": "sgd_momentum"}, ""),
    ("optimizer: came_pytorch", {"training.optimizer": "adamw_torch_fused"}, "came_pytorch is not in"),
    ("torch_compile: auto", {"training.compile": True}, ""),
    ("rl: dpo", {}, "rl dpo is not modelled"),
    ("max_grad_norm: 0.3", {"training.max_grad_norm": 0.3}, ""),
    ("tensor_parallel_size: 4", {"strategy.kind": "single", "strategy.split.tp": 4}, ""),
    ("dp_replicate_size: 2\nfsdp_version: 2\nfsdp_config: {offload_params: false}", {"strategy.kind": "hsdp"}, ""),
    ("fsdp: [full_shard, auto_wrap]", {"strategy.kind": "fsdp"}, ""),
    ("fsdp_config: {fsdp_version: 2, reshard_after_forward: false}", {"strategy.fsdp.sharding": "shard_grad_op"}, ""),
    ("ddp_find_unused_parameters: true", {"strategy.ddp.find_unused_parameters": True}, ""),
    ("deepspeed: {zero_optimization: {stage: 2}, bf16: {enabled: auto}}", {"strategy.kind": "zero2"}, ""),
]


@pytest.mark.parametrize(("lines", "expected", "assumed"), LINES, ids=lambda value: str(value)[:40])
def test_a_line_of_axolotls_counts(lines: str, expected: dict[str, Any], assumed: str) -> None:
    text = f"base_model: a/b\n{lines}\n"
    found = scenario(text, gpus=cluster(num_gpus=4))
    assert {path: at(found, path) for path in expected} == expected
    assert assumed in " ".join(read(text).assumed)


def test_what_bears_on_memory_and_is_not_counted_is_said() -> None:
    text = "base_model: a/b\nneftune_noise_alpha: 5\nwandb_project: x\ntiled_mlp: true\nunheard_of: 1\nlisa_n_layers: 2"
    reading = read(text)
    assert [line.split()[0] for line in reading.ignored] == ["neftune_noise_alpha", "tiled_mlp", "lisa_n_layers"]
    assert reading.unrelated == ("wandb_project",)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"seq_len": 128}, {"batch.seq_len": 128, "batch.gradient_accumulation_steps": 4}),
        ({"micro_batch": 8}, {"batch.micro_batch": 8, "batch.gradient_accumulation_steps": 4}),
        ({"global_batch": 16}, {"batch.micro_batch": 2, "batch.gradient_accumulation_steps": 2}),
        ({"strategy": "zero3"}, {"strategy.kind": "zero3", "training.method": "lora"}),
        ({"method": "full"}, {"training.method": "full", "training.lora_dropout": 0.0}),
        ({"checkpointing": "none"}, {"training.checkpointing": "none"}),
    ],
)
def test_flags_win_over_the_file(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = scenario(AXOLOTL_LORA, **given)
    assert {path: at(found, path) for path in expected} == expected


def test_what_a_file_says_of_fp8_goes_with_fp8() -> None:
    assert scenario(ACCELERATE_TE, precision="bf16").training.precision == "bf16"


def test_an_engines_settings_go_with_the_engine() -> None:
    found = scenario(AXOLOTL_ZERO, strategy="fsdp2")
    assert (found.strategy.kind, found.strategy.offload, found.strategy.zero.sub_group_size) == ("fsdp2", "none", 10**9)


def test_one_gpu_needs_no_copies() -> None:
    assert scenario(AXOLOTL_LORA, gpus=cluster(num_gpus=1)).strategy.kind == "single"


def test_auto_precision_follows_the_gpu() -> None:
    old = cluster(num_gpus=1, compute_capability=(7, 5), bf16_flops_per_s=0.0)
    assert scenario("base_model: a/b\nbf16: auto", gpus=old).training.precision == "fp16"


def test_a_file_that_is_there_goes_before_one_that_is_shipped() -> None:
    here = {"deepspeed_configs/zero3_bf16_cpuoffload_all.json": '{"zero_optimization": {"stage": 1}}'}
    assert read(AXOLOTL_ZERO, files=here).flags["strategy"] == "zero1"
    assert "is not here: read as Axolotl ships it" in " ".join(read(AXOLOTL_ZERO).assumed)


@pytest.mark.parametrize("name", AXOLOTL_DEEPSPEED)
def test_every_shipped_deepspeed_file_is_understood(name: str) -> None:
    reading = read(f"base_model: a/b\nbf16: auto\ndeepspeed: deepspeed_configs/{name}")
    assert str(reading.flags["strategy"]) == f"zero{name[4]}"
    assert reading.ignored == ()


@pytest.mark.parametrize("name", TRL_ACCELERATE)
def test_every_shipped_accelerate_file_is_understood(name: str) -> None:
    kinds = {"single_gpu": "ddp", "multi_gpu": "ddp", "fsdp1": "fsdp"}
    reading = read(f"model_name_or_path: a/b\naccelerate_config: {name}")
    assert reading.flags["strategy"] == kinds.get(name, name)


WRONG = [
    (
        "base_model: a/b\nmicro_batch_size: two",
        "my.yml: micro_batch_size is 'two', not a whole number from 1 on",
    ),
    ("base_model: a/b\nmicro_batch_size: 0", "micro_batch_size is 0"),
    ("base_model: a/b\nmicro_batch_size: true", "micro_batch_size is True"),
    ("base_model: a/b\nmicro_batch_size: [1]", "micro_batch_size is [1]"),
    ("base_model: a/b\nsequence_len: 1e99", "sequence_len is '1e99'"),
    ("base_model: a/b\nsample_packing: maybe", "sample_packing is 'maybe', neither true nor false; write"),
    ("base_model: [a]", "base_model is ['a'], not a word"),
    ("base_model: a/b\nfsdp_config: yes", "fsdp_config is True, not a section of keys"),
    ("base_model: a/b\nadapter: lora\nlora_target_modules: {a: 1}", "lora_target_modules is {'a': 1}, not a list"),
    ("base_model: a/b\nadapter: llama-adapter", "adapter llama-adapter is not modelled; write adapter: lora"),
    ("base_model: a/b\ndeepspeed: nowhere.json", "deepspeed names nowhere.json, which is not there; write a path"),
    ("base_model: a/b\nmax_grad_norm: .nan", "max_grad_norm is nan, not a number from 0 on"),
    ("distributed_type: MEGATRON_LM", "distributed_type MEGATRON_LM is not modelled"),
    ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 4, no stage of ZeRO"),
    ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}', "reduce_bucket_size is 'big', not a whole"),
    (
        "model_name_or_path: a/b\naccelerate_config: fast",
        "accelerate_config fast is no file here; use one of",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=lambda value: value[-40:])
def test_a_wrong_value_is_one_line_that_says_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ConfigFileError) as caught:
        read(text)
    line = str(caught.value)
    assert message in line
    assert "; " in line and "\n" not in line and len(line) < 250


JUNK = (-1, "x", [1], {"a": 1}, float("nan"))
KEYS = {
    Tool.ACCELERATE: (ACCELERATE_FSDP1, known_keys.ACCELERATE, {"fsdp_config": known_keys.ACCELERATE_FSDP}),
    Tool.AXOLOTL: (AXOLOTL_FSDP2, known_keys.AXOLOTL, {"fsdp_config": known_keys.AXOLOTL_FSDP}),
    Tool.DEEPSPEED: (DEEPSPEED_ZERO3, known_keys.DEEPSPEED, {"zero_optimization": known_keys.DEEPSPEED_ZERO}),
    Tool.TRL: (TRL_QLORA, known_keys.TRL | known_keys.TRL_LAUNCH, {"gradient_checkpointing_kwargs": {"use_reentrant"}}),
}


@pytest.mark.parametrize("tool", Tool)
def test_no_value_of_any_key_is_more_than_one_clear_line(tool: Tool) -> None:
    text, keys, sections = KEYS[tool]
    config = parse_config(text, name="f")
    configs = [{**config, key: junk} for key in keys for junk in JUNK]
    configs += [
        {**config, section: {**config[section], key: junk}}
        for section, known in sections.items()
        for key in known
        for junk in JUNK
    ]
    for changed in configs:
        lint(changed, tool=tool, cluster=cluster())
        try:
            reading = read_config(changed, tool=tool, place=Place(file="f", cluster=cluster()))
            reading.scenario(Request(), model=profile(), cluster=cluster())
        except LaunchkitError as error:
            assert "; " in str(error) and "\n" not in str(error)


FUSED = [
    ("", True),
    ("lora_mlp_kernel: true", True),
    ("lora_mlp_kernel: false", False),
    ("load_in_8bit: true", False),
    ("fsdp_version: 1\nfsdp_config: {reshard_after_forward: true}", False),
    ("fsdp_version: 2\nfsdp_config: {reshard_after_forward: true}", True),
]


@pytest.mark.parametrize(("lines", "is_fused"), FUSED, ids=lambda value: str(value)[:40])
def test_axolotls_fused_lora_is_said_where_it_runs(lines: str, is_fused: bool) -> None:
    text = f"base_model: m\nadapter: lora\nlora_r: 8\nlora_target_linear: true\nlearning_rate: 1e-4\n{lines}\n"
    assert ("fused LoRA" in " ".join(read(text).assumed)) is is_fused
