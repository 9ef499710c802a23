"""Accelerate's YAML, for ``accelerate launch --config_file``."""

from __future__ import annotations

from launchkit.engine_settings import PREFETCHES, word_of
from launchkit.export.layout import (
    DEEPSPEED_FILE,
    FsdpLayout,
    autocast_format,
    check_expressible,
    float8_section,
    fsdp_layout,
    is_split_by_transformers,
    mesh_section,
    num_nodes,
    num_processes,
)
from launchkit.hardware import Backend, Cluster
from launchkit.plan import Candidate

MULTI_NODE_PORT = 29500  # torch's own default; every node must name the same one
_MULTI_DEVICE = {Backend.HPU: "MULTI_HPU"}  # MULTI_GPU elsewhere, CPU too: MULTI_CPU starts one process only


def accelerate_config(
    candidate: Candidate, cluster: Cluster, *, deepspeed_file: str = DEEPSPEED_FILE, main_process_ip: str | None = None
) -> dict[str, object]:
    """The configuration of ``accelerate launch`` for ``candidate``.

    ZeRO is described by ``deepspeed_file`` alone: accelerate refuses precision, accumulation, clipping, stage or
    offload keys beside it, and the keys of its own YAML have no sizes and lose the NVMe path. On several nodes give
    ``main_process_ip``, or ``--main_process_ip`` at launch; each node adds its ``--machine_rank``.
    """
    check_expressible(candidate, cluster)
    return accelerate_keys(candidate, cluster, deepspeed_file=deepspeed_file, main_process_ip=main_process_ip)


def accelerate_keys(
    candidate: Candidate, cluster: Cluster, *, deepspeed_file: str = DEEPSPEED_FILE, main_process_ip: str | None = None
) -> dict[str, object]:
    """``accelerate_config`` without its checks."""
    scenario = candidate.scenario
    config: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": _distributed_type(candidate, cluster),
        **({} if scenario.strategy.kind.zero_stage else {"mixed_precision": autocast_format(scenario)}),
        **_processes(candidate, cluster, main_process_ip=main_process_ip),
        "use_cpu": cluster.gpu.backend is Backend.CPU,
        "main_training_function": "main",
    }
    if scenario.strategy.kind.is_fsdp and not is_split_by_transformers(candidate):
        config["fsdp_config"] = _fsdp_section(fsdp_layout(candidate, cluster), candidate)
    if mesh := mesh_section(candidate, cluster):
        config["parallelism_config"] = {f"parallelism_config_{key}": value for key, value in mesh.items()}
    if scenario.strategy.kind.zero_stage:
        config["deepspeed_config"] = _deepspeed_section(candidate, cluster, deepspeed_file=deepspeed_file)
    if float8 := float8_section(candidate):
        config["fp8_config"] = float8
    if scenario.training.compile:
        config["dynamo_config"] = {"dynamo_backend": "INDUCTOR"}
    return config


def _distributed_type(candidate: Candidate, cluster: Cluster) -> str:
    kind = candidate.scenario.strategy.kind
    if kind.is_fsdp and not is_split_by_transformers(candidate):
        return "FSDP"
    if kind.zero_stage:
        return "DEEPSPEED"
    if num_processes(candidate, cluster) == 1:
        return "NO"
    return _MULTI_DEVICE.get(cluster.gpu.backend, "MULTI_GPU")


def _processes(candidate: Candidate, cluster: Cluster, *, main_process_ip: str | None) -> dict[str, object]:
    nodes = num_nodes(candidate, cluster)
    counts: dict[str, object] = {
        "num_machines": nodes,
        "num_processes": num_processes(candidate, cluster),
        "machine_rank": 0,
        "gpu_ids": "all",
    }
    if nodes == 1:
        return counts | {"main_process_port": 0}  # 0: a free one
    address = {} if main_process_ip is None else {"main_process_ip": main_process_ip}
    return counts | address | {"main_process_port": MULTI_NODE_PORT, "rdzv_backend": "static", "same_network": True}


def _fsdp_section(layout: FsdpLayout, candidate: Candidate) -> dict[str, object]:
    return {
        "fsdp_version": layout.version,
        **(_fsdp1_keys(layout, candidate) if layout.version == 1 else _fsdp2_keys(layout)),
        "fsdp_auto_wrap_policy": layout.wrap_policy,
        "fsdp_transformer_layer_cls_to_wrap": layout.wrap_classes,
        "fsdp_state_dict_type": layout.state_dict_type,
        "fsdp_cpu_ram_efficient_loading": layout.cpu_ram_efficient_loading,
        "fsdp_offload_params": layout.offload_params,
        "fsdp_activation_checkpointing": layout.activation_checkpointing,
    }


def _fsdp1_keys(layout: FsdpLayout, candidate: Candidate) -> dict[str, object]:
    """FSDP1 ignores ``fsdp_reshard_after_forward``; its sharding strategy is the only key that counts."""
    fsdp = candidate.scenario.strategy.fsdp
    return {
        "fsdp_sharding_strategy": layout.sharding.name,
        "fsdp_backward_prefetch": word_of(PREFETCHES, fsdp.backward_prefetch),
        "fsdp_forward_prefetch": fsdp.forward_prefetch,
        "fsdp_use_orig_params": fsdp.use_orig_params,
        "fsdp_sync_module_states": True,  # what loading on rank 0 alone relies on; harmless otherwise
    }


def _fsdp2_keys(layout: FsdpLayout) -> dict[str, object]:
    return {"fsdp_reshard_after_forward": layout.sharding.reshard_after_forward}


def _deepspeed_section(candidate: Candidate, cluster: Cluster, *, deepspeed_file: str) -> dict[str, object]:
    section: dict[str, object] = {
        "deepspeed_config_file": deepspeed_file,
        "zero3_init_flag": candidate.scenario.strategy.kind.zero_stage == 3,
    }
    if num_nodes(candidate, cluster) > 1:
        section["deepspeed_multinode_launcher"] = "standard"  # torch's elastic launcher, as on one node
    return section
