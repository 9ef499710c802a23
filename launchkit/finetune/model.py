"""Loading a model as its job says: directory or hub id, dtype, attention, 4-bit weights, adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from launchkit.finetune.split_adapters import declare_whole_widths
from launchkit.frozen import freeze_parts
from launchkit.launch.job import FineTuneJob
from launchkit.scenario import Method


def load_tokenizer(job: FineTuneJob) -> Any:
    """The tokenizer; models without a padding token pad with their end mark, which is never scored."""
    tokenizer = AutoTokenizer.from_pretrained(job.model_path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(job: FineTuneJob) -> PreTrainedModel:
    """The model with its adapter, if any. The training arguments must exist by now: they tell ``from_pretrained`` that
    ZeRO-3 or FSDP will shard, so that not every process holds a whole copy."""
    model = AutoModelForCausalLM.from_pretrained(
        job.model_path,
        dtype=getattr(torch, job.weights_dtype),
        attn_implementation=str(job.training.attention),
        **_quantisation(job),
        **_parts(job),
    )
    model.config.use_cache = False
    freeze_parts(model, job.training.freeze)
    return _widened(model) if _widens_unquantised(job) else model


def _parts(job: FineTuneJob) -> dict[str, Any]:
    """Each rank loads its part of each matrix, and FSDP's shard of that, where the job is tensor parallel."""
    if job.parts is None:
        return {}
    from transformers.distributed.configuration_utils import DistributedConfig  # of transformers 5.23 on

    return {"distributed_config": DistributedConfig(**asdict(job.parts))}


def adapter_config(job: FineTuneJob) -> Any:
    """PEFT's configuration of the job's adapter; None for full fine-tuning."""
    if job.lora is None:
        return None
    from peft import LoraConfig  # an optional dependency

    targets = job.lora.targets[0] if job.lora.targets == ("all-linear",) else list(job.lora.targets)
    return LoraConfig(
        r=job.lora.rank,
        lora_alpha=job.lora.alpha,
        lora_dropout=job.lora.dropout,
        target_modules=targets,
        target_parameters=list(job.lora.target_parameters) or None,
        modules_to_save=list(job.lora.modules_to_save) or None,
        use_dora=job.lora.dora,
        use_rslora=job.lora.rslora,
        task_type="CAUSAL_LM",
    )


def with_adapter(model: PreTrainedModel, job: FineTuneJob) -> Any:
    """``model`` wrapped by PEFT, its base frozen; ``model`` itself for full fine-tuning."""
    config = adapter_config(job)
    if config is None:
        return model
    from peft import get_peft_model  # an optional dependency

    if job.training.checkpointing != "none":
        model.enable_input_require_grads()  # else nothing before the first adapter asks for gradients
    # FSDP1 flattens only tensors of one dtype, and 4-bit weights count as their storage's.
    adapted = get_peft_model(model, config, autocast_adapter_dtype=not _needs_one_dtype(job))
    if job.parts is not None:
        declare_whole_widths(adapted)
    return adapted


def _widens_unquantised(job: FineTuneJob) -> bool:
    """Beside 4-bit weights PEFT recommends fp32 for all others. Engines that cast or shard want them as loaded."""
    return job.training.method is Method.QLORA and not (job.strategy.is_fsdp or job.strategy.zero_stage)


def _widened(model: PreTrainedModel) -> PreTrainedModel:
    from peft import prepare_model_for_kbit_training  # an optional dependency

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _needs_one_dtype(job: FineTuneJob) -> bool:
    return job.strategy == "fsdp" or (job.strategy.is_fsdp and job.training.method is Method.QLORA)


def _quantisation(job: FineTuneJob) -> dict[str, Any]:
    """QLoRA's weights are 4-bit NormalFloat, under FSDP stored in the compute dtype's width: it cannot flatten or shard
    integers."""
    if job.training.method is not Method.QLORA:
        return {}
    from transformers import BitsAndBytesConfig  # needs bitsandbytes, an optional dependency

    dtype = getattr(torch, job.weights_dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if job.strategy.is_fsdp else torch.uint8,
    )
    return {"quantization_config": config}
