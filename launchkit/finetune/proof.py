"""What is really running: the wrappers around the model, what of it is held here and in which dtypes.

accelerate has been seen to run DDP, or several single jobs, for an FSDP configuration, with exit code 0. So each rank
looks at its own live objects and writes down what it finds.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch._subclasses.fake_tensor import FakeTensor

from launchkit.launch.record import WRAPPERS, Proof

WRAPPER_NAMES = frozenset(WRAPPERS.values())


def read_proof(optimizer: torch.optim.Optimizer | None) -> Proof:
    """The proof of this rank, from its live objects."""
    modules = live_modules()
    root = biggest_module(modules)
    parameters = list(root.parameters()) if root is not None else []
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Proof(
        wrappers=_wrappers(modules, root),
        world_size=torch.distributed.get_world_size() if is_distributed else 1,
        backend=torch.distributed.get_backend() if is_distributed else "",
        zero_stage=max((_zero_stage(module) for module in modules), default=0),
        num_parameters=sum(_full_numel(parameter) for parameter in parameters),
        num_local_parameters=sum(local_tensor(parameter).numel() for parameter in parameters),
        num_optimizer_parameters=sum(local_tensor(parameter).numel() for parameter in _optimized(optimizer)),
        parameter_dtypes=_by_dtype([local_tensor(parameter) for parameter in parameters]),
        optimizer_state_dtypes=_by_dtype(_states(optimizer)),
    )


def live_modules() -> list[torch.nn.Module]:
    """Every module of this process. ``type(…)`` rather than ``isinstance``: the latter wakes lazy objects up."""
    return [found for found in gc.get_objects() if issubclass(type(found), torch.nn.Module)]


def biggest_module(modules: list[torch.nn.Module] | None = None) -> torch.nn.Module | None:
    """The module with most parameters among those that are part of no other."""
    modules = live_modules() if modules is None else modules
    children = {id(child) for module in modules for child in module.__dict__.get("_modules", {}).values()}
    roots = [module for module in modules if id(module) not in children and "_modules" in module.__dict__]
    return max(roots, key=lambda root: sum(_full_numel(parameter) for parameter in root.parameters()), default=None)


def foreign_storages(module: torch.nn.Module, is_known: Callable[[int], bool]) -> dict[int, int]:
    """Bytes, by address, of parameters' storages that torch's allocator did not make: pieces of mapped files, arrays of
    other libraries. Of a storage that parameters are parts of, those parts."""
    storages: dict[int, int] = {}
    for parameter in module.parameters():
        held = local_tensor(parameter)
        storage = held.untyped_storage()
        parts = storages.get(storage.data_ptr(), 0) + held.numel() * held.element_size()
        storages[storage.data_ptr()] = min(parts, storage.nbytes())
    return {address: size for address, size in storages.items() if address and not is_known(address)}


def held_addresses(module: torch.nn.Module) -> list[int]:
    """Addresses of the storages that this process's Python objects hold, gradients of ``module`` among them."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    tensors += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    local = (local_tensor(tensor) for tensor in tensors if not isinstance(tensor, FakeTensor))  # these hold nothing
    return [held.untyped_storage().data_ptr() for held in local if held.device.type == "cpu" and not held.is_sparse]


def local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """What of a parameter is held here: its shard under FSDP2 (a DTensor) and ZeRO-3, else all of it."""
    for attribute in ("_local_tensor", "ds_tensor"):
        shard = getattr(parameter, attribute, None)
        if shard is not None:
            return shard.data if isinstance(shard, torch.Tensor) else parameter
    return parameter.detach()


def _full_numel(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _wrappers(modules: list[torch.nn.Module], root: torch.nn.Module | None) -> tuple[str, ...]:
    """The root's wrapper first, then the others', each once."""
    texts = {text for module in modules if (text := _wrapper_text(module))}
    outermost = _wrapper_text(root) if root is not None else ""
    return tuple(sorted(texts, key=lambda text: (text != outermost, text)))


def _wrapper_text(module: torch.nn.Module) -> str:
    """``FSDPLlamaForCausalLM (FSDPModule)``; empty for a module that no strategy made."""
    found = [base.__name__ for base in type(module).__mro__ if base.__name__ in WRAPPER_NAMES]
    if not found:
        return ""
    name = type(module).__name__
    return name if name == found[0] else f"{name} ({found[0]})"


def _zero_stage(module: torch.nn.Module) -> int:
    read: Any = getattr(module, "zero_optimization_stage", None) if type(module).__name__ == "DeepSpeedEngine" else None
    return int(read()) if read is not None else 0


def _optimized(optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]] if optimizer else []


def _states(optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    values = [value for state in optimizer.state.values() for value in state.values()] if optimizer else []
    return [local_tensor(value) for value in values if isinstance(value, torch.Tensor) and value.numel() > 1]


def _by_dtype(tensors: list[torch.Tensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(counts)
