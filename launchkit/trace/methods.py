"""Puts the fine-tuning method on a model that is still on the meta device: adapters, frozen parts, 4-bit weights."""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from launchkit.errors import TraceError
from launchkit.finetune.split_adapters import declare_whole_widths
from launchkit.recipe import RECIPES
from launchkit.scenario import Compute, Method, TraceKey, is_fused_expert, names_in
from launchkit.trace.axolotl import convert_embeddings, widen
from launchkit.trace.quantised import prepare_for_kbit_training, quantise_linears

# Names that PEFT targets are given by group; resolved against the real module tree.
_ATTENTION = re.compile(
    r"(q_proj|k_proj|v_proj|o_proj|qkv_proj|query_key_value|c_attn|q_lin|k_lin|v_lin|out_lin|query|key|value|out_proj|Wqkv|Wo|q|k|v|o|dense)$"
)

# Ways to split a matrix that PEFT splits its adapter by.
_ADAPTED_STYLES = ("colwise", "rowwise")

_ANY_DROPOUT = 0.1  # the bytes of dropout are the same for every share above zero

WEIGHT_DTYPE: Mapping[Compute, torch.dtype] = {
    Compute.FP32: torch.float32,
    Compute.AUTOCAST_BF16: torch.float32,
    Compute.AUTOCAST_FP16: torch.float32,
    Compute.BF16: torch.bfloat16,
    Compute.BF16_AUTOCAST: torch.bfloat16,
    Compute.FP16: torch.float16,
    Compute.FP16_AUTOCAST: torch.float16,
    Compute.AUTOCAST_FP8: torch.float32,
    Compute.FP8_AUTOCAST: torch.bfloat16,
}


_PEFT_TASKS = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}


def peft_task(model: nn.Module) -> str | None:
    """PEFT's ``task_type``: a classifier's head is trained whole beside its adapters."""
    name = type(model).__name__
    return next((task for suffix, task in _PEFT_TASKS.items() if name.endswith(suffix)), None)


def apply_method(model: nn.Module, key: TraceKey, *, lora_rank: int) -> nn.Module:
    """The model as it is trained: itself, or wrapped by PEFT with everything else frozen.

    Adapters of a 16-bit model are fp32, as PEFT's ``autocast_adapter_dtype=True`` makes them, unless the key says that
    an engine casts them. Raises ``TraceError`` for names that match nothing.
    """
    if key.widened:
        widen(model, key.widened)
    if key.method is Method.FULL:
        return model
    from peft import LoraConfig

    targets, parameters = lora_targets(model, key.lora_targets)
    if key.method is Method.QLORA:
        quantise_linears(model, dtype=WEIGHT_DTYPE[key.compute], device=key.device)
        prepare_for_kbit_training(model, upcast=not key.cast_adapters)
        if key.widened:
            convert_embeddings(model, WEIGHT_DTYPE[key.compute])
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=RECIPES[key.method].lora_alpha(lora_rank),
        lora_dropout=_ANY_DROPOUT if key.adapter_dropout else 0.0,
        target_modules=targets,
        target_parameters=parameters or None,
        modules_to_save=_modules_to_save(model, key.modules_to_save),
        use_dora=key.dora,
        task_type=peft_task(model),
    )
    return _with_adapters(model, config, key)


def _with_adapters(model: nn.Module, config: Any, key: TraceKey) -> nn.Module:
    """``get_peft_model`` as the built-in fine-tune calls it, its complaints with what to type instead."""
    from peft import get_peft_model

    unfit = _split_otherwise(model) if key.tp > 1 else {}
    if key.tp > 1:
        _check_saved_whole(model, config.modules_to_save or ())
    try:
        with unpacking_for_dora():
            adapted = get_peft_model(model, config, autocast_adapter_dtype=not key.cast_adapters)
    except AttributeError as error:
        if key.tp == 1 or "ParamWrapper" not in str(error):  # whose weight peft 0.21 asks for, and it has none
            raise
        raise TraceError(
            f"PEFT cannot put adapters on fused experts that are split, which --lora-targets {key.lora_targets} "
            f"includes; pass {_other_targets(model, key.lora_targets, unfit=unfit)}"
        ) from None
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).removeprefix("[PEFT:PeftType.LORA] ").split())
        advice = _other_targets(model, key.lora_targets, unfit=re.findall(r"'(\w+)'", reason))
        raise TraceError(
            f"PEFT refuses --lora-targets {key.lora_targets}: {_sentence(reason)}; pass {advice}"
        ) from None
    if key.tp > 1:
        _check_split_alike(adapted, key, unfit=unfit)
        declare_whole_widths(adapted)
    return adapted


def _check_saved_whole(model: nn.Module, names: Sequence[str]) -> None:
    """PEFT copies a module that it is to train whole, and a split one cannot be copied."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in names and any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise TraceError(
                f"PEFT cannot copy {name}, whose weight is split, to train it whole; leave it out of "
                "--lora-modules-to-save, or use --strategy fsdp2 without --tp"
            )


def _check_split_alike(model: nn.Module, key: TraceKey, *, unfit: Mapping[str, str]) -> None:
    """Source: peft 0.21 ``LoraModel._create_and_replace``, which warns, and leaves adapters without their messages."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            style = getattr(layer.get_base_layer(), "_hf_tp_plan", None)
            if style not in (None, *_ADAPTED_STYLES):
                name, advice = path.rpartition(".")[2], _other_targets(model, key.lora_targets, unfit=unfit)
                raise TraceError(
                    f"PEFT splits adapters by columns or by rows alone, and transformers splits {name} as {style}; "
                    f"pass {advice}, or use --strategy fsdp2 without --tp"
                )


def _split_otherwise(model: nn.Module) -> dict[str, str]:
    """The linear layers, by the last part of their names, on which PEFT cannot split adapters, and how transformers
    splits them."""
    plan: Mapping[str, str] = model.tp_plan  # type: ignore[assignment]
    styles = {path.rpartition(".")[2]: plan.get(re.sub(r"\.\d+\.", ".*.", path)) for path, _ in _linears(model)}
    return {name: style for name, style in styles.items() if style is not None and style not in _ADAPTED_STYLES}


def adapter_error(model: nn.Module, key: TraceKey, error: BaseException) -> TraceError | None:
    """What to tell where a step failed in an adapter itself; None where it failed elsewhere.

    PEFT takes every subclass of a linear layer for one, also those that return more than one tensor (the routers of
    some mixtures of experts), and its adapters break on them.
    """
    if key.method is Method.FULL:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    layer = frame.f_locals.get("self")
    if not isinstance(layer, BaseTunerLayer):
        return None
    name = next((path for path, module in model.named_modules() if module is layer), "").rpartition(".")[2]
    wrapped = type(layer.get_base_layer()).__name__
    advice = _other_targets(model, key.lora_targets, unfit=[name])
    return TraceError(
        f"PEFT's adapters do not run on {name} ({wrapped}), one of --lora-targets {key.lora_targets}; pass {advice}"
    )


def _sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def _other_targets(model: nn.Module, text: str, *, unfit: Collection[str]) -> str:
    """The targets to type in place of ``text``: the attention's where it has any that fit, else all that fit."""
    attention = _attention_names(model)
    if text != "attention" and attention and not attention & set(unfit):
        return "--lora-targets attention"
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    fit = {name.rpartition(".")[2] for name, layer in _linears(model) if layer is not head} - set(unfit)
    return f"--lora-targets {','.join(sorted(fit))}" if fit else "--method full"


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
    names = {name.rpartition(".")[2] for name, _ in _linears(model)}
    chosen = named
    if named == ["attention"]:
        chosen = sorted(_attention_names(model))
    missing = [name for name in chosen if name not in names]
    if missing or not chosen:
        raise TraceError(
            f"--lora-targets {','.join(named)} matches no linear layer; "
            f"choose among all-linear, attention, {', '.join(sorted(names))}"
        )
    return chosen


def _attention_names(model: nn.Module) -> set[str]:
    return {
        name.rpartition(".")[2]
        for name, _ in _linears(model)
        if re.search(r"attn|attention", name, re.IGNORECASE) and _ATTENTION.search(name)
    }


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers by their paths in the model, whether or not adapters are on them."""
    for name, module in model.named_modules():
        if _is_linear(module) and ".lora_" not in name:
            yield name.removesuffix(".base_layer"), module


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
