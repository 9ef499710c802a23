"""Axolotl's YAML: a whole fine-tune. Read as Axolotl 0.19 does.

Source: axolotl-ai-cloud/axolotl of July 2026, ``utils/config/__init__.py`` (``resolve_dtype``, ``normalize_config``),
``utils/trainer.py`` (``setup_fsdp_envs``), ``utils/schemas``, ``loaders/model.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from launchkit.errors import ConfigFileError
from launchkit.export import known_keys
from launchkit.export.axolotl import FUSED_LORA
from launchkit.export.lint import Tool
from launchkit.export.read.adapters import read_adapter, read_optimizer
from launchkit.export.read.engines import read_ddp, read_deepspeed, read_deepspeed_file, read_fsdp, read_unsharded
from launchkit.export.read.reading import Draft, Place, Reading
from launchkit.export.read.section import Section
from launchkit.export.read.shipped import AXOLOTL_DEEPSPEED
from launchkit.scenario import Attention, Checkpointing, Loss, Method, Precision, StrategyKind, Trainer

_DEFAULT_SEQUENCE_LEN = 512
# What only an adapter reads.
_DORMANT = (
    *("lora_r", "lora_dropout", "lora_target_linear", "lora_target_modules", "lora_modules_to_save", "peft_use_dora"),
    *("peft_use_rslora", "lora_target_parameters"),
)
# Data, schedules, logs, checkpoints: what no step's memory depends on. Prefixes of keys.
_UNRELATED = (
    *("adam_", "added_tokens", "auto_resume", "base_model_config", "base_model_ignore", "chat_template", "comet_"),
    *("cosine_", "curriculum", "dataloader_", "dataset", "ddp_timeout", "debug", "default_system", "do_", "early_"),
    *("eot_tokens", "eval", "excess_length", "field", "gradio_", "greater_is", "group_by_length", "hf_", "hub_"),
    *("include_t", "is_", "learning_rate", "load_best", "local_rank", "logging_", "lora_alpha", "lora_fan", "loraplus"),
    *("loss_watchdog", "lr_", "max_steps", "merge_", "metric_for", "min_sample", "mlflow_", "model_type", "num_epochs"),
    *("otel_", "output_dir", "pad_to", "push_", "resume_", "revision", "role", "sample_packing_", "save", "seed"),
    *("shuffle_", "skip_prepare", "special_tokens", "strict", "test_datasets", "tf32", "tokenizer", "tokens", "total_"),
    *("trackio_", "train_on_inputs", "trust_remote", "type_of_model", "use_comet", "use_mlflow", "use_tensorboard"),
    *("use_trackio", "use_wandb", "val_set_size", "wandb_", "warmup_", "weight_decay", "world_size"),
    *("final_state_dict_type", "cpu_offload_pin_memory", "low_cpu_mem", "fp8_config", "train_on_eos", "base_model_"),
)


def read_axolotl(config: Mapping[str, Any], place: Place) -> Reading:
    """The reading of a file for ``axolotl train``."""
    keys, draft = Section(config, file=place.file), Draft(tool=Tool.AXOLOTL)
    draft.model = keys.text("base_model") or ""
    draft.flag("trainer", Trainer.AXOLOTL)
    for part in _PARTS:
        part(keys, draft, place)
    return draft.finish(keys, known=known_keys.AXOLOTL, unrelated=_UNRELATED)


def _batch(keys: Section, draft: Draft, place: Place) -> None:
    micro, steps, total = (keys.count(key) for key in ("micro_batch_size", "gradient_accumulation_steps", "batch_size"))
    micro = micro or 1
    draft.flag("micro_batch", micro)
    draft.accumulation = steps or max(1, (total or micro) // micro)
    draft.flag("seq_len", keys.count("sequence_len") or _DEFAULT_SEQUENCE_LEN)
    draft.flag("packing", keys.switch("sample_packing") or False)
    draft.max_grad_norm = keys.number("max_grad_norm")
    if kind := keys.text("rl"):
        draft.assumed.append(f"rl {kind} is not modelled: supervised fine-tuning is counted, which takes less")


def _method(keys: Section, draft: Draft, place: Place) -> None:
    adapter, is_4bit = keys.text("adapter"), keys.switch("load_in_4bit")
    if adapter not in (None, "lora", "qlora"):
        raise ConfigFileError(f"{place.file}: adapter {adapter} is not modelled; write adapter: lora, or qlora")
    if keys.switch("load_in_8bit"):
        draft.assumed.append("load_in_8bit is not modelled: base weights are counted in 16 bits, which takes more")
    if adapter is None:
        draft.flag("method", Method.FULL)
        if keys.get("unfrozen_parameters"):
            draft.assumed.append("unfrozen_parameters is not modelled: all weights count as trained, which takes more")
        if dormant := [key for key in _DORMANT if keys.has(key)]:
            draft.assumed.append(f"without adapter nothing comes of {', '.join(dormant)}")
            keys.skip(*dormant)
        return
    if adapter == "lora" and is_4bit:
        draft.assumed.append("adapter lora with load_in_4bit is counted as qlora")
    draft.flag("method", Method.QLORA if adapter == "qlora" or is_4bit else Method.LORA)
    read_adapter(keys, draft)
    _fused_lora(keys, draft)
    draft.flag("dora", keys.switch("peft_use_dora"))
    draft.flag("rslora", keys.switch("peft_use_rslora"))


def _optimizer(keys: Section, draft: Draft, place: Place) -> None:
    read_optimizer(keys, draft, key="optimizer")


def _fused_lora(keys: Section, draft: Draft) -> None:
    """Unset in a supervised run, all are on, but in 8 bits, with code of the model's own, and under FSDP1."""
    switches = [keys.switch(key) for key in FUSED_LORA]
    is_left_out = keys.switch("load_in_8bit") or keys.switch("trust_remote_code") or keys.text("rl")
    is_fsdp1 = keys.get("fsdp_config") is not None and str(keys.get("fsdp_version")) != "2"
    if any(switches) or (all(switch is None for switch in switches) and not is_left_out and not is_fsdp1):
        draft.assumed.append("Axolotl's fused LoRA kernels are not modelled: PEFT's own layers are counted")


def _attention(keys: Section, draft: Draft, place: Place) -> None:
    legacy = [name for key, name in known_keys.AXOLOTL_ATTENTIONS.items() if keys.switch(key)]
    name = keys.text("attn_implementation") or next(iter(legacy), None)
    if name is None:
        return
    if name not in set(Attention):
        draft.assumed.append(f"{name} attention is not modelled: flash_attention_2 is counted")
    draft.flag("attention", name if name in set(Attention) else Attention.FLASH_ATTENTION_2)


def _loss(keys: Section, draft: Draft, place: Place) -> None:
    plugins = " ".join(keys.names("plugins"))
    is_fused = keys.switch("liger_fused_linear_cross_entropy") and "liger" in plugins.lower()
    cuts = keys.switch("cut_cross_entropy") is not False and "cut_cross_entropy" in plugins.lower()
    draft.flag("loss", Loss.LIGER if is_fused else Loss.CCE if cuts else Loss.PLAIN)
    if keys.switch("chunked_cross_entropy"):
        draft.assumed.append("chunked_cross_entropy is not modelled: plain cross-entropy is counted, which takes more")
        keys.skip("chunked_cross_entropy_num_chunks")


def _checkpointing(keys: Section, draft: Draft, place: Place) -> None:
    """Re-entrant unless ``use_reentrant`` is written false: Axolotl passes nothing, and torch's hook is the old one."""
    enabled = keys.get("gradient_checkpointing")
    arguments = keys.section("gradient_checkpointing_kwargs")
    reenters = arguments.switch("use_reentrant") is not False
    offloads, selects = keys.get("activation_offloading"), keys.switch("selective_checkpointing")
    if enabled in ("offload", "offload_disk", "unsloth"):
        offloads = True
    elif not keys.switch("gradient_checkpointing"):
        return
    kind = Checkpointing.REENTRANT if reenters else Checkpointing.FULL
    kind = Checkpointing.OFFLOAD if offloads else Checkpointing.SELECTIVE if selects else kind
    draft.flag("checkpointing", kind)


def _strategy(keys: Section, draft: Draft, place: Place) -> None:
    tensor = keys.count("tensor_parallel_size") or 1
    context = keys.count("context_parallel_size") or keys.count("sequence_parallel_degree") or 1
    draft.flag("tp", tensor if tensor > 1 else None)
    draft.flag("cp", context if context > 1 else None)
    if context > 1:
        draft.assumed.append("Axolotl's ring of flash attention is counted as torch's ring attention")
        keys.skip("ring_attn_func", "heads_k_stride")
    replicas, shards = keys.count("dp_replicate_size") or 1, keys.count("dp_shard_size") or 0
    section = keys.section("fsdp_config", prefix="fsdp_")
    legacy = keys.get("fsdp")
    engine = keys.get("deepspeed")
    if section or legacy:
        version = 2 if "2" in (keys.text("fsdp_version"), section.text("version")) else 1
        read_fsdp(section, draft, place, version=version, replicas=replicas, shards=shards)
        _fsdp_checkpointing(draft)
    elif engine is not None:
        _deepspeed(engine, keys, draft, place)
    elif tensor > 1:
        draft.flag("strategy", StrategyKind.SINGLE)
    else:
        read_unsharded(draft, place)
        read_ddp(keys, draft)


def _fsdp_checkpointing(draft: Draft) -> None:
    """FSDP's wrapper of blocks is one kind; the model's own saves as much, and gathers each block once more."""
    asked = draft.flags.get("checkpointing", Checkpointing.NONE)
    if asked not in (Checkpointing.NONE, Checkpointing.FULL):
        draft.assumed.append(f"{asked} checkpointing under FSDP is counted as full")
        draft.flag("checkpointing", Checkpointing.FULL)


def _deepspeed(engine: object, keys: Section, draft: Draft, place: Place) -> None:
    if isinstance(engine, Mapping):
        read_deepspeed(keys.section("deepspeed"), draft, place)
    else:
        read_deepspeed_file(str(engine), draft, place, key="deepspeed", shipped=AXOLOTL_DEEPSPEED)


def _precision(keys: Section, draft: Draft, place: Place) -> None:
    """Axolotl loads weights in the format that it autocasts to.

    FSDP makes fp32 shards of trained weights, and ZeRO fp32 masters, so that their bf16 is ``--precision bf16``; what
    nothing shards stays as it was loaded.
    """
    is_16bit = keys.switch("fp16"), keys.switch("float16")
    bf16 = keys.switch("bf16", auto=place.cluster.gpu.supports_bf16 and not is_16bit[0])
    if bf16 is None:
        bf16 = place.cluster.gpu.supports_bf16 and not any(is_16bit)
    is_bf16, is_fp16 = bf16 or keys.switch("bfloat16"), any(is_16bit)
    keys.skip("float32")
    if not is_bf16 and not is_fp16 and keys.text("bf16") == "auto":
        is_fp16 = True  # where the GPU has no bf16
    if keys.switch("fp8"):
        draft.flag("precision", Precision.FP8)
        draft.flag("fp8_all_gather", keys.switch("fp8_enable_fsdp_float8_all_gather"))
    elif is_bf16:
        draft.flag("precision", Precision.BF16_PARAMS)
    else:
        draft.flag("precision", Precision.FP16 if is_fp16 else Precision.FP32)


def _sharded_precision(keys: Section, draft: Draft, place: Place) -> None:
    """What the engine makes of bf16 weights; see ``_precision``."""
    strategy = StrategyKind(str(draft.flags["strategy"]))
    if strategy.is_fsdp and draft.flags["precision"] is Precision.BF16_PARAMS:
        draft.flag("precision", Precision.BF16)
    if not strategy.is_fsdp:
        draft.flags.pop("fp8_all_gather", None)


def _compile(keys: Section, draft: Draft, place: Place) -> None:
    draft.flag("compile", keys.switch("torch_compile", auto=True))
    keys.skip("torch_compile_backend", "torch_compile_mode")


_PARTS: tuple[Callable[[Section, Draft, Place], None], ...] = (
    _batch,
    _method,
    _optimizer,
    _attention,
    _loss,
    _checkpointing,
    _precision,
    _strategy,
    _sharded_precision,
    _compile,
)
