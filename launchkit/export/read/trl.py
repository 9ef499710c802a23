"""TRL's YAML for ``trl sft --config``: ``SFTConfig``, ``ModelConfig`` and ``ScriptArguments`` in one, and what of
``accelerate launch`` stands beside them.

Source: trl 1.16 ``SFTConfig``, ``ModelConfig``, ``cli/commands/training.py``; transformers 5.23 ``TrainingArguments``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from launchkit.errors import ConfigFileError
from launchkit.export import known_keys
from launchkit.export.lint import Tool
from launchkit.export.read.accelerate import read_launch
from launchkit.export.read.adapters import read_adapter, read_optimizer
from launchkit.export.read.engines import read_ddp, read_deepspeed_file, read_unsharded
from launchkit.export.read.reading import Draft, Place, Reading
from launchkit.export.read.section import Section
from launchkit.export.read.shipped import TRL_ACCELERATE
from launchkit.export.read.text import parse_config
from launchkit.scenario import Attention, Checkpointing, Loss, Method, Precision, StrategyKind, Trainer

_DEFAULT_MICRO_BATCH, _DEFAULT_MAX_LENGTH, _DEFAULT_DROPOUT = 8, 1024, 0.05  # of SFTConfig and ModelConfig
_UNRELATED = (
    *("accelerator_config", "adam_", "assistant_only", "average_tokens", "batch_eval", "bnb_4bit_quant_type"),
    *("chat_template", "completion_only", "data_", "dataloader_", "dataset", "ddp_backend", "ddp_timeout", "debug"),
    *("disable_tqdm", "do_", "enable_jit", "env", "eos_token", "eval_", "full_determinism", "greater_is", "hub_"),
    *("ignore_", "include_", "label_names", "learning_rate", "length_column", "load_best", "local_rank", "log_"),
    *("logging_", "lora_alpha", "lora_task", "lr_scheduler", "max_steps", "metric_for", "model_revision", "num_train"),
    *("num_processes", "num_machines", "output_dir", "pad_to", "pad_token", "per_device_eval", "prediction_loss"),
    *("project", "push_to_hub", "remove_unused", "report_to", "restore_", "resume_", "run_name", "save_", "seed"),
    *("shuffle_", "skip_memory", "streaming", "test_split", "tf32", "trackio_", "train_sampling", "truncation_mode"),
    *("trust_remote", "use_bnb_nested", "use_cache", "use_cpu", "warmup_", "weight_decay"),
)


def read_trl(config: Mapping[str, Any], place: Place) -> Reading:
    """The reading of a file for ``trl sft``."""
    keys, draft = Section(config, file=place.file), Draft(tool=Tool.TRL)
    draft.model = keys.text("model_name_or_path") or ""
    draft.flag("trainer", Trainer.TRL)
    for part in _PARTS:
        part(keys, draft, place)
    return draft.finish(keys, known=known_keys.TRL, unrelated=_UNRELATED)


def _batch(keys: Section, draft: Draft, place: Place) -> None:
    draft.flag("micro_batch", keys.count("per_device_train_batch_size") or _DEFAULT_MICRO_BATCH)
    draft.accumulation = keys.count("gradient_accumulation_steps") or 1
    draft.flag("seq_len", keys.count("max_length") or _DEFAULT_MAX_LENGTH)
    draft.flag("packing", keys.switch("packing") or False)
    draft.max_grad_norm = keys.number("max_grad_norm")
    strategy = keys.text("packing_strategy") or "bfd"
    if draft.flags["packing"] and not strategy.startswith("bfd"):
        draft.assumed.append(f"packing_strategy {strategy} is counted as bfd")


def _method(keys: Section, draft: Draft, place: Place) -> None:
    is_4bit = keys.switch("load_in_4bit")
    if keys.switch("load_in_8bit"):
        draft.assumed.append("load_in_8bit is not modelled: base weights are counted in 16 bits, which takes more")
    if not keys.switch("use_peft"):
        draft.flag("method", Method.FULL)
        keys.skip("lora_r", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
        return
    draft.flag("method", Method.QLORA if is_4bit else Method.LORA)
    read_adapter(keys, draft)
    draft.flags.setdefault("lora_dropout", _DEFAULT_DROPOUT)
    draft.flag("dora", keys.switch("use_dora"))
    draft.flag("rslora", keys.switch("use_rslora"))


def _optimizer(keys: Section, draft: Draft, place: Place) -> None:
    read_optimizer(keys, draft, key="optim")


def _attention(keys: Section, draft: Draft, place: Place) -> None:
    name = keys.text("attn_implementation")
    if name is not None and name not in set(Attention):
        draft.assumed.append(f"{name} attention is not modelled: flash_attention_2 is counted")
        name = Attention.FLASH_ATTENTION_2
    draft.flag("attention", name)


def _loss(keys: Section, draft: Draft, place: Place) -> None:
    draft.flag("loss", Loss.LIGER if keys.switch("use_liger_kernel") else Loss.CHUNKED)
    if (kind := keys.text("loss_type")) not in (None, "nll", "chunked_nll"):
        draft.assumed.append(f"loss_type {kind} is not modelled: nll is counted")


def _checkpointing(keys: Section, draft: Draft, place: Place) -> None:
    """On unless written false, which is TRL's own default; non-reentrant unless written true."""
    arguments = keys.section("gradient_checkpointing_kwargs")
    reenters, selects, offloads = (arguments.switch(key) for key in ("use_reentrant", "selective", "offload"))
    if keys.switch("gradient_checkpointing") is False:
        return
    kind = Checkpointing.REENTRANT if reenters else Checkpointing.FULL
    kind = Checkpointing.SELECTIVE if selects else Checkpointing.OFFLOAD if offloads else kind
    draft.flag("checkpointing", kind)


def _strategy(keys: Section, draft: Draft, place: Place) -> None:
    name, engine = keys.text("accelerate_config"), keys.text("deepspeed")
    checkpointing = draft.flags.get("checkpointing")
    if name is not None:
        _accelerate(name, draft, place)
    elif engine is not None:
        read_deepspeed_file(engine, draft, place, key="deepspeed", shipped={})
    else:
        read_unsharded(draft, place)
    if draft.flags["strategy"] is StrategyKind.DDP:
        read_ddp(keys, draft)
    keys.skip("ddp_broadcast_buffers", "ddp_find_unused_parameters")
    if StrategyKind(str(draft.flags["strategy"])).is_fsdp and checkpointing not in (None, Checkpointing.FULL):
        draft.assumed.append(f"{checkpointing} checkpointing under FSDP is counted as full")
        draft.flag("checkpointing", Checkpointing.FULL)


def _accelerate(name: str, draft: Draft, place: Place) -> None:
    """The file of ``--accelerate_config``, or one of those that TRL brings along, by its name."""
    text = place.open_file(name)
    own_name = name.rpartition("/")[2]
    if text is None and name not in TRL_ACCELERATE:
        raise ConfigFileError(
            f"{place.file}: accelerate_config {name} is no file here; use one of {', '.join(TRL_ACCELERATE)}"
        )
    config = TRL_ACCELERATE[name] if text is None else parse_config(text, name=own_name)
    section = Section(config, file=own_name)
    launch = Draft(
        tool=Tool.ACCELERATE, flags=draft.flags, accumulation=draft.accumulation, fsdp=draft.fsdp, zero=draft.zero
    )
    read_launch(section, launch, place)
    draft.assumed += [line for line in launch.assumed if "weights in" not in line]
    draft.ignored += launch.ignored


def _precision(keys: Section, draft: Draft, place: Place) -> None:
    """Autocast, and in what the weights are loaded: fp32 unless ``dtype`` says otherwise. FSDP makes fp32 shards of
    trained weights under autocast, and ZeRO computes in what its file says."""
    strategy = StrategyKind(str(draft.flags["strategy"]))
    if strategy.zero_stage:
        keys.skip("dtype")
        return
    stays_narrow = draft.flags["method"] is not Method.FULL or not strategy.is_fsdp
    is_narrow = (keys.text("dtype") or "float32").rpartition(".")[2] in ("bfloat16", "float16", "auto")
    autocast = _autocast(keys, launch=draft.flags.get("precision"))
    if autocast is Precision.BF16 and is_narrow and stays_narrow:
        autocast = Precision.BF16_PARAMS
    elif autocast is Precision.FP32 and is_narrow:
        autocast = Precision.BF16_PURE
    draft.flag("precision", autocast)
    if autocast is not Precision.FP8:
        draft.flags.pop("fp8_all_gather", None)
        draft.flags.pop("fp8_backend", None)


def _trainer_precision(keys: Section, draft: Draft, place: Place) -> None:
    """What DeepSpeed's file means by ``auto``."""
    if any(keys.has(key) for key in ("deepspeed", "accelerate_config")):
        autocast = _autocast(keys, launch=None)
        draft.flag("precision", None if autocast is Precision.FP32 else autocast)


def _autocast(keys: Section, *, launch: object) -> Precision:
    """On in bf16 unless written false; where both formats are off, what the launcher was told stands."""
    fp16, bf16 = keys.switch("fp16"), keys.switch("bf16")
    if bf16 or (bf16 is None and not fp16):
        return Precision.BF16
    if fp16:
        return Precision.FP16
    return Precision.BF16 if launch is Precision.BF16_PARAMS else Precision(str(launch or Precision.FP32))


def _compile(keys: Section, draft: Draft, place: Place) -> None:
    draft.flag("compile", keys.switch("torch_compile"))
    keys.skip("torch_compile_backend", "torch_compile_mode")


_PARTS: tuple[Callable[[Section, Draft, Place], None], ...] = (
    _batch,
    _method,
    _optimizer,
    _attention,
    _loss,
    _checkpointing,
    _trainer_precision,
    _strategy,
    _precision,
    _compile,
)
