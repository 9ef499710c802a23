"""The first of a group of ranks that share one copy's step: its share of the weights, and the group's messages.

A process group that does nothing stands for the other ranks, so what is traced is the code that a rank really runs:
transformers' tensor-parallel plan over DTensors. Two things an ordinary trace would get wrong: an operator on DTensors
is no operator of this rank, only what DTensor makes of it is; and sharding propagation makes tensors of global size,
which are not memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from transformers import PreTrainedModel

from launchkit.errors import TraceError
from launchkit.program import CollectiveKind
from launchkit.scenario import DeviceKind, TraceKey
from launchkit.trace.float8 import is_float8, like_float8
from launchkit.trace.recorder import AllocRecord, CollectiveRecord, FreeRecord, StepRecorder

# The operators that send something, and whether the whole payload is what goes in or what comes out.
_MESSAGES: Mapping[str, tuple[CollectiveKind, bool]] = {
    "_c10d_functional::all_reduce": (CollectiveKind.ALL_REDUCE, True),
    "_c10d_functional::all_reduce_": (CollectiveKind.ALL_REDUCE, True),
    "_c10d_functional::all_gather_into_tensor": (CollectiveKind.ALL_GATHER, False),
    "_c10d_functional::reduce_scatter_tensor": (CollectiveKind.REDUCE_SCATTER, True),
    "_c10d_functional::all_to_all_single": (CollectiveKind.ALL_TO_ALL, True),
    "c10d::allreduce_": (CollectiveKind.ALL_REDUCE, True),
    "deepspeed::dim_zero_all_to_all": (CollectiveKind.ALL_TO_ALL, True),
}
# gloo flattens what it is given into a buffer of its own for the time of these calls.
_COPIED_ON_WIRE = frozenset({CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER})

# Waiting hands over the tensor itself; its fake implementation makes another.
_WAITING = "_c10d_functional::wait_tensor"

_PROPAGATIONS = ("_propagate_tensor_meta_non_cached", "propagate_op_sharding_non_cached")


@contextmanager
def rank_of(num_ranks: int) -> Iterator[DeviceMesh]:
    """The first of ``num_ranks`` ranks, and the mesh of them all."""
    if dist.is_initialized():
        raise TraceError(
            "a split model cannot be traced inside a distributed job; run launchkit in a process of its own"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # lazy: registers the group that does nothing

    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


def split_weights(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Puts transformers' tensor-parallel plan on a model on the meta device, in place.

    Tied weights are split by the plan's entry of each and tied again, as ``from_pretrained`` does it, which also leaves
    in the model what PEFT reads to split adapters alike.
    """
    try:
        from transformers.distributed.configuration_utils import DistributedConfig  # lazy: of transformers 5.21 on
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError:
        raise TraceError(
            f"transformers {transformers.__version__} splits models in another way; upgrade to 5.23, or leave out --tp"
        ) from None
    if not model.tp_plan:
        raise TraceError(
            f"transformers has no tensor-parallel plan for {type(model).__name__}; use --strategy fsdp2 or zero3 "
            "without --tp"
        )
    _untie(model)
    model.config.distributed_config = DistributedConfig(tp_size=mesh.size())
    model._device_mesh, model._tp_size = mesh, mesh.size()
    try:
        plan, _, _ = model._resolve_parallel_plans(model.config.distributed_config)
        apply_tensor_parallelism(model, mesh, plan)
    except ValueError as error:
        raise TraceError(f"transformers cannot split {type(model).__name__}: {' '.join(str(error).split())}") from None
    model.tie_weights()


def _untie(model: nn.Module) -> None:
    """Gives every use of a tied weight one of its own."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter), parameter.requires_grad)
            seen.add(id(parameter))


def is_split(tensor: torch.Tensor) -> bool:
    """Whether other ranks have other parts of ``tensor``."""
    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of ``tensor`` lies on this rank: its share of a split one, the 8-bit data of torchao's."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor
    return tensor._data if is_float8(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def like(whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``part`` as this rank's share of a tensor split as ``whole`` is, or wrapped as it; itself where it is neither."""
    if is_float8(whole):
        return like_float8(whole, part)
    return DTensor(part, whole._spec, requires_grad=False) if isinstance(whole, DTensor) else part


class LocalRecorder(StepRecorder):
    """Looks away while shardings are propagated, which makes tensors of global size that exist on no device."""

    is_blind = False

    def __enter__(self) -> Self:
        self._patches = ExitStack()
        for name in _PROPAGATIONS:
            seeing = getattr(ShardingPropagator, name)
            self._patches.enter_context(mock.patch.object(ShardingPropagator, name, self._blindly(seeing)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _blindly(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def propagate(*arguments: Any, **others: Any) -> Any:
            self.is_blind, before = True, self.is_blind
            try:
                return original(*arguments, **others)
            finally:
                self.is_blind = before

        return propagate

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_blind:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class RankRecorder(LocalRecorder):
    """Sees what one rank does: local operators and messages."""

    def __init__(self, *, key: TraceKey, **tensors: Any) -> None:
        super().__init__(**tensors, device=key.device, attention=key.attention)
        self.copies_on_wire = key.device is DeviceKind.CPU

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_blind:
            return func(*args, **(kwargs or {}))
        if DTensor in types:
            return NotImplemented
        if func._schema.name == _WAITING:
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        super()._record(func, args, kwargs, out)
        message = _MESSAGES.get(func._schema.name)
        if message is not None:
            self._note_message(*message, args, out)

    def _note_message(self, kind: CollectiveKind, sends_input: bool, args: tuple[Any, ...], out: Any) -> None:
        payload = args[0] if sends_input else out
        tensors = payload if isinstance(payload, (list, tuple)) else [payload]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.log.collectives.append(CollectiveRecord(self.place, kind, num_bytes))
        if self.copies_on_wire and kind in _COPIED_ON_WIRE:
            number, self._next = self._next, self._next + 1
            self.log.memory.append(AllocRecord(number, num_bytes, self.place, "gloo", 0))
            self.log.memory.append(FreeRecord(number, self.place))
