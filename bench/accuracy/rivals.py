"""What other tools say of the rows of the accuracy page: ``rivals.json`` here.

``python -m bench.accuracy.rivals`` asks each of them about every cell of ``results.json`` and every predicted row of
``published.json``. Of a tool that is installed its own code answers; EleutherAI's calculator is a script outside any
package, so its formulas are written down here. Each gets the settings that serve it best, and says nothing (None) of
what it does not know: an engine, an optimizer, offloading. None knows adapters.

llm-analysis pins versions of transformers and huggingface-hub that launchkit cannot live with, though it runs with
newer ones: ``pip install --no-deps llm-analysis==0.2.2 'fire<0.6' termcolor``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from bench.accuracy.cell import Cell
from bench.accuracy.cells import CELLS
from bench.accuracy.rows import PUBLISHED, RESULTS, RIVALS, Row, published_rows, read_json
from launchkit.api import find_cluster
from launchkit.catalog.models import load_index

# Bytes a parameter of Adam's two moments.
ADAM_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_bnb_8bit": 2}
ADAM = ("adamw_torch", "adamw_torch_fused")
PURE = ("bf16-pure", "bf16-params")  # no fp32 anywhere
SHARDING_STAGES = {"full_shard": 3, "shard_grad_op": 2, "no_shard": 0}
# DeepSpeed's settings that EleutherAI's calculator takes; stage 3 gathers in its prefetch buckets.
BUCKET_SETTINGS = {
    "allgather_bucket_size": "allgather_bucket_parameters",
    "stage3_prefetch_bucket_size": "allgather_bucket_parameters",
    "stage3_max_live_parameters": "max_live_parameters",
}
STAGES = {"single": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row as the rivals can be asked about it. ``config`` is the text of the model's ``config.json``."""

    config: str
    num_gpus: int
    strategy: str
    method: str
    precision: str
    optimizer: str
    micro_batch: int
    seq_len: int
    checkpointing: str
    attention: str
    offload: str = "none"
    sharding: str = "full_shard"
    allgather_bucket_parameters: int = 500_000_000
    max_live_parameters: int = 1_000_000_000

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage that shards the same things; None where none does."""
        if self.strategy in ("fsdp", "fsdp2"):
            return SHARDING_STAGES.get(self.sharding)
        return STAGES.get(self.strategy)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the rivals want to know of a model. ``num_mlp_linears`` is 3 where the MLP is gated, else 2.

    ``backbone_bytes`` is the model without its head in fp32, which is what ``AutoModel`` builds. ``num_heads`` is 0
    where the model is anything but one stack of attention blocks on tokens.
    """

    num_parameters: int
    largest_layer_parameters: int
    backbone_bytes: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    num_mlp_linears: int
    vocab_size: int
    num_experts: int = 0
    num_experts_per_token: int = 0


@cache
def shape_of(config_text: str) -> Shape:
    """The shape of a model, counted on its modules on the meta device."""
    import torch  # lazy, as all of the training stack and the rivals here: most answers need none of it
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel

    from launchkit.scenario import Attention
    from launchkit.trace.build import build_on_meta, load_config, training_class

    config = load_config(json.loads(config_text))
    model = build_on_meta(training_class(config)[0], config, attention=Attention.EAGER, dtype=torch.float32)
    with init_empty_weights():
        backbone = AutoModel.from_config(config, dtype=torch.float32)
    layers = [sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()]
    return Shape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        largest_layer_parameters=max(layers),
        backbone_bytes=int(calculate_maximum_sizes(backbone)[0]),
        **_dimensions(config.get_text_config(), [tuple(parameter.shape) for parameter in model.parameters()]),
    )


def _dimensions(config: Any, shapes: Iterable[Sequence[int]]) -> dict[str, int]:
    """The rest of a ``Shape`` from a transformers configuration and the shapes of the model's parameters."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    num_heads, vocabulary = _first(config, "num_attention_heads"), _first(config, "vocab_size")
    width = _first(config, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    matrices = (shape[-2:] for shape in shapes if len(shape) >= 2)
    num_linears = sum(_mlp_linears(shape, hidden_size=hidden, intermediate_size=width) for shape in matrices)
    return {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": num_heads if vocabulary and not config.is_encoder_decoder else 0,
        "num_kv_heads": _first(config, "num_key_value_heads") or num_heads,
        "intermediate_size": width,
        "num_mlp_linears": round(num_linears / layers),
        "vocab_size": vocabulary,
        "num_experts": _first(config, "num_local_experts", "num_experts", "n_routed_experts"),
        "num_experts_per_token": _first(config, "num_experts_per_tok"),
    }


def _first(config: Any, *names: str) -> int:
    """The first of the configuration's fields that it has and that is set, else 0."""
    return next((value for name in names if (value := getattr(config, name, None))), 0)


def _mlp_linears(shape: Sequence[int], *, hidden_size: int, intermediate_size: int) -> int:
    """How many linear layers of an MLP a matrix is: two where gate and up projection share one."""
    others = [size for size in shape if size != hidden_size]
    return others.count(intermediate_size) + 2 * others.count(2 * intermediate_size) if len(others) == 1 else 0


def accelerate_estimate(job: Job, shape: Shape) -> int | None:
    """The column *Training using Adam* of ``accelerate estimate-memory``, by accelerate's own function.

    Formula: 4 × the fp32 model in fp32, 2 × in 16 bits. The model is ``AutoModel``'s, without head. It says nothing of
    activations, batch or length: by its documentation the figure is for a batch of one. Whatever a 16-bit run holds in
    fp32, ``float16`` is what can be asked for.
    """
    if job.optimizer not in ADAM or job.zero_stage != 0:
        return None
    from accelerate.commands.estimate import estimate_training_usage

    dtype = "float32" if job.precision == "fp32" else "float16"
    return int(max(estimate_training_usage(shape.backbone_bytes, dtype).values()))


def deepspeed_estimate(job: Job, shape: Shape) -> int | None:
    """DeepSpeed's ``estimate_zero2_`` and ``estimate_zero3_model_states_mem_needs``, its own functions.

    Parameters, gradients and optimizer states under Adam in 16 bits with an fp32 master, and in stage 3 the largest
    layer; no activations and none of the buckets.
    """
    offloads = {"zero2": ("none", "optimizer"), "zero3": ("none", "optimizer", "all")}
    if job.precision == "fp32" or job.optimizer not in ADAM or job.offload not in offloads.get(job.strategy, ()):
        return None
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    common = {"num_gpus_per_node": job.num_gpus, "num_nodes": 1, "cpu_offload": job.offload != "none"}
    if job.strategy == "zero2":
        return int(estimate_zero2_model_states_mem_needs(shape.num_parameters, **common)[1])
    common["cpu_offload_params"] = job.offload == "all"
    return int(estimate_zero3_model_states_mem_needs(shape.num_parameters, shape.largest_layer_parameters, **common)[1])


def eleuther_estimate(job: Job, shape: Shape) -> int | None:
    """*Per-GPU Memory Required for Training* of EleutherAI's ``calc_transformer_mem.py``, by its formulas.

    Formula: weights + gradients + 12 bytes of Adam with an fp32 master a parameter, divided as the ZeRO stage says,
    DeepSpeed's all-gather bucket and live parameters, and per token and layer ``16 w + 2`` activation bytes for each
    hidden unit, with ``w`` bytes a value; without checkpointing ``(2 w + 1) heads × length`` more.
    Omits: the logits, what an optimizer step takes for a moment, the MLP's width in the activations.
    Source: EleutherAI/cookbook, ``calc/calc_transformer_mem.py`` at 069ae2ef. FSDP is asked for as the ZeRO stage that
    shards the same, with DeepSpeed's buckets set to nothing.
    """
    stage = job.zero_stage
    if job.optimizer not in ADAM or job.offload != "none" or stage is None or not shape.num_heads:
        return None
    value_bytes = 4 if job.precision == "fp32" else 2
    gradient_bytes = 2 if job.precision in PURE else 4
    num_parameters = _eleuther_parameters(shape, seq_len=job.seq_len)
    states = (
        num_parameters * value_bytes / (job.num_gpus if stage == 3 else 1)
        + num_parameters * gradient_bytes / (job.num_gpus if stage >= 2 else 1)
        + num_parameters * 12 / (job.num_gpus if stage >= 1 else 1)
    )
    is_deepspeed = job.strategy.startswith("zero") and job.num_gpus > 1
    num_buffered = job.allgather_bucket_parameters + (job.max_live_parameters if stage == 3 else 0)
    buckets = value_bytes * num_buffered if is_deepspeed else 0
    per_unit = 16.0 * value_bytes + 2
    if job.checkpointing == "none":
        per_unit += (2 * value_bytes + 1) * shape.num_heads * job.seq_len / shape.hidden_size
    activations = job.seq_len * job.micro_batch * shape.hidden_size * shape.num_layers * per_unit
    return round(states + buckets + activations)


def _eleuther_parameters(shape: Shape, *, seq_len: int) -> float:
    """Parameters as that calculator counts them: untied embeddings, learnt positions, every expert."""
    hidden, layers = shape.hidden_size, shape.num_layers
    around = 2 * shape.vocab_size * hidden + hidden * seq_len + 8 * hidden * layers + 2 * hidden
    attention = 2 * (1 + shape.num_kv_heads / shape.num_heads) * layers * hidden**2
    mlp = shape.num_mlp_linears * layers * hidden * shape.intermediate_size
    return around + attention + max(shape.num_experts, 1) * mlp


def llm_analysis_estimate(job: Job, shape: Shape) -> int | None:
    """``(weight+op_state+grad+act)_memory_per_gpu`` of llm-analysis, by its own ``LLMAnalysis.training``.

    It knows MLPs of two linear layers, so a gated one goes in as wide as makes its parameters right. FSDP is asked for
    as the ZeRO stage that shards the same, which its documentation equates. It refuses weights of 32 bits, so fp32 has
    no answer. Omits buffers of the engine, the loss beyond one copy of the logits, and what an optimizer step takes
    for a moment.
    """
    stage = job.zero_stage
    is_known = job.precision != "fp32" and job.optimizer in ADAM_BYTES and job.offload == "none"
    if not is_known or stage is None or not shape.num_heads:
        return None
    from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis
    from llm_analysis.config import DtypeConfig, ModelConfig, ParallelismConfig, get_gpu_config_by_name

    logging.getLogger("__name__").setLevel(logging.ERROR)  # that is what it calls its logger
    width = shape.intermediate_size * shape.num_mlp_linears // 2
    analysis = LLMAnalysis(
        ModelConfig(
            name="model",
            num_layers=shape.num_layers,
            n_head=shape.num_heads,
            hidden_dim=shape.hidden_size,
            vocab_size=shape.vocab_size,
            max_seq_len=job.seq_len,
            num_key_value_heads=shape.num_kv_heads,
            ffn_embed_dim=width,
            expansion_ratio=width / shape.hidden_size,
            moe_num_experts=max(shape.num_experts, 1),
            moe_top_k=max(shape.num_experts_per_token, 1),
        ),
        get_gpu_config_by_name("a100-sxm-80gb"),  # any: what it says of memory does not depend on it
        DtypeConfig(weight_bits=16, activation_bits=16, embedding_bits=16),
        ParallelismConfig(dp_size=job.num_gpus),
    )
    found = analysis.training(
        batch_size_per_gpu=job.micro_batch,
        global_batch_size=job.micro_batch * job.num_gpus,  # with it, what does not fit is told too
        seq_len=job.seq_len,
        activation_recomputation=ActivationRecomputation[job.checkpointing.upper()],
        ds_zero=DSZeRO(stage),
        flash_attn=job.attention != "eager",
        **_optimizer_bytes(job),
    )
    return round(found["(weight+op_state+grad+act)_memory_per_gpu"])


def _optimizer_bytes(job: Job) -> dict[str, int]:
    """Bytes a parameter: what it calls the master weights' width is also the gradients', and the optimizer's states are
    the sum of both numbers. Without a master the second number gives up what the first adds."""
    if job.precision not in PURE:
        return {"master_weights_dtype_bytes": 4, "other_op_bytes": ADAM_BYTES[job.optimizer]}
    moment_bytes = ADAM_BYTES[job.optimizer] // (2 if job.optimizer in ADAM else 1)  # in bf16, as the weights
    return {"master_weights_dtype_bytes": 2, "other_op_bytes": moment_bytes - 2}


TOOLS: Mapping[str, Callable[[Job, Shape], int | None]] = {
    "accelerate": accelerate_estimate,
    "DeepSpeed": deepspeed_estimate,
    "EleutherAI": eleuther_estimate,
    "llm-analysis": llm_analysis_estimate,
}


def ask(job: Job) -> dict[str, int]:
    """The answers of those tools that have one."""
    if job.method != "full":  # none of them knows adapters
        return {}
    shape = shape_of(job.config)
    return {name: said for name, tool in TOOLS.items() if (said := tool(job, shape)) is not None}


def job_of_cell(cell: Cell) -> Job:
    """A CPU cell as a job."""
    return Job(
        config=json.dumps(cell.config, sort_keys=True),
        num_gpus=cell.num_processes,
        strategy=cell.strategy,
        method=cell.method,
        precision=cell.precision,
        optimizer=cell.optimizer,
        micro_batch=cell.micro_batch,
        seq_len=cell.seq_len,
        checkpointing=cell.checkpointing,
        attention=cell.attention,
        offload=cell.offload,
        sharding=cell.sharding,
        **{field: cell.zero[key] for key, field in BUCKET_SETTINGS.items() if isinstance(cell.zero.get(key), int)},
    )


def job_of_row(row: Row) -> Job:
    """A published row as a job; its model is one of the catalogue's."""
    index = load_index()
    entry = index.find(row.flags["model"])
    if entry is None:
        raise LookupError(f"{row.flags['model']} of {row.id} is not in the catalogue; predict the row again")
    names = ("strategy", "method", "precision", "optimizer", "micro_batch", "seq_len", "checkpointing", "attention")
    return Job(
        config=json.dumps(index.config(entry), sort_keys=True),
        num_gpus=find_cluster(row.flags["gpus"]).num_gpus,
        offload=row.flags["offload"],
        **{name: row.flags[name] for name in names},
    )


def main() -> None:
    measured = read_json(RESULTS)
    jobs = {
        "cells": {cell.name: job_of_cell(cell) for cell in CELLS if cell.name in measured},
        "published": {row.id: job_of_row(row) for row in published_rows(read_json(PUBLISHED)) if row.is_measured},
    }
    answers: dict[str, Any] = {
        group: {name: said for name, job in members.items() if (said := ask(job))} for group, members in jobs.items()
    }
    answers["versions"] = {name: version(name) for name in ("accelerate", "deepspeed", "llm-analysis", "transformers")}
    RIVALS.write_text(json.dumps(answers, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(*(f"{len(answers[group])} of {len(jobs[group])} {group}" for group in jobs), sep=", ")


if __name__ == "__main__":
    main()
