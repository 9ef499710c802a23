"""Puts the fine-tuning method on a model that is still on the meta device: adapters, frozen parts, 4-bit weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from launchkit.errors import TraceError
from launchkit.recipe import RECIPES
from launchkit.scenario import Compute, Method, TraceKey, is_fused_expert, names_in
from launchkit.trace.quantised import prepare_for_kbit_training, quantise_linears

# Names that PEFT targets are given by group; resolved against the real module tree.
_ATTENTION = re.compile(
    r"(q_proj|k_proj|v_proj|o_proj|qkv_proj|query_key_value|c_attn|q_lin|k_lin|v_lin|out_lin|query|key|value|out_proj|Wqkv|Wo|q|k|v|o|dense)$"
)

_ANY_DROPOUT = 0.1  # the bytes of dropout are the same for every share above zero

WEIGHT_DTYPE: Mapping[Compute, torch.dtype] = {
    Compute.FP32: torch.float32,
    Compute.AUTOCAST_BF16: torch.float32,
    Compute.AUTOCAST_FP16: torch.float32,
    Compute.BF16: torch.bfloat16,
    Compute.BF16_AUTOCAST: torch.bfloat16,
    Compute.FP16: torch.float16,
}


def apply_method(model: nn.Module, key: TraceKey, *, lora_rank: int) -> nn.Module:
    """The model as it is trained: itself, or wrapped by PEFT with everything else frozen.

    Adapters of a 16-bit model are fp32, as PEFT's ``autocast_adapter_dtype=True`` makes them, unless the key says that
    an engine casts them. Raises ``TraceError`` for names that match nothing.
    """
    if key.method is Method.FULL:
        return model
    from peft import LoraConfig, get_peft_model

    targets, parameters = lora_targets(model, key.lora_targets)
    if key.method is Method.QLORA:
        quantise_linears(model, dtype=WEIGHT_DTYPE[key.compute], device=key.device)
        prepare_for_kbit_training(model, upcast=not key.cast_adapters)
    task = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS", "ConditionalGeneration": None}
    task_type = next((t for suffix, t in task.items() if type(model).__name__.endswith(suffix)), None)
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=RECIPES[key.method].lora_alpha(lora_rank),
        lora_dropout=_ANY_DROPOUT if key.adapter_dropout else 0.0,
        target_modules=targets,
        target_parameters=parameters or None,
        modules_to_save=_modules_to_save(model, key.modules_to_save),
        use_dora=key.dora,
        task_type=task_type,
    )
    try:
        with unpacking_for_dora():
            return get_peft_model(model, config, autocast_adapter_dtype=not key.cast_adapters)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).removeprefix("[PEFT:PeftType.LORA] ").split())
        raise TraceError(f"PEFT refuses --lora-targets {key.lora_targets}: {reason}") from None


def lora_targets(model: nn.Module, text: str) -> tuple[str | list[str], list[str]]:
    """PEFT's ``target_modules`` and ``target_parameters`` for ``all-linear``, ``attention`` or a list of names
    separated by commas, of which those of fused experts (``experts.down_proj``) are parameters.

    Raises ``TraceError`` naming what the model does have when nothing matches.
    """
    if text == "all-linear":
        return "all-linear", []
    named = names_in(text)
    parameters = [name for name in named if is_fused_expert(name) and _has_fused_experts(model, name)]
    modules = [name for name in named if name not in parameters]
    return (_target_modules(model, modules) if modules or not parameters else []), parameters


def _has_fused_experts(model: nn.Module, target: str) -> bool:
    return any(name.endswith(f".{target}") and p.dim() == 3 for name, p in model.named_parameters())


def _target_modules(model: nn.Module, named: list[str]) -> list[str]:
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}
    chosen = named
    if named == ["attention"]:
        chosen = sorted(
            {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if _is_linear(module) and re.search(r"attn|attention", name, re.IGNORECASE) and _ATTENTION.search(name)
            }
        )
    missing = [name for name in chosen if name not in names]
    if missing or not chosen:
        raise TraceError(
            f"--lora-targets {','.join(named)} matches no linear layer; "
            f"choose among all-linear, attention, {', '.join(sorted(names))}"
        )
    return chosen


def _modules_to_save(model: nn.Module, names: str) -> list[str] | None:
    """PEFT's ``modules_to_save``. Raises ``TraceError`` where the model has no module of that name."""
    if not names:
        return None
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    saved = names_in(names)
    missing = sorted(set(saved) - known)
    if missing:
        outer = sorted(
            name for name in ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "score") if name in known
        )
        raise TraceError(
            f"--lora-modules-to-save {','.join(missing)} names no module of the model; "
            f"try {' or '.join(outer) or 'a name of its module tree'}"
        )
    return list(saved)


@contextmanager
def unpacking_for_dora() -> Iterator[None]:
    """While active, DoRA reads a traced 4-bit weight as it reads a real one: unpacked by bitsandbytes."""
    from peft.tuners.lora import dora

    dequantise = dora.dequantize_module_weight

    def unpack(module: nn.Module) -> Any:
        packed = getattr(module, "packed", None)
        return dequantise(module) if packed is None else packed.unpack(module.weight.device)  # type: ignore[union-attr]

    with mock.patch.object(dora, "dequantize_module_weight", unpack):
        yield


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
