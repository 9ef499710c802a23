"""What the code of published runs did in a step that today's does not, put into a trace of today's code.

Most published runs are years old. ``Past`` says which of their code's habits a row's step had, each with its source;
``PastModel`` answers with programs traced that way. Nothing here is fitted: each habit is a rule of the old source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional
from transformers import modeling_utils
from transformers.integrations import sdpa_attention
from transformers.loss.loss_utils import LOSS_MAPPING

from launchkit.catalog.models import TracedModel
from launchkit.model import ModelProfile
from launchkit.planner.evaluate import Bench
from launchkit.program import StepProgram
from launchkit.scenario import Checkpointing, Scenario, TraceKey
from launchkit.trace import methods, trace_model, tracing
from launchkit.trace.forward import Batch, Forward, forward_of
from launchkit.trace.quantised import prepare_for_kbit_training


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a step did that today's does not.

    reenters: full checkpointing ran a backward pass within the backward pass. Source: transformers 4.48.1
    ``PreTrainedModel.gradient_checkpointing_enable``, whose default it was before version 5.

    shifts_logits: the loss widened all logits, then copied all but the last position's. Source: transformers 4.48.1
    ``loss/loss_utils.py``, ``ForCausalLMLoss``.

    widens_logits: the model put out fp32 logits, so that the narrow ones were gone. Source: transformers 4.45.2
    ``LlamaForCausalLM.forward``, ``MistralForCausalLM.forward``.

    fused_loss: a Triton cross-entropy that writes the gradient over the logits. Source: fms-acceleration
    ``fused_ops_and_kernels``, ``kernels/unsloth/cross_entropy_loss.py``.

    repeats_keys: keys and values were repeated for each query head even for FlashAttention. Source: transformers 4.45.2
    ``MistralFlashAttention2.forward``; Llama's did not.

    fast_kernels: Triton norms and rotary embeddings that work in place. Source: fms-acceleration
    ``fused_ops_and_kernels``, ``kernels/unsloth/rms_layernorm.py``, ``rope_embedding.py``.

    checkpoints_units: FSDP's units lay inside the checkpointed call, as the blocks of transformers before 4.53 do. A
    frozen unit hooks the inputs of its recomputation, by which they and their gradients live until the backward pass
    ends, and no unit's backward knows which to gather next. Source: transformers 4.45.2 ``MistralModel.forward``;
    torch 2.4.1 ``fsdp/_runtime_utils.py``, ``_register_post_backward_reshard_only_hook``, ``_pre_backward_hook``.

    keeps_half: what stood beside 4-bit weights stayed in 16 bits. Source: fms-acceleration
    ``framework_plugin_bnb.py``, ``_prepare_model_for_kbit_training``.

    widens_norms_alone: beside 4-bit weights embeddings and head were narrowed again. Source: trl 0.13.0
    ``trainer/utils.py``, ``peft_module_casting_to_bf16``.

    brings_units: 4-bit weights were made on the device one by one and waited on the host until FSDP fetched their unit.
    Source: transformers 4.48.1 ``modeling_utils.py``, ``_load_state_dict_into_meta_model``. Today's wait on the device.

    keeps_outputs: the loop held the model's outputs, logits among them, until the next micro-batch's were there.
    Source: chenyaofo/OpenLM ``openlm/engine/pretraining.py``, ``train``.
    """

    reenters: bool = False
    shifts_logits: bool = False
    widens_logits: bool = False
    fused_loss: bool = False
    repeats_keys: bool = False
    fast_kernels: bool = False
    checkpoints_units: bool = False
    keeps_half: bool = False
    widens_norms_alone: bool = False
    brings_units: bool = False
    keeps_outputs: bool = False

    @property
    def habits(self) -> tuple[str, ...]:
        """The names of those that the step had."""
        return tuple(name for name, has in asdict(self).items() if has)

    def applied_to(self, key: TraceKey) -> TraceKey:
        """``key`` of today's step as it was then."""
        reenters = self.reenters and key.checkpointing is Checkpointing.FULL
        return replace(key, checkpointing=Checkpointing.REENTRANT) if reenters else key


@dataclass(frozen=True, kw_only=True)
class PastModel:
    """A ``ModelSource`` whose programs are traced as ``past`` has it."""

    source: TracedModel
    past: Past
    programs: dict[TraceKey, StepProgram] = field(default_factory=dict)

    @property
    def profile(self) -> ModelProfile:
        return self.source.profile

    def program(self, key: TraceKey) -> StepProgram:
        """Traced once for each key."""
        if key not in self.programs:
            with _as_it_was(self.past, model_type=self.profile.model_type, holds_inputs=self._holds_inputs(key)):
                self.programs[key] = trace_model(self.source.config, self.past.applied_to(key))
        return self.programs[key]

    def has_program(self, key: TraceKey) -> bool:
        """Only what a step needs is traced: published peaks are of training."""
        return key in self.programs

    def _holds_inputs(self, key: TraceKey) -> bool:
        """Only units without anything to train hook their inputs, which those beside adapters are."""
        return self.past.checkpoints_units and bool(key.lora_targets)


@dataclass
class PastBench(Bench):
    """A ``Bench`` whose programs are loaded as ``past`` has it."""

    past: Past = field(kw_only=True)

    def program(self, scenario: Scenario) -> StepProgram:
        """The step of the largest rank."""
        program = super().program(scenario)
        if not self.past.brings_units:
            return program
        return replace(program, arrivals=tuple(arrival._replace(waits=False) for arrival in program.arrivals))


@contextmanager
def _as_it_was(past: Past, *, model_type: str, holds_inputs: bool) -> Iterator[None]:
    """While active, what is built and traced runs as ``past`` says."""
    with ExitStack() as stack:
        if past.shifts_logits:
            loss = _fused_loss if past.fused_loss else functional.cross_entropy
            stack.enter_context(mock.patch.dict(LOSS_MAPPING, ForCausalLM=partial(_shifted_loss, loss=loss)))
        stack.enter_context(mock.patch.object(tracing, "forward_of", partial(_forward_of, past=past)))
        if past.keeps_half or past.widens_norms_alone:
            prepare = partial(_prepare, widens_norms=past.widens_norms_alone)
            stack.enter_context(mock.patch.object(methods, "prepare_for_kbit_training", prepare))
        if past.repeats_keys:
            stack.enter_context(mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda *arguments: False))
        if past.fast_kernels:
            stack.enter_context(_fast_kernels(model_type))
        if holds_inputs:
            stack.enter_context(mock.patch.object(modeling_utils, "checkpoint", _holding(modeling_utils.checkpoint)))
        yield


def _shifted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    *,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    **kwargs: Any,
) -> torch.Tensor:
    wide = logits.float()
    rows = wide[..., :-1, :].contiguous().view(-1, vocab_size)
    return loss(rows, labels[..., 1:].contiguous().view(-1))


class _FusedLoss(Function):
    """A loss and a log-sum-exp per row; the gradient is written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses, log_sum_exp = (logits.new_empty(len(logits)) for _ in range(2))
        ctx.save_for_backward(logits, log_sum_exp, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0], None


def _fused_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _FusedLoss.apply(logits, labels).sum() / len(labels)  # type: ignore[no-any-return]


def _forward_of(key: TraceKey, *, past: Past) -> Forward:
    forward = forward_of(key)
    if past.widens_logits:
        forward = _widening(forward)
    return _keeping(forward) if past.keeps_outputs else forward


def _widening(forward: Forward) -> Forward:
    """``forward`` of a model whose head's output is widened before anything else sees it."""

    def run(model: nn.Module, batch: Batch) -> torch.Tensor:
        causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = causal.get_output_embeddings()
        with mock.patch.object(head, "forward", lambda hidden: type(head).forward(head, hidden).float()):
            return forward(model, batch)

    return run


def _holding(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint`` whose recomputations leave their inputs to the garbage collector, and so to the end of the step's
    backward pass."""

    def hold(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        def run(*inputs: Any) -> Any:
            if torch.is_grad_enabled():
                held: list[Any] = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor)]
                held.append(held)
            return function(*inputs)

        return checkpoint(run, *arguments, **options)

    return hold


def _keeping(forward: Forward) -> Forward:
    """``forward`` of a loop that holds fp32 logits: the last batch's until it is done, its own until the step is."""

    def run(model: nn.Module, batch: Batch) -> torch.Tensor:
        causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        shape = (*batch["input_ids"].shape, causal.config.vocab_size)
        before = torch.empty(shape, dtype=torch.float32)
        kept: list[Any] = []
        kept.append(kept)  # until the step's garbage is collected
        head = causal.get_output_embeddings()
        handle = head.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            return forward(model, batch)
        finally:
            handle.remove()
            del before

    return run


def _prepare(model: nn.Module, *, upcast: bool, widens_norms: bool) -> None:
    """``prepare_for_kbit_training`` that widens nothing, or the norms alone."""
    prepare_for_kbit_training(model, upcast=upcast and widens_norms)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.to(torch.bfloat16)


class _FastNorm(Function):
    """Keeps its input and a number per row; the gradient is written over the one that arrives, the weight gets none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _FastRotary(Function):
    """Rotates where the tensor lies, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.tables = (cos, sin)
        return x.view(-1, x.shape[2] * x.shape[3]).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        return gradient.reshape(-1, gradient.shape[2] * gradient.shape[3]).view(gradient.shape), None, None


def _fast_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return _FastNorm.apply(hidden_states, self.weight)  # type: ignore[no-any-return]


def _fast_rotary(query: Any, key: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return tuple(_FastRotary.apply(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (query, key))  # type: ignore[return-value]


@contextmanager
def _fast_kernels(model_type: str) -> Iterator[None]:
    modeling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    (norm,) = (part for name, part in vars(modeling).items() if name.endswith("RMSNorm"))
    with (
        mock.patch.object(norm, "forward", _fast_norm),
        mock.patch.object(modeling, "apply_rotary_pos_emb", _fast_rotary),
    ):
        yield
