"""The built-in fine-tune: one rank of it, whatever launched it.

Order matters. The training arguments come first: they start the process group and register the DeepSpeed
configuration, without which every rank would build a whole copy of the model before it is sharded.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launchkit.dataset import read_examples
from launchkit.finetune import cpu_fsdp
from launchkit.finetune.batches import RightPadded, TokenRows
from launchkit.finetune.data import fit_rows, tokenise
from launchkit.finetune.devices import check_devices
from launchkit.finetune.measure import StepMeter
from launchkit.finetune.model import adapter_config, load_model, load_tokenizer, with_adapter
from launchkit.finetune.unpack import unpacked
from launchkit.launch.environment import RUN_DIR_VARIABLE
from launchkit.launch.job import FineTuneJob
from launchkit.optimizers import find
from launchkit.process.worker import global_rank, say
from launchkit.recipe import KEPT_CHECKPOINTS
from launchkit.scenario import Checkpointing, CommHook, DdpSettings, Loss, StrategyKind
from launchkit.scenario import Trainer as TrainerKind
from launchkit.units import MIB

SHORT_RUN_STEPS = 200  # up to here every step is logged, beyond it every tenth


def train(job: FineTuneJob) -> None:
    """Trains as the job says, measures, and saves the model (or its adapter) with its tokenizer."""
    check_devices()
    job = unpacked(job)
    if job.on_cpu and _counts_as_devices(job):
        cpu_fsdp.install()
    elif job.on_cpu:
        cpu_fsdp.skip_shared_memory_extension()
    meter = StepMeter.from_environment(resets_peaks=True)
    meter.watch_optimizer()
    arguments = training_arguments(job)
    if job.on_cpu and job.deepspeed_file:
        cpu_fsdp.join_deepspeed()
    say(f"loading {job.model_path}")
    tokenizer = load_tokenizer(job)
    rows = fit_rows(
        tokenise(read_examples(job.data.path), tokenizer), seq_len=job.batch.seq_len, packing=job.training.packing
    )
    shares_sequences = job.split.cp * job.split.sp > 1  # each is cut into equal pieces
    collator = RightPadded(
        pad_token_id=tokenizer.pad_token_id,
        length=job.batch.seq_len if job.data.pad_to_seq_len or shares_sequences else 0,
        with_positions=uses_trl(job) or shares_sequences,
        with_mask=shares_sequences,
        hides_padding=job.training.padding,
    )
    trainer = _trainer(job, arguments, tokenizer, rows, collator)
    if job.strategy is StrategyKind.DDP:
        trainer.accelerator.ddp_handler = ddp_handler(job.ddp)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reporter(meter, collator))
    trainer.train()
    meter.finish()
    if job.save:
        _save(trainer, tokenizer, job)


def ddp_handler(settings: DdpSettings) -> DistributedDataParallelKwargs:
    """DDP's arguments as accelerate takes them. They go there directly, since the Trainer's arguments have no bucket
    views and no communication hooks."""
    hook = "no" if settings.comm_hook is CommHook.NONE else settings.comm_hook.value
    return DistributedDataParallelKwargs(
        bucket_cap_mb=settings.bucket_cap_bytes // MIB,
        find_unused_parameters=settings.find_unused_parameters,
        gradient_as_bucket_view=settings.gradient_as_bucket_view,
        static_graph=settings.static_graph,
        broadcast_buffers=settings.broadcast_buffers,
        comm_hook=DDPCommunicationHookType(hook),
    )


def _save(trainer: Trainer, tokenizer: Any, job: FineTuneJob) -> None:
    begin = time.monotonic()
    trainer.save_model(job.output_dir)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(job.output_dir)
    say(f"saved in {time.monotonic() - begin:.1f} s: {job.output_dir}")


def _counts_as_devices(job: FineTuneJob) -> bool:
    """Whether accelerate has to take CPU processes for devices: it shards nothing, and knows of no split, otherwise."""
    return job.strategy.is_fsdp or job.parts is not None


def uses_trl(job: FineTuneJob) -> bool:
    """TRL's trainer for plans made for it, and for its chunked loss, which the plain trainer does not have."""
    return job.training.trainer is TrainerKind.TRL or job.training.loss is Loss.CHUNKED


def training_arguments(job: FineTuneJob) -> TrainingArguments:
    """The Trainer's arguments; TRL's class of them where TRL trains."""
    values = _argument_values(job)
    if not uses_trl(job):
        return TrainingArguments(**values)
    from trl import SFTConfig  # an optional dependency

    return SFTConfig(**values, max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True})


def _argument_values(job: FineTuneJob) -> dict[str, Any]:
    is_sharded_on_cpu = job.on_cpu and _counts_as_devices(job)
    is_accelerates = job.strategy.is_fsdp and job.parts is None  # FSDP's own checkpointing, then
    checkpoints_itself = job.training.checkpointing is not Checkpointing.NONE and not is_accelerates
    is_trial = job.data.max_steps > 0
    return {
        "output_dir": job.output_dir,
        "per_device_train_batch_size": job.batch.micro_batch,
        "gradient_accumulation_steps": job.batch.gradient_accumulation_steps,
        "max_steps": job.data.max_steps or -1,
        "num_train_epochs": job.data.num_epochs,
        "learning_rate": job.learning_rate,
        "max_grad_norm": job.max_grad_norm,
        **find(job.training.optimizer).trainer_arguments,
        "seed": job.data.seed,
        # The arguments want a GPU or use_cpu; sharded on the CPU, ACCELERATE_MIXED_PRECISION says it instead.
        "bf16": job.autocast == "bf16" and not is_sharded_on_cpu,
        "fp16": job.autocast == "fp16" and not is_sharded_on_cpu,
        "use_cpu": job.on_cpu and not is_sharded_on_cpu,
        "deepspeed": job.deepspeed_file or None,
        "activation_checkpointing": checkpoints_itself,
        "activation_checkpointing_kwargs": _checkpointing_arguments(job) if checkpoints_itself else None,
        "use_liger_kernel": job.training.loss is Loss.LIGER,
        "torch_compile": job.training.compile,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": not job.on_cpu,
        "remove_unused_columns": False,
        "save_strategy": "no" if is_trial else "epoch",
        "save_only_model": job.parts is not None,  # the Trainer has no states of a split model to resume from
        "save_total_limit": KEPT_CHECKPOINTS,
        "logging_steps": 1 if 0 < job.data.max_steps <= SHORT_RUN_STEPS else 10,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _checkpointing_arguments(job: FineTuneJob) -> dict[str, Any]:
    return {"use_reentrant": job.training.reenters(job.strategy), **job.training.checkpointing.trainer_arguments}


def _trainer(
    job: FineTuneJob, arguments: TrainingArguments, tokenizer: Any, rows: list[list[int]], collator: RightPadded
) -> Trainer:
    model = load_model(job)
    if not uses_trl(job):
        return Trainer(
            model=with_adapter(model, job),
            args=arguments,
            train_dataset=TokenRows(rows),
            data_collator=collator,
            processing_class=tokenizer,
        )
    from datasets import Dataset  # optional dependencies
    from trl import SFTTrainer

    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        data_collator=collator,
        processing_class=tokenizer,
        peft_config=adapter_config(job),
    )


class Reporter(TrainerCallback):
    """Feeds the meter, prints a line per log, and appends it to ``metrics.jsonl`` on rank 0."""

    def __init__(self, meter: StepMeter, collator: RightPadded) -> None:
        self._meter = meter
        self._collator = collator
        run_dir = os.environ.get(RUN_DIR_VARIABLE)
        self._path = Path(run_dir) / "metrics.jsonl" if run_dir and global_rank() == 0 else None

    def on_train_begin(self, *_arguments: Any, **_values: Any) -> None:
        self._meter.begin()

    def on_step_end(self, args: TrainingArguments, *_arguments: Any, **_values: Any) -> None:
        # A batch is read ahead of its step, so that tokens are counted per batch.
        tokens_per_batch = self._collator.num_tokens // self._collator.num_batches
        self._meter.tokens_per_step = tokens_per_batch * args.gradient_accumulation_steps
        self._meter.longest_tokens = self._collator.longest_tokens
        self._meter.end_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_values: Any,
    ) -> None:
        if not logs or "loss" not in logs or self._path is None:
            return
        seconds = self._meter.step_seconds[-1] if self._meter.step_seconds else 0.0
        line = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs.get("learning_rate", 0.0)),
            "gradient_norm": float(logs.get("grad_norm", 0.0)),
            "step_seconds": seconds,
        }
        with self._path.open("a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(line) + "\n")
        speed = self._meter.tokens_per_step / seconds if seconds else 0.0
        say(
            f"step {state.global_step}/{state.max_steps}  loss {line['loss']:.4f}  {seconds:.2f} s  "
            f"{speed:,.0f} tokens/s per process"
        )
