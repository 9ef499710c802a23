"""Builds a model to be traced: real classes from a configuration, no weights, few layers.

The model is built whole on the meta device (fractions of a second at any size), its stacks of blocks are found
in the module tree and cut down to a few representative layers, the method's adapters are put on, and what is left
moves to fake tensors on the device ``cpu`` (fake ``cuda`` tensors abort the process on a CPU build of torch, and
``meta`` fails in transformers' masking code).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from launchkit.errors import ModelConfigError, TraceError
from launchkit.scenario import Attention
from launchkit.trace.parallel import like, local

# How many layers of a stack are traced when all are of one kind: the first, the last, and two between that must
# come out equal, since a layer between two equal layers stands for all of them.
_LAYERS_WHEN_UNIFORM = 4


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A list of blocks in the module tree: its path, each layer's kind, and which layers are kept for tracing."""

    path: str
    kinds: tuple[str, ...]
    kept: tuple[int, ...]
    block_class: str


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model ready to run on fake tensors, and what was cut away."""

    model: nn.Module
    config: PreTrainedConfig
    stacks: tuple[Stack, ...]
    task: str
    prefix: str = ""  # where the transformers model sits inside what PEFT made of it

    def blocks(self, stack: Stack) -> nn.ModuleList:
        """The kept layers of ``stack``."""
        found = self.model.get_submodule(self.prefix + stack.path)
        assert isinstance(found, nn.ModuleList)
        return found


# Marks a configuration whose class ties the head whatever its file says (T5): the weights hold a head of its own then,
# and ``from_pretrained`` unties what they hold apart. Source: transformers 5.23 ``PreTrainedModel.tie_weights``.
_OWN_HEAD = "_launchkit_own_head"


def load_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """A transformers configuration object from the fields of ``config.json``."""
    model_type = config.get("model_type")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise ModelConfigError(
            f"model_type {model_type!r} is not known to transformers {transformers.__version__}; "
            "upgrade transformers, or plan a model of a known architecture"
        ) from None
    try:
        settings = type(known).from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # transformers validates with many exception types
        raise ModelConfigError(
            f"transformers refuses this config.json: {_first_line(error)}; correct the field"
        ) from None
    if config.get("tie_word_embeddings") is False and getattr(settings, "tie_word_embeddings", False):
        setattr(settings, _OWN_HEAD, True)
    return settings


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# The head that each architecture is fine-tuned with, where that is not the class its checkpoint names.
_FINE_TUNED_AS = {"MaskedLM": "SequenceClassification", "PreTraining": "SequenceClassification"}


def checkpoint_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that the checkpoint names, or the causal (else sequence-to-sequence) one of its model type."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    mappings = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        transformers.MODEL_FOR_MASKED_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    )
    for mapping in mappings:
        if type(config) in mapping:
            return mapping[type(config)]
    raise TraceError(
        f"transformers has no trainable class for model_type {config.model_type!r}; name one in architectures"
    )


def training_class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], str]:
    """The class that is fine-tuned, and the task it trains on."""
    named = checkpoint_class(config)
    for suffix, head in _FINE_TUNED_AS.items():
        if named.__name__.endswith(suffix):
            found = getattr(transformers, named.__name__.removesuffix(suffix).removesuffix("For") + "For" + head, None)
            if found is not None:
                return found, "sequence-classification"
    if config.is_encoder_decoder:
        return named, "speech-seq2seq" if hasattr(config, "num_mel_bins") else "seq2seq-lm"
    for suffix, task in (
        ("ForSequenceClassification", "sequence-classification"),
        ("ForImageClassification", "image-classification"),
        ("ForMaskedLM", "masked-lm"),
    ):
        if named.__name__.endswith(suffix):
            return named, task
    return named, "causal-lm"


def build_on_meta(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, *, attention: Attention, dtype: torch.dtype
) -> PreTrainedModel:
    """The whole model on the meta device, in ``dtype``, with the attention implementation asked for."""
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"), _no_initialisation():
            model = model_class._from_config(config, attn_implementation=str(attention), dtype=dtype)
    except Exception as error:  # constructors raise many exception types
        if "does not support an attention implementation" in str(error):
            raise TraceError(f"{model_class.__name__} has no {attention} attention; use --attention eager") from None
        raise TraceError(
            f"{model_class.__name__} cannot be built with {attention} attention: {_first_line(error)}"
        ) from None
    model.tie_weights()  # which transformers leaves out where it does not initialise
    if getattr(config, _OWN_HEAD, False):
        head: Any = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    return model


def _no_initialisation() -> Any:
    from transformers.initialization import no_init_weights

    return no_init_weights()


# Lists of modules that run between the blocks of a stack, not one after the other: they count with the block before.
_BESIDE_BLOCKS = frozenset({"deepstack_merger_list"})


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of equal-natured blocks that the model runs through, by path: outermost ``ModuleList`` whose
    members share a class; lists inside a block (experts, projections) are part of it."""
    stacks: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in stacks):
            continue
        if path.rpartition(".")[2] in _BESIDE_BLOCKS:
            continue
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(m) for m in module}) == 1:
            stacks[path] = module
    return stacks


def layer_kinds(config: PreTrainedConfig, stack: nn.ModuleList) -> tuple[str, ...]:
    """What distinguishes each layer: its type in ``config.layer_types``, how it was set up, and the shapes of its
    parameters, which stand behind the ``#``."""
    text_config = config.get_text_config()
    types = getattr(text_config, "layer_types", None)
    named = types if types is not None and len(types) == len(stack) else [""] * len(stack)
    shapes: dict[str, int] = {}
    kinds = []
    for name, manner, block in zip(named, _manners(stack), stack, strict=True):
        shape = repr([(n, tuple(p.shape), local(p).element_size()) for n, p in block.named_parameters()])
        kinds.append(f"{name}{manner}#{shapes.setdefault(shape, len(shapes))}")
    for layer in _second_to_share(kinds, getattr(text_config, "num_kv_shared_layers", 0) or 0):
        kinds[layer] = f"second {kinds[layer]}"
    return tuple(kinds)


def _second_to_share(kinds: Sequence[str], num_sharing: int) -> list[int]:
    """The last but one of each kind among the last ``num_sharing`` layers, which take their keys and values from an
    earlier layer: in the backward pass its gradient of them meets the last one's, and the sum is a tensor of its own,
    to which all others are added in place."""
    layers = range(len(kinds) - num_sharing, len(kinds))
    of_kind = {kind: [i for i in layers if kinds[i] == kind] for kind in kinds}
    return [found[-2] for found in of_kind.values() if len(found) > 1]


def _manners(stack: nn.ModuleList) -> list[str]:
    """A mark per layer, the same for layers whose modules were set up alike; all empty where all were.

    Layers of one class and one shape may still compute differently: without rotary embeddings in every fourth
    (SmolLM3), with a window, with dropout. An attribute that differs in every layer only numbers it.
    """
    settings = [_settings(block) for block in stack]
    names = {name for found in settings for name in found}
    values = {name: [found.get(name) for found in settings] for name in names}
    telling = [name for name in sorted(names) if len(set(values[name])) > 1 and not _only_numbers(values[name])]
    marks: dict[str, int] = {}
    texts = [repr([found.get(name) for name in telling]) for found in settings]
    numbers = [marks.setdefault(text, len(marks)) for text in texts]
    return [f"~{number}" if len(marks) > 1 else "" for number in numbers]


def _only_numbers(values: Sequence[Any]) -> bool:
    """Whether a setting only numbers the layers that have it: each has another value, or its own place in the stack."""
    held = [(layer, value) for layer, value in enumerate(values) if value is not None]
    differ = len({value for _, value in held}) == len(held) > 2
    return differ or all(type(value) is int and value == layer for layer, value in held)


def _settings(block: nn.Module) -> dict[str, Any]:
    """The plain values that a block's modules hold, by path, and the class of each; of a float, whether it is zero."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        found[path] = type(module).__name__
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, (bool, int, float, str)):
                found[f"{path}.{name}"] = bool(value) if isinstance(value, float) else value
    return found


def surroundings(kinds: Sequence[str]) -> tuple[tuple[object, ...], ...]:
    """What decides a layer's step besides its own kind: its neighbours' kinds, and whether it is the first or the last
    of its kind, which is where what all of a kind share (a mask, rotary tables) comes to an end. Each end of the stack
    is a case of its own."""
    last = len(kinds) - 1
    final = {kind: i for i, kind in enumerate(kinds)}
    return tuple(
        ("end", i) if i in (0, last) else (*kinds[i - 1 : i + 2], kinds.index(kind) == i, final[kind] == i)
        for i, kind in enumerate(kinds)
    )


def choose_layers(kinds: Sequence[str]) -> tuple[int, ...]:
    """Which layers to trace so that all surroundings occur: where they first do, with both neighbours."""
    count = len(kinds)
    if count <= _LAYERS_WHEN_UNIFORM or len(set(kinds)) == 1:
        return tuple(range(min(count, _LAYERS_WHEN_UNIFORM)))
    cases = surroundings(kinds)
    told = [i for i, case in enumerate(cases) if cases.index(case) == i]
    kept = sorted({i + d for i in told for d in (-1, 0, 1)} & set(range(count)))
    for i in sorted(set(kept) - {*told, 1, count - 2}):  # a neighbour that the next one can stand in for
        fewer = [other for other in kept if other != i]
        if surroundings([kinds[j] for j in fewer])[1:-1] == tuple(cases[j] for j in fewer)[1:-1]:
            kept = fewer
    return tuple(kept)


def cut(model: nn.Module, config: PreTrainedConfig, *, first_apart: bool = False) -> tuple[Stack, ...]:
    """Cuts every stack of ``model`` down to the layers that are traced, in place.

    With ``first_apart`` the first layer is of a kind of its own, and so is then the second, its neighbour: where the
    gradient ends inside the first, what all layers share is used in a backward for the last time in the second.
    """
    stacks = []
    for path, modules in find_stacks(model).items():
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        own = getattr(holder, "config", config)  # a vision tower's, say
        kinds = tuple(map("".join, zip(_marks(holder, config, len(modules)), layer_kinds(own, modules), strict=True)))
        if first_apart:
            kinds = (f"first {kinds[0]}", *kinds[1:])
        kept = choose_layers(kinds) if _can_cut_layer_types(holder, kinds) else tuple(range(len(kinds)))
        setattr(holder, name, nn.ModuleList([modules[i] for i in kept]))
        stacks.append(Stack(path=path, kinds=kinds, kept=kept, block_class=type(modules[0]).__name__))
        _cut_layer_types(holder, kinds, kept)
        _renumber(holder, len(kinds), kept)
    return tuple(stacks)


# Attributes beside a stack that list by index which of its layers are treated in another way, and whether each of those
# is a case of its own. Source: transformers' vision towers of Qwen2.5-VL (full attention among windows) and Qwen3-VL
# (whose output goes to a layer of the text model).
_NAMED_LAYERS: Mapping[str, bool] = {"fullatt_block_indexes": False, "deepstack_visual_indexes": True}
# What the text model is given for its first layers: as many as the vision tower names so.
_GIVEN_TO_TEXT = "deepstack_visual_indexes"


def _marks(holder: nn.Module, config: PreTrainedConfig, num_layers: int) -> list[str]:
    """A mark for each layer that an attribute of ``holder`` names, nothing for the others."""
    given = 0 if hasattr(holder, _GIVEN_TO_TEXT) else len(getattr(_vision(config), _GIVEN_TO_TEXT, None) or ())
    marks = [_GIVEN_TO_TEXT + " " if layer < given else "" for layer in range(num_layers)]
    for name, are_single in _NAMED_LAYERS.items():
        for order, layer in enumerate(getattr(holder, name, None) or ()):
            if layer < num_layers:
                marks[layer] = f"{name}{order if are_single else ''} "
    return marks


def _vision(config: PreTrainedConfig) -> Any:
    return getattr(config, "vision_config", None)


def _renumber(holder: nn.Module, num_layers: int, kept: Sequence[int]) -> None:
    """Names the layers that are left by their place among them."""
    for name in _NAMED_LAYERS:
        named = getattr(holder, name, None)
        if named is not None and num_layers > len(kept):
            setattr(holder, name, [kept.index(layer) for layer in named if layer in kept])


def _layer_typed(holder: nn.Module, num_layers: int) -> list[PreTrainedConfig]:
    """The configurations in the modules of ``holder`` that list a type for each of ``num_layers`` layers."""
    found = {id(config): config for m in holder.modules() if (config := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if len(getattr(config, "layer_types", None) or ()) == num_layers]


def _can_cut_layer_types(holder: nn.Module, kinds: Sequence[str]) -> bool:
    """Whether layers can be left out: some configurations derive the types of layers, and one of a few layers would
    derive others."""
    return len(set(kinds)) == 1 or not any(_derives_types(config) for config in _layer_typed(holder, len(kinds)))


def _derives_types(config: PreTrainedConfig) -> bool:
    name = type(config).attribute_map.get("layer_types", "layer_types")
    return isinstance(getattr(type(config), name, None), property)


def _cut_layer_types(holder: nn.Module, kinds: Sequence[str], kept: Sequence[int]) -> None:
    """Some models look a layer's type up by its index in the stack, so the list in the configuration shrinks too."""
    for config in _layer_typed(holder, len(kinds)):
        if not _derives_types(config):
            config.layer_types = [config.layer_types[i] for i in kept]


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Moves every parameter and buffer from meta to fake CPU tensors, in place; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            part = torch.empty_like(local(tensor), device="meta")
            empty = like(tensor, FakeTensor(mode, part, torch.device("cpu")))
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
        return made[id(tensor)]

    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = fake(tensor)  # type: ignore[assignment]
