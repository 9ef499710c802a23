"""Memory of one node's host: its processes, what they load, what is offloaded to it, what is gathered to be saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from launchkit.hardware import Cluster
from launchkit.planner.load import LoadPeak
from launchkit.planner.sizes import ModelSizes, saves_whole_weights
from launchkit.program import Phase, Point, StepProgram
from launchkit.scenario import DeviceKind, Scenario, StrategyKind
from launchkit.strategies.weights import loaded_itemsize
from launchkit.units import GB, MIB

# Resident memory of one process with torch, transformers, accelerate and PEFT imported (475 MiB measured, CPU build of
# torch 2.13), and of a training one with TRL, datasets and deepspeed too (640 to 720 MiB in the built-in fine-tune).
LOADING_PROCESS_BYTES = 480 * MIB
PROCESS_BYTES = 700 * MIB
# Of these the pages of libraries, which the processes of a node share.
SHARED_LIBRARY_BYTES = 130 * MIB

# What the first CUDA operation adds: 1203 MiB (pytorch#106511, 2023), 1717 and 1973 with cuDNN (pytorch#12873,
# pytorch#15209, 2018). Not measured here.
CUDA_PROCESS_BYTES = 1500 * MIB

# ``save_pretrained`` copies the tensors of one file to the host at a time. Source: its ``max_shard_size``.
LARGEST_FILE_BYTES = 50 * GB


class HostUse(NamedTuple):
    """Memory of one node: what its processes own, and pages of mapped files, which the kernel drops when it must."""

    needed_bytes: int
    mapped_bytes: int = 0

    @property
    def resident_bytes(self) -> int:
        """What the node holds, each page counted once."""
        return self.needed_bytes + self.mapped_bytes


def offloaded_activation_bytes(program: StepProgram, point: Point) -> int:
    """What the forward pass of one rank leaves on the host for its backward."""
    forward = [stage for stage in program.stages if stage.phase is Phase.FORWARD]
    sections = (program.section_of(stage, layer) for stage in forward for layer in stage.order())
    return sum(copy.num_bytes.at(point) for s in sections for copy in s.copies if not copy.to_device)


def host_while_training(program: StepProgram, *, cluster: Cluster, device_bytes: int, point: Point) -> HostUse:
    """Processes and what they keep on the host; of CPU processes also ``device_bytes``, what stays resident of each
    one's allocations.

    Omits: dataloader workers (none by default; 10 to 12 MiB of private pages each where they are forked and rows lie in
    an Arrow file, measured), the page cache of the data.
    """
    ranks = cluster.node.num_gpus
    on_host = device_bytes if _is_host(cluster) else offloaded_activation_bytes(program, point)
    return HostUse(_processes(PROCESS_BYTES, cluster) + ranks * (program.host_persistent_bytes + on_host))


def unfilled_bytes(sizes: ModelSizes, scenario: Scenario) -> int:
    """What of ZeRO's buckets gradients never reach, because the model has fewer: on the host it takes no memory."""
    zero = scenario.strategy.zero
    if not (scenario.strategy.kind.zero_stage and zero.contiguous_gradients):
        return 0
    num_buckets = 2 if scenario.strategy.kind is not StrategyKind.ZERO3 and zero.overlap_comm else 1
    num_spare = num_buckets * zero.reduce_bucket_size - sizes.num_trained
    return max(0, num_spare) * loaded_itemsize(scenario)


def host_while_loading(peak: LoadPeak, scenario: Scenario, *, cluster: Cluster) -> HostUse:
    """Processes, each with its copies of converted weights, and the mapped weight files once for all of them."""
    ranks = cluster.node.num_gpus
    processes = _processes(LOADING_PROCESS_BYTES, cluster)
    if _is_host(cluster):
        moments = _loading_on_cpu(peak, scenario, ranks=ranks)
        return max(
            (HostUse(processes + needed, mapped) for needed, mapped in moments), key=lambda use: use.resident_bytes
        )
    return HostUse(processes + ranks * peak.copied_bytes, peak.mapped_bytes)


def _loading_on_cpu(peak: LoadPeak, scenario: Scenario, *, ranks: int) -> tuple[HostUse, HostUse]:
    """Where the device's memory is the host's: when ``from_pretrained`` returns, and when the engine is ready.

    Weights that are loaded as they are stored stay unread until then. A converted copy is the model itself, unless FSDP
    shards it further. Only FSDP keeps the file mapped so long, for the weights that it has yet to shard.
    """
    kind = scenario.strategy.kind
    loaded = HostUse(ranks * peak.copied_bytes, peak.mapped_bytes if peak.copied_bytes else 0)
    if kind is StrategyKind.SINGLE:
        return loaded, loaded
    copies, mapped = (peak.copied_bytes, 0 if peak.copied_bytes else peak.mapped_bytes) if kind.is_fsdp else (0, 0)
    return loaded, HostUse(ranks * (peak.written_bytes + copies), mapped)


def host_while_saving(
    sizes: ModelSizes, scenario: Scenario, training: HostUse, *, cluster: Cluster, device_bytes: int
) -> HostUse:
    """What is there between steps, and the copies that a checkpoint is written from: on the first node.

    Formula: FSDP's full state dict and full optimizer state, one after the other, on rank 0. ZeRO-3's 16-bit weights on
    rank 0. ZeRO-1 and 2 clone the whole state dict on every rank. Without an engine the tensors of one file.
    Source: accelerate 1.15 ``get_state_dict``; DeepSpeed 0.19.8 ``_zero3_consolidated_16bit_state_dict``,
    ``clone_tensors_for_torch_save``; safetensors 0.8 ``_flatten_as_ptr``, which copies nothing on the CPU.
    """
    kind, ranks = scenario.strategy.kind, cluster.node.num_gpus
    on_host = ranks * device_bytes if _is_host(cluster) else 0
    if not saves_whole_weights(scenario):
        copies = 0
    elif kind.is_fsdp:
        copies = max(sizes.state_dict_bytes, sizes.state_bytes)
    elif kind is StrategyKind.ZERO3:
        copies = sizes.trained_bytes
    elif kind.zero_stage:
        copies = ranks * sizes.state_dict_bytes
    else:
        copies = 0 if _is_host(cluster) else min(sizes.trained_bytes, LARGEST_FILE_BYTES)
    return HostUse(training.needed_bytes + on_host + copies)


class HostNeed(NamedTuple):
    """What a node needs of its host's memory at most, and what it is doing then (``while loading``)."""

    doing: str
    needed_bytes: int


def known_host_bytes(cluster: Cluster) -> int:
    """A node's memory where it is known and is not the devices' own; 0 elsewhere."""
    return 0 if _is_host(cluster) else cluster.node.host_memory_bytes


def greatest_need(uses: Mapping[str, HostUse]) -> HostNeed:
    """The moment that asks most of a node. Where it has less, the kernel kills processes (exit code -9)."""
    doing, use = max(uses.items(), key=lambda item: item[1].needed_bytes)
    return HostNeed(doing, use.needed_bytes)


def rare_host_bytes(cluster: Cluster) -> int:
    """What a node of unknown memory is not taken to have; 0 where its memory is known."""
    return 0 if cluster.node.host_memory_bytes else cluster.node.plausible_host_bytes


def _processes(each_bytes: int, cluster: Cluster) -> int:
    """The processes of a node. Formula: private pages of each, and the libraries' once."""
    each = each_bytes + (0 if _is_host(cluster) else CUDA_PROCESS_BYTES)
    return cluster.node.num_gpus * (each - SHARED_LIBRARY_BYTES) + SHARED_LIBRARY_BYTES


def _is_host(cluster: Cluster) -> bool:
    return cluster.gpu.device_kind is DeviceKind.CPU
