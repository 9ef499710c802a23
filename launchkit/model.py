"""What planning knows of a model besides its step program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from launchkit.program import StepProgram
from launchkit.scenario import Attention, TraceKey


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """A model's metadata. ``source`` is ``catalogue``, ``hub``, ``local`` or ``traced``.

    ``fingerprint`` is a hash over the configuration fields that decide the architecture: two hub ids with equal
    fields share it, and with it their programs. ``block_classes`` are the classes FSDP wraps (those of
    ``_no_split_modules`` that occur in the module tree). ``checkpoint_itemsize`` is the width of the stored weights.
    """

    name: str
    source: str
    fingerprint: str
    model_type: str
    architecture: str
    num_parameters: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_position_embeddings: int
    block_classes: tuple[str, ...]
    attentions: tuple[Attention, ...]  # those the model's code offers
    checkpoint_itemsize: int = 2
    sliding_window: int = 0  # tokens that the narrowest attention sees; 0 where all layers see everything
    num_active_parameters: int = 0  # of an MoE model: those a token passes through; 0 for dense models
    task: str = "causal-lm"  # causal-lm | sequence-classification | seq2seq-lm | …
    tied_embeddings: bool = False
    quantises_head: bool = False  # transformers' quantisation takes the classifier too, which PEFT then cannot train
    num_attention_heads: int = 0  # 0 where the configuration does not say, as below
    num_key_value_heads: int = 0
    layer_types: tuple[str, ...] = ()  # the kinds of attention that occur; empty where all see everything
    versions: Mapping[str, str] = field(default_factory=dict)  # what the programs were traced with
    notes: tuple[str, ...] = ()


class ModelSource(Protocol):
    """A model as the planner sees it: its profile, and its step programs on demand.

    The catalogue answers from files; a traced source answers by tracing and remembers.
    """

    @property
    def profile(self) -> ModelProfile: ...

    def program(self, key: TraceKey) -> StepProgram:
        """The unsharded step program: forward, loss and backward of one micro-batch, without the optimizer's
        part, which the strategies add. Raises ``TraceError`` where it cannot be had."""
        ...

    def expect(self, keys: Iterable[TraceKey]) -> None:
        """Says which programs will likely be asked for, the likeliest first, so that those that have to be made can be
        made side by side. Nothing is read of ``keys`` that need not be."""
        ...

    def has_program(self, key: TraceKey) -> bool:
        """Whether ``program(key)`` is at hand, or the model is being traced anyway, so that one more costs little."""
        ...
