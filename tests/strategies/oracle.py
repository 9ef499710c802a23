"""FSDP2 itself on fake tensors: the events of a step of the first of any number of ranks, without any other.

A process group that does nothing stands for the others. Two things an ordinary trace would get wrong: FSDP frees and
refills its storages in place, which no finaliser sees, so its two functions for that are recorded too; and sharding
propagation makes tensors of global size, which are not memory, so nothing is recorded meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from launchkit.program import Point
from launchkit.scenario import TraceKey
from launchkit.trace import step, tracing
from launchkit.trace.build import Built, load_config
from launchkit.trace.compat import full_sequences, random_states
from launchkit.trace.inputs import make_batch
from launchkit.trace.parallel import LocalRecorder
from launchkit.trace.recorder import AllocRecord, FreeRecord


class Recorder(LocalRecorder):
    """Also sees storages that are emptied and filled again."""

    def refilling(self, original: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
        def refill(tensor: torch.Tensor) -> None:
            size = tensor.numel() * tensor.itemsize
            if tensor.untyped_storage().size() != size:
                self.log.memory.append(
                    AllocRecord(self._number_of(tensor.untyped_storage())[0], size, self.place, "resize", 0)
                )
            original(tensor)

        return refill

    def emptying(self, original: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
        def empty(tensor: torch.Tensor) -> None:
            if tensor.untyped_storage().size():
                self.log.memory.append(FreeRecord(self._number_of(tensor.untyped_storage())[0], self.place))
            original(tensor)

        return empty

    @contextmanager
    def watching_fsdp(self) -> Iterator[None]:
        with ExitStack() as stack:
            refill = self.refilling(_fsdp_param.alloc_storage)
            for module in (_fsdp_param, _fsdp_param_group):
                stack.enter_context(mock.patch.object(module, "alloc_storage", refill))
            stack.enter_context(mock.patch.object(_fsdp_param, "free_storage", self.emptying(_fsdp_param.free_storage)))
            yield


@contextmanager
def ranks(num_ranks: int, *, num_shards: int = 0) -> Iterator[DeviceMesh]:
    """A mesh of that many ranks of which only the first exists; two-dimensional where the shard group is smaller."""
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        if num_shards:
            shape, names = (num_ranks // num_shards, num_shards), ("replicate", "shard")
            yield init_device_mesh("cpu", shape, mesh_dim_names=names)
        else:
            yield init_device_mesh("cpu", (num_ranks,))
    finally:
        dist.destroy_process_group()


def fsdp2_deltas(config: Mapping[str, Any], key: TraceKey, mesh: DeviceMesh, *, mixed: bool, point: Point) -> list[int]:
    """What the allocator would be asked for, and get back, in the forward and backward of a step after the first."""
    model = tracing._build(load_config(config), key, lora_rank=point.lora_rank, mesh=None, first_apart=False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    with model.mode:
        for stack in model.built.stacks:
            for block in model.built.blocks(stack):
                fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model.built.model, mesh=mesh, mp_policy=policy)
    _step(model.built, model.mode, key, point)
    return _deltas(_step(model.built, model.mode, key, point))


def _step(built: Built, mode: Any, key: TraceKey, point: Point) -> Recorder:
    model = built.model.train()
    with mode, full_sequences(packed=False), random_states(key.device):
        batch = make_batch(built, point, key)
        shards = [parameter.to_local() for parameter in model.parameters()]  # type: ignore[attr-defined]
        recorder = Recorder(known=[*shards, *model.buffers(), *batch.values()], parameters=shards)
        with recorder.watching_fsdp(), recorder, step._collected():
            recorder.recording = True
            model(**batch).loss.backward()
        recorder.recording = False
        model.zero_grad(set_to_none=True)
    return recorder


def _deltas(recorder: Recorder) -> list[int]:
    live: dict[int, int] = {}
    found = []
    for record in recorder.log.memory:
        if isinstance(record, AllocRecord):
            live[record.storage] = record.num_bytes
            found.append(record.num_bytes)
        elif isinstance(record, FreeRecord):
            found.append(-live.pop(record.storage))
    return found
