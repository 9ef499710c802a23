"""Activation checkpointing as trainers switch it on: of whole blocks, of all but the attention, held on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import modeling_utils

from launchkit.errors import TraceError
from launchkit.scenario import Checkpointing, DeviceKind
from launchkit.trace.recorder import note_copy

aten = torch.ops.aten

# What selective checkpointing keeps: the attention, whose computing again costs most. Everything else of a block is
# computed again. Source: trl 1.16 models/selective_activation_checkpointing.py; Axolotl's selective_checkpointing.
_SAVED = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


_ARGUMENTS: Mapping[Checkpointing, Mapping[str, Any]] = {
    Checkpointing.FULL: {},
    Checkpointing.SELECTIVE: {"context_fn": partial(create_selective_checkpoint_contexts, _policy)},
    Checkpointing.OFFLOAD: {},
    Checkpointing.REENTRANT: {"use_reentrant": True},
}


def enable_checkpointing(model: nn.Module, checkpointing: Checkpointing, *, input_grads: bool = False) -> None:
    """Without re-entering autograd unless told to, transformers' default (``use_reentrant=False``, transformers 5.23
    ``PreTrainedModel.activation_checkpointing_enable``). Nothing for ``Checkpointing.NONE``.

    What is re-entered needs an input that requires a gradient, or its backward never runs: with adapters the Trainer
    makes the embeddings require one (``enable_input_require_grads``). So does Axolotl always (``input_grads``).
    """
    if input_grads or checkpointing is Checkpointing.REENTRANT:
        model.enable_input_require_grads()  # type: ignore[operator]
    if checkpointing is Checkpointing.NONE:
        return
    if not getattr(model, "supports_gradient_checkpointing", True):
        whole: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise TraceError(f"{type(whole).__name__} has no activation checkpointing; pass --checkpointing none")
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    offload = {"offload": True} if checkpointing is Checkpointing.OFFLOAD else {}
    enable({"use_reentrant": False, **_ARGUMENTS[checkpointing]}, **offload)


class _OnHost(saved_tensors_hooks):
    """``save_on_cpu`` between a GPU and its host, as the GPU's memory sees it: what is saved leaves, and comes back
    into memory of its own."""

    def __init__(self, **arguments: Any) -> None:
        def pack(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
            note_copy(to_device=False, num_bytes=tensor.numel() * tensor.element_size())
            return tensor.shape, tensor.dtype

        def unpack(packed: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
            tensor = torch.empty(packed[0], dtype=packed[1])
            note_copy(to_device=True, num_bytes=tensor.numel() * tensor.element_size())
            return tensor

        super().__init__(pack, unpack)


@contextmanager
def host_apart(device: DeviceKind) -> Iterator[None]:
    """While active, activations that are saved on the host leave the step's memory, if its device is a GPU."""
    if device is DeviceKind.CPU:
        yield
        return
    with mock.patch.object(modeling_utils, "save_on_cpu", _OnHost):
        yield
