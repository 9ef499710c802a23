"""FSDP and ZeRO as the tools' files spell them, which is nearly alike: read in one place for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from launchkit.engine_settings import PREFETCHES, WRAPS
from launchkit.errors import ConfigFileError
from launchkit.export.read.reading import Draft, Place
from launchkit.export.read.section import AUTO, Section
from launchkit.export.read.text import parse_config
from launchkit.scenario import (
    BackwardPrefetch,
    Checkpointing,
    Method,
    Offload,
    Precision,
    Sharding,
    Strategy,
    StrategyKind,
)
from launchkit.strategies.split import mesh_of
from launchkit.units import MIB

_SHARDINGS = {str(index + 1): sharding for index, sharding in enumerate(Sharding)} | {
    sharding.name: sharding for sharding in Sharding
}
_PREFETCHES = {str(index + 1): prefetch for index, prefetch in enumerate(PREFETCHES.values())} | PREFETCHES
# DeepSpeed's keys by the fields of ``ZeroSettings``; the first that is written counts. Source: DeepSpeed 0.19.8
# ``runtime/zero/config.py``.
_ZERO_SIZES = {
    "reduce_bucket_size": ("reduce_bucket_size",),
    "allgather_bucket_size": ("allgather_bucket_size",),
    "sub_group_size": ("sub_group_size",),
    "stage3_prefetch_bucket_size": ("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
    "stage3_param_persistence_threshold": ("stage3_param_persistence_threshold", "param_persistence_threshold"),
    "stage3_max_live_parameters": ("stage3_max_live_parameters", "max_live_parameters"),
    "stage3_max_reuse_distance": ("stage3_max_reuse_distance", "max_reuse_distance"),
    "zero_hpz_partition_size": ("zero_hpz_partition_size",),
}
_ZERO_SWITCHES = {
    "overlap_comm": ("overlap_comm",),
    "contiguous_gradients": ("contiguous_gradients",),
    "reduce_scatter": ("reduce_scatter",),
    "round_robin_gradients": ("round_robin_gradients",),
    "memory_efficient_linear": ("memory_efficient_linear",),
    "zero_quantized_weights": ("zero_quantized_weights",),
    "zero_quantized_gradients": ("zero_quantized_gradients",),
}
_GATHER_ON_SAVE = (
    "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)
_DEEPSPEED_OPTIMIZERS = {
    "adam": "adamw_torch_fused",
    "adamw": "adamw_torch_fused",
    "lion": "lion_32bit",
    "muon": "muon",
    "sgd": "sgd",
}


def read_unsharded(draft: Draft, place: Place) -> None:
    """Every GPU takes part, with a copy of the model each."""
    draft.flag("strategy", StrategyKind.SINGLE if place.cluster.num_gpus == 1 else StrategyKind.DDP)


def read_ddp(keys: Section, draft: Draft) -> None:
    """DDP's settings, as ``TrainingArguments`` and Axolotl both name them."""
    cap = keys.count("ddp_bucket_cap_mb")
    if cap is not None:
        draft.ddp["bucket_cap_bytes"] = cap * MIB
    finds, broadcasts = keys.switch("ddp_find_unused_parameters"), keys.switch("ddp_broadcast_buffers")
    draft.ddp |= {} if finds is None else {"find_unused_parameters": finds}
    draft.ddp |= {} if broadcasts is None else {"broadcast_buffers": broadcasts}
    is_static = keys.switch("ddp_static_graph")
    draft.ddp |= {} if is_static is None else {"static_graph": is_static}


def read_fsdp(keys: Section, draft: Draft, place: Place, *, version: int, replicas: int = 1, shards: int = 0) -> None:
    """The section ``fsdp_config``, whose keys accelerate prefixes; ``replicas`` above 1 make it HSDP."""
    sharding = _sharding(keys, draft, version=version)
    kind = StrategyKind.FSDP if version == 1 else StrategyKind.HSDP if replicas > 1 else StrategyKind.FSDP2
    if kind is StrategyKind.HSDP:
        hybrid = {Sharding.FULL_SHARD: Sharding.HYBRID_SHARD, Sharding.SHARD_GRAD_OP: Sharding.HYBRID_SHARD_ZERO2}
        sharding = hybrid.get(sharding, sharding)
        _shard_groups(draft, place, shards=shards)
    draft.flag("strategy", kind)
    draft.flag("fsdp_sharding", sharding)
    draft.flag("offload", Offload.PARAMS if keys.switch("offload_params") else Offload.NONE)
    _fsdp_settings(keys, draft, version=version)
    _wrapping(keys, draft, place, version=version)
    if keys.switch("activation_checkpointing"):
        draft.flag("checkpointing", Checkpointing.FULL)


def _sharding(keys: Section, draft: Draft, *, version: int) -> Sharding:
    """FSDP1 reads its sharding strategy, FSDP2 whether weights are dropped after the forward, neither the other's."""
    strategy, reshards = keys.text("sharding_strategy"), keys.get("reshard_after_forward")
    if version == 2:
        if reshards is None or (isinstance(reshards, str) and reshards.upper() in _SHARDINGS):
            return Sharding.FULL_SHARD
        return Sharding.FULL_SHARD if keys.switch("reshard_after_forward") else Sharding.SHARD_GRAD_OP
    if strategy is None:
        return Sharding.FULL_SHARD
    if strategy.upper() not in _SHARDINGS:
        draft.assumed.append(f"{keys.where('sharding_strategy')} {strategy} is unknown: full_shard is counted")
    return _SHARDINGS.get(strategy.upper(), Sharding.FULL_SHARD)


def _shard_groups(draft: Draft, place: Place, *, shards: int) -> None:
    """A group of another size than the one that hybrid sharding makes by itself, a node's."""
    split = Strategy(kind=StrategyKind.HSDP).split
    usual = mesh_of(Strategy(kind=StrategyKind.HSDP, split=split), place.cluster)["dp_shard"]
    group = shards * int(str(draft.flags.get("cp", 1)))
    if group and group != usual:
        draft.fsdp["shard_group_size"] = group


def _fsdp_settings(keys: Section, draft: Draft, *, version: int) -> None:
    draft.fsdp["cpu_ram_efficient_loading"] = keys.switch("cpu_ram_efficient_loading") is not False
    draft.fsdp["full_state_dict"] = (keys.text("state_dict_type") or "FULL_STATE_DICT") == "FULL_STATE_DICT"
    keys.skip("sync_module_states")
    if version == 2:
        return
    prefetch = keys.text("backward_prefetch") or "NO_PREFETCH"  # accelerate's plugin has none unless it is told to
    draft.fsdp["backward_prefetch"] = _PREFETCHES.get(prefetch.upper(), BackwardPrefetch.NONE)
    draft.fsdp["forward_prefetch"] = keys.switch("forward_prefetch") or False
    draft.fsdp["use_orig_params"] = keys.switch("use_orig_params") is not False


def _wrapping(keys: Section, draft: Draft, place: Place, *, version: int) -> None:
    """launchkit shards block by block, or under FSDP1 the model as one; another policy gathers other pieces at once."""
    policy = keys.text("auto_wrap_policy") or "NO_WRAP"
    is_modelled = version == 1 and draft.flags.get("method", Method.FULL) is Method.FULL and not place.adapts
    if policy in WRAPS and is_modelled:
        draft.fsdp["wrap"] = WRAPS[policy]
    elif policy != "TRANSFORMER_BASED_WRAP":
        draft.ignored.append(f"{keys.where('auto_wrap_policy')} {policy}: blocks of the model are counted as the units")
    keys.skip("transformer_layer_cls_to_wrap")


def read_deepspeed_file(name: str, draft: Draft, place: Place, *, key: str, shipped: Mapping[str, Any]) -> None:
    """DeepSpeed's JSON that another file names; ``shipped`` are those that the tool brings along, by name."""
    text = place.open_file(name)
    own_name = name.rpartition("/")[2]
    if text is not None:
        config = parse_config(text, name=own_name)
    elif own_name in shipped:
        config = shipped[own_name]
        draft.assumed.append(f"{key} {name} is not here: read as {draft.tool.called} ships it")
    else:
        raise ConfigFileError(
            f"{place.file}: {key} names {name}, which is not there; write a path that starts where this file lies"
        )
    section = Section(config, file=own_name)
    read_deepspeed(section, draft, place)
    draft.ignored += [f"{own_name}: {path} is not modelled" for path, _ in section.unread() if _bears(path)]


def _bears(path: str) -> bool:
    """Whether a key of DeepSpeed's that nobody read may bear on memory or speed."""
    return not path.startswith(DEEPSPEED_UNRELATED)


# Logs, schedules, and how fp16 scales its loss.
DEEPSPEED_UNRELATED = (
    *("steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "tensorboard", "wandb", "comet"),
    *("csv_monitor", "flops_profiler", "comms_logger", "scheduler", "fp16.", "log_level", "zero_allow_untested"),
    *("prescale_gradients", "gradient_predivide", "optimizer.params", "dataloader_drop_last", "zero_force_ds_cpu"),
    *("zero_optimization.elastic_checkpoint", "zero_optimization.ignore_unused", "seq_parallel_communication"),
)


def read_deepspeed(keys: Section, draft: Draft, place: Place) -> None:
    """DeepSpeed's own file, whoever names it: strategy, offload, buffers, precision, batch."""
    zero = keys.section("zero_optimization")
    stage = zero.count("stage", least=0) or 0
    if stage not in (0, 1, 2, 3):
        raise ConfigFileError(f"{place.file}: {zero.where('stage')} is {stage}, no stage of ZeRO; write stage: 2")
    if stage == 0:
        draft.assumed.append("ZeRO stage 0 is DeepSpeed's plain data parallelism: DDP is counted")
        read_unsharded(draft, place)
    else:
        draft.flag("strategy", f"zero{stage}")
        draft.zero |= _zero_settings(zero, stage=stage)
        draft.flag("offload", _offload(zero, stage=stage))
    draft.flag("precision", _precision(keys, draft, place))
    draft.flag("sp", keys.count("sequence_parallel_size"))
    _deepspeed_batch(keys, draft, place)
    _deepspeed_optimizer(keys, draft)


def _zero_settings(zero: Section, *, stage: int) -> dict[str, Any]:
    """Fields of ``ZeroSettings``; the word ``auto`` stays, since the model decides what it means."""
    values = {field: _first(zero.size, names) for field, names in _ZERO_SIZES.items()}
    values |= {field: _first(zero.switch, names) for field, names in _ZERO_SWITCHES.items()}
    if values["overlap_comm"] is (stage == 3):
        values["overlap_comm"] = None  # DeepSpeed's own default
    if stage < 3:
        values = {field: value for field, value in values.items() if not field.startswith("stage3")}
    gathers = [zero.switch(name, auto=True) for name in _GATHER_ON_SAVE]
    values["gather_16bit_weights_on_model_save"] = any(gathers) or stage < 3
    sections = [section for name in ("offload_optimizer", "offload_param") if (section := zero.section(name))]
    values["offload_pin_memory"] = not sections or any([section.switch("pin_memory") for section in sections])
    paths = [section.text("nvme_path") for section in sections]
    values["nvme_path"] = next((path for path in paths if path), None)
    return {field: value for field, value in values.items() if value is not None}


def _first(read: Callable[[str], Any], names: tuple[str, ...]) -> Any:
    """The value of the first of ``names`` that is written."""
    values = [read(name) for name in names]
    return next((value for value in values if value is not None), None)


def _offload(zero: Section, *, stage: int) -> Offload:
    """What waits on the host: DeepSpeed offloads parameters in stage 3 alone."""
    devices = {}
    for name in ("offload_optimizer", "offload_param"):
        section = zero.section(name)
        devices[name] = section.text("device") or "none"
        section.skip("buffer_size")
    if zero.switch("cpu_offload"):
        devices["offload_optimizer"] = "cpu"
    optimizer = devices["offload_optimizer"] != "none"
    params = devices["offload_param"] != "none" and stage == 3
    if "nvme" in devices.values() and optimizer and params:
        return Offload.NVME
    by_parts = {(True, True): Offload.ALL, (True, False): Offload.OPTIMIZER, (False, True): Offload.PARAMS}
    return by_parts.get((optimizer, params), Offload.NONE)


def _precision(keys: Section, draft: Draft, place: Place) -> Precision:
    """Of DeepSpeed's weights; ``auto`` is the trainer's own, which has been read before where its file was."""
    bf16, fp16 = keys.section("bf16"), keys.section("fp16")
    said = draft.flags.get("precision")
    trainers = Precision(str(said)) if said is not None else None
    is_auto = AUTO in (bf16.get("enabled"), fp16.get("enabled"))
    if bf16.switch("enabled", auto=False):
        masters = bf16.switch("bf16_master_weights_and_grads"), bf16.switch("bf16_optimizer_states")
        is_full = draft.flags.get("method", Method.FULL) == Method.FULL and not place.adapts
        return Precision.BF16_PARAMS if all(masters) and is_full else Precision.BF16
    if fp16.switch("enabled", auto=False):
        return Precision.FP16
    if not is_auto:
        return Precision.FP32
    if trainers in (None, Precision.BF16_PARAMS, Precision.BF16_PURE):
        if trainers is None:
            draft.assumed.append('"auto" precision is the trainer\'s: bf16 is counted')
        return Precision.BF16
    return trainers


def _deepspeed_batch(keys: Section, draft: Draft, place: Place) -> None:
    """Numbers, where the trainer does not fill in its own."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    micro, steps, total = (None if keys.get(name) == AUTO else keys.count(name) for name in names)
    ranks = place.cluster.num_gpus // int(str(draft.flags.get("sp", 1)))
    if micro is None and total is not None:
        micro = max(1, total // ((steps or 1) * max(1, ranks)))
    if steps is None and total is not None and micro is not None:
        steps = max(1, total // (micro * max(1, ranks)))
    draft.flag("micro_batch", micro)
    draft.accumulation = steps or draft.accumulation
    if keys.get("gradient_clipping") != AUTO:
        draft.max_grad_norm = keys.number("gradient_clipping") or 0.0


def _deepspeed_optimizer(keys: Section, draft: Draft) -> None:
    """DeepSpeed's own optimizer, where one is named; else it is the script's."""
    optimizer = keys.section("optimizer")
    name = optimizer.text("type")
    if name is None:
        return
    nearest = _DEEPSPEED_OPTIMIZERS.get(name.lower())
    draft.flag("optimizer", nearest or "adamw_torch_fused")
    draft.assumed.append(f"{optimizer.where('type')} {name} is counted as {nearest or 'adamw_torch_fused'}")
