"""How each trainer turns a batch into a loss: the plain loop, HF Trainer under accelerate, TRL's SFTTrainer, and the
heads that Liger and cut cross-entropy put in place of the model's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from launchkit.errors import TraceError
from launchkit.scenario import DeviceKind, Loss, TraceKey, Trainer
from launchkit.trace.heads import AllRows, ChunkedLogProb, CutCrossEntropy, LigerCrossEntropy
from launchkit.trace.inputs import unused

Batch = Mapping[str, torch.Tensor]
Forward = Callable[[nn.Module, Batch], torch.Tensor]

_NO_LABEL = -100


def forward_of(key: TraceKey) -> Forward:
    """The forward pass and loss of the trainer and loss that ``key`` names."""
    if key.trainer is Trainer.TRL:
        return _without(unused(key), _trl_on_cuda if key.device is DeviceKind.CUDA else _trl_on_cpu)
    if key.loss in _FUSED:
        return _without(unused(key), _FUSED[key.loss])
    if key.loss is not Loss.PLAIN:
        raise TraceError(f"no {key.loss} loss is known of the {key.trainer} trainer; use --loss plain or --trainer trl")
    if key.trainer is Trainer.LOOP or not key.compute.is_autocast:
        return _plain
    return _accelerated


def _without(names: Collection[str], forward: Forward) -> Forward:
    """``forward`` of a batch that lacks what goes by ``names``."""

    def called(model: nn.Module, batch: Batch) -> torch.Tensor:
        return forward(model, {name: tensor for name, tensor in batch.items() if name not in names})

    return called


def _plain(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def _accelerated(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Under mixed precision accelerate converts every output to fp32, the logits included, after the forward pass.

    Source: accelerate 1.15 ``Accelerator.prepare_model`` (``convert_outputs_to_fp32``).
    """
    from accelerate.utils.operations import convert_to_fp32

    return convert_to_fp32(model(**batch))["loss"]  # type: ignore[no-any-return]


def _trl_on_cuda(model: nn.Module, batch: Batch) -> torch.Tensor:
    return _trl(model, batch, on_cuda=True)


def _trl_on_cpu(model: nn.Module, batch: Batch) -> torch.Tensor:
    return _trl(model, batch, on_cuda=False)


def _trl(model: nn.Module, batch: Batch, *, on_cuda: bool) -> torch.Tensor:
    """SFTTrainer's loss, which never makes all logits, with its metrics: entropy and accuracy of each token.

    Source: trl 1.16 ``SFTTrainer.compute_loss``, ``add_fused_lm_head``; so with adapters and Liger's kernels as well.
    """
    hidden, head = _backbone(model, batch)
    hidden, labels = hidden[:, :-1], batch["labels"][:, 1:]
    mask = labels != _NO_LABEL
    if on_cuda:
        rows, targets = AllRows.apply(hidden), labels.reshape(-1).clone()
    else:
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.clamp(min=0).reshape(-1)
    outputs = ChunkedLogProb.apply(rows, head.weight, head.bias, targets, on_cuda)
    del rows, targets
    log_probs, entropy, is_top1 = (x.view(mask.shape).masked_fill(~mask, 0) for x in outputs)
    del outputs
    nll = -log_probs.sum() / mask.sum()  # the model's own loss, which is computed and left
    loss = (-log_probs).sum() / mask.sum()
    entropy.detach().sum(), is_top1.sum(), nll.detach()
    return loss  # type: ignore[no-any-return]


def _liger(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Source: liger-kernel 0.8.5 ``transformers/model/llama.py``, ``loss_utils.py``."""
    hidden, head = _backbone(model, batch)
    targets = functional.pad(batch["labels"], (0, 1), value=_NO_LABEL)[..., 1:].contiguous()
    loss = LigerCrossEntropy.apply(hidden.view(-1, hidden.shape[-1]), head.weight, targets.view(-1))
    return loss / len(targets)  # type: ignore[no-any-return]


def _cut(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Source: cut-cross-entropy 25.1.1 ``cce_linear_cross_entropy``, ``shift`` as its transformers patch has it."""
    hidden, head = _backbone(model, batch)
    rows = hidden.contiguous().flatten(0, -2)
    return CutCrossEntropy.apply(rows, head.weight, batch["labels"].flatten())  # type: ignore[no-any-return]


_FUSED: Mapping[Loss, Forward] = {Loss.LIGER: _liger, Loss.CCE: _cut}


def _backbone(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Any]:
    """The last hidden states of a causal model, and its head, which is not called."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return causal.base_model(**inputs, use_cache=False).last_hidden_state, causal.get_output_embeddings()
