"""Host memory and disk: what loading, running and saving take besides the GPU."""

from __future__ import annotations

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.program import StepProgram
from launchkit.scenario import DeviceKind, Method, Scenario, StrategyKind
from launchkit.units import MIB

# Resident memory of one training process before it holds a model: the interpreter with torch, transformers, TRL and
# deepspeed imported. Measured on the built-in fine-tune, CPU build of torch 2.13: 640 to 720 MiB; CUDA builds map more.
PROCESS_BYTES = 700 * MIB
CUDA_PROCESS_BYTES = 2600 * MIB  # with the CUDA libraries and a context; not measured here

ADAPTER_BYTES_PER_PARAMETER = 4  # PEFT keeps and saves adapters in fp32


def host_peak_bytes(program: StepProgram, *, cluster: Cluster) -> int:
    """Resident memory of all processes of one node while training, in bytes: the processes and what is offloaded.

    Omits: dataloader workers, the page cache. On a CPU cluster the device's memory is the host's and is counted there.
    """
    per_rank = _process_bytes(cluster) + program.host_persistent_bytes
    return per_rank * cluster.node.num_gpus


def host_has_room(program: StepProgram, *, cluster: Cluster) -> bool:
    """Whether a node holds its processes and what they offload. Memory that nobody knows is taken to be enough, and a
    CPU's is the device's own."""
    memory_bytes = cluster.node.host_memory_bytes
    if not memory_bytes or cluster.gpu.device_kind is DeviceKind.CPU:
        return True
    return host_peak_bytes(program, cluster=cluster) <= memory_bytes


def host_load_peak_bytes(profile: ModelProfile, scenario: Scenario, *, cluster: Cluster) -> int:
    """Resident memory of one node at its highest while the checkpoint is loaded, in bytes.

    Formula: processes + copies × checkpoint. Every rank reads a full copy, except under FSDP's
    ``cpu_ram_efficient_loading`` (rank 0 alone) and ZeRO-3's ``zero.Init`` (one shared pass, each rank keeps a shard).
    A single process loads straight to its device, one copy through the page cache.
    Source: transformers ``from_pretrained`` under each engine, see launching notes in docs/configs.md.
    """
    checkpoint = profile.num_parameters * profile.checkpoint_itemsize
    kind = scenario.strategy.kind
    ranks = 1 if kind is StrategyKind.SINGLE else cluster.node.num_gpus
    efficient = kind.is_fsdp and scenario.strategy.fsdp.cpu_ram_efficient_loading
    copies = 1 if efficient and scenario.training.method is not Method.QLORA else ranks
    if kind is StrategyKind.ZERO3:
        copies = 1
    return ranks * _process_bytes(cluster) + copies * checkpoint


def checkpoint_bytes(profile: ModelProfile, scenario: Scenario, *, num_trainable: int) -> int:
    """Weights that one checkpoint holds, in bytes on disk: the adapter's, or the whole model's in its stored dtype.

    Omits: optimizer states, which the trainer saves beside them unless told not to.
    """
    if scenario.training.method is Method.FULL:
        return profile.num_parameters * profile.checkpoint_itemsize
    return num_trainable * ADAPTER_BYTES_PER_PARAMETER


def _process_bytes(cluster: Cluster) -> int:
    return PROCESS_BYTES if cluster.gpu.device_kind == "cpu" else CUDA_PROCESS_BYTES
