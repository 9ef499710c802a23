"""Runs one cell in this process and writes what the real allocator did; ``bench.accuracy.measure`` starts it.

The allocator is torch's own CPU allocator, read through
``torch.profiler(profile_memory=True)``: each allocation event carries ``total_allocated``, which counts only what was
allocated since the profiler started, so it starts before the model is built.

The profiler sees only threads that it was propagated to. A collective's buffer whose last reference a gloo thread drops
once its work is done is freed unseen, and the counter keeps it for good. Between steps no buffer lives, so what the
counter holds beyond parameters, buffers and optimizer states is such a *ghost*. Ghosts of earlier steps are taken off
a step's peak; those that arise in the step itself may or may not have been there at its peak, which makes a range.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from bench.accuracy.cell import Cell
from bench.accuracy.inputs import task_batches

MARK = "launchkit::"
GLOO_SECONDS = 0.005  # after which gloo's thread has let go of what it has done
DTENSOR_SECONDS = 0.02  # after which it has done it too, if no rank is late

FSDP = ("fsdp", "fsdp2", "hsdp")

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_torch_fused": ("AdamW", {"fused": True}),
    "adamw_torch": ("AdamW", {}),
    "adamw_torch_foreach": ("AdamW", {"foreach": True}),
    "sgd": ("SGD", {}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
    "nadamw": ("NAdam", {"decoupled_weight_decay": True}),
}


def build_model(cell: Cell) -> nn.Module:
    """The cell's model with random weights, adapters and checkpointing in place."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(cell.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    narrow = cell.precision.startswith("bf16-") or (cell.is_mixed and loads_narrow(cell))
    dtype = torch.bfloat16 if narrow else torch.float32
    named = getattr(transformers, (config.architectures or [""])[0], None)
    build = named._from_config if named else AutoModelForCausalLM.from_config
    model: Any = build(config, attn_implementation=cell.attention, dtype=dtype)
    if cell.use_cache is not None:  # where the Trainer sets it: a decoder's own copy of the configuration keeps its own
        for part in (model.config, model.config.get_text_config()):
            part.use_cache = cell.use_cache
    head = model.get_output_embeddings()
    if head is not None and cell.config.get("tie_word_embeddings") is False and config.tie_word_embeddings:
        head.weight = nn.Parameter(head.weight.detach().clone())  # T5's class ties it, and a checkpoint brings its own
    if cell.method == "qlora":
        model = quantised(model, cell, dtype=dtype)
    adapts_parts = cell.tp > 1 and cell.method != "full"  # adapters go on a model that is split already
    return model if adapts_parts else made_trainable(model, cell)


def made_trainable(model: Any, cell: Cell) -> nn.Module:
    """``model`` with what is frozen, adapters and checkpointing in place."""
    frozen = set(cell.freeze.split(",")) if cell.freeze else set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = parameter.requires_grad and frozen.isdisjoint(name.split("."))
    if cell.method != "full":
        model = with_adapter(model, cell)
    if cell.precision == "fp8" and cell.trainer == "loop":  # elsewhere accelerate does it
        convert_linears(model, cell)
    if cell.checkpointing != "none":
        enable_checkpointing(model, cell)
    trained: nn.Module = model.train()
    return trained


def convert_linears(model: nn.Module, cell: Cell) -> None:
    """accelerate's recipe of torchao's layers. Their products run for real: ``torch._scaled_mm`` has a CPU kernel."""
    from accelerate.utils.ao import convert_model_to_fp8_ao
    from torchao.float8 import Float8LinearConfig

    config = Float8LinearConfig(pad_inner_dim=True, enable_fsdp_float8_all_gather=cell.gathers_float8)
    convert_model_to_fp8_ao(model, config=config)


def float8_variables(cell: Cell) -> dict[str, str]:
    """What ``accelerate launch`` would say of it in the environment."""
    if cell.precision != "fp8":
        return {}
    return {
        "ACCELERATE_MIXED_PRECISION": "fp8",
        "ACCELERATE_FP8_BACKEND": "AO",
        "ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER": str(cell.gathers_float8),
    }


def scale_ahead(cell: Cell, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What accelerate hangs behind the optimizer's step: the scales of all weights, in one message."""
    if cell.gathers_float8:
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

        optimizer.register_step_post_hook(lambda *_, **__: precompute_float8_dynamic_scale_for_fsdp(model))


def loads_narrow(cell: Cell) -> bool:
    """Whether frozen weights are loaded in 16 bits, as the built-in fine-tune does, under mixed precision."""
    return cell.method == "qlora" or (cell.method == "lora" and cell.strategy in FSDP and cell.trainer != "loop")


def enable_checkpointing(model: Any, cell: Cell) -> None:
    """As the trainers do: transformers' own, re-entering only if told to; TRL's selection of what is kept."""
    if cell.checkpointing == "selective":
        from trl.models import enable_selective_activation_checkpointing

        enable_selective_activation_checkpointing(model.get_base_model() if cell.method != "full" else model)
    offload = {"offload": True} if cell.checkpointing == "offload" else {}
    if cell.checkpointing == "reentrant":
        model.enable_input_require_grads()
    kwargs = {"use_reentrant": cell.checkpointing == "reentrant"}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, **offload)


def quantised(model: Any, cell: Cell, *, dtype: torch.dtype) -> nn.Module:
    """The model saved and loaded again in 4 bits, as QLoRA loads it, and what is not quantised in fp32."""
    import tempfile

    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=cell.attention, quantization_config=four_bits
        )
    if cell.use_cache is not None:
        model.config.use_cache = cell.use_cache
    for parameter in model.parameters():  # what was not quantised may still lie in the mapped file
        if parameter.dtype is not torch.uint8:
            parameter.data = parameter.data.clone()
    if cell.trainer == "trl":  # which leaves this to whoever loads the model
        return model
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def with_adapter(model: Any, cell: Cell) -> nn.Module:
    """``model`` under PEFT's adapter, which is all that is trained."""
    from peft import LoraConfig, get_peft_model

    from launchkit.finetune.split_adapters import declare_whole_widths
    from launchkit.trace.methods import lora_targets, peft_task

    targets, parameters = lora_targets(model, cell.lora_targets)
    config = LoraConfig(
        r=cell.lora_rank,
        lora_alpha=2 * cell.lora_rank,
        target_modules=targets,
        target_parameters=parameters or None,
        use_dora=cell.dora,
        use_rslora=cell.rslora,
        lora_dropout=cell.lora_dropout,
        task_type=peft_task(model),
        modules_to_save=cell.lora_modules_to_save.split(",") if cell.lora_modules_to_save else None,
    )
    adapted = get_peft_model(model, config)
    if cell.tp > 1:
        declare_whole_widths(adapted)
    return adapted


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_optimizer(cell: Cell, model: nn.Module) -> torch.optim.Optimizer:
    """Parameters of one device mesh in one group, as the Trainer has them: no kernel takes them mixed."""
    make, arguments = optimizer_class(cell)
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in trainable(model):
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    parameters = [{"params": group} for group in groups.values()]
    return make(parameters, **{"lr": 1e-4, **arguments})


def optimizer_class(cell: Cell) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """torch's own by name; of others, what the Trainer makes of the name."""
    if cell.optimizer in OPTIMIZERS:
        name, arguments = OPTIMIZERS[cell.optimizer]
        return getattr(torch.optim, name), arguments
    from transformers import Trainer, TrainingArguments

    named = TrainingArguments(**trainer_optimizer(cell), use_cpu=True, report_to=[])
    made: tuple[Any, dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(named)
    return made


def trainer_optimizer(cell: Cell) -> dict[str, str]:
    """The optimizer's name and arguments as the Trainer takes them."""
    from launchkit.optimizers import find

    return find(cell.optimizer).trainer_arguments


def autocast(cell: Cell) -> contextlib.AbstractContextManager[Any]:
    """Autocast where ``--trainer loop`` has it: mixed precision without an engine that casts by itself."""
    engine_casts = cell.strategy in FSDP or cell.strategy.startswith("zero")
    on = cell.precision in ("bf16-params", "fp8") or (cell.is_mixed and not engine_casts)
    return torch.autocast("cpu", dtype=torch.bfloat16) if on else contextlib.nullcontext()


def wrapped_classes(cell: Cell, model: nn.Module) -> set[str]:
    """The classes of the model's blocks."""
    base = model.get_base_model() if cell.method != "full" else model
    return set(base._no_split_modules or ()) & {type(module).__name__ for module in base.modules()}


def split(cell: Cell, model: Any) -> Any:
    """``model`` under transformers' tensor-parallel plan, each rank with its own part of each matrix. Returns the mesh
    of the ranks that hold the same part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    shape = (cell.num_processes // cell.tp, cell.tp)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("fsdp", "tp"))
    untie(model)
    model.config.distributed_config = DistributedConfig(tp_size=cell.tp)
    model._device_mesh = mesh["tp"]  # where PEFT looks for it
    plan, _, _ = model._resolve_parallel_plans(model.config.distributed_config)
    apply_tensor_parallelism(model, mesh["tp"], plan)
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):  # else it stays a view of the whole
            parameter._local_tensor = parameter._local_tensor.detach().clone()
    model.tie_weights()
    return mesh["fsdp"]


def untie(model: Any) -> None:
    """Gives the head a weight of its own, as ``from_pretrained`` finds it when it splits."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())


def shard(cell: Cell, model: nn.Module) -> nn.Module:
    """``fully_shard`` on every block, then on the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    group_size = cell.shard_group_size or cell.num_processes
    if cell.tp > 1:
        mesh = split(cell, model)
    elif cell.sharding.startswith("hybrid"):
        shape = (cell.num_processes // group_size, group_size)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (cell.num_processes,))
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=dtypes[cell.reduce_dtype])
        if cell.is_mixed
        else MixedPrecisionPolicy()
    )
    # None is the default: blocks are resharded after their forward, the root is not
    reshard = None if cell.sharding in ("full_shard", "hybrid_shard") else False
    classes = wrapped_classes(cell, model)
    for module in model.modules():
        if type(module).__name__ in classes:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return model


def shard_flat(cell: Cell, model: nn.Module) -> nn.Module:
    """``FullyShardedDataParallel`` around every block and the root, with accelerate's defaults."""
    from functools import partial

    from torch.distributed.fsdp import BackwardPrefetch, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    prefetch = cell.fsdp.get("backward_prefetch", "BACKWARD_PRE")
    wraps = cell.fsdp.get("auto_wrap_policy") != "NO_WRAP"
    names = wrapped_classes(cell, model)
    classes = {type(module) for module in model.modules() if type(module).__name__ in names}
    reduce_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cell.reduce_dtype]
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype, buffer_dtype=torch.bfloat16)
    # the member is spelled with an underscore, since torch does not document it
    sharding = "_HYBRID_SHARD_ZERO2" if cell.sharding == "hybrid_shard_zero2" else cell.sharding.upper()
    return FullyShardedDataParallel(
        model,
        process_group=shard_groups(cell),
        sharding_strategy=ShardingStrategy[sharding],
        auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls=classes) if wraps else None,
        mixed_precision=policy if cell.is_mixed else None,
        backward_prefetch=None if prefetch == "NO_PREFETCH" else BackwardPrefetch[prefetch],
        forward_prefetch=cell.fsdp.get("forward_prefetch", False),
        limit_all_gathers=cell.fsdp.get("limit_all_gathers", True),
        use_orig_params=cell.use_orig_params,
        device_id=torch.device("cpu"),
    )


def shard_groups(cell: Cell) -> Any:
    """This rank's shard group and its group of replicas, under hybrid sharding; else None, which means all ranks."""
    size = cell.shard_group_size or cell.num_processes
    if not cell.sharding.startswith("hybrid"):
        return None
    ranks = torch.arange(cell.num_processes).reshape(-1, size)
    shards, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
    replicas, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist())
    return shards, replicas


def replicate(cell: Cell, model: nn.Module) -> nn.Module:
    """``DistributedDataParallel`` with the cell's arguments."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    arguments = dict(cell.ddp)
    hook = arguments.pop("comm_hook", "")
    wrapped = nn.parallel.DistributedDataParallel(model, **arguments)
    if hook:
        wrapped.register_comm_hook(None, getattr(default_hooks, f"{hook}_compress_hook"))
    return wrapped


def batches(cell: Cell, vocab_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """One micro-batch after another, labels in a tensor of their own as collators make them."""
    while True:
        ids = torch.randint(0, vocab_size, (cell.micro_batch, cell.seq_len))
        yield {"input_ids": ids, "labels": ids.clone()}


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this rank's parameters, buffers, gradients and optimizer states, and of DDP's buckets."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    # under use_orig_params these outlive zero_grad
    flat = [module._flat_param for module in model.modules() if getattr(module, "_has_params", False)]
    tensors += [parameter.grad for parameter in flat if parameter.grad is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = getattr(local, "_tensor", local).untyped_storage()  # torchao wraps what it casts before gathering
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values()) + reducer_bytes(model)


def reducer_bytes(model: nn.Module) -> int:
    """Bytes of DDP's buckets, which no tensor of Python's shows: as many as gradients, and a map of what was used."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return 0
    trained = trainable(model)
    used = 4 * len(trained) if model.find_unused_parameters and not model.static_graph else 0
    return sum(parameter.numel() * parameter.element_size() for parameter in trained) + used


def run_loop(cell: Cell) -> list[int]:
    """The plain step of ``--trainer loop``, on one process, DDP or FSDP. On several, what is resident at the start
    of each step and at the end; elsewhere nothing, as no ghosts arise."""
    model = build_model(cell)
    config = model.config
    if cell.strategy in ("fsdp2", "hsdp"):
        model = shard(cell, model)
    elif cell.strategy == "fsdp":
        model = shard_flat(cell, model)
    elif cell.strategy == "ddp":
        model = replicate(cell, model)
    elif cell.tp > 1:
        split(cell, model)
        model = model if cell.method == "full" else made_trainable(model, cell)
    optimizer = build_optimizer(cell, model)
    scale_ahead(cell, model, optimizer)
    data = task_batches(cell, config)
    resident = []
    for step in range(cell.num_steps):
        gc.collect()
        resident.append(resident_bytes(model, optimizer))
        with record_function(f"{MARK}step.{step}"):
            for micro in range(cell.gradient_accumulation_steps):
                batch = next(data)
                with gradient_sync(cell, model, last=micro == cell.gradient_accumulation_steps - 1):
                    with record_function(f"{MARK}forward"), autocast(cell):
                        loss = model(**batch).loss
                    with record_function(f"{MARK}backward"):
                        loss.backward()
                del loss
            with record_function(f"{MARK}optimizer"):
                if cell.max_grad_norm:
                    nn.utils.clip_grad_norm_(trainable(model), cell.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            del batch  # a loop's variable, which holds the last one while the optimizer steps
    resident.append(resident_bytes(model, optimizer))
    return resident if cell.num_processes > 1 else []


def gradient_sync(cell: Cell, model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """``no_sync`` for DDP's inner micro-batches; FSDP2 reduces after each, as accelerate does by default."""
    if cell.strategy == "ddp" and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def deepspeed_config(cell: Cell) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": int(cell.strategy[-1]), **cell.zero}
    if cell.offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}  # pinning takes a GPU's driver
    if cell.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    bf16 = {"enabled": cell.precision != "fp32"}
    if cell.method == "full" and cell.precision.startswith("bf16-"):
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return {
        "train_micro_batch_size_per_gpu": cell.micro_batch,
        "gradient_accumulation_steps": cell.gradient_accumulation_steps,
        "gradient_clipping": (cell.max_grad_norm or 1.0) if cell.trainer == "hf" else cell.max_grad_norm,
        "zero_optimization": zero,
        "bf16": bf16,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def uncompiled_deepspeed() -> Any:
    """DeepSpeed on the CPU without the transport that every run there would compile."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from launchkit.finetune import cpu_fsdp

    cpu_fsdp.skip_shared_memory_extension()
    return deepspeed


class _Finished:
    """A collective's work that is done already, and is let go of a moment later.

    A thread of gloo's holds it too. Whoever lets go last frees the copies that gloo made, and the profiler sees that
    only where it is this thread. What is still under way would hold them for as long as the other rank is late.
    """

    def __init__(self, work: Any) -> None:
        self._work = work
        work.wait()
        time.sleep(GLOO_SECONDS)

    def wait(self, *arguments: Any) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def outlive_gloo() -> None:
    """Makes every collective of this process a ``_Finished`` one, so that no ghosts arise and runs repeat."""

    def patched(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, async_op: bool = False, **others: Any) -> Any:
            work = collective(*arguments, async_op=True, **others)
            finished = None if work is None else _Finished(work)
            return finished if async_op else None

        return run

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "broadcast", "reduce"):
        setattr(dist, name, patched(getattr(dist, name)))


def outlive_gloo_under_dtensor() -> None:
    """Waits a moment before each wait for a functional collective, as DTensor has them, so that few ghosts arise: the
    work is done by then, and this thread the last to hold it."""
    from torch.distributed import _functional_collectives as functional

    original = functional.wait_tensor

    def wait_tensor(tensor: torch.Tensor) -> torch.Tensor:
        time.sleep(DTENSOR_SECONDS)
        return original(tensor)

    functional.wait_tensor = wait_tensor


def python_bytes() -> int:
    """Bytes of every CPU storage that a tensor known to Python holds: between steps, all that is resident."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def share_sequences(cell: Cell, model: nn.Module) -> Any:
    """DeepSpeed's Ulysses in the model's attention, with its groups of ranks; None where nothing is shared."""
    if cell.sp == 1:
        return None
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=cell.attention,
        sequence_parallel_size=cell.sp,
        micro_batch_size=cell.micro_batch,
        seq_length_is_variable=True,
    )


def shares(cell: Cell, vocab_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of each micro-batch, as ``UlyssesSPDataLoaderAdapter`` and the Trainer hand it over."""
    length = cell.seq_len // cell.sp
    first = dist.get_rank() % cell.sp * length
    while True:
        ids = torch.randint(0, vocab_size, (cell.micro_batch, length))
        positions = torch.arange(first, first + length).expand(cell.micro_batch, -1).contiguous()
        labels = ids.clone()
        mask = torch.ones_like(ids)
        yield {
            "input_ids": ids, "attention_mask": mask, "position_ids": positions, "shift_labels": labels,
            "labels": labels,
        }  # fmt: skip


def run_deepspeed(cell: Cell) -> list[int]:
    """Raw ``deepspeed.initialize`` with a torch optimizer; nothing is compiled. What is resident at the start of each
    step and at the end, as of ``run_loop``."""
    deepspeed = uncompiled_deepspeed()
    outlive_gloo()
    before = python_bytes()
    deepspeed.init_distributed(dist_backend="gloo")
    model = build_model(cell)
    config = model.config
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(cell, model),
        config=deepspeed_config(cell),
        mpu=share_sequences(cell, model),
    )
    del model
    vocab_size = config.get_text_config().vocab_size
    data = shares(cell, vocab_size) if cell.sp > 1 else batches(cell, vocab_size)
    if cell.images:
        data = task_batches(cell, config)
    resident = []
    for step in range(cell.num_steps):
        gc.collect()
        resident.append(python_bytes() - before)
        with record_function(f"{MARK}step.{step}"):
            for _ in range(cell.gradient_accumulation_steps):
                batch = next(data)
                with record_function(f"{MARK}forward"):
                    loss = engine(**batch).loss
                with record_function(f"{MARK}backward"):
                    engine.backward(loss)
                del loss
                with record_function(f"{MARK}optimizer"):
                    engine.step()
                del batch  # a loop's variable, which holds it while the optimizer steps
    gc.collect()
    return [*resident, python_bytes() - before]


FSDP_VARIABLES: dict[str, Callable[[Cell], dict[str, str]]] = {
    "fsdp": lambda cell: {
        "FSDP_VERSION": "1",
        "FSDP_SHARDING_STRATEGY": cell.sharding.upper(),
        "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",
        "FSDP_USE_ORIG_PARAMS": str(cell.use_orig_params).lower(),
    },
    "fsdp2": lambda cell: {
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": str(cell.sharding == "full_shard").lower(),
    },
}


def shard_through_accelerate(cell: Cell, model: nn.Module) -> None:
    """What ``accelerate launch`` would say in the environment, on processes that count as devices."""
    from launchkit.finetune import cpu_fsdp

    cpu_fsdp.install()
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16" if cell.is_mixed else "no",
        **FSDP_VARIABLES[cell.strategy](cell),
        "FSDP_AUTO_WRAP_POLICY": cell.fsdp.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        "FSDP_TRANSFORMER_CLS_TO_WRAP": ",".join(wrapped_classes(cell, model)),
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        **float8_variables(cell),
    }


def split_through_transformers(cell: Cell, model: Any) -> nn.Module:
    """The model saved, and loaded again by each rank in its part (``DistributedConfig``), which the Trainer finds; on
    processes that count as devices."""
    import tempfile

    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    from launchkit.finetune import cpu_fsdp

    cpu_fsdp.install()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if cell.is_mixed else "no"
    parts = DistributedConfig(
        tp_size=cell.tp, fsdp_size=cell.num_processes // cell.tp, fsdp_mixed_precision=cell.is_mixed
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=parts, dtype=model.dtype)
    for parameter in model.parameters():  # what was not cut may still lie in the mapped file
        part = getattr(parameter, "_local_tensor", None)
        if part is None:
            parameter.data = parameter.data.clone()
        else:
            parameter._local_tensor = part.detach().clone()
    model.config.use_cache = bool(cell.use_cache)
    return made_trainable(model, cell)


def make_trainer(cell: Cell, model: nn.Module, rows: list[dict[str, list[int]]], **values: Any) -> Any:
    """``transformers.Trainer``, or TRL's ``SFTTrainer`` on rows that are tokens already."""
    from transformers import Trainer, TrainingArguments

    callbacks = values.pop("callbacks")
    if cell.trainer == "hf":
        return Trainer(model=model, args=TrainingArguments(**values), train_dataset=rows, callbacks=callbacks)
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    if cell.packing:
        half = cell.seq_len // 2
        rows = [{name: ids[start : start + half] for name, ids in row.items()} for row in rows for start in (0, half)]
        arguments = SFTConfig(**values, max_length=cell.seq_len, packing=True)
    else:
        arguments = SFTConfig(**values, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def run_trainer(cell: Cell) -> list[int]:
    """The trainer of transformers or TRL with its defaults, on one process, DDP, FSDP or ZeRO."""
    import tempfile

    from transformers import TrainerCallback

    is_zero = cell.strategy.startswith("zero")
    if is_zero:
        uncompiled_deepspeed()
        outlive_gloo()
    os.environ |= float8_variables(cell)
    model = build_model(cell)
    is_sharded = cell.strategy in FSDP_VARIABLES
    if cell.tp > 1:
        is_sharded, model = True, split_through_transformers(cell, model)
    elif is_sharded:
        shard_through_accelerate(cell, model)
    data = task_batches(cell, model.config)
    # One more than is used, as a loader holds one ahead until its data ends.
    num_batches = (cell.num_steps * cell.gradient_accumulation_steps + 1) * cell.num_processes
    if cell.evaluation_micro_batch:
        num_batches = max(num_batches, 2 * cell.evaluation_micro_batch * cell.num_processes // cell.micro_batch)
    rows = [
        {name: tensor[row].tolist() for name, tensor in batch.items()}
        for batch in (next(data) for _ in range(num_batches))
        for row in range(cell.micro_batch)
    ]

    resident: list[int] = []

    class Marks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            gc.collect()
            resident.append(resident_bytes(trainer.model_wrapped, others["optimizer"]))
            self.mark = record_function(f"{MARK}step.{state.global_step}")
            self.mark.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.mark.__exit__(None, None, None)
            if state.global_step == cell.num_steps:
                resident.append(resident_bytes(trainer.model_wrapped, others["optimizer"]))

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            cell,
            model,
            rows,
            callbacks=[Marks()],
            output_dir=folder,
            use_cpu=not is_sharded,
            max_steps=cell.num_steps,
            per_device_train_batch_size=cell.micro_batch,
            gradient_accumulation_steps=cell.gradient_accumulation_steps,
            gradient_checkpointing=cell.checkpointing == "full",
            **trainer_optimizer(cell),
            bf16=cell.precision in ("bf16", "bf16-params") and not is_sharded,
            max_grad_norm=cell.max_grad_norm or 1.0,
            per_device_eval_batch_size=cell.evaluation_micro_batch or 8,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            deepspeed=deepspeed_config(cell) if is_zero else None,
        )
        trainer.train()
        if cell.evaluation_micro_batch:
            gc.collect()
            with record_function(f"{MARK}evaluation"):
                trainer.evaluate(trainer.train_dataset)
    return resident if is_sharded or cell.strategy == "ddp" else []


def runner(cell: Cell) -> Callable[[Cell], list[int]]:
    if cell.trainer != "loop":
        return run_trainer
    return run_deepspeed if cell.strategy.startswith("zero") else run_loop


def walk(cell: Cell, tree: list[Any]) -> tuple[list[tuple[Any, tuple[str, ...]]], dict[str, list[tuple[int, int]]]]:
    """The allocation events in time order, each with the operators around it, and the marked spans by name."""
    allocations: list[tuple[Any, tuple[str, ...]]] = []
    spans: dict[str, list[tuple[int, int]]] = {}
    stack: list[tuple[Any, tuple[str, ...]]] = [(event, ()) for event in tree]
    while stack:
        event, path = stack.pop()
        if event.tag == torch._C._profiler._EventType.Allocation:
            allocations.append((event, path))
            continue
        if event.name.startswith(MARK):
            spans.setdefault(event.name.removeprefix(MARK), []).append((event.start_time_ns, event.end_time_ns))
        stack.extend((child, (*path, event.name)) for child in event.children)
    allocations.sort(key=lambda pair: pair[0].start_time_ns)
    return allocations, spans


def summarise(cell: Cell, prof: Any, *, resident: list[int], timeline: bool) -> dict[str, Any]:
    """Peaks per step and per phase, bytes live between steps, and on demand each event of every step."""
    allocations, spans = walk(cell, prof.profiler.kineto_results.experimental_event_tree())
    times = [event.start_time_ns for event, _ in allocations]
    totals = [event.extra_fields.total_allocated for event, _ in allocations]

    def peak(span: tuple[int, int]) -> int:
        """Includes what was live when the span began."""
        before = [total for time, total in zip(times, totals, strict=True) if time < span[0]][-1:]
        return max(before + [t for time, t in zip(times, totals, strict=True) if span[0] <= time <= span[1]])

    steps = [spans[f"step.{step}"][0] for step in range(cell.num_steps)]
    last = steps[-1]
    phases = {
        name: max(peak(span) for span in spans[name] if last[0] <= span[0] <= last[1])
        for name in ("forward", "backward", "optimizer")
        if name in spans
    }

    def live(moment: int) -> int:
        return next((t for time, t in zip(reversed(times), reversed(totals), strict=True) if time < moment), 0)

    moments = [start for start, _ in steps] + [last[1]]
    ghosts = [max(0, live(moment) - known) for moment, known in zip(moments, resident, strict=bool(resident))]
    ghosts = ghosts or [0] * len(moments)
    highs = [peak(span) - ghosts[step] for step, span in enumerate(steps)]
    result: dict[str, Any] = {
        "rank": int(os.environ.get("RANK", "0")),
        "build_peak_bytes": max(total for time, total in zip(times, totals, strict=True) if time < steps[0][0]),
        "step_peaks_bytes": highs,
        "step_floors_bytes": [high - ghosts[step + 1] + ghosts[step] for step, high in enumerate(highs)],
        "phase_peaks_bytes": {name: high - ghosts[-2] for name, high in phases.items()},
        "live_between_steps_bytes": live(last[0]) - ghosts[-2],
        "ghost_bytes": ghosts,
    }
    if "evaluation" in spans:
        result["evaluation_peak_bytes"] = peak(spans["evaluation"][0]) - ghosts[-1]
    if timeline:
        result["timeline"] = [
            {
                "step": step,
                "phase": next((n for n in phases for a, b in spans[n] if a <= event.start_time_ns <= b), ""),
                "bytes": event.extra_fields.alloc_size,
                "live": event.extra_fields.total_allocated,
                "address": event.extra_fields.ptr,
                "where": [name for name in path if not name.startswith(MARK)],
            }
            for event, path in allocations
            for step, (start, end) in enumerate(steps)
            if start <= event.start_time_ns <= end
        ]
    return result


def run(cell: Cell, folder: Path, *, timeline: bool) -> None:
    """Runs ``cell`` and writes this rank's numbers into ``folder``."""
    torch.manual_seed(0)
    torch.backends.mkldnn.enabled = cell.onednn  # its scratch, which only CPUs have, makes the peak of many steps
    if cell.tp > 1:
        outlive_gloo_under_dtensor()
    if cell.num_processes > 1 and cell.trainer == "loop":
        dist.init_process_group("gloo")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        resident = runner(cell)(cell)
    result = summarise(cell, prof, resident=resident, timeline=timeline)
    (folder / f"rank{result['rank']}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
