"""The public side of tracing: a configuration and a key in, a step program or a profile out."""

from __future__ import annotations

import copy
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig

from launchkit.errors import TraceError
from launchkit.frozen import check_whole_stacks, freeze_parts
from launchkit.images import SMALL_SIZE, TEXT_ALONE
from launchkit.model import ModelProfile
from launchkit.program import Parameter, ParameterGroup, Point, StepProgram
from launchkit.quiet import without_logs
from launchkit.scenario import Attention, DeviceKind, Method, TraceKey
from launchkit.trace.assemble import TracedModel, UnlikeLayersError, assemble, parameter
from launchkit.trace.build import (
    Built,
    Stack,
    build_on_meta,
    checkpoint_class,
    cut,
    find_stacks,
    load_config,
    to_fake,
    training_class,
)
from launchkit.trace.checkpointing import enable_checkpointing
from launchkit.trace.cuda import faithful_to_cuda
from launchkit.trace.flash_attention_3 import LARGEST_HEAD, blocks_of
from launchkit.trace.float8 import autocast_as_on_cuda, convert_linears
from launchkit.trace.forward import forward_of
from launchkit.trace.liger import liger_kernels
from launchkit.trace.methods import WEIGHT_DTYPE, adapter_error, apply_method
from launchkit.trace.parallel import is_split, local, rank_of, split_weights
from launchkit.trace.quantised import packed_bytes, quantises_head, scale_bytes
from launchkit.trace.recorder import Log
from launchkit.trace.sequences import check_ring, shared_sequences
from launchkit.trace.step import trace_step
from launchkit.trace.transformer_engine import convert_modules
from launchkit.trace.unpadding import unpadded_flash
from launchkit.trace.zero_linear import kept_linear_inputs
from launchkit.units import divide_up

ProgressHook = Callable[[int, int, str], None]

# Where the step is traced, lengths in strides. The last point of each list is held back: it checks the polynomials and
# shapes none. Ranks occur among the points so that a size linear in the rank is told from one that is not.
_POINTS_BATCHED = (Point(2, 2, 8), Point(3, 2, 8), Point(2, 3, 8), Point(4, 5, 16))
_POINTS_SINGLE = (Point(1, 2, 8), Point(1, 3, 8), Point(1, 5, 16))
# A loop over the sequence is told from a few of its steps, not from two, and its sums have a term of each power.
_LOOPED_BATCHED = (Point(2, 6, 8), Point(3, 6, 8), Point(2, 8, 8), Point(2, 9, 8), Point(4, 11, 16))
_LOOPED_SINGLE = (Point(1, 6, 8), Point(1, 8, 8), Point(1, 9, 8), Point(1, 11, 16))

# CUDA's attention kernels pad lengths to multiples of 32.
_STRIDE = 32
_STRIDE_WITHOUT_ATTENTION = 2


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Which sequence lengths show how a model's sizes go with the length: multiples of ``stride`` beyond ``window``,
    enough of them to see the steps of a loop where the model is ``looped``."""

    stride: int = _STRIDE
    window: int = 0
    looped: bool = False

    def of(self, point: Point) -> Point:
        """``point``, whose length is in strides, with its length in tokens."""
        return point._replace(seq_len=(point.seq_len + divide_up(self.window, self.stride)) * self.stride)


# No adapters, and those that the first layer's attention computes with, so that its whole backward runs.
_BEFORE_ATTENTION = ("", "all-linear", "attention")


def trace_points(key: TraceKey, lengths: Lengths = Lengths()) -> tuple[Point, ...]:  # frozen
    """The points that a program is fitted to, the held-back one last; or the one point that it is of."""
    if key.at is not None:
        return (key.at,)
    batched, single = (_LOOPED_BATCHED, _LOOPED_SINGLE) if lengths.looped else (_POINTS_BATCHED, _POINTS_SINGLE)
    points = tuple(lengths.of(point) for point in (single if key.single_sequence else batched))
    if key.method is Method.FULL:
        return tuple(point._replace(lora_rank=0) for point in points)
    ranked = points[0]._replace(seq_len=points[0].seq_len + 2 * lengths.stride, lora_rank=16)
    return (*points[:-1], ranked, points[-1])


def telling_lengths(config: PreTrainedConfig, *, beyond_window: bool) -> Lengths:
    """The lengths for the model of ``config``."""
    text = config.get_text_config()
    types = set(getattr(text, "layer_types", None) or ())
    chunk = _chunk_size(config)
    stride = math.lcm(chunk, _STRIDE) if chunk else _STRIDE
    if types == {"linear_attention"} and not chunk:
        stride = _STRIDE_WITHOUT_ATTENTION
    return Lengths(
        stride=stride, window=_sliding_window(text) if beyond_window else 0, looped="linear_attention" in types
    )


def _flash_3_stride(config: PreTrainedConfig) -> int:
    """Tokens in whole blocks of FlashAttention 3, which rounds lengths up to them."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return blocks_of(min(head, LARGEST_HEAD), is_causal=True).stride


def _chunk_size(config: PreTrainedConfig) -> int:
    """Tokens that the model's recurrent layers take at once and pad the sequence to; 0 where they go token by token.

    It is in the configuration (Mamba 2), or the default of a function beside the model's class (the gated delta rule).
    """
    text = config.get_text_config()
    for name in ("chunk_size", "mamba_chunk_size", "block_size"):
        if isinstance(size := getattr(text, name, None), int):
            return size
    functions = vars(sys.modules[checkpoint_class(config).__module__]).values()
    defaults = (p.default for f in functions if inspect.isfunction(f) for p in _parameters(f) if p.name == "chunk_size")
    return next((size for size in defaults if isinstance(size, int)), 0)


def _parameters(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(function).parameters.values())


def trace_model(config: Mapping[str, Any], key: TraceKey, *, progress: ProgressHook | None = None) -> StepProgram:
    """The steady step's program of the model that ``config``, the fields of a ``config.json``, describes.

    Raises ``ModelConfigError`` for a configuration transformers refuses and ``TraceError``, naming the operator or the
    reason, for a model whose step cannot be traced.

    Where layers that should be alike are not, the first one is taken for a kind of its own: it may read another dtype
    than it puts out (bf16 embeddings beside norms that autocast widens).
    """
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        settings = load_config(config)
        lengths = telling_lengths(settings, beyond_window=key.beyond_window)
        if lengths.looped:  # token by token at full length takes minutes
            key = replace(key, at=None, asks_kernels=False)
        if key.attention is Attention.FLASH_ATTENTION_3:
            lengths = replace(lengths, stride=math.lcm(lengths.stride, _flash_3_stride(settings)))
        points = trace_points(key, replace(lengths, stride=lengths.stride * key.split.num_pieces))
        if key.device is DeviceKind.CUDA:
            stack.enter_context(faithful_to_cuda(key.attention))
        stack.enter_context(autocast_as_on_cuda(key))
        stack.enter_context(kept_linear_inputs(key))
        stack.enter_context(liger_kernels(key, training_class(settings)[0], settings.model_type))
        num_ranks = key.split.num_ranks
        mesh = stack.enter_context(rank_of(num_ranks)) if num_ranks > 1 else None
        stack.enter_context(shared_sequences(key, settings, mesh))
        stack.enter_context(unpadded_flash(key))
        reason = ""
        for first_apart in (False, True) if key.lora_targets in _BEFORE_ATTENTION else (True,):
            try:
                return _trace_steps(settings, key, points, mesh=mesh, first_apart=first_apart, progress=progress)
            except UnlikeLayersError as error:
                reason = str(error)
        raise TraceError(reason)


def _trace_steps(
    settings: PreTrainedConfig,
    key: TraceKey,
    points: Sequence[Point],
    *,
    mesh: DeviceMesh | None,
    first_apart: bool,
    progress: ProgressHook | None,
) -> StepProgram:
    """The program of a model whose first layer is of a kind of its own or not.

    A model's first step may differ from the later ones by what it leaves cached. In most it does not: it then tells the
    same story as the later steps at other points, and fits their polynomials. Where it does not fit it is run again.
    """
    models: dict[int, _Traceable] = {}
    logs: list[Log] = []
    firsts: list[int] = []  # the points at which a model ran its first step
    for done, point in enumerate(points):
        if progress:
            progress(done, len(points), f"tracing {key.method} {key.compute}, {point.micro_batch}×{point.seq_len}")
        if point.lora_rank not in models:
            models[point.lora_rank] = _build(
                settings, key, lora_rank=point.lora_rank, mesh=mesh, first_apart=first_apart
            )
            firsts.append(done)
            if key.at is not None:  # no other point would show that the first step differs
                _trace_one(models[point.lora_rank], *_least_of(key, point))
        logs.append(_trace_one(models[point.lora_rank], key, point))
        check_ring(logs[-1], key)
    described = models[points[0].lora_rank].described
    try:
        return assemble(described, logs, points)
    except TraceError:
        for i in firsts:
            logs[i] = _trace_one(models[points[i].lora_rank], key, points[i])
        return assemble(described, logs, points)


def _least_of(key: TraceKey, point: Point) -> tuple[TraceKey, Point]:
    """A quick step that leaves behind what a step at ``point`` would."""
    key = replace(key, asks_kernels=False)
    if not key.image_size:
        return key, point
    return replace(key, image_size=str(SMALL_SIZE)), point._replace(micro_batch=1)


@dataclass(frozen=True, kw_only=True)
class _Traceable:
    """A model on fake tensors, the mode they live in, and what assembling needs to know of it."""

    built: Built
    mode: FakeTensorMode
    described: TracedModel


def _trace_one(model: _Traceable, key: TraceKey, point: Point) -> Log:
    built = model.built
    try:
        return trace_step(built, model.mode, point=point, key=key, forward=forward_of(key))
    except TraceError:
        raise
    except Exception as error:
        if (of_adapter := adapter_error(built.model, key, error)) is not None:
            raise of_adapter from error
        text = " ".join(str(error).split())[:300]
        raise TraceError(
            f"the training step of {type(built.model).__name__} cannot be traced: {type(error).__name__}: {text}"
        ) from error


def _build(
    settings: PreTrainedConfig,
    key: TraceKey,
    *,
    lora_rank: int,
    mesh: DeviceMesh | None,
    first_apart: bool,
) -> _Traceable:
    model_class, task = training_class(settings)
    whole: nn.Module = build_on_meta(
        model_class, settings, attention=key.built_attention, dtype=WEIGHT_DTYPE[key.compute]
    )
    config = whole.config
    whole.train()
    convert_linears(whole, key)
    convert_modules(whole, key)
    if key.freeze:
        check_whole_stacks(dict(whole.named_parameters()), freeze_parts(whole, key.freeze))
    stacks = cut(whole, config, first_apart=first_apart)
    if mesh is not None and key.tp > 1:
        split_weights(whole, mesh)
    model = apply_method(whole, key, lora_rank=lora_rank)
    enable_checkpointing(model, key.checkpointing, input_grads=key.input_grads)
    prefix = _prefix(whole, model)
    traced = _describe(model, stacks, prefix=prefix, config=settings, lora_rank=lora_rank)
    if key.flat_gradients:
        _train_with_adapters([model.get_submodule(f"{prefix}{s.path}.{j}") for s in stacks for j in range(len(s.kept))])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.cache_enabled = False  # most of what runs is remembered by the recorder, the rest seldom comes again
    to_fake(model, mode)
    built = Built(model=model, config=settings, stacks=stacks, task=task, prefix=prefix)
    return _Traceable(built=built, mode=mode, described=traced)


def _train_with_adapters(blocks: Sequence[nn.Module]) -> None:
    """What is flattened with something that is trained is a view of a tensor that requires a gradient."""
    for block in blocks:
        if any(parameter.requires_grad for parameter in block.parameters()):
            for parameter in block.parameters():
                parameter.requires_grad = parameter.is_floating_point()


def _prefix(whole: nn.Module, model: nn.Module) -> str:
    """The path of the transformers model inside what PEFT made of it, with a dot, or nothing."""
    if whole is model:
        return ""
    return next(name for name, module in model.named_modules() if module is whole) + "."


def _describe(
    model: nn.Module, stacks: tuple[Stack, ...], *, prefix: str, config: PreTrainedConfig, lora_rank: int
) -> TracedModel:
    groups: dict[str, ParameterGroup] = {}
    owners: dict[str, tuple[str, int]] = {}
    group_of_layer: dict[str, tuple[str, ...]] = {}
    named = dict(model.named_parameters())
    rest = dict(named)
    for stack in stacks:
        names_of_kind: dict[str, str] = {}
        for kind in stack.kinds:
            shape = kind.partition("#")[2]
            name = stack.block_class if not names_of_kind else f"{stack.block_class}.{len(names_of_kind)}"
            if shape not in names_of_kind:
                while name in groups or name in names_of_kind.values():
                    name = f"{stack.path}.{name}"
                names_of_kind[shape] = name
        group_of_layer[stack.path] = tuple(names_of_kind[kind.partition("#")[2]] for kind in stack.kinds)
        for j, layer in enumerate(stack.kept):
            start = f"{prefix}{stack.path}.{j}."
            group = group_of_layer[stack.path][layer]
            mine = {name: p for name, p in rest.items() if name.startswith(start)}
            rows = tuple(_row(name.removeprefix(start), p, lora_rank) for name, p in mine.items())
            groups[group] = ParameterGroup(name=group, parameters=rows)
            owners |= {name: (group, index) for index, name in enumerate(mine)}
            rest = {name: p for name, p in rest.items() if name not in mine}
    groups["root"] = ParameterGroup(
        name="root", parameters=tuple(_row(name.removeprefix(prefix), p, lora_rank) for name, p in rest.items())
    )
    owners |= {name: ("root", index) for index, name in enumerate(rest)}
    return TracedModel(
        stacks=stacks,
        groups=groups,
        owners=owners,
        parameter_names=tuple(named),
        group_of_layer=group_of_layer,
        buffer_bytes=_buffer_bytes(model, stacks, prefix),
        vocab_size=getattr(config.get_text_config(), "vocab_size", 0),
    )


def _row(name: str, p: nn.Parameter, lora_rank: int) -> Parameter:
    """The row of what this rank holds of a parameter."""
    logical = getattr(p, "logical_shape", None)
    if logical is not None:
        numel = logical[0] * logical[1]
        return Parameter(
            name=name,
            shape=logical,
            itemsize=p.element_size(),
            trainable=False,
            packed_bytes=packed_bytes(numel),
            extra_bytes=scale_bytes(numel),
        )
    row = parameter(name, local(p).shape, local(p).element_size(), trainable=p.requires_grad, lora_rank=lora_rank)
    return replace(row, is_split=is_split(p))


def _buffer_bytes(model: nn.Module, stacks: tuple[Stack, ...], prefix: str) -> tuple[int, ...]:
    """Bytes of each buffer of the whole model: those of a cut stack as often as it had layers."""
    sizes: list[int] = []
    for name, buffer in model.named_buffers():
        stack = next((s for s in stacks if name.startswith(f"{prefix}{s.path}.")), None)
        repeats = 1
        if stack is not None:
            layer = int(name.removeprefix(f"{prefix}{stack.path}.").partition(".")[0])
            repeats = len(stack.kinds) - len(stack.kept) + 1 if layer == min(1, len(stack.kept) - 1) else 1
        sizes.extend([buffer.numel() * buffer.element_size()] * repeats)
    return tuple(sizes)


def profile_model(
    config: Mapping[str, Any], *, name: str, source: str = "traced", fingerprint: str = ""
) -> ModelProfile:
    """What planning needs to know of the model besides its programs. Builds it once on the meta device."""
    with _quiet():
        settings = load_config(config)
        model_class, task = training_class(settings)
        named_class = checkpoint_class(settings)
        attentions = tuple(a for a in (Attention.SDPA, Attention.EAGER) if _offers(model_class, settings, a))
        if not attentions:
            raise TraceError(f"{model_class.__name__} offers neither sdpa nor eager attention; it cannot be planned")
        model = build_on_meta(named_class, settings, attention=attentions[0], dtype=torch.bfloat16)
        classifies = task == "sequence-classification"
        trained = (
            build_on_meta(model_class, settings, attention=attentions[0], dtype=torch.bfloat16) if classifies else None
        )
    text = settings.get_text_config()
    stacks = find_stacks(model)
    blocks = {type(stack[0]).__name__ for stack in stacks.values()}
    wrapped = tuple(sorted(set(model._no_split_modules or ()) & {type(m).__name__ for m in model.modules()}))
    return ModelProfile(
        name=name,
        source=source,
        fingerprint=fingerprint,
        model_type=settings.model_type,
        architecture=named_class.__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_active_parameters=_active_parameters(model, text),
        hidden_size=getattr(text, "hidden_size", 0),
        num_layers=getattr(text, "num_hidden_layers", 0) or sum(len(stack) for stack in stacks.values()),
        vocab_size=getattr(text, "vocab_size", 0),
        max_position_embeddings=getattr(text, "max_position_embeddings", 0) or 0,
        block_classes=wrapped or tuple(sorted(blocks)),
        attentions=attentions,
        sliding_window=_sliding_window(text),
        task=task,
        tied_embeddings=_has_tied_head(model),
        quantises_head=trained is not None and quantises_head(trained),
        versions=traced_with(),
        notes=_notes(settings),
    )


def _has_tied_head(model: Any) -> bool:
    """Whether the output embedding is the input embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _notes(settings: PreTrainedConfig) -> tuple[str, ...]:
    """What a plan of this model takes for granted."""
    notes = []
    if getattr(settings, "vision_config", None) is not None:
        notes.append(TEXT_ALONE)
    if telling_lengths(settings, beyond_window=False).looped:
        notes.append(
            "recurrent layers run as transformers' own Python code, as without mamba-ssm, causal-conv1d or "
            "flash-linear-attention, whose kernels keep less; lengths are taken as whole chunks"
        )
    return tuple(notes)


def _active_parameters(model: nn.Module, text: PreTrainedConfig) -> int:
    """Parameters that one token passes through in a mixture of experts; 0 for a dense model.

    Formula: all parameters, the routed experts' times experts per token over experts.
    """
    per_token = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None)
    experts = next(
        (v for f in ("num_local_experts", "num_experts", "n_routed_experts") if (v := getattr(text, f, None))), None
    )
    if not per_token or not experts:
        return 0
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and "shared" not in name)
    total = sum(p.numel() for p in model.parameters())
    return total - routed + routed * int(per_token) // int(experts)


def _sliding_window(text: PreTrainedConfig) -> int:
    """Tokens that the model's narrowest attention sees, where its configuration says that any layer uses a window."""
    window = getattr(text, "sliding_window", None) or 0
    types = getattr(text, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return 0
    return 0 if getattr(text, "use_sliding_window", True) is False else int(window)


def _offers(model_class: Any, settings: PreTrainedConfig, attention: Attention) -> bool:
    small = copy.deepcopy(settings)
    try:
        build_on_meta(model_class, small, attention=attention, dtype=torch.bfloat16)
    except TraceError:
        return False
    return True


def traced_with() -> dict[str, str]:
    """The versions that decide what a trace looks like."""
    return {name: version(name) for name in ("torch", "transformers", "peft")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries' chatter about a model that is only being looked at stays off the terminal."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with without_logs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers.logging.set_verbosity(level)
