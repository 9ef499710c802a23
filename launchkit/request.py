"""What was asked for: every scenario flag as typed, and the scenario that ``estimate`` reads from it.

One table, ``FLAGS``, names each flag once. The command line, the ``LAUNCHKIT_*`` variables, ``launchkit.toml`` and the
Python API all read their values through it, so that a value means the same wherever it was written.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, TypeVar

from launchkit.alloc_conf import EXPANDABLE, AllocatorSettings
from launchkit.engine_settings import DDP, FSDP, ZERO, auto_sizes
from launchkit.errors import IllegalScenarioError, UsageError
from launchkit.hardware import Cluster, format_gpus
from launchkit.images import DEFAULT_SIZE, OF_ANY_SIZE, ImageSize
from launchkit.model import ModelProfile
from launchkit.scenario import (
    UNSHARDED,
    Attention,
    BackwardPrefetch,
    Batch,
    Checkpointing,
    DeviceKind,
    Fp8Backend,
    FsdpSettings,
    Loss,
    Method,
    Offload,
    Precision,
    Scenario,
    Sharding,
    Split,
    State,
    Strategy,
    StrategyKind,
    Trainer,
    Training,
    names_in,
)

_T = TypeVar("_T")
SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
MAXIMUM_COUNT = 10**8  # no batch, length or rank is larger; a typing slip is


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything typed besides the model. ``None`` means that ``plan`` may choose and ``estimate`` takes the default.

    ``gpus``, ``host_memory`` and ``config`` say where the cluster and the model come from; the rest narrows the search.
    """

    gpus: str | None = None
    host_memory: str | None = None
    strategy: StrategyKind | None = None
    tp: int | None = None
    cp: int | None = None
    sp: int | None = None
    fsdp_sharding: Sharding | None = None
    fp8_all_gather: bool | None = None
    offload: Offload | None = None
    ddp_settings: str | None = None
    fsdp_settings: str | None = None
    zero_settings: str | None = None
    method: Method | None = None
    freeze: str | None = None
    lora_rank: int | None = None
    lora_targets: str | None = None
    lora_dropout: float | None = None
    lora_modules_to_save: str | None = None
    dora: bool | None = None
    rslora: bool | None = None
    precision: Precision | None = None
    fp8_backend: Fp8Backend | None = None
    optimizer: str | None = None
    micro_batch: int | None = None
    global_batch: int | None = None
    seq_len: int | None = None
    packing: bool | None = None
    padding: bool | None = None
    images: bool | None = None
    image_size: str | None = None
    checkpointing: Checkpointing | None = None
    attention: Attention | None = None
    loss: Loss | None = None
    compile: bool | None = None
    trainer: Trainer | None = None
    data: str | None = None
    state: State | None = None
    alloc_conf: str | None = None
    config: str | None = None

    @classmethod
    def from_flags(cls, values: Mapping[str, object]) -> Request:
        """Reads values as typed (``{"seq-len": "4096"}``); unknown names and bad values raise ``UsageError``."""
        parsed: dict[str, Any] = {}
        for name, value in values.items():
            if value is not None:
                flag = find_flag(name)
                parsed[flag.name] = flag.parse(value)
        return cls(**parsed)

    def given(self) -> dict[str, str | int | bool]:
        """The flags that were given, by name, as plain values."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: _plain(value) for name, value in values if value is not None}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One scenario flag. ``default`` is what ``estimate`` takes, ``None`` where there is none."""

    name: str
    kind: type
    help: str
    default: str | int | float | bool | None = None

    @property
    def option(self) -> str:
        """The spelling on the command line: ``--seq-len``."""
        return "--" + self.name.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a flag that is a choice; empty for free text and numbers."""
        return tuple(str(member) for member in self.kind) if issubclass(self.kind, StrEnum) else ()

    def parse(self, value: object) -> str | int | float | bool:
        """The typed value of what was written, or ``UsageError``."""
        if self.kind is bool:
            return self._parse_switch(value)
        if self.kind is int:
            return self._parse_count(value)
        if self.kind is float:
            return self._parse_share(value)
        if issubclass(self.kind, StrEnum):
            return self._parse_choice(value, self.kind)
        if isinstance(value, str) and value.strip():
            return value.strip()
        raise UsageError(f"{self.option} {value!r} is no text; give it a value, such as {self.default or 'a path'}")

    def _parse_switch(self, value: object) -> bool:
        switch = SWITCHES.get(str(value).strip().lower())
        if switch is None:
            raise UsageError(f"{self.option} {value!r} is neither on nor off; write true or false")
        return switch

    def _parse_count(self, value: object) -> int:
        try:
            number = int(str(value).replace("_", "")) if not isinstance(value, bool) else 0
        except ValueError:
            number = 0
        if not 1 <= number <= MAXIMUM_COUNT:
            allowed = f"a whole number from 1 to {MAXIMUM_COUNT:,}"
            raise UsageError(f"{self.option} {value} is not {allowed}; try {self.option} {self.default or 1}")
        return number

    def _parse_share(self, value: object) -> float:
        try:
            share = float(str(value)) if not isinstance(value, bool) else -1.0
        except ValueError:
            share = -1.0
        if not 0.0 <= share < 1.0:
            raise UsageError(f"{self.option} {value} is not a share from 0 to below 1; try {self.option} 0.05")
        return share

    def _parse_choice(self, value: object, kind: type[StrEnum]) -> StrEnum:
        written = _canonical(str(value))
        for member in kind:
            if _canonical(member) == written:
                return member
        near = difflib.get_close_matches(written, [_canonical(member) for member in kind], n=1)
        meant = f"did you mean {near[0]}? it takes" if near else "use one of"
        raise UsageError(f"{self.option} {value} is unknown; {meant} {', '.join(kind)}")


FLAGS: tuple[Flag, ...] = (
    Flag(name="gpus", kind=str, default="auto", help="4x4090, 2x8xH100, A100-80GB:4, 24GiB, cpu, 2xcpu; auto detects"),
    Flag(name="host_memory", kind=str, help="memory of each node, such as 256GiB [unknown; detected with --gpus auto]"),
    Flag(name="strategy", kind=StrategyKind, default="single", help="how the job is spread over the GPUs"),
    Flag(name="tp", kind=int, default=1, help="ranks that share each matrix (tensor parallel)"),
    Flag(name="cp", kind=int, default=1, help="ranks that share each sequence, in a ring (context parallel, FSDP2)"),
    Flag(name="sp", kind=int, default=1, help="ranks that share each sequence and its heads (Ulysses, DeepSpeed)"),
    Flag(name="fsdp_sharding", kind=Sharding, help="what FSDP shards [full_shard; hsdp: hybrid_shard]"),
    Flag(name="fp8_all_gather", kind=bool, default=True, help="under fp8, FSDP2 casts weights before it gathers them"),
    Flag(name="offload", kind=Offload, default="none", help="what is kept off the GPU"),
    Flag(
        name="ddp_settings",
        kind=str,
        help="arguments of DistributedDataParallel: bucket_cap_mb=50,gradient_as_bucket_view=true",
    ),
    Flag(
        name="fsdp_settings",
        kind=str,
        help="keys of accelerate's fsdp_config: backward_prefetch=NO_PREFETCH,use_orig_params=false",
    ),
    Flag(
        name="zero_settings",
        kind=str,
        help="keys of DeepSpeed's zero_optimization: reduce_bucket_size=5e7,overlap_comm=false",
    ),
    Flag(name="method", kind=Method, default="full", help="what is trained"),
    Flag(name="freeze", kind=str, help="parts that a full fine-tune leaves as they are: vision_tower,embed_tokens"),
    Flag(name="lora_rank", kind=int, default=16, help="rank of the adapters"),
    Flag(
        name="lora_targets",
        kind=str,
        default="all-linear",
        help="all-linear, attention, or module names separated by commas",
    ),
    Flag(name="lora_dropout", kind=float, default=0.0, help="share dropped of what goes into an adapter"),
    Flag(
        name="lora_modules_to_save",
        kind=str,
        help="modules trained whole beside the adapters, such as embed_tokens,lm_head",
    ),
    Flag(name="dora", kind=bool, default=False, help="adapters with a trained magnitude (DoRA)"),
    Flag(name="rslora", kind=bool, default=False, help="adapters scaled by the root of their rank (rsLoRA)"),
    Flag(name="precision", kind=Precision, default="bf16", help="where each number format is held"),
    Flag(name="fp8_backend", kind=Fp8Backend, default="ao", help="fp8's layers: torchao's or Transformer Engine's"),
    Flag(
        name="optimizer",
        kind=str,
        default="adamw_torch_fused",
        help="adamw_torch_fused, adamw_torch, adamw_bnb_8bit, paged_adamw_8bit, adafactor, sgd, lion_32bit, muon, …",
    ),
    Flag(name="micro_batch", kind=int, default=1, help="sequences per GPU and forward pass"),
    Flag(name="global_batch", kind=int, help="sequences per optimizer step, over all GPUs [one micro-batch per GPU]"),
    Flag(name="seq_len", kind=int, default=2048, help="tokens per sequence; with --data its longest"),
    Flag(name="packing", kind=bool, default=False, help="fill every sequence with several examples"),
    Flag(name="padding", kind=bool, help="sequences are padded, and a mask says so [axolotl, unpacked: yes]"),
    Flag(name="images", kind=bool, default=False, help="every sequence has one image, its tokens within the length"),
    Flag(
        name="image_size",
        kind=str,
        help=f"height x width in pixels of each image, for models that take any [with --images {DEFAULT_SIZE}]",
    ),
    Flag(name="checkpointing", kind=Checkpointing, default="none", help="activations computed again in the backward"),
    Flag(name="attention", kind=Attention, default="sdpa", help="attention implementation"),
    Flag(name="loss", kind=Loss, default="plain", help="cross-entropy implementation; TRL's is chunked"),
    Flag(name="compile", kind=bool, default=False, help="run the model through torch.compile"),
    Flag(name="trainer", kind=Trainer, default="hf", help="whose training loop"),
    Flag(name="data", kind=str, help="training data (JSON lines): sets the length, and tells what an epoch takes"),
    Flag(name="state", kind=State, default="steady", help="which step: the first has no optimizer states yet"),
    Flag(
        name="alloc_conf",
        kind=str,
        help="PYTORCH_ALLOC_CONF of the run, such as expandable_segments:True; default: torch's own [axolotl: that]",
    ),
    Flag(name="config", kind=str, help="read the model's configuration from this config.json"),
)
_BY_NAME = {flag.name: flag for flag in FLAGS}


# Ways to split one copy of a model that no strategy here plans, and what serves the same end.
OTHER_PARALLELISM: Mapping[str, tuple[str, str]] = {
    "ep": ("expert parallelism", "use --strategy fsdp2 or zero3, which share experts out as all weights"),
    "pp": ("pipeline parallelism", "use --strategy fsdp2 or zero3, which share layers out as all weights"),
}


def find_flag(name: str) -> Flag:
    """The flag of that name; ``-`` and ``_`` mean the same."""
    flag = _BY_NAME.get(name.replace("-", "_").lower())
    if flag is not None:
        return flag
    if name.lower() in OTHER_PARALLELISM:
        meaning, instead = OTHER_PARALLELISM[name.lower()]
        raise UsageError(f"--{name.lower()} is {meaning}, which launchkit does not plan; {instead}")
    near = difflib.get_close_matches(name.replace("-", "_").lower(), _BY_NAME, n=1)
    advice = f"did you mean {near[0]}?" if near else "see launchkit plan --help"
    raise UsageError(f"{name!r} is no setting of launchkit; {advice}")


def option_text(name: str, value: str | int | float | bool) -> str:
    """A flag as it is typed: ``--seq-len 4096``, ``--no-packing``."""
    flag = find_flag(name)
    if flag.kind is bool:
        return flag.option if value else f"--no-{flag.option[2:]}"
    return f"{flag.option} {value}"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published recipe as flags: they stand behind everything that was given, and before the defaults."""

    name: str
    description: str
    flags: Mapping[str, str | int | float | bool]
    source: str

    def below(self, given: Mapping[str, object]) -> dict[str, object]:
        """What was given (``None`` counts as not given), and this preset's flags where nothing was."""
        named = {find_flag(name).name: value for name, value in given.items() if value is not None}
        return {**self.flags, **named}


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """A scenario without open questions, and what had to be decided on the way."""

    scenario: Scenario
    notes: tuple[str, ...] = ()


def resolve(request: Request, *, model: ModelProfile, cluster: Cluster) -> Resolution:
    """The one scenario that ``estimate`` reads from a request: what was given, and the defaults elsewhere."""
    attention, notes = _attention(request, model)
    seq_len, length_notes = _seq_len(request, model)
    image_size, image_notes = _image_size(request, model)
    strategy = _strategy(request, model, cluster)
    trainer, loss = _trainer_and_loss(request)
    training = Training(
        method=_value(request, "method", Method),
        freeze=_names(request.freeze),
        lora_rank=_value(request, "lora_rank", int),
        lora_targets=_value(request, "lora_targets", str),
        lora_dropout=_value(request, "lora_dropout", float),
        lora_modules_to_save=_names(request.lora_modules_to_save),
        dora=_value(request, "dora", bool),
        rslora=_value(request, "rslora", bool),
        precision=_precision(request, trainer=trainer, kind=strategy.kind),
        fp8_backend=_fp8_backend(request),
        optimizer=_value(request, "optimizer", str),
        checkpointing=_value(request, "checkpointing", Checkpointing),
        attention=attention,
        loss=loss,
        compile=_value(request, "compile", bool),
        packing=_value(request, "packing", bool),
        padding=_padding(request, model, trainer),
        images=_value(request, "images", bool) or request.image_size is not None,
        image_size=image_size,
        trainer=trainer,
        max_grad_norm=0.0 if trainer is Trainer.LOOP else Training().max_grad_norm,
    )
    scenario = Scenario(
        training=training,
        strategy=strategy,
        batch=_batch(request, seq_len=seq_len, strategy=strategy, num_gpus=cluster.num_gpus),
        state=_value(request, "state", State),
        alloc_conf=_alloc_conf(request, cluster),
    )
    return Resolution(scenario=scenario, notes=(*notes, *length_notes, *image_notes))


def decisions(request: Request, *, model: ModelProfile) -> tuple[str, ...]:
    """What the model itself decides where the request leaves it open, in words."""
    return (*_attention(request, model)[1], *_seq_len(request, model)[1], *_image_size(request, model)[1])


def scenario_flags(scenario: Scenario, *, cluster: Cluster) -> dict[str, str | int | bool | None]:
    """Every flag of a scenario, resolved: what to type to ``estimate`` to get this scenario again."""
    training, strategy, batch = scenario.training, scenario.strategy, scenario.batch
    num_ranks = strategy.num_data_ranks(cluster.num_gpus)
    values: dict[str, Any] = {
        "gpus": format_gpus(cluster),
        "strategy": strategy.kind,
        **{name: getattr(strategy.split, name) for name in _SPLITS},
        "fsdp_sharding": strategy.fsdp.sharding if strategy.kind.is_fsdp else None,
        "fp8_all_gather": strategy.fsdp.float8_all_gather if _gathers_for_float8(scenario) else None,
        "offload": strategy.offload,
        "ddp_settings": DDP.text(strategy.ddp, kind=strategy.kind) or None,
        "fsdp_settings": FSDP.text(strategy.fsdp, kind=strategy.kind) or None,
        "zero_settings": ZERO.text(strategy.zero, kind=strategy.kind) or None,
        "method": training.method,
        "freeze": training.freeze or None,
        "lora_rank": training.lora_rank,
        "lora_targets": training.lora_targets,
        "lora_dropout": training.lora_dropout,
        "lora_modules_to_save": training.lora_modules_to_save or None,
        "dora": training.dora,
        "rslora": training.rslora,
        "precision": training.precision,
        "fp8_backend": training.fp8_backend if training.precision is Precision.FP8 else None,
        "optimizer": training.optimizer,
        "micro_batch": batch.micro_batch,
        "global_batch": batch.global_batch(num_ranks),
        "seq_len": batch.seq_len,
        "packing": training.packing,
        "padding": training.padding,
        "images": training.images,
        "image_size": training.image_size or None,
        "checkpointing": training.checkpointing,
        "attention": training.attention,
        "loss": training.loss,
        "compile": training.compile,
        "trainer": training.trainer,
        "state": scenario.state,
        "alloc_conf": scenario.alloc_conf or None,
    }
    return {name: _plain(value) for name, value in values.items()}


def _gathers_for_float8(scenario: Scenario) -> bool:
    return scenario.training.precision is Precision.FP8 and scenario.strategy.kind.is_fsdp


def _fp8_backend(request: Request) -> Fp8Backend:
    if request.fp8_backend is not None and request.precision is not Precision.FP8:
        raise IllegalScenarioError(
            f"--fp8-backend {request.fp8_backend} says nothing without fp8; add --precision fp8, or leave it out"
        )
    return _value(request, "fp8_backend", Fp8Backend)


def _trainer_and_loss(request: Request) -> tuple[Trainer, Loss]:
    """TRL's trainer computes its loss in chunks, and no other does: each stands for the other where that is open."""
    trainer, loss = _value(request, "trainer", Trainer), _value(request, "loss", Loss)
    if request.loss is None and trainer is Trainer.TRL:
        return trainer, Loss.CHUNKED
    if request.trainer is None and loss is Loss.CHUNKED:
        return Trainer.TRL, loss
    return trainer, loss


def _precision(request: Request, *, trainer: Trainer, kind: StrategyKind) -> Precision:
    """What was asked for, else the default."""
    precision = _value(request, "precision", Precision)
    return precision if request.precision is not None else precision_in(trainer, kind, usual=precision)


def precision_in(trainer: Trainer | None, kind: StrategyKind, *, usual: Precision) -> Precision:
    """The ``usual`` default, but for Axolotl, which loads bf16 weights and always autocasts: ``bf16-params`` where
    nothing shards them, and never under FSDP."""
    if trainer is not Trainer.AXOLOTL or usual not in (Precision.BF16, Precision.BF16_PARAMS):
        return usual
    if kind in UNSHARDED:
        return Precision.BF16_PARAMS
    return Precision.BF16 if kind.is_fsdp else usual


def _padding(request: Request, model: ModelProfile, trainer: Trainer) -> bool:
    """What was asked for; else Axolotl pads what it does not pack, and passes the mask.

    Source: axolotl 0.19 ``core/builders/causal.py`` (``pad_to_multiple_of``), ``utils/collators/batching.py``.
    """
    if request.padding and request.packing:
        raise IllegalScenarioError("--packing fills every sequence, and leaves nothing for --padding; give one of them")
    if request.padding is not None:
        return request.padding
    return trainer is Trainer.AXOLOTL and not request.packing and model.task == "causal-lm"


def _attention(request: Request, model: ModelProfile) -> tuple[Attention, tuple[str, ...]]:
    if request.attention is not None:
        return request.attention, ()
    if not model.attentions or Attention.SDPA in model.attentions:
        return Attention.SDPA, ()
    chosen = model.attentions[0]
    return chosen, (f"{model.architecture} has no sdpa attention: {chosen} is assumed",)


def _seq_len(request: Request, model: ModelProfile) -> tuple[int, tuple[str, ...]]:
    """What was asked for, else the default, or what the model was made for where that is less."""
    longest = model.max_position_embeddings
    if request.seq_len is not None:
        beyond = 0 < longest < request.seq_len
        note = f"{request.seq_len:,} tokens are more than the {longest:,} that {model.name} was made for"
        return request.seq_len, (note,) if beyond else ()
    default = _value(request, "seq_len", int)
    if 0 < longest < default:
        return longest, (f"{longest:,} tokens per sequence, the most that {model.name} was made for",)
    return default, ()


def _image_size(request: Request, model: ModelProfile) -> tuple[str, tuple[str, ...]]:
    """What was asked for, else the default and a word on it, of a model that takes images of any size; nothing of
    others."""
    if request.image_size is not None:
        size = ImageSize.parse(request.image_size)
        if model.model_type not in OF_ANY_SIZE:
            raise UsageError(
                f"--image-size {size} changes nothing for {model.name}, whose type {model.model_type} has no images of "
                "any size; write --images alone"
            )
        return str(size), ()
    if not request.images or model.model_type not in OF_ANY_SIZE:
        return "", ()
    return str(DEFAULT_SIZE), (f"images are taken to have {DEFAULT_SIZE} pixels; --image-size says what they have",)


def _alloc_conf(request: Request, cluster: Cluster) -> str:
    """What was asked for, else what the trainer sets itself; nothing where torch has no caching allocator.

    Source: axolotl 0.19 ``utils/__init__.py``, ``set_pytorch_cuda_alloc_conf``, called as its command line starts.
    """
    if request.alloc_conf is not None:
        AllocatorSettings.parse(request.alloc_conf)
    if cluster.gpu.device_kind is not DeviceKind.CUDA:
        return ""
    if request.alloc_conf is not None:
        return request.alloc_conf.replace(" ", "")
    return EXPANDABLE if request.trainer is Trainer.AXOLOTL else ""


_SPLITS = ("tp", "cp", "sp")


def split_of(request: Request) -> Split:
    """How many ranks are to share one copy's step."""
    return Split(**{name: _value(request, name, int) for name in _SPLITS})


def _kind(request: Request, split: Split, cluster: Cluster) -> StrategyKind:
    """What was asked for; where that is open, the engine that a split belongs to."""
    if request.strategy is not None or split.num_ranks == 1:
        return _value(request, "strategy", StrategyKind)
    if split.sp > 1:
        return StrategyKind.ZERO3
    is_alone = split.cp == 1 and split.tp == cluster.num_gpus
    return StrategyKind.SINGLE if is_alone else StrategyKind.FSDP2


def _strategy(request: Request, model: ModelProfile, cluster: Cluster) -> Strategy:
    split = split_of(request)
    kind = _kind(request, split, cluster)
    offload = _value(request, "offload", Offload)
    default = Sharding.HYBRID_SHARD if kind is StrategyKind.HSDP else Sharding.FULL_SHARD
    if request.fsdp_sharding is not None and not kind.is_fsdp:
        raise IllegalScenarioError(
            f"--fsdp-sharding {request.fsdp_sharding} says nothing under --strategy {kind}; add --strategy fsdp2"
        )
    if request.fp8_all_gather is not None and not (kind.is_fsdp and request.precision is Precision.FP8):
        raise IllegalScenarioError(
            "--fp8-all-gather is about weights that FSDP2 gathers for fp8; add --strategy fsdp2 --precision fp8"
        )
    sharding = request.fsdp_sharding or default
    fsdp = FsdpSettings(
        sharding=sharding,
        offload_params=kind.is_fsdp and offload.params,
        float8_all_gather=_value(request, "fp8_all_gather", bool),
        backward_prefetch=default_prefetch(request.trainer),
    )
    strategy = Strategy(kind=kind, split=split, offload=offload, fsdp=fsdp)
    return with_settings(strategy, request, hidden_size=model.hidden_size, strict=True)


def default_prefetch(trainer: Trainer | None) -> BackwardPrefetch:
    """FSDP1's, where nothing else is asked for: what the files written here say; Axolotl has no key for it and fetches
    nothing ahead. Source: axolotl 0.19 ``FSDPConfig``; transformers 5.24 ``TrainingArguments``, NO_PREFETCH then."""
    return BackwardPrefetch.NONE if trainer is Trainer.AXOLOTL else BackwardPrefetch.PRE


def with_settings(strategy: Strategy, request: Request, *, hidden_size: int, strict: bool) -> Strategy:
    """``strategy`` with what the request says of the engines' settings. ``strict`` refuses what says nothing under this
    strategy, which a search leaves out."""
    kind = strategy.kind if strict else None
    for name, option, auto in (("ddp", DDP, None), ("fsdp", FSDP, None), ("zero", ZERO, auto_sizes(hidden_size))):
        text = getattr(request, f"{name}_settings")
        if text is not None and (strict or strategy.kind in option.kinds):
            values = option.read(text, kind=kind, auto=auto)
            strategy = replace(strategy, **{name: replace(getattr(strategy, name), **values)})
    return strategy


def _batch(request: Request, *, seq_len: int, strategy: Strategy, num_gpus: int) -> Batch:
    micro_batch = _value(request, "micro_batch", int)
    num_ranks = max(1, strategy.num_data_ranks(num_gpus))
    sequences = micro_batch * num_ranks
    global_batch = request.global_batch or sequences
    steps, remainder = divmod(global_batch, sequences)
    if remainder or not steps:
        nearest = max(sequences, round(global_batch / sequences) * sequences)
        raise IllegalScenarioError(
            f"--global-batch {global_batch} is no multiple of --micro-batch {micro_batch} × "
            f"{groups_text(strategy, num_ranks)}; "
            f"use --global-batch {nearest}"
        )
    return Batch(micro_batch=micro_batch, gradient_accumulation_steps=steps, seq_len=seq_len)


def groups_text(strategy: Strategy, num_data_ranks: int) -> str:
    """``4 GPUs``, or ``2 groups of 2 GPUs`` where several share a batch."""
    shared = strategy.split.num_ranks
    return f"{num_data_ranks} groups of {shared} GPUs" if shared > 1 else f"{num_data_ranks} GPUs"


def _names(text: str | None) -> str:
    """Names separated by commas, without the spaces, each once and in order: what is the same has one spelling."""
    return ",".join(sorted(set(names_in(text or ""))))


def _value(request: Request, name: str, kind: type[_T]) -> _T:
    given = getattr(request, name)
    value: object = _BY_NAME[name].parse(_BY_NAME[name].default) if given is None else given
    assert isinstance(value, kind)
    return value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, StrEnum) else value


def _canonical(text: str) -> str:
    return text.strip().lower().replace("-", "_")
