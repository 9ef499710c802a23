"""DeepSpeed's JSON. Every size is read from ``ZeroSettings``, the fields that the memory rewrite counts."""

from __future__ import annotations

from launchkit.export.layout import autocast_format, check_expressible, clip_norm, num_data_ranks, num_processes
from launchkit.hardware import Cluster
from launchkit.plan import Candidate
from launchkit.scenario import Offload, ZeroSettings
from launchkit.units import divide_up

AUTO = "auto"
NVME_DIRECTORY = "nvme_offload"  # beside the run, where the user named no other path
PARAM_SWAP_BUFFER_ELEMENTS = 100_000_000  # DeepSpeed 0.19.8, zero/offload_config.py, offload_param.buffer_size
_CPU_ADAM_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")  # what DeepSpeedCPUAdam computes as well


def deepspeed_config(
    candidate: Candidate, cluster: Cluster, *, auto: bool, cpu_adam_builds: bool = False
) -> dict[str, object]:
    """The ZeRO configuration of ``candidate``.

    ``auto`` leaves batch sizes and clipping to the Hugging Face Trainer, which fills them from its own arguments;
    ``deepspeed.initialize`` in a script does not know the word, so such a script needs numbers. Precision is never
    ``auto``: a run that disagrees with the plan then stops with a message instead of taking twice the memory.

    No optimizer is named: the script's own is used, and since it is not DeepSpeed's, ``zero_force_ds_cpu_optimizer``
    is false under offload unless ``cpu_adam_builds`` (otherwise accelerate swaps any optimizer for DeepSpeedCPUAdam,
    which a machine without a matching compiler cannot build).
    """
    check_expressible(candidate, cluster)
    return deepspeed_keys(candidate, cluster, auto=auto, cpu_adam_builds=cpu_adam_builds)


def deepspeed_keys(
    candidate: Candidate, cluster: Cluster, *, auto: bool, cpu_adam_builds: bool = False
) -> dict[str, object]:
    """``deepspeed_config`` without its checks."""
    scenario = candidate.scenario
    config: dict[str, object] = {
        **_batch(candidate, cluster, auto=auto),
        "gradient_clipping": AUTO if auto else clip_norm(candidate),
        **_precision(candidate),
        "zero_allow_untested_optimizer": True,
    }
    if scenario.strategy.offload.optimizer:
        config["zero_force_ds_cpu_optimizer"] = cpu_adam_builds and scenario.training.optimizer in _CPU_ADAM_OPTIMIZERS
    if scenario.strategy.split.sp > 1:
        config["seq_parallel_communication_data_type"] = "fp32"  # DeepSpeed's default, which the plan counted
    config["zero_optimization"] = _zero_section(candidate, cluster)
    return config


def _batch(candidate: Candidate, cluster: Cluster, *, auto: bool) -> dict[str, object]:
    batch = candidate.scenario.batch
    sizes = {
        "train_batch_size": batch.global_batch(num_data_ranks(candidate, cluster)),
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
    }
    return {key: AUTO if auto else value for key, value in sizes.items()}


def _precision(candidate: Candidate) -> dict[str, object]:
    """At most one of ``bf16`` and ``fp16``; neither means fp32."""
    name = autocast_format(candidate.scenario)
    if name == "no":
        return {}
    section: dict[str, object] = {"enabled": True}
    if candidate.scenario.training.has_bf16_masters:
        section |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return {name: section}


def _zero_section(candidate: Candidate, cluster: Cluster) -> dict[str, object]:
    strategy = candidate.scenario.strategy
    stage, zero = strategy.kind.zero_stage, strategy.zero
    section: dict[str, object] = {
        "stage": stage,
        "overlap_comm": stage == 3 if zero.overlap_comm is None else zero.overlap_comm,
        "contiguous_gradients": zero.contiguous_gradients,
        "reduce_scatter": zero.reduce_scatter,
        "reduce_bucket_size": zero.reduce_bucket_size,
        **(_stage3_sizes(zero) if stage == 3 else _bucket_sizes(zero)),
    }
    if strategy.offload.optimizer:
        section["offload_optimizer"] = _offload(strategy.offload, zero)
    if strategy.offload.params:
        section["offload_param"] = _offload(strategy.offload, zero) | _swap_buffer(candidate, cluster)
    return section


def _bucket_sizes(zero: ZeroSettings) -> dict[str, object]:
    return {"allgather_bucket_size": zero.allgather_bucket_size, "round_robin_gradients": zero.round_robin_gradients}


def _stage3_sizes(zero: ZeroSettings) -> dict[str, object]:
    return {
        "sub_group_size": zero.sub_group_size,
        "stage3_prefetch_bucket_size": zero.stage3_prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero.stage3_param_persistence_threshold,
        "stage3_max_live_parameters": zero.stage3_max_live_parameters,
        "stage3_max_reuse_distance": zero.stage3_max_reuse_distance,
        "stage3_gather_16bit_weights_on_model_save": zero.gather_16bit_weights_on_model_save,
        **({} if zero.memory_efficient_linear else {"memory_efficient_linear": False}),
        **_hierarchy(zero),
    }


def _hierarchy(zero: ZeroSettings) -> dict[str, object]:
    """ZeRO++ and MiCS, where they are on."""
    off = ZeroSettings()
    values = {
        "zero_hpz_partition_size": zero.zero_hpz_partition_size,
        "zero_quantized_weights": zero.zero_quantized_weights,
        "zero_quantized_gradients": zero.zero_quantized_gradients,
        "mics_shard_size": zero.mics_shard_size,
    }
    return {key: value for key, value in values.items() if value != getattr(off, key)}


def _offload(offload: Offload, zero: ZeroSettings) -> dict[str, object]:
    if offload is Offload.NVME:
        path = zero.nvme_path or NVME_DIRECTORY
        return {"device": "nvme", "nvme_path": path, "pin_memory": zero.offload_pin_memory}
    return {"device": "cpu", "pin_memory": zero.offload_pin_memory}


def _swap_buffer(candidate: Candidate, cluster: Cluster) -> dict[str, object]:
    """A swap buffer holds one rank's part of the largest tensor, an embedding; DeepSpeed asserts that it fits."""
    if candidate.scenario.strategy.offload is not Offload.NVME:
        return {}
    embedding = candidate.model.vocab_size * candidate.model.hidden_size
    shard = divide_up(embedding, num_processes(candidate, cluster))
    return {"buffer_size": max(shard, PARAM_SWAP_BUFFER_ELEMENTS)}
