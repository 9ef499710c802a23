"""What Axolotl makes otherwise than transformers' Trainer, of whose step its own is."""

from __future__ import annotations

from dataclasses import replace

from launchkit.model import ModelProfile
from launchkit.scenario import Attention, Compute, DeviceKind, Loss, Method, TraceKey, Training, Widened


def as_axolotl(key: TraceKey, training: Training, profile: ModelProfile) -> TraceKey:
    """The program of Axolotl's step: what it holds in fp32, how it keeps packed sequences apart, that embedded tokens
    require gradients under adapters. Source: axolotl 0.19 ``loaders/adapter.py``, ``load_adapter``."""
    return replace(
        key,
        packed=key.packed and not _packs_by_boundaries(key, training, profile),
        widened=_widened(key, training, profile),
        input_grads=training.method is not Method.FULL,
    )


def _packs_by_boundaries(key: TraceKey, training: Training, profile: ModelProfile) -> bool:
    """Whether it hands sdpa's flash kernel the boundaries of sequences in place of a mask: on GPUs, of 16-bit
    weights, without a sliding window. Source: axolotl 0.19 ``loaders/patch_manager.py``,
    ``_apply_sdpa_varlen_patch``. Omits: heads above 256, and values of another width than keys, for which it does not.
    """
    is_narrow = key.compute in (Compute.BF16_AUTOCAST, Compute.FP16_AUTOCAST, Compute.BF16, Compute.FP16)
    is_sdpa = training.attention is Attention.SDPA
    return key.device is DeviceKind.CUDA and is_narrow and is_sdpa and not profile.sliding_window


def _widened(key: TraceKey, training: Training, profile: ModelProfile) -> Widened:
    """Of what nothing shards, since ZeRO narrows all weights again and FSDP is left alone. fp32 is wide already, and
    what flash attention or cut cross-entropy reads, and adapters, are narrowed once more, but for routers.

    Source: axolotl 0.19 ``loaders/model.py``, ``_configure_embedding_dtypes``, ``_convert_embedding_modules_dtype``.
    """
    if key.compute not in (Compute.BF16_AUTOCAST, Compute.FP16_AUTOCAST):
        return Widened.NOTHING
    if training.method is Method.FULL and not training.attention.is_flash and training.loss is not Loss.CCE:
        return Widened.EMBEDDINGS
    return Widened.GATES if profile.num_active_parameters or training.method is Method.QLORA else Widened.NOTHING
