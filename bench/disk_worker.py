"""One rank of ``bench.disk``: two steps of transformers' Trainer, and the checkpoint behind them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

SEQ_LEN = 64
VOCABULARY = 8000


def run(case: dict[str, Any], folder: Path) -> None:
    """Trains on random tokens and leaves ``checkpoint-2`` in ``folder``."""
    import torch

    from launchkit.finetune import cpu_fsdp

    torch.set_num_threads(1)
    strategy, is_fsdp = case["strategy"], case["strategy"].startswith("fsdp")
    engine: dict[str, Any] = {}
    if is_fsdp:
        cpu_fsdp.install()
        engine = {"fsdp": True, "fsdp_config": _fsdp(case)}
    elif strategy.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        cpu_fsdp.skip_shared_memory_extension()
        engine = {"deepspeed": _deepspeed(case), "bf16": True}
    _train(case, folder, engine, use_cpu=not is_fsdp)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # engines now and then abort while they shut down


def _train(case: dict[str, Any], folder: Path, engine: dict[str, Any], *, use_cpu: bool) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    from bench.host_worker import Watch, resident
    from launchkit.finetune import cpu_fsdp

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        max_steps=2,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=use_cpu,
        optim="adamw_torch",
        dataloader_pin_memory=False,
        save_only_model=case["model_only"],
        **engine,
    )
    if "deepspeed" in engine:
        cpu_fsdp.join_deepspeed()
    tokens = [torch.randint(0, VOCABULARY, (SEQ_LEN,)) for _ in range(8)]
    rows = [{"input_ids": row, "labels": row} for row in tokens]

    class Watched(Trainer):
        """A trainer that notes how far this process's private memory rises while it saves."""

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            ctypes.CDLL(None).malloc_trim(0)  # or copies would lie in what the heap keeps
            before, _ = resident()
            with Watch() as watch:
                super()._save_checkpoint(*args, **kwargs)
            most = max((private for _, private, _ in watch.samples), default=before)
            (folder / f"rise-{os.environ.get('RANK', 0)}").write_text(str(most - before))

    Watched(model=_model(case), args=arguments, train_dataset=rows).train()


def _model(case: dict[str, Any]) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if case["strategy"].startswith("zero") else torch.float32
    quantised = {}
    if case["method"] == "qlora":
        kept = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        quantised = {"quantization_config": kept}
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype, **quantised)
    if case["method"] == "full":
        return model
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def _fsdp(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT" if case["gathers"] else "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": True,
        "reshard_after_forward": True,
    }


def _deepspeed(case: dict[str, Any]) -> dict[str, Any]:
    stage = {
        "stage": int(case["strategy"][-1]),
        "stage3_gather_16bit_weights_on_model_save": case["gathers"],
        "reduce_bucket_size": 5_000_000,
    }
    return {
        "zero_optimization": stage,
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
