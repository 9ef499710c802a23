"""What the environment tells the processes of a run: the strategy, as accelerate reads it, and the devices.

A script that calls ``Accelerator()`` with no arguments picks its strategy up from these variables, the ones that
``accelerate launch`` itself would set. Source of names and values: accelerate 1.15, ``utils/launch.py`` and
``utils/dataclasses.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from launchkit.alloc_conf import OLDER_VARIABLE, VARIABLE
from launchkit.engine_settings import PREFETCHES, word_of
from launchkit.export.layout import (
    FsdpLayout,
    autocast_format,
    float8_section,
    fsdp_layout,
    is_split_by_transformers,
    mesh_section,
    num_processes,
)
from launchkit.hardware import Backend, Cluster
from launchkit.plan import Candidate

RUN_DIR_VARIABLE = "LAUNCHKIT_RUN_DIR"
CPU_ENGINES_VARIABLE = "LAUNCHKIT_CPU_SHARDING"
MEASURE_VARIABLE = "LAUNCHKIT_MEASURE"
DEVICE_VARIABLE = "LAUNCHKIT_DEVICE"
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|AUTH", re.IGNORECASE)
# Workers write to files, where progress bars are of no use, and the profiler that measures them announces itself.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "KINETO_LOG_LEVEL": "99"}
TELLING = re.compile(
    r"^(CUDA_|NCCL_|GLOO_|TORCH_|PYTORCH_|ACCELERATE_|FSDP_|PARALLELISM_|DS_|OMP_|LAUNCHKIT_|HF_|TRANSFORMERS_|MASTER_"
    r"|RANK$|WORLD_SIZE$|LOCAL_|PYTHONPATH$|LD_LIBRARY_PATH$)"
)


def strategy_environment(candidate: Candidate, cluster: Cluster, *, deepspeed_file: str) -> dict[str, str]:
    """The variables through which ``Accelerator()`` and the Hugging Face Trainer learn the strategy."""
    kind = candidate.scenario.strategy.kind
    environment = {"ACCELERATE_MIXED_PRECISION": autocast_format(candidate.scenario)}
    if kind.is_fsdp and not is_split_by_transformers(candidate):
        environment |= fsdp_environment(
            fsdp_layout(candidate, cluster), candidate, on_cpu=cluster.gpu.backend is Backend.CPU
        )
    environment |= {f"ACCELERATE_FP8_{key.upper()}": str(value) for key, value in float8_section(candidate).items()}
    if mesh := mesh_section(candidate, cluster):
        environment["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        environment |= {f"PARALLELISM_CONFIG_{key.upper()}": str(value) for key, value in mesh.items()}
    if kind.zero_stage:
        environment |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": deepspeed_file,
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": _lower(kind.zero_stage == 3),
        }
    if candidate.scenario.training.compile:
        environment["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR"
    return environment


def fsdp_environment(layout: FsdpLayout, candidate: Candidate, *, on_cpu: bool) -> dict[str, str]:
    """FSDP1 honours only its sharding strategy, FSDP2 only whether it reshards. On the CPU there is no accelerator to
    synchronise FSDP1's module states over, which loading on rank 0 alone would need, and gathering its full state dict
    crashes there (torch 2.13)."""
    is_fsdp1_on_cpu = on_cpu and layout.version == 1
    loads_on_rank0 = layout.cpu_ram_efficient_loading and not is_fsdp1_on_cpu
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": str(layout.version),
        "FSDP_RESHARD_AFTER_FORWARD": _lower(layout.sharding.reshard_after_forward),
        "FSDP_OFFLOAD_PARAMS": _lower(layout.offload_params),
        "FSDP_AUTO_WRAP_POLICY": layout.wrap_policy,
        "FSDP_TRANSFORMER_CLS_TO_WRAP": layout.wrap_classes,
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT" if is_fsdp1_on_cpu else layout.state_dict_type,
        "FSDP_CPU_RAM_EFFICIENT_LOADING": _lower(loads_on_rank0),
        "FSDP_ACTIVATION_CHECKPOINTING": _lower(layout.activation_checkpointing),
    }
    fsdp = candidate.scenario.strategy.fsdp
    if layout.version == 1:
        environment |= {
            "FSDP_SHARDING_STRATEGY": layout.sharding.name,
            "FSDP_BACKWARD_PREFETCH": word_of(PREFETCHES, fsdp.backward_prefetch),
            "FSDP_FORWARD_PREFETCH": _lower(fsdp.forward_prefetch),
            "FSDP_USE_ORIG_PARAMS": _lower(fsdp.use_orig_params),
            "FSDP_SYNC_MODULE_STATES": _lower(not on_cpu),
        }
    return environment


def device_environment(candidate: Candidate, cluster: Cluster) -> dict[str, str]:
    """Which devices the processes use, with which allocator, and with how many threads.

    On the CPU accelerate shards nothing unless it is made to (``launchkit.finetune.cpu_fsdp``): what it needs is the
    opposite of ``ACCELERATE_USE_CPU``, which DDP and single processes in turn cannot do without.
    """
    environment = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", **QUIET}
    if conf := candidate.scenario.alloc_conf:
        environment |= {VARIABLE: conf, OLDER_VARIABLE: conf}
    cores = cluster.node.num_cpu_cores
    num_local = max(1, num_processes(candidate, cluster) // max(1, cluster.num_nodes))
    if cores:
        environment["OMP_NUM_THREADS"] = str(max(1, cores // num_local))
    if cluster.gpu.backend is not Backend.CPU:
        return environment | {DEVICE_VARIABLE: str(cluster.gpu.backend)}
    environment |= {DEVICE_VARIABLE: "cpu", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    strategy = candidate.scenario.strategy
    if strategy.kind.is_fsdp or strategy.kind.zero_stage or strategy.split.num_ranks > 1:
        return environment | {CPU_ENGINES_VARIABLE: "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    return environment | {"ACCELERATE_USE_CPU": "true"}


def recorded_environment(changes: Mapping[str, str], inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a run record keeps: the changes and whatever else steers torch and its libraries, but no secrets."""
    kept = {name: value for name, value in inherited.items() if TELLING.match(name)}
    return {name: value for name, value in sorted({**kept, **changes}.items()) if not SECRET.search(name)}


def _lower(value: bool) -> str:
    return "true" if value else "false"
