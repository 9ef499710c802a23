"""One point of the search: what is trained, how it is spread, in which batches.

Names of values follow Hugging Face's ``TrainingArguments``. A number that costs memory **and** is written to an
engine's configuration is a field here, read by both the rewrite (``strategies``) and the exporter (``export``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from launchkit.program import Point


class Method(StrEnum):
    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


class Precision(StrEnum):
    """Where each format is held. ``bf16`` and ``fp16`` are mixed precision with fp32 held somewhere: fp32 weights
    under autocast (single, ddp), fp32 shards with 16-bit compute (fsdp), 16-bit weights with an fp32 master (zero).
    ``fp8`` is bf16 whose linear layers make their products of 8-bit copies (``Fp8Backend`` says whose)."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    BF16_PARAMS = "bf16-params"  # bf16 weights, gradients and states, autocast on
    BF16_PURE = "bf16-pure"  # the same without autocast
    FP8 = "fp8"

    @property
    def is_mixed(self) -> bool:
        return self in (Precision.BF16, Precision.FP16, Precision.FP8)


class Fp8Backend(StrEnum):
    """Whose linear layers accelerate puts in for ``fp8``: its ``fp8_config.backend``."""

    AO = "ao"  # torchao's
    TE = "te"  # Transformer Engine's, and its norms


class Checkpointing(StrEnum):
    """What of a block's activations the backward pass computes again."""

    NONE = "none"
    FULL = "full"
    SELECTIVE = "selective"  # all but the attention
    OFFLOAD = "offload"  # all, and what each block starts from waits on the host
    REENTRANT = "reentrant"  # all, in a backward pass within the backward pass (torch's ``use_reentrant=True``)

    @property
    def trainer_arguments(self) -> dict[str, bool]:
        """What ``gradient_checkpointing_kwargs`` says beside ``use_reentrant``: the Trainer's ``offload``, TRL's
        ``selective``."""
        return {str(self): True} if self in (Checkpointing.OFFLOAD, Checkpointing.SELECTIVE) else {}


class Attention(StrEnum):
    EAGER = "eager"
    SDPA = "sdpa"
    FLASH_ATTENTION_2 = "flash_attention_2"
    FLASH_ATTENTION_3 = "flash_attention_3"

    @property
    def is_flash(self) -> bool:
        """Whether it is a package of its own, which is told where sequences begin and how far they see, without a
        mask."""
        return self in (Attention.FLASH_ATTENTION_2, Attention.FLASH_ATTENTION_3)


class Loss(StrEnum):
    PLAIN = "plain"
    CHUNKED = "chunked"
    LIGER = "liger"
    CCE = "cce"


class Trainer(StrEnum):
    LOOP = "loop"
    HF = "hf"
    TRL = "trl"
    AXOLOTL = "axolotl"


class State(StrEnum):
    """Which step is meant: the first, before any optimizer state exists, or a later one."""

    STEADY = "steady"
    FIRST = "first"


class StrategyKind(StrEnum):
    SINGLE = "single"
    DDP = "ddp"
    FSDP = "fsdp"
    FSDP2 = "fsdp2"
    HSDP = "hsdp"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"

    @property
    def zero_stage(self) -> int:
        """1 to 3 for a ZeRO stage, 0 for everything else."""
        return int(self.value[-1]) if self.value.startswith("zero") else 0

    @property
    def is_fsdp(self) -> bool:
        return self in (StrategyKind.FSDP, StrategyKind.FSDP2, StrategyKind.HSDP)


UNSHARDED = (StrategyKind.SINGLE, StrategyKind.DDP)  # every rank holds everything


class Offload(StrEnum):
    NONE = "none"
    OPTIMIZER = "optimizer"
    PARAMS = "params"
    ALL = "all"
    NVME = "nvme"

    @property
    def optimizer(self) -> bool:
        return self in (Offload.OPTIMIZER, Offload.ALL, Offload.NVME)

    @property
    def params(self) -> bool:
        return self in (Offload.PARAMS, Offload.ALL, Offload.NVME)


class Sharding(StrEnum):
    """FSDP's sharding strategy, in FSDP1's names."""

    FULL_SHARD = "full_shard"
    SHARD_GRAD_OP = "shard_grad_op"
    NO_SHARD = "no_shard"
    HYBRID_SHARD = "hybrid_shard"
    HYBRID_SHARD_ZERO2 = "hybrid_shard_zero2"

    @property
    def reshard_after_forward(self) -> bool:
        """Whether gathered weights are dropped between forward and backward."""
        return self in (Sharding.FULL_SHARD, Sharding.HYBRID_SHARD)

    @property
    def is_hybrid(self) -> bool:
        return self in (Sharding.HYBRID_SHARD, Sharding.HYBRID_SHARD_ZERO2)


class CommHook(StrEnum):
    """In which dtype DDP's buckets are reduced: their own, or a 16-bit copy."""

    NONE = "none"
    FP16 = "fp16"
    BF16 = "bf16"


class BackwardPrefetch(StrEnum):
    """When FSDP1 gathers the next unit of a backward pass: before this one's, after it, or when its own begins."""

    PRE = "pre"
    POST = "post"
    NONE = "none"


class Wrap(StrEnum):
    """What FSDP1 flattens into one parameter: each block, and what no block holds; or the whole model."""

    BLOCKS = "blocks"
    MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class DdpSettings:
    """``DistributedDataParallel``'s arguments that cost memory or time. Source: its signature, torch 2.13
    (``bucket_cap_mb=25``, ``_DEFAULT_FIRST_BUCKET_BYTES`` = 1 MiB), and ``register_comm_hook``. The first bucket is
    smaller only while the cap is the default."""

    bucket_cap_bytes: int = 25 * 1024**2
    first_bucket_bytes: int = 1024**2
    gradient_as_bucket_view: bool = False
    find_unused_parameters: bool = False
    static_graph: bool = False
    broadcast_buffers: bool = True
    comm_hook: CommHook = CommHook.NONE


@dataclass(frozen=True, kw_only=True)
class FsdpSettings:
    """What FSDP1 and FSDP2 are told. ``full_state_dict`` chooses FULL_ over SHARDED_STATE_DICT when saving;
    ``float8_all_gather`` is torchao's, which counts under ``--precision fp8`` only and is on in accelerate's recipe."""

    sharding: Sharding = Sharding.FULL_SHARD
    offload_params: bool = False
    full_state_dict: bool = True
    cpu_ram_efficient_loading: bool = True
    limit_all_gathers: bool = True
    backward_prefetch: BackwardPrefetch = BackwardPrefetch.PRE
    forward_prefetch: bool = False
    use_orig_params: bool = True
    wrap: Wrap = Wrap.BLOCKS
    shard_group_size: int = 0  # ranks per shard group under hybrid sharding; 0: one node
    float8_all_gather: bool = True  # weights are cast to 8 bits before they are gathered


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """DeepSpeed's ``zero_optimization`` section. Sizes are in elements. Source of the defaults: DeepSpeed 0.19.8
    ``deepspeed/runtime/zero/config.py``; ``gather_16bit_weights_on_model_save`` is true here, since with DeepSpeed's
    own default a checkpoint holds no weights that ``from_pretrained`` can read. ``zero_hpz_partition_size`` and
    ``zero_quantized_weights`` are ZeRO++'s, ``mics_shard_size`` is MiCS's; 0 is DeepSpeed's -1, off."""

    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None  # None: DeepSpeed's own default (on at stage 3, off below)
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    round_robin_gradients: bool = False
    sub_group_size: int = 1_000_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    gather_16bit_weights_on_model_save: bool = True
    offload_pin_memory: bool = True
    nvme_path: str = ""
    zero_hpz_partition_size: int = 1
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False
    mics_shard_size: int = 0
    memory_efficient_linear: bool = True


@dataclass(frozen=True, kw_only=True)
class Split:
    """How many ranks share the step of one copy of the model, and with it one batch: accelerate's ``tp_size``,
    ``cp_size`` and ``sp_size``."""

    tp: int = 1  # tensor parallel: each matrix is shared out
    cp: int = 1  # context parallel: each sequence is, and keys and values go round
    sp: int = 1  # sequence parallel (Ulysses): each sequence is, and within the attention the heads are

    @property
    def num_ranks(self) -> int:
        return self.tp * self.cp * self.sp

    @property
    def num_pieces(self) -> int:
        """Into how many pieces each sequence is cut: a ring gives every rank an early and a late one, so that all
        compute as much."""
        return 2 * self.cp if self.cp > 1 else self.sp

    @property
    def text(self) -> str:
        """``TP 2``; nothing where each rank has a step of its own."""
        sizes = (("TP", self.tp), ("CP", self.cp), ("SP", self.sp))
        return " × ".join(f"{name} {size}" for name, size in sizes if size > 1)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a job is spread over the GPUs. Only the settings of the engine in force matter."""

    kind: StrategyKind = StrategyKind.SINGLE
    split: Split = field(default_factory=Split)
    offload: Offload = Offload.NONE
    ddp: DdpSettings = field(default_factory=DdpSettings)
    fsdp: FsdpSettings = field(default_factory=FsdpSettings)
    zero: ZeroSettings = field(default_factory=ZeroSettings)

    @property
    def offloads_params(self) -> bool:
        """Whether weights wait on the host, by the offload that was asked for or by FSDP's own setting."""
        return self.offload.params or self.fsdp.offload_params

    def num_ranks(self, num_gpus: int) -> int:
        """Processes on ``num_gpus`` GPUs: one per GPU, or those of a single copy of the model."""
        return self.split.num_ranks if self.kind is StrategyKind.SINGLE else num_gpus

    def num_data_ranks(self, num_gpus: int) -> int:
        """Ranks that see batches of their own, where ranks that share a step count as one."""
        return self.num_ranks(num_gpus) // self.split.num_ranks

    @property
    def name(self) -> str:
        """Short text: ``FSDP2``, ``FSDP2 × TP 2``, ``ZeRO-3 + CPU offload``."""
        text = {
            StrategyKind.SINGLE: "single GPU",
            StrategyKind.DDP: "DDP",
            StrategyKind.FSDP: "FSDP1",
            StrategyKind.FSDP2: "FSDP2",
            StrategyKind.HSDP: "HSDP",
            StrategyKind.ZERO1: "ZeRO-1",
            StrategyKind.ZERO2: "ZeRO-2",
            StrategyKind.ZERO3: "ZeRO-3",
        }[self.kind]
        if self.kind.is_fsdp and self.fsdp.sharding not in (Sharding.FULL_SHARD, Sharding.HYBRID_SHARD):
            text += f" {self.fsdp.sharding.value}"
        offloads = {
            Offload.NONE: "",
            Offload.OPTIMIZER: " + optimizer offload",
            Offload.PARAMS: " + parameter offload",
            Offload.ALL: " + CPU offload",
            Offload.NVME: " + NVMe offload",
        }
        if self.split.text:
            text = self.split.text if self.kind is StrategyKind.SINGLE else f"{text} × {self.split.text}"
        return text + offloads[self.offload]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained and how one step computes, whatever the batch and the strategy."""

    method: Method = Method.FULL
    freeze: str = ""  # names of parts that a full fine-tune leaves as they are, separated by commas
    lora_rank: int = 16
    lora_targets: str = "all-linear"
    lora_dropout: float = 0.0  # a share; PEFT drops of what goes into an adapter
    lora_modules_to_save: str = ""  # names of modules trained whole beside the adapters, separated by commas
    dora: bool = False
    rslora: bool = False  # scales the update by 1/√rank instead of 1/rank, which costs nothing
    precision: Precision = Precision.BF16
    fp8_backend: Fp8Backend = Fp8Backend.AO  # which counts under fp8 only
    optimizer: str = "adamw_torch_fused"
    checkpointing: Checkpointing = Checkpointing.NONE
    attention: Attention = Attention.SDPA
    loss: Loss = Loss.PLAIN
    compile: bool = False
    packing: bool = False
    padding: bool = False  # sequences are padded, which an attention mask tells of
    images: bool = False  # each sequence is about one image, whose tokens are among its own
    image_size: str = ""  # its pixels, height x width, of a model that takes images of any size
    trainer: Trainer = Trainer.HF
    max_grad_norm: float = 1.0  # clipping is the trainer's: none under Trainer.LOOP

    @property
    def has_bf16_masters(self) -> bool:
        """Whether ZeRO keeps its master weights and optimizer states in bf16 too: of a full fine-tune that is held in
        bf16 throughout. Adapters are few, and keep fp32 ones."""
        return self.method is Method.FULL and self.precision in (Precision.BF16_PARAMS, Precision.BF16_PURE)

    @property
    def uses_transformer_engine(self) -> bool:
        """Whether accelerate puts Transformer Engine's layers in."""
        return self.precision is Precision.FP8 and self.fp8_backend is Fp8Backend.TE

    def must_reenter(self, kind: StrategyKind) -> bool:
        """Whether checkpoints are re-entered under a strategy whatever is asked for: under ZeRO-3 beside 4-bit weights,
        whose metadata change when they are gathered, which non-reentrant checkpointing takes for an error; and there
        with TRL's adapters, for which it sets ``use_reentrant`` itself (trl 1.16 ``SFTTrainer``)."""
        adapts = self.method is Method.QLORA or (self.method is Method.LORA and self.trainer is Trainer.TRL)
        return adapts and kind is StrategyKind.ZERO3 and self.checkpointing is not Checkpointing.NONE

    def reenters(self, kind: StrategyKind) -> bool:
        """Whether checkpoints are computed again by a backward pass within the backward pass (``use_reentrant``)."""
        return self.checkpointing is Checkpointing.REENTRANT or self.must_reenter(kind)

    @property
    def flattens_batch(self) -> bool:
        """Whether a micro-batch becomes one long row, in which a mask of tokens by tokens keeps sequences apart.

        TRL packs so, whatever the attention (``packing_strategy="bfd"``, its default). FlashAttention takes the
        boundaries in place of a mask, and holds what it would hold of separate rows. The plain loop and the Trainer
        pack end to end, without a mask.
        """
        return self.masks_packing and self.trainer is Trainer.TRL

    @property
    def masks_packing(self) -> bool:
        """Whether a mask of tokens by tokens keeps the sequences of a row apart: TRL's and Axolotl's, whose positions
        start anew with each. Source: axolotl 0.19 ``attn_decontaminates_packing``."""
        keeps_apart = self.trainer in (Trainer.TRL, Trainer.AXOLOTL)
        return self.packing and keeps_apart and not self.attention.is_flash


def names_in(text: str) -> tuple[str, ...]:
    """The names in ``text``, which commas separate."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def is_fused_expert(target: str) -> bool:
    """Whether a LoRA target is a parameter that holds the matrices of all experts (``experts.gate_up_proj``), which
    PEFT calls ``target_parameters``, and no module."""
    return "experts" in target.split(".")[:-1]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How many tokens a step sees. ``micro_batch`` counts sequences per GPU and forward pass."""

    micro_batch: int = 1
    gradient_accumulation_steps: int = 1
    seq_len: int = 2048

    def global_batch(self, data_parallel_size: int) -> int:
        """Sequences per optimizer step."""
        return self.micro_batch * self.gradient_accumulation_steps * data_parallel_size


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One point of the search: all that an estimate depends on besides the model and the cluster. ``alloc_conf`` is the
    text of ``PYTORCH_ALLOC_CONF``; nothing for torch's defaults."""

    training: Training = field(default_factory=Training)
    strategy: Strategy = field(default_factory=Strategy)
    batch: Batch = field(default_factory=Batch)
    state: State = State.STEADY
    alloc_conf: str = ""

    @property
    def loads_on_first_rank(self) -> bool:
        """Whether FSDP's ranks wait for the first one's weights (``cpu_ram_efficient_loading``): not for 4-bit ones,
        which it alone would quantise while the others wait for shapes that never come; nor for torchao's, which
        accelerate 1.15 refuses it with."""
        training = self.training
        is_possible = training.method is not Method.QLORA and training.precision is not Precision.FP8
        return is_possible and self.strategy.fsdp.cpu_ram_efficient_loading


class Compute(StrEnum):
    """What dtype a block really computes in, which is what a trace depends on (not the precision's name)."""

    FP32 = "fp32"  # fp32 weights, no autocast
    AUTOCAST_BF16 = "autocast-bf16"  # fp32 weights under bf16 autocast
    AUTOCAST_FP16 = "autocast-fp16"
    BF16 = "bf16"  # bf16 weights, no autocast
    BF16_AUTOCAST = "bf16-autocast"  # bf16 weights, autocast on
    FP16 = "fp16"  # fp16 weights, no autocast
    FP16_AUTOCAST = "fp16-autocast"  # fp16 weights, autocast on
    AUTOCAST_FP8 = "autocast-fp8"  # fp32 weights under bf16 autocast, products of linear layers in 8 bits
    FP8_AUTOCAST = "fp8-autocast"  # the same on bf16 weights

    @property
    def is_autocast(self) -> bool:
        return self.is_float8 or self in _AUTOCAST

    @property
    def is_float8(self) -> bool:
        """Whether linear layers are such as cast what they multiply to 8 bits: torchao's, or Transformer Engine's."""
        return self in (Compute.AUTOCAST_FP8, Compute.FP8_AUTOCAST)


_AUTOCAST = (Compute.AUTOCAST_BF16, Compute.AUTOCAST_FP16, Compute.BF16_AUTOCAST, Compute.FP16_AUTOCAST)
_SAME_BYTES = {
    Compute.AUTOCAST_FP16: Compute.AUTOCAST_BF16,
    Compute.FP16: Compute.BF16,
    Compute.FP16_AUTOCAST: Compute.BF16_AUTOCAST,
}


class Widened(StrEnum):
    """What Axolotl holds in fp32 of a model that it loads in 16 bits."""

    NOTHING = ""
    GATES = "gates"  # the routers of experts
    EMBEDDINGS = "embeddings"  # these, norms, embeddings and the head


class DeviceKind(StrEnum):
    """Whose kernels a trace describes; ``cpu`` switches the CUDA-faithfulness layer off."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, kw_only=True)
class TraceKey:
    """Which of a model's programs is meant: everything that changes what is traced."""

    device: DeviceKind
    method: Method
    compute: Compute
    checkpointing: Checkpointing
    attention: Attention
    loss: Loss
    trainer: Trainer
    lora_targets: str = ""  # empty for full fine-tuning
    single_sequence: bool = False  # a micro-batch of 1 is a program of its own
    beyond_window: bool = False  # and so is a sequence at least as long as the model's sliding window
    cast_adapters: bool = False  # an engine casts adapters to 16 bits with the rest, which PEFT would keep in fp32
    flat_gradients: bool = False  # FSDP1 flattens a block's frozen weights with its adapters: all get gradients
    evaluation: bool = False  # the forward pass and loss of an evaluation, without gradients
    packed: bool = False  # rows of several sequences each, which a mask keeps apart
    padded: bool = False  # a mask tells of padding
    widened: Widened = Widened.NOTHING
    freeze: str = ""
    input_grads: bool = False  # embedded tokens require gradients, whatever is trained
    adapter_dropout: bool = False  # whatever the share: what is kept of it does not depend on it
    dora: bool = False
    modules_to_save: str = ""
    images: bool = False
    image_size: str = ""  # pixels, height x width; nothing where the model takes images of one size
    keeps_linear_inputs: bool = False  # of frozen layers too, as ZeRO-3's own linear function does
    tp: int = 1  # ranks that share each matrix
    cp: int = 1  # ranks that share each sequence, keys and values going round
    sp: int = 1  # ranks that share each sequence, and heads in its attention
    pads_float8: bool = False  # torchao pads the inner dimension of each product, as accelerate's recipe has it
    gathers_float8: bool = False  # weights of torchao's layers arrive in 8 bits
    at: Point | None = None  # of this batch alone
    asks_kernels: bool = False  # and with the scratch that this machine's kernels take for it
    transformer_engine: bool = False  # 8-bit layers are Transformer Engine's
    transposes_float8: bool = False  # whose factors are transposed for each layout of a product but one

    @property
    def split(self) -> Split:
        """The ranks that share the step that is traced."""
        return Split(tp=self.tp, cp=self.cp, sp=self.sp)

    @property
    def of_usual_trainer(self) -> TraceKey:
        """The program that stands in for this one where it cannot be had: without what Axolotl alone does, and without
        padding."""
        usual = replace(self, padded=False, widened=Widened.NOTHING, input_grads=False)
        return replace(usual, packed=usual.packed and usual.trainer is Trainer.TRL).canonical

    @property
    def built_attention(self) -> Attention:
        """The attention that the model is built with. FlashAttention need not be installed: SDPA's stands for it."""
        return Attention.SDPA if self.attention.is_flash else self.attention

    @property
    def canonical(self) -> TraceKey:
        """The key of the program that serves this one too.

        fp16 and bf16 take the same bytes. TRL's trainer has a head of its own, which computes its loss in chunks
        whatever is asked for. The others differ in a step only where accelerate widens the outputs of an autocast
        forward, so without autocast, and where a fused head puts out no logits, their step is the plain loop's; but of
        Liger's kernels Axolotl is told to take the loss alone.
        4-bit weights compute in 16 bits whatever the others are held in. FlashAttention 2 holds what CUDA's flash
        kernel under SDPA holds; neither it nor FlashAttention 3 needs a mask for a window or for packed sequences; of
        padded ones transformers hands them copies without the padding. An evaluation keeps nothing that checkpointing
        could spare.
        """
        compute = _SAME_BYTES.get(self.compute, self.compute)
        if self.method is Method.QLORA and compute is Compute.AUTOCAST_BF16:
            compute = Compute.BF16_AUTOCAST
        attention, beyond_window, packed = self.attention, self.beyond_window, self.packed
        if attention.is_flash:
            beyond_window, packed = False, False
        if attention is Attention.FLASH_ATTENTION_2 and not self.padded:
            attention = Attention.SDPA
        trainer, loss = self._canonical_head(compute)
        return replace(
            self,
            compute=compute,
            checkpointing=Checkpointing.NONE if self.evaluation else self.checkpointing,
            trainer=trainer,
            loss=loss,
            attention=attention,
            beyond_window=beyond_window,
            packed=packed,
        )

    def _canonical_head(self, compute: Compute) -> tuple[Trainer, Loss]:
        """Whose head turns the hidden states into a loss, and which."""
        if self.trainer is Trainer.TRL:
            return Trainer.TRL, Loss.LIGER if self.loss is Loss.LIGER else Loss.CHUNKED
        if self.loss is Loss.LIGER and self.trainer is Trainer.AXOLOTL:
            return Trainer.AXOLOTL, self.loss
        widens = compute.is_autocast and self.trainer is not Trainer.LOOP and self.loss is Loss.PLAIN
        return Trainer.HF if widens else Trainer.LOOP, self.loss

    @property
    def text(self) -> str:
        """A stable name for files and messages."""
        parts: list[str] = [
            self.device,
            self.method,
            self.compute,
            self.checkpointing,
            self.attention,
            self.loss,
            self.trainer,
        ]
        if self.lora_targets:
            parts.append(self.lora_targets)
        parts.append("b1" if self.single_sequence else "bn")
        if self.beyond_window:
            parts.append("windowed")
        if self.cast_adapters:
            parts.append("cast")
        if self.flat_gradients:
            parts.append("flat")
        if self.evaluation:
            parts.append("evaluation")
        if self.packed:
            parts.append("packed")
        if self.padded:
            parts.append("padding")
        if self.widened:
            parts.append(f"wide-{self.widened}")
        if self.input_grads:
            parts.append("input-grads")
        if self.freeze:
            parts.append(f"freeze-{self.freeze}")
        if self.adapter_dropout:
            parts.append("dropout")
        if self.dora:
            parts.append("dora")
        if self.modules_to_save:
            parts.append(f"save-{self.modules_to_save}")
        if self.images:
            parts.append(f"images{self.image_size}")
        if self.keeps_linear_inputs:
            parts.append("inputs")
        if self.pads_float8:
            parts.append("padded")
        if self.gathers_float8:
            parts.append("gathered")
        if self.transformer_engine:
            parts.append("te-transposed" if self.transposes_float8 else "te")
        parts += [f"{name}{size}" for name, size in (("tp", self.tp), ("cp", self.cp), ("sp", self.sp)) if size > 1]
        if self.at is not None:
            parts.append("x".join(map(str, self.at)))
        return "/".join(str(part) for part in parts)
