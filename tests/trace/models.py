"""Models small enough to trace in a second, and the keys that tests trace them under."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from launchkit.program import Alloc, Point, Section, StepProgram
from launchkit.scenario import Attention, Checkpointing, Compute, DeviceKind, Loss, Method, TraceKey, Trainer
from launchkit.simulate.expand import expand
from launchkit.trace import build

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 7,
    "vocab_size": 96,
}
LLAMA: dict[str, Any] = {"model_type": "llama"} | _SMALL
TIED: dict[str, Any] = {"model_type": "qwen2", "tie_word_embeddings": True} | _SMALL
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 7, "n_head": 4, "vocab_size": 96}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
MIXTRAL: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2} | _SMALL
T5: dict[str, Any] = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 6,
    "num_decoder_layers": 6,
    "num_heads": 4,
    "vocab_size": 96,
    "decoder_start_token_id": 0,
}


def gemma3(*layer_types: str) -> dict[str, Any]:
    """A Gemma 3 whose layers see a window of 32 tokens or everything, by the first letters given."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    types = [names[letter] for letter in layer_types]
    own = {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 32, "layer_types": types}
    return _SMALL | own | {"num_hidden_layers": len(types)}


def key(**overrides: Any) -> TraceKey:
    """A full fine-tune in fp32 on a CPU, unless told otherwise."""
    values: dict[str, Any] = {
        "device": DeviceKind.CPU,
        "method": Method.FULL,
        "compute": Compute.FP32,
        "checkpointing": Checkpointing.NONE,
        "attention": Attention.SDPA,
        "loss": Loss.PLAIN,
        "trainer": Trainer.LOOP,
    }
    return TraceKey(**(values | overrides))


LORA = {"method": Method.LORA, "lora_targets": "all-linear"}
CUDA_CHECKPOINTED = {
    "device": DeviceKind.CUDA,
    "compute": Compute.AUTOCAST_BF16,
    "checkpointing": Checkpointing.FULL,
}


def whole_stacks() -> AbstractContextManager[Any]:
    """While active, no layer is cut away: what is traced is the whole model."""
    everything: Callable[[Sequence[str]], tuple[int, ...]] = lambda kinds: tuple(range(len(kinds)))  # noqa: E731
    return mock.patch.object(build, "choose_layers", everything)


def requests(program: StepProgram, point: Point) -> list[int]:
    """What the allocator is asked for in a step, as signed bytes in order. Storages that die with no birth between
    have no order of their own (autocast's cache is a hash table), so each run of deaths is sorted."""
    ordered: list[int] = []
    deaths: list[int] = []
    for event in expand(program, point):
        if event.delta_bytes < 0:
            deaths.append(event.delta_bytes)
            continue
        ordered += [*sorted(deaths), event.delta_bytes]
        deaths = []
    return ordered + sorted(deaths)


def allocations(section: Section) -> Sequence[Alloc]:
    return [event for event in section.events if isinstance(event, Alloc)]


def first_section(program: StepProgram, stage: str, *, layer: int = 0) -> Section:
    return program.section_of(program.stage(stage), layer)


def varied(config: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    return dict(config) | overrides
