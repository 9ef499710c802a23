"""The built-in fine-tune's job: everything that its workers need to know, as one JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from launchkit.errors import IllegalScenarioError, PlanFileError
from launchkit.export.layout import (
    autocast_format,
    clip_norm,
    distributed_config,
    lora_modules_to_save,
    lora_target_modules,
    lora_target_parameters,
)
from launchkit.hardware import Backend, Cluster
from launchkit.optimizers import find
from launchkit.plan import Candidate
from launchkit.recipe import RECIPES
from launchkit.scenario import (
    Batch,
    Checkpointing,
    DdpSettings,
    Loss,
    Method,
    Precision,
    Split,
    StrategyKind,
    Trainer,
    Training,
)
from launchkit.serialize import decode, encode
from launchkit.strategies.weights import loaded_dtype


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the examples are, how often they are seen, and how they fill a sequence.

    ``pad_to_seq_len`` makes every batch as long as the plan assumed, so that a short trial shows the planned peak.
    ``max_steps`` of 0 means ``num_epochs`` over the data.
    """

    path: str
    max_steps: int = 0
    num_epochs: float = 1.0
    pad_to_seq_len: bool = False
    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class Lora:
    """PEFT's adapter; ``alpha`` and ``rslora`` scale its update and cost no memory."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False


@dataclass(frozen=True, kw_only=True)
class Parts:
    """transformers' ``DistributedConfig``: how the model is split as it is loaded."""

    tp_size: int
    fsdp_size: int = 1
    dp_replicate_size: int = 1
    fsdp_mixed_precision: bool = False

    @classmethod
    def of(cls, candidate: Candidate, cluster: Cluster) -> Parts | None:
        """Those of a candidate; None where nothing is split."""
        values: dict[str, Any] = distributed_config(candidate, cluster)
        return cls(**values) if values else None


@dataclass(frozen=True, kw_only=True)
class FineTuneJob:
    """One fine-tune as its workers read it. ``weights_dtype`` is what the model is loaded in, ``autocast`` accelerate's
    ``mixed_precision``; both follow from precision and strategy (``weights_dtype_of``)."""

    model_path: str
    output_dir: str
    data: Data
    training: Training
    batch: Batch
    strategy: StrategyKind
    weights_dtype: str
    autocast: str
    max_grad_norm: float
    learning_rate: float
    lora: Lora | None = None
    split: Split = field(default_factory=Split)
    parts: Parts | None = None
    ddp: DdpSettings = field(default_factory=DdpSettings)
    gguf_file: str = ""
    deepspeed_file: str = ""
    on_cpu: bool = False
    save: bool = True

    @property
    def text(self) -> str:
        """As JSON, the content of ``job.json``."""
        return json.dumps(encode(self), indent=2) + "\n"

    @classmethod
    def from_text(cls, text: str, *, name: str) -> FineTuneJob:
        """Reads ``job.json`` back."""
        try:
            job = decode(cls, json.loads(text), path="")
        except ValueError as error:
            raise PlanFileError(f"{name} is not a job file ({error}); launch again to write one") from error
        assert isinstance(job, FineTuneJob)
        return job


def fine_tune_job(
    candidate: Candidate, cluster: Cluster, *, model_path: str, output_dir: str, data: Data, deepspeed_file: str
) -> FineTuneJob:
    """The job that trains ``candidate`` exactly as it was planned."""
    directory, gguf_file = split_gguf(model_path)
    _check_trainable(candidate)
    training = candidate.scenario.training
    return FineTuneJob(
        model_path=directory,
        gguf_file=gguf_file,
        output_dir=output_dir,
        data=data,
        training=training,
        batch=candidate.scenario.batch,
        strategy=candidate.scenario.strategy.kind,
        weights_dtype=weights_dtype_of(candidate),
        autocast=autocast_format(candidate.scenario),
        max_grad_norm=clip_norm(candidate),
        learning_rate=RECIPES[training.method].learning_rate,
        lora=None if training.method is Method.FULL else _lora(candidate),
        split=candidate.scenario.strategy.split,
        parts=Parts.of(candidate, cluster),
        ddp=candidate.scenario.strategy.ddp,
        deepspeed_file=deepspeed_file,
        on_cpu=cluster.gpu.backend is Backend.CPU,
    )


def weights_dtype_of(candidate: Candidate) -> str:
    """The dtype that the weights are loaded in, which is the one that the strategy's rewrite counts them in."""
    return loaded_dtype(candidate.scenario)


def split_gguf(model_path: str) -> tuple[str, str]:
    """``/models/a.gguf`` as directory and file name, as transformers wants them; anything else unchanged."""
    if not model_path.lower().endswith(".gguf"):
        return model_path, ""
    directory, _, name = model_path.rpartition("/")
    return directory or ".", name


def _lora(candidate: Candidate) -> Lora:
    training = candidate.scenario.training
    alpha = RECIPES[training.method].lora_alpha(training.lora_rank)
    return Lora(
        rank=training.lora_rank,
        alpha=alpha,
        targets=lora_target_modules(candidate),
        target_parameters=lora_target_parameters(training),
        dropout=training.lora_dropout,
        modules_to_save=lora_modules_to_save(training),
        dora=training.dora,
        rslora=training.rslora,
    )


def _check_trainable(candidate: Candidate) -> None:
    """What the built-in fine-tune does not do, it refuses before anything starts."""
    training = candidate.scenario.training
    if candidate.model.task != "causal-lm":
        raise IllegalScenarioError(
            f"the built-in fine-tune trains causal language models, not {candidate.model.task}; "
            "launch a script of your own: launchkit launch train.py"
        )
    if training.trainer is Trainer.AXOLOTL:
        raise IllegalScenarioError(
            "the plan is for axolotl, which the built-in fine-tune is not; use launchkit config --target axolotl, "
            "or plan with --trainer hf"
        )
    refused = {
        "cut cross-entropy": (training.loss is Loss.CCE, "--loss plain"),
        training.optimizer: (not find(training.optimizer).trainer_arguments, "--optimizer adamw_torch_fused"),
        "fp8": (training.precision is Precision.FP8, "--precision bf16"),
        "selective checkpointing but TRL's": (
            training.checkpointing is Checkpointing.SELECTIVE
            and training.trainer is not Trainer.TRL
            and training.loss is not Loss.CHUNKED,
            "--trainer trl",
        ),
    }
    for name, (applies, advice) in refused.items():
        if applies:
            raise IllegalScenarioError(f"the built-in fine-tune has no {name}; plan with {advice}")


def job_notes(candidate: Candidate) -> tuple[str, ...]:
    """Where the built-in fine-tune cannot do quite what the plan assumed."""
    if candidate.scenario.training.flattens_batch:
        return ("rows are packed without the mask that trl sft makes and the plan counted: less memory is measured",)
    return ()
