"""How each trainer turns a batch into a loss: the plain loop, HF Trainer under accelerate, TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from launchkit.scenario import Compute, TraceKey, Trainer

Forward = Callable[[nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]


def forward_of(key: TraceKey) -> Forward:
    """The forward pass and loss of the trainer that ``key`` names."""
    if key.trainer is Trainer.LOOP or key.compute in (Compute.FP32, Compute.BF16, Compute.FP16):
        return _plain
    return _accelerated


def _plain(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def _accelerated(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Under mixed precision accelerate converts every output to fp32, the logits included, after the forward pass.

    Source: accelerate 1.15 ``Accelerator.prepare_model`` (``convert_outputs_to_fp32``).
    """
    from accelerate.utils.operations import convert_to_fp32

    return convert_to_fp32(model(**batch))["loss"]  # type: ignore[no-any-return]
