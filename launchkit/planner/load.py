"""What loading a model takes: of each device until training can begin, and of a node's memory.

Source: transformers 5.23 ``from_pretrained``, accelerate 1.15 ``fsdp2_prepare_model``, DeepSpeed 0.19.8 ``zero.Init``
and ``stage_1_and_2.py``, torch 2.13 ``DistributedDataParallel``; resident memory measured in fresh processes
(``bench/host.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from launchkit.optimizers import FP32_BYTES
from launchkit.planner.sizes import ModelSizes
from launchkit.scenario import Method, Scenario, StrategyKind, Trainer
from launchkit.simulate.loading import SENT_AT_A_TIME
from launchkit.strategies.ddp import BROADCAST_BUCKET_BYTES
from launchkit.strategies.weights import loaded_itemsize
from launchkit.units import divide_up


@dataclass(frozen=True, kw_only=True)
class LoadJob:
    """What the readings below start from. ``resident_bytes`` is what a rank's device holds once training has begun,
    ``unwritten_bytes`` the buffers among it that stay as they were allocated until the first step."""

    sizes: ModelSizes
    scenario: Scenario
    checkpoint_itemsize: int
    num_shards: int
    resident_bytes: int
    unwritten_bytes: int
    room_bytes: int  # of the device

    @property
    def converts(self) -> bool:
        """Whether the weights are loaded in another dtype than they are stored in, which takes a copy in host memory.

        In the stored dtype they are views of the mapped file. 4-bit weights are made on the device, and of a model that
        transformers splits as it loads it, parts.
        """
        same = loaded_itemsize(self.scenario) == self.checkpoint_itemsize or self.scenario.strategy.split.tp > 1
        return not same and self.scenario.training.method is not Method.QLORA


class LoadPeak(NamedTuple):
    """``device_bytes`` are allocated on each rank's device, of which ``written_bytes`` have been written to: what
    counts where the device is the CPU. ``copied_bytes`` are of each rank's host memory, until they are on the device;
    ``mapped_bytes`` are the weight files, read through one mapping by all ranks of a node."""

    device_bytes: int
    written_bytes: int
    copied_bytes: int
    mapped_bytes: int


def load_peak(job: LoadJob) -> LoadPeak:
    """The highest point of loading.

    Every rank loads a whole model, also under FSDP's ``cpu_ram_efficient_loading``: transformers 5.23 leaves no rank
    out (two processes, 317M parameters stored in 16 bits and wanted in fp32: 1.2 GB of copies in each). Under ZeRO-3
    the modules are sharded as they are built, and the first rank alone reads values.
    """
    kind = job.scenario.strategy.kind
    copies = job.sizes.loaded_bytes if job.converts and kind is not StrategyKind.ZERO3 else 0
    device = _quantised if job.scenario.training.method is Method.QLORA else _ON_DEVICE[kind]
    return LoadPeak(device(job), _written(job, device(job)), copies, job.sizes.stored_bytes)


def _written(job: LoadJob, device_bytes: int) -> int:
    """What of the device's allocations is written to: ZeRO-3's buffers wait for gradients, and mapped weights become a
    DDP process's own when a broadcast writes to them, by which time one of two buffers is gone."""
    kind = job.scenario.strategy.kind
    if kind is StrategyKind.DDP and not job.converts:
        return job.sizes.state_dict_bytes + min(job.sizes.state_dict_bytes, BROADCAST_BUCKET_BYTES)
    return device_bytes - (job.unwritten_bytes if kind is StrategyKind.ZERO3 else 0)


def _whole(job: LoadJob) -> int:
    """Weights go over one by one, of split matrices this rank's part."""
    return divide_up(job.sizes.state_dict_bytes, job.scenario.strategy.split.tp)


def _replicated(job: LoadJob) -> int:
    """DDP makes all ranks start from the first one's weights."""
    whole = job.sizes.state_dict_bytes
    return whole + min(whole, SENT_AT_A_TIME * BROADCAST_BUCKET_BYTES)


def _quantised(job: LoadJob) -> int:
    """Each weight is brought over in 16 bits and packed there. Also where an engine shards: it does so afterwards."""
    return job.sizes.state_dict_bytes + job.sizes.largest_unpacked_bytes


def _scattered(job: LoadJob) -> int:
    """accelerate's FSDP2 brings over a weight at a time, whole, on every rank; the plain loop a unit at a time."""
    whole = job.scenario.training.trainer is Trainer.LOOP or not job.scenario.loads_on_first_rank
    arriving = job.sizes.largest_unit_bytes if whole else job.sizes.largest_tensor_bytes
    return _shards(job) + arriving


def _flattened(job: LoadJob) -> int:
    """FSDP1 brings over a unit, copies it into a flat tensor and keeps its part."""
    return _shards(job) + 2 * job.sizes.largest_unit_bytes


def _shards(job: LoadJob) -> int:
    strategy = job.scenario.strategy
    return 0 if strategy.offloads_params else divide_up(job.sizes.state_dict_bytes, job.num_shards * strategy.split.tp)


def _flat_and_whole(job: LoadJob) -> int:
    """ZeRO-1 and 2 flatten the trained weights on the device where it has room for both, else on the host. Then the
    rank's partition is cast to fp32 by way of a clone, and gets gradients of zeros; offloaded, both go to the host."""
    whole, partition = job.sizes.state_dict_bytes, divide_up(job.sizes.num_trained, job.num_shards)
    both = whole + job.sizes.trained_bytes
    flattened = both if both <= job.room_bytes else whole
    cast = whole + partition * (loaded_itemsize(job.scenario) + FP32_BYTES)
    with_gradients = whole if job.scenario.strategy.offload.optimizer else whole + 2 * partition * FP32_BYTES
    return max(flattened, cast, with_gradients)


def _partitioned(job: LoadJob) -> int:
    """ZeRO-3 gathers what it loads, module by module, and then allocates all that training holds."""
    return max(_shards(job) + job.sizes.largest_tensor_bytes, job.resident_bytes)


_ON_DEVICE: Mapping[StrategyKind, Callable[[LoadJob], int]] = {
    StrategyKind.SINGLE: _whole,
    StrategyKind.DDP: _replicated,
    StrategyKind.FSDP: _flattened,
    StrategyKind.FSDP2: _scattered,
    StrategyKind.HSDP: _scattered,
    StrategyKind.ZERO1: _flat_and_whole,
    StrategyKind.ZERO2: _flat_and_whole,
    StrategyKind.ZERO3: _partitioned,
}
