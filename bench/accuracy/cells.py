"""The cells of the accuracy page: every strategy, precision, method and checkpointing that this machine can run."""

from __future__ import annotations

from typing import Any

from bench.accuracy.architectures import ARCHITECTURES, IMAGE_SIZES, architecture_cells
from bench.accuracy.cell import Cell

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
TIED: dict[str, Any] = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True}
SIXTEENS: dict[str, Any] = LLAMA | {"intermediate_size": 352}  # every matrix has sides that 16 divides
QWEN3: dict[str, Any] = LLAMA | {"model_type": "qwen3", "head_dim": 32, "vocab_size": 4096}
UNEVEN: dict[str, Any] = LLAMA | {"hidden_size": 120, "intermediate_size": 331, "vocab_size": 2047}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 128, "n_layer": 5, "n_head": 4, "vocab_size": 2048}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 32,
    "vocab_size": 2048,
}
# Wide and short: its peak is the optimizer's, not the activations'.
WIDE: dict[str, Any] = LLAMA | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
# The head outweighs the blocks: its peak is the loss's, over two of TRL's tiles of the vocabulary.
VOCABULARY: dict[str, Any] = LLAMA | {"num_hidden_layers": 2, "vocab_size": 40_000, "tie_word_embeddings": True}

# More than 100 million parameters: several buckets of DDP's, and weights that dwarf what does not scale with them.
LARGE: dict[str, Any] = LLAMA | {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 16000,
}

_FSDP: dict[str, Any] = {"strategy": "fsdp2", "num_processes": 2}

SINGLE = (
    Cell(name="single-fp32", config=LLAMA),
    Cell(name="single-fp32-b1", config=LLAMA, micro_batch=1, seq_len=160),
    Cell(name="single-fp32-checkpointing", config=LLAMA, checkpointing="full"),
    Cell(name="single-fp32-accumulation", config=LLAMA, gradient_accumulation_steps=2),
    Cell(name="single-bf16", config=LLAMA, precision="bf16"),
    Cell(name="single-bf16-checkpointing", config=LLAMA, precision="bf16", checkpointing="full"),
    Cell(name="single-bf16-params", config=LLAMA, precision="bf16-params"),
    Cell(name="single-bf16-pure", config=LLAMA, precision="bf16-pure"),
    Cell(name="single-fp8", config=SIXTEENS, precision="fp8"),
    Cell(name="single-hf-fp8", config=SIXTEENS, trainer="hf", precision="fp8"),
    Cell(name="single-fp8-padded", config=SIXTEENS, precision="fp8", seq_len=60),
    Cell(name="single-fp8-checkpointing", config=SIXTEENS, precision="fp8", checkpointing="full"),
    Cell(name="single-lora-bf16", config=LLAMA, method="lora", precision="bf16"),
    Cell(name="single-lora-bf16-pure", config=LLAMA, method="lora", precision="bf16-pure"),
    Cell(name="single-lora-fp32-checkpointing", config=LLAMA, method="lora", checkpointing="full"),
    Cell(name="single-tied-fp32", config=TIED),
    Cell(name="single-wide-adamw", config=WIDE, micro_batch=2, seq_len=16, optimizer="adamw_torch"),
    Cell(name="single-wide-sgd", config=WIDE, micro_batch=2, seq_len=16, optimizer="sgd"),
    Cell(name="single-qwen3-fp32", config=QWEN3),
    Cell(name="single-gpt2-fp32", config=GPT2),
    Cell(name="single-gemma3-fp32", config=GEMMA3, attention="eager"),
    Cell(name="single-hf-fp32", config=LLAMA, trainer="hf"),
    Cell(name="single-hf-bf16", config=LLAMA, trainer="hf", precision="bf16"),
    Cell(name="single-trl-fp32", config=LLAMA, trainer="trl"),
    Cell(name="single-trl-fp32-b1", config=LLAMA, trainer="trl", micro_batch=1, seq_len=160),
    Cell(name="single-trl-bf16", config=LLAMA, trainer="trl", precision="bf16"),
    Cell(name="single-trl-bf16-pure", config=LLAMA, trainer="trl", precision="bf16-pure"),
    Cell(name="single-trl-vocabulary", config=VOCABULARY, trainer="trl", checkpointing="full", seq_len=256),
    Cell(name="single-trl-lora-bf16", config=LLAMA, trainer="trl", method="lora", precision="bf16"),
    Cell(name="single-hf-lora-bf16", config=LLAMA, trainer="hf", method="lora", precision="bf16"),
    Cell(name="single-hf-evaluation", config=LLAMA, trainer="hf", evaluation_micro_batch=8),
    Cell(name="single-hf-evaluation-bf16", config=LLAMA, trainer="hf", precision="bf16", evaluation_micro_batch=8),
    Cell(name="single-trl-packing", config=LLAMA, trainer="trl", packing=True, seq_len=256),
    Cell(name="single-trl-packing-eager", config=LLAMA, trainer="trl", packing=True, attention="eager"),
    Cell(name="single-trl-evaluation", config=LLAMA, trainer="trl", evaluation_micro_batch=8),
)

DDP = (
    Cell(name="ddp-fp32", config=LLAMA, strategy="ddp", num_processes=2),
    Cell(name="ddp-bf16", config=LLAMA, strategy="ddp", num_processes=2, precision="bf16"),
    Cell(name="ddp-trl-fp32", config=LLAMA, trainer="trl", strategy="ddp", num_processes=2),
    Cell(name="ddp-wide-fp32", config=WIDE, strategy="ddp", num_processes=2, seq_len=16),
    Cell(name="ddp-fp8", config=SIXTEENS, strategy="ddp", num_processes=2, precision="fp8"),
    Cell(name="ddp-lora-bf16", config=LLAMA, strategy="ddp", num_processes=2, method="lora", precision="bf16"),
)

_DDP: dict[str, Any] = {"strategy": "ddp", "num_processes": 2}

DDP_SETTINGS = (
    Cell(name="ddp-bucket-view-fp32", config=LLAMA, ddp={"gradient_as_bucket_view": True}, **_DDP),
    Cell(name="ddp-bucket-view-wide", config=WIDE, seq_len=16, ddp={"gradient_as_bucket_view": True}, **_DDP),
    Cell(name="ddp-static-graph-fp32", config=LLAMA, ddp={"static_graph": True}, **_DDP),
    Cell(name="ddp-find-unused-fp32", config=LLAMA, ddp={"find_unused_parameters": True}, **_DDP),
    Cell(name="ddp-fp16-hook-fp32", config=WIDE, seq_len=16, ddp={"comm_hook": "fp16"}, **_DDP),
    Cell(name="ddp-small-buckets-fp32", config=WIDE, seq_len=16, ddp={"bucket_cap_mb": 2}, **_DDP),
    Cell(name="ddp-small-buckets-hook", config=WIDE, seq_len=16, ddp={"bucket_cap_mb": 2, "comm_hook": "fp16"}, **_DDP),
    Cell(name="ddp-static-graph-wide", config=WIDE, seq_len=16, ddp={"static_graph": True}, **_DDP),
    Cell(name="ddp-find-unused-wide", config=WIDE, seq_len=16, ddp={"find_unused_parameters": True}, **_DDP),
    Cell(name="ddp-large-hook", config=LARGE, seq_len=32, ddp={"comm_hook": "fp16", "bucket_cap_mb": 50}, **_DDP),
    Cell(name="ddp-accumulation-fp32", config=LLAMA, gradient_accumulation_steps=2, **_DDP),
    Cell(name="ddp-checkpointing-bf16", config=LLAMA, precision="bf16", checkpointing="full", **_DDP),
    Cell(name="ddp-tied-fp32", config=TIED, **_DDP),
    Cell(name="ddp-gpt2-fp32", config=GPT2, **_DDP),
    Cell(name="ddp-hf-bf16", config=LLAMA, trainer="hf", precision="bf16", **_DDP),
    Cell(name="ddp-4-fp32", config=LLAMA, strategy="ddp", num_processes=4),
    Cell(name="ddp-large-fp32", config=LARGE, seq_len=32, **_DDP),
    Cell(
        name="ddp-large-bucket-view-bf16",
        config=LARGE,
        precision="bf16",
        seq_len=32,
        ddp={"gradient_as_bucket_view": True},
        **_DDP,
    ),
)

FSDP2 = (
    Cell(name="fsdp2-fp32", config=LLAMA, **_FSDP),
    Cell(name="fsdp2-fp32-checkpointing", config=LLAMA, checkpointing="full", **_FSDP),
    Cell(name="fsdp2-bf16", config=LLAMA, precision="bf16", **_FSDP),
    Cell(name="fsdp2-fp8", config=SIXTEENS, precision="fp8", **_FSDP),
    Cell(name="fsdp2-hf-fp8", config=SIXTEENS, trainer="hf", precision="fp8", **_FSDP),
    Cell(name="fsdp2-fp8-bf16-gather", config=SIXTEENS, precision="fp8", float8_all_gather=False, **_FSDP),
    Cell(name="fsdp2-bf16-checkpointing", config=LLAMA, precision="bf16", checkpointing="full", **_FSDP),
    Cell(name="fsdp2-lora-bf16", config=LLAMA, method="lora", precision="bf16", **_FSDP),
    Cell(
        name="fsdp2-lora-bf16-checkpointing",
        config=LLAMA,
        method="lora",
        precision="bf16",
        checkpointing="full",
        **_FSDP,
    ),
    Cell(name="fsdp2-lora-fp32", config=LLAMA, method="lora", **_FSDP),
    Cell(name="fsdp2-tied-fp32", config=TIED, **_FSDP),
    Cell(name="fsdp2-tied-bf16", config=TIED, precision="bf16", **_FSDP),
    Cell(name="fsdp2-gpt2-fp32", config=GPT2, **_FSDP),
    Cell(name="fsdp2-shard-grad-op", config=LLAMA, sharding="shard_grad_op", **_FSDP),
    Cell(name="fsdp2-uneven-3", config=UNEVEN, strategy="fsdp2", num_processes=3),
    Cell(name="fsdp2-accumulation", config=LLAMA, gradient_accumulation_steps=2, **_FSDP),
    Cell(name="fsdp2-wide-bf16", config=WIDE, precision="bf16", seq_len=16, **_FSDP),
    Cell(name="fsdp2-wide-adamw", config=WIDE, optimizer="adamw_torch", seq_len=16, **_FSDP),
    Cell(name="fsdp2-bf16-pure", config=LLAMA, precision="bf16-pure", **_FSDP),
    Cell(name="fsdp2-uneven-bf16-3", config=UNEVEN, precision="bf16", strategy="fsdp2", num_processes=3),
    Cell(name="fsdp2-large-bf16", config=LARGE, precision="bf16", seq_len=32, **_FSDP),
    Cell(
        name="hsdp-fp32",
        config=LLAMA,
        sharding="hybrid_shard",
        strategy="hsdp",
        num_processes=4,
        shard_group_size=2,
    ),
    Cell(
        name="hsdp-bf16",
        config=LLAMA,
        precision="bf16",
        sharding="hybrid_shard",
        strategy="hsdp",
        num_processes=4,
        shard_group_size=2,
    ),
    Cell(
        name="hsdp-bf16-checkpointing",
        config=LLAMA,
        precision="bf16",
        checkpointing="full",
        sharding="hybrid_shard",
        strategy="hsdp",
        num_processes=4,
        shard_group_size=2,
    ),
    Cell(name="fsdp2-hf-fp32", config=LLAMA, trainer="hf", **_FSDP),
    Cell(name="fsdp2-hf-lora-fp32", config=LLAMA, trainer="hf", method="lora", **_FSDP),
    Cell(name="fsdp2-hf-lora-bf16", config=LLAMA, trainer="hf", method="lora", precision="bf16", **_FSDP),
    Cell(
        name="fsdp2-hf-lora-bf16-checkpointing",
        config=LLAMA,
        trainer="hf",
        method="lora",
        precision="bf16",
        checkpointing="full",
        **_FSDP,
    ),
    Cell(name="fsdp2-hf-tied-fp32", config=TIED, trainer="hf", **_FSDP),
    Cell(name="fsdp2-hf-bf16", config=LLAMA, trainer="hf", precision="bf16", **_FSDP),
    Cell(name="fsdp2-hf-tied-bf16", config=TIED, trainer="hf", precision="bf16", **_FSDP),
    Cell(name="fsdp2-trl-fp32", config=LLAMA, trainer="trl", **_FSDP),
    Cell(name="fsdp2-trl-bf16", config=LLAMA, trainer="trl", precision="bf16", **_FSDP),
    Cell(name="fsdp2-trl-tied-fp32", config=TIED, trainer="trl", **_FSDP),
    Cell(name="fsdp2-trl-lora-bf16", config=LLAMA, trainer="trl", method="lora", precision="bf16", **_FSDP),
    Cell(name="fsdp2-hf-evaluation", config=LLAMA, trainer="hf", evaluation_micro_batch=8, **_FSDP),
    Cell(name="fsdp2-hf-accumulation-fp32", config=LLAMA, trainer="hf", gradient_accumulation_steps=2, **_FSDP),
)

_FSDP1: dict[str, Any] = {"strategy": "fsdp", "num_processes": 2}

FSDP1 = (
    Cell(name="fsdp1-fp32", config=LLAMA, **_FSDP1),
    Cell(name="fsdp1-fp32-checkpointing", config=LLAMA, checkpointing="full", **_FSDP1),
    Cell(name="fsdp1-bf16", config=LLAMA, precision="bf16", **_FSDP1),
    Cell(name="fsdp1-bf16-checkpointing", config=LLAMA, precision="bf16", checkpointing="full", **_FSDP1),
    Cell(name="fsdp1-lora-bf16", config=LLAMA, method="lora", precision="bf16", **_FSDP1),
    Cell(name="fsdp1-lora-fp32", config=LLAMA, method="lora", **_FSDP1),
    Cell(name="fsdp1-lora-fp32-checkpointing", config=LLAMA, method="lora", checkpointing="full", **_FSDP1),
    Cell(name="fsdp1-tied-fp32", config=TIED, **_FSDP1),
    Cell(name="fsdp1-tied-bf16", config=TIED, precision="bf16", **_FSDP1),
    Cell(name="fsdp1-gpt2-fp32", config=GPT2, **_FSDP1),
    Cell(name="fsdp1-shard-grad-op", config=LLAMA, sharding="shard_grad_op", **_FSDP1),
    Cell(name="fsdp1-no-shard", config=LLAMA, sharding="no_shard", **_FSDP1),
    Cell(name="fsdp1-flat-fp32", config=LLAMA, use_orig_params=False, **_FSDP1),
    Cell(name="fsdp1-flat-bf16", config=LLAMA, use_orig_params=False, precision="bf16", **_FSDP1),
    *(
        Cell(name=f"fsdp1-{name}-{dtype}", config=WIDE, seq_len=16, precision=dtype, fsdp=fsdp, **_FSDP1)
        for dtype in ("fp32", "bf16")
        for name, fsdp in (
            ("no-prefetch", {"backward_prefetch": "NO_PREFETCH"}),
            ("post-prefetch", {"backward_prefetch": "BACKWARD_POST"}),
            ("forward-prefetch", {"forward_prefetch": True}),
            ("unlimited", {"limit_all_gathers": False}),
        )
    ),
    *(
        Cell(name=f"fsdp1-no-wrap-{name}", fsdp={"auto_wrap_policy": "NO_WRAP"}, **values, **_FSDP1)
        for name, values in {
            "fp32": {"config": LLAMA},
            "bf16": {"config": LLAMA, "precision": "bf16"},
            "wide-fp32": {"config": WIDE, "seq_len": 16},
            "wide-bf16": {"config": WIDE, "seq_len": 16, "precision": "bf16"},
            "checkpointing": {"config": TIED, "checkpointing": "full"},
            "hf-bf16": {"config": LLAMA, "trainer": "hf", "precision": "bf16"},
        }.items()
    ),
    Cell(
        name="fsdp1-forward-prefetch-checkpointing",
        config=LLAMA,
        checkpointing="full",
        fsdp={"forward_prefetch": True},
        **_FSDP1,
    ),
    Cell(
        name="fsdp1-post-prefetch-checkpointing",
        config=LLAMA,
        checkpointing="full",
        fsdp={"backward_prefetch": "BACKWARD_POST"},
        **_FSDP1,
    ),
    Cell(
        name="fsdp1-forward-prefetch-no-shard",
        config=WIDE,
        seq_len=16,
        precision="bf16",
        sharding="no_shard",
        fsdp={"forward_prefetch": True},
        **_FSDP1,
    ),
    Cell(
        name="fsdp1-forward-prefetch-shard-grad-op",
        config=WIDE,
        seq_len=16,
        sharding="shard_grad_op",
        fsdp={"forward_prefetch": True},
        **_FSDP1,
    ),
    Cell(
        name="fsdp1-both-prefetches-flat",
        config=LLAMA,
        precision="bf16",
        use_orig_params=False,
        fsdp={"backward_prefetch": "BACKWARD_POST", "forward_prefetch": True},
        **_FSDP1,
    ),
    Cell(name="fsdp1-uneven-3", config=UNEVEN, strategy="fsdp", num_processes=3),
    Cell(name="fsdp1-uneven-flat-3", config=UNEVEN, strategy="fsdp", num_processes=3, use_orig_params=False),
    Cell(name="fsdp1-accumulation", config=LLAMA, gradient_accumulation_steps=2, **_FSDP1),
    Cell(name="fsdp1-wide-bf16", config=WIDE, precision="bf16", seq_len=16, **_FSDP1),
    Cell(name="fsdp1-wide-adamw", config=WIDE, optimizer="adamw_torch", seq_len=16, **_FSDP1),
    Cell(name="fsdp1-bf16-pure", config=LLAMA, precision="bf16-pure", **_FSDP1),
    Cell(name="fsdp1-large-bf16", config=LARGE, precision="bf16", seq_len=32, **_FSDP1),
    Cell(name="fsdp1-hf-fp32", config=LLAMA, trainer="hf", **_FSDP1),
    Cell(name="fsdp1-hf-bf16", config=LLAMA, trainer="hf", precision="bf16", **_FSDP1),
    Cell(
        name="fsdp1-hf-bf16-checkpointing", config=LLAMA, trainer="hf", precision="bf16", checkpointing="full", **_FSDP1
    ),
    Cell(name="fsdp1-hf-tied-bf16", config=TIED, trainer="hf", precision="bf16", **_FSDP1),
    Cell(name="fsdp1-hf-lora-bf16", config=LLAMA, trainer="hf", method="lora", precision="bf16", **_FSDP1),
    Cell(name="fsdp1-hf-lora-fp32", config=LLAMA, trainer="hf", method="lora", **_FSDP1),
    Cell(name="fsdp1-hf-accumulation-fp32", config=LLAMA, trainer="hf", gradient_accumulation_steps=2, **_FSDP1),
    Cell(
        name="fsdp1-hybrid-bf16",
        config=LLAMA,
        precision="bf16",
        sharding="hybrid_shard",
        strategy="fsdp",
        num_processes=4,
        shard_group_size=2,
    ),
    Cell(
        name="fsdp1-hybrid-zero2-fp32",
        config=LLAMA,
        sharding="hybrid_shard_zero2",
        strategy="fsdp",
        num_processes=4,
        shard_group_size=2,
    ),
)

ZERO = (
    *(
        Cell(name=f"zero{stage}-{dtype}", config=LLAMA, strategy=f"zero{stage}", num_processes=2, precision=dtype)
        for stage in (1, 2, 3)
        for dtype in ("fp32", "bf16")
    ),
    Cell(name="zero3-lora-bf16", config=LLAMA, strategy="zero3", num_processes=2, method="lora", precision="bf16"),
    Cell(
        name="zero2-bf16-checkpointing",
        config=LLAMA,
        strategy="zero2",
        num_processes=2,
        precision="bf16",
        checkpointing="full",
    ),
)

# Buckets far smaller than the model, so that they do not dominate.
_SMALL_BUCKETS = {"reduce_bucket_size": 200_000}
_SMALL_FETCHES = _SMALL_BUCKETS | {"stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 1_000}
_LITTLE_REUSE = _SMALL_FETCHES | {"stage3_max_live_parameters": 300_000, "stage3_max_reuse_distance": 100_000}
_SMALL_ZERO3: dict[str, Any] = {"strategy": "zero3", "num_processes": 2, "zero": _SMALL_FETCHES}

ZERO_SETTINGS = (
    *(
        Cell(
            name=f"zero{stage}-small-{dtype}",
            config=LLAMA,
            strategy=f"zero{stage}",
            num_processes=2,
            precision=dtype,
            zero=_SMALL_BUCKETS if stage < 3 else _SMALL_FETCHES,
        )
        for stage in (1, 2, 3)
        for dtype in ("fp32", "bf16")
    ),
    Cell(name="zero3-small-reuse-fp32", config=LLAMA, **_SMALL_ZERO3 | {"zero": _LITTLE_REUSE}),
    Cell(name="zero3-small-reuse-bf16", config=LLAMA, precision="bf16", **_SMALL_ZERO3 | {"zero": _LITTLE_REUSE}),
    Cell(name="zero3-small-checkpointing-fp32", config=LLAMA, checkpointing="full", **_SMALL_ZERO3),
    Cell(name="zero3-small-checkpointing-bf16", config=LLAMA, precision="bf16", checkpointing="full", **_SMALL_ZERO3),
    Cell(name="zero3-small-lora-fp32", config=LLAMA, method="lora", **_SMALL_ZERO3),
    Cell(name="zero3-small-lora-bf16", config=LLAMA, method="lora", precision="bf16", **_SMALL_ZERO3),
    Cell(name="zero3-small-uneven-fp32", config=UNEVEN, **_SMALL_ZERO3),
    Cell(name="zero3-small-tied-bf16", config=TIED, precision="bf16", **_SMALL_ZERO3),
    Cell(name="zero3-small-accumulation-fp32", config=LLAMA, gradient_accumulation_steps=2, **_SMALL_ZERO3),
)

MIXTRAL: dict[str, Any] = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}

METHODS = (
    Cell(name="method-qlora-fp32", config=LLAMA, method="qlora"),
    Cell(name="method-qlora-bf16", config=LLAMA, method="qlora", precision="bf16"),
    Cell(name="method-qlora-bf16-checkpointing", config=LLAMA, method="qlora", precision="bf16", checkpointing="full"),
    Cell(name="method-qlora-tied-hf", config=TIED, method="qlora", precision="bf16", trainer="hf"),
    Cell(name="method-qlora-trl", config=LLAMA, method="qlora", precision="bf16", trainer="trl"),
    Cell(
        name="method-qlora-trl-checkpointing",
        config=TIED,
        method="qlora",
        precision="bf16",
        trainer="trl",
        checkpointing="full",
    ),
    Cell(name="method-qlora-gpt2", config=GPT2, method="qlora", precision="bf16", checkpointing="full"),
    Cell(name="method-qlora-dora", config=LLAMA, method="qlora", precision="bf16", dora=True, checkpointing="full"),
    Cell(name="method-dora-bf16", config=LLAMA, method="lora", precision="bf16", dora=True),
    Cell(name="method-lora-down-fp32", config=LLAMA, method="lora", lora_targets="down_proj"),
    Cell(
        name="method-lora-saved-embedding",
        config=TIED,
        method="lora",
        precision="bf16",
        lora_targets="o_proj",
        lora_modules_to_save="embed_tokens",
        checkpointing="full",
    ),
    Cell(
        name="method-lora-experts",
        config=MIXTRAL,
        method="lora",
        lora_targets="experts.gate_up_proj,experts.down_proj",
    ),
    Cell(name="method-selective-fp32", config=LLAMA, checkpointing="selective", seq_len=256),
    Cell(name="method-selective-lora", config=LLAMA, method="lora", precision="bf16", checkpointing="selective"),
)

_GEMMA: dict[str, Any] = UNEVEN | {"model_type": "gemma", "head_dim": 30}
_VIT: dict[str, Any] = ARCHITECTURES["vit"]
_WHISPER: dict[str, Any] = ARCHITECTURES["whisper"]

# What the fixed grid above leaves out, and a random one found wrong.
COMBINED = (
    Cell(name="combined-adamw-bnb-8bit", config=WIDE, seq_len=16, optimizer="adamw_bnb_8bit"),
    Cell(name="combined-hf-adamw-bnb-8bit", config=VOCABULARY, seq_len=16, trainer="hf", optimizer="adamw_bnb_8bit"),
    Cell(name="combined-lion-bf16", config=WIDE, seq_len=16, precision="bf16-params", optimizer="lion_32bit"),
    Cell(name="combined-trl-lion-8bit", config=TIED, trainer="trl", precision="bf16-pure", optimizer="lion_8bit"),
    Cell(name="combined-ademamix-8bit", config=WIDE, seq_len=16, precision="bf16-pure", optimizer="ademamix_8bit"),
    Cell(name="combined-rmsprop-bnb", config=WIDE, seq_len=16, optimizer="rmsprop_bnb"),
    Cell(name="combined-hf-adafactor", config=TIED, trainer="hf", precision="bf16-params", optimizer="adafactor"),
    Cell(name="combined-hf-momentum", config=GPT2, trainer="hf", optimizer="sgd_momentum", checkpointing="full"),
    Cell(name="combined-hf-accumulation", config=LLAMA, trainer="hf", gradient_accumulation_steps=3),
    Cell(name="combined-trl-accumulation", config=VOCABULARY, trainer="trl", gradient_accumulation_steps=2),
    Cell(name="combined-hf-vit", config=_VIT, trainer="hf", gradient_accumulation_steps=2),
    Cell(
        name="combined-dora-dropout",
        config=_GEMMA,
        method="lora",
        dora=True,
        lora_dropout=0.05,
        precision="bf16",
        checkpointing="full",
        seq_len=192,
    ),
    Cell(name="combined-rslora-saved", config=LLAMA, method="lora", rslora=True, lora_modules_to_save="lm_head"),
    Cell(name="onednn-bf16", config=LLAMA, precision="bf16", onednn=True),
    Cell(name="onednn-bf16-checkpointing", config=LLAMA, precision="bf16", checkpointing="full", onednn=True),
    Cell(name="onednn-uneven-checkpointing", config=UNEVEN, precision="bf16-pure", checkpointing="full", onednn=True),
    Cell(name="onednn-hf-lora", config=LLAMA, trainer="hf", method="lora", precision="bf16", onednn=True),
    Cell(name="onednn-vit-fp32", config=_VIT, onednn=True),
    Cell(name="onednn-vit-bf16", config=_VIT, precision="bf16", checkpointing="full", onednn=True),
    Cell(name="onednn-whisper-bf16", config=_WHISPER, precision="bf16", onednn=True),
)


def _zero(name: str, config: dict[str, Any] = LLAMA, *, stage: int, num_processes: int = 2, **values: Any) -> Cell:
    """A cell with small buckets and ``zero`` beside them, in bf16 where nothing else is said."""
    small = _SMALL_BUCKETS if stage < 3 else _SMALL_FETCHES
    zero = small | values.pop("zero", {})
    precision = values.pop("precision", "bf16")
    return Cell(
        name=f"zero{stage}-{name}",
        config=config,
        precision=precision,
        strategy=f"zero{stage}",
        num_processes=num_processes,
        zero=zero,
        **values,
    )


_TINY = {"reduce_bucket_size": 20_000}  # smaller than most adapters together
_SMALL_MIXTRAL: dict[str, Any] = MIXTRAL | {"intermediate_size": 256, "num_hidden_layers": 4}
_AUTO = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
_MILLION = {"reduce_bucket_size": 1_000_000}
_LARGE_FETCHES = _MILLION | {
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 10_000_000,
    "stage3_max_reuse_distance": 5_000_000,
}

ZERO_MORE = (
    _zero("lora-bf16", stage=1, method="lora", zero=_TINY),
    _zero("uneven-fp32", UNEVEN, stage=1, precision="fp32"),
    _zero("accumulation-fp32", stage=1, precision="fp32", gradient_accumulation_steps=2),
    _zero("lora-bf16", stage=2, method="lora", zero=_TINY),
    _zero("uneven-fp32", UNEVEN, stage=2, precision="fp32"),
    _zero("accumulation-fp32", stage=2, precision="fp32", gradient_accumulation_steps=2),
    _zero("noncontiguous-fp32", stage=2, precision="fp32", zero={"contiguous_gradients": False}),
    _zero("no-scatter-fp32", stage=2, precision="fp32", zero={"reduce_scatter": False}),
    _zero("round-robin-fp32", stage=2, precision="fp32", zero={"round_robin_gradients": True}),
    _zero("overlap-fp32", stage=2, precision="fp32", zero={"overlap_comm": True}),
    _zero("bf16-pure", stage=2, precision="bf16-pure"),
    _zero("mixtral-bf16", _SMALL_MIXTRAL, stage=2),
    _zero("small-checkpointing-bf16", stage=2, checkpointing="full"),
    _zero("tied-bf16", TIED, stage=2),
    _zero("hf-bf16", stage=2, trainer="hf"),
    _zero("4-uneven-bf16", UNEVEN, stage=2, num_processes=4),
    _zero("offload-bf16", stage=2, offload="optimizer"),
    _zero("offload-accumulation-fp32", stage=2, precision="fp32", offload="optimizer", gradient_accumulation_steps=2),
    _zero("large-bf16", LARGE, stage=2, seq_len=128, zero=_MILLION),
    _zero("lora-checkpointing-bf16", stage=3, method="lora", checkpointing="full"),
    _zero("lora-attention-bf16", stage=3, method="lora", lora_targets="q_proj,v_proj"),
    _zero("gpt2-fp32", GPT2, stage=3, precision="fp32"),
    _zero("mixtral-bf16", _SMALL_MIXTRAL, stage=3),
    _zero("wide-adamw-bf16", WIDE, stage=3, optimizer="adamw_torch"),
    _zero("sub-groups-bf16", stage=3, zero={"sub_group_size": 100_000}),
    _zero("no-scatter-bf16", stage=3, zero={"reduce_scatter": False}),
    _zero("noncontiguous-fp32", stage=3, precision="fp32", zero={"contiguous_gradients": False}),
    _zero(
        "no-prefetch-checkpointing-bf16",
        stage=3,
        checkpointing="full",
        zero={"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0},
    ),
    _zero("bf16-pure", stage=3, precision="bf16-pure"),
    _zero("hf-bf16", stage=3, trainer="hf"),
    _zero("hf-auto-bf16", stage=3, trainer="hf", zero=_AUTO),
    _zero("4-uneven-bf16", UNEVEN, stage=3, num_processes=4),
    _zero("offload-fp32", stage=3, precision="fp32", offload="optimizer"),
    _zero("offload-all-bf16", stage=3, offload="all"),
    _zero("lora-offload-all-bf16", stage=3, method="lora", offload="all"),
    _zero("large-bf16", LARGE, stage=3, seq_len=128, zero=_LARGE_FETCHES),
)

_TP: dict[str, Any] = {"tp": 2, "num_processes": 2}

_TP_FSDP: dict[str, Any] = {"strategy": "fsdp2", "tp": 2, "num_processes": 4}

TENSOR_PARALLEL = (
    Cell(name="tp-fp32", config=LLAMA, **_TP),
    Cell(name="tp-fp32-b1", config=LLAMA, micro_batch=1, seq_len=160, **_TP),
    Cell(name="tp-fp32-checkpointing", config=LLAMA, checkpointing="full", **_TP),
    Cell(name="tp-bf16", config=LLAMA, precision="bf16", **_TP),
    Cell(name="tp-bf16-checkpointing", config=LLAMA, precision="bf16", checkpointing="full", **_TP),
    Cell(name="tp-bf16-pure", config=LLAMA, precision="bf16-pure", **_TP),
    Cell(name="tp-tied-fp32", config=TIED, **_TP),
    Cell(name="tp-tied-bf16", config=TIED, precision="bf16", **_TP),
    Cell(name="tp-qwen3-fp32", config=QWEN3, **_TP),
    Cell(name="tp-wide-adamw", config=WIDE, seq_len=16, optimizer="adamw_torch", **_TP),
    Cell(name="tp-uneven-fp32", config=UNEVEN, **_TP),
    Cell(name="tp-mixtral-fp32", config=_SMALL_MIXTRAL, **_TP),
    Cell(name="tp-gemma3-fp32", config=GEMMA3, attention="eager", **_TP),
    Cell(name="tp-hf-fp32", config=LLAMA, trainer="hf", **_TP),
    Cell(name="tp-hf-bf16", config=LLAMA, trainer="hf", precision="bf16", **_TP),
    Cell(name="tp-accumulation-fp32", config=LLAMA, gradient_accumulation_steps=2, **_TP),
    Cell(name="tp-fsdp2-fp32", config=LLAMA, **_TP_FSDP),
    Cell(name="tp-fsdp2-bf16", config=LLAMA, precision="bf16", **_TP_FSDP),
    Cell(name="tp-fsdp2-bf16-checkpointing", config=LLAMA, precision="bf16", checkpointing="full", **_TP_FSDP),
    Cell(name="tp-fsdp2-tied-fp32", config=TIED, **_TP_FSDP),
    Cell(name="tp-fsdp2-wide-fp32", config=WIDE, seq_len=16, **_TP_FSDP),
    Cell(name="tp-fsdp2-hf-fp32", config=LLAMA, trainer="hf", **_TP_FSDP),
    Cell(name="tp-fsdp2-hf-bf16", config=LLAMA, trainer="hf", precision="bf16", **_TP_FSDP),
    Cell(
        name="tp-fsdp2-hf-accumulation-bf16",
        config=LLAMA,
        trainer="hf",
        precision="bf16",
        gradient_accumulation_steps=2,
        **_TP_FSDP,
    ),
    Cell(name="tp-fsdp2-hf-checkpointing", config=LLAMA, trainer="hf", checkpointing="full", **_TP_FSDP),
    Cell(name="tp-fsdp2-hf-tied-bf16", config=TIED, trainer="hf", precision="bf16", **_TP_FSDP),
)

_TP_LORA: dict[str, Any] = {"method": "lora", **_TP}
_ATTENTION = "q_proj,k_proj,v_proj,o_proj"

TENSOR_PARALLEL_ADAPTERS = (
    Cell(name="tp-lora-fp32", config=LLAMA, **_TP_LORA),
    Cell(name="tp-lora-fp32-b1", config=LLAMA, micro_batch=1, seq_len=160, **_TP_LORA),
    Cell(name="tp-lora-fp32-checkpointing", config=LLAMA, checkpointing="full", **_TP_LORA),
    Cell(name="tp-lora-attention-fp32", config=LLAMA, lora_targets=_ATTENTION, **_TP_LORA),
    Cell(name="tp-lora-attention-bf16", config=LLAMA, lora_targets=_ATTENTION, precision="bf16", **_TP_LORA),
    Cell(name="tp-lora-rows-fp32", config=LLAMA, lora_targets="o_proj,down_proj", **_TP_LORA),
    Cell(name="tp-lora-bf16", config=LLAMA, precision="bf16", **_TP_LORA),
    Cell(name="tp-lora-bf16-checkpointing", config=LLAMA, precision="bf16", checkpointing="full", **_TP_LORA),
    Cell(name="tp-lora-bf16-pure", config=LLAMA, precision="bf16-pure", **_TP_LORA),
    Cell(name="tp-lora-tied-bf16", config=TIED, precision="bf16", **_TP_LORA),
    Cell(name="tp-lora-wide-adamw", config=WIDE, seq_len=16, lora_rank=64, optimizer="adamw_torch", **_TP_LORA),
    Cell(name="tp-lora-uneven-fp32", config=UNEVEN, **_TP_LORA),
    Cell(name="tp-lora-mixtral-fp32", config=_SMALL_MIXTRAL, lora_targets=_ATTENTION, **_TP_LORA),
    Cell(name="tp-lora-norm-fp32", config=LLAMA, lora_modules_to_save="norm", **_TP_LORA),
    Cell(name="tp-lora-accumulation-fp32", config=LLAMA, gradient_accumulation_steps=2, **_TP_LORA),
    Cell(name="tp-lora-hf-fp32", config=LLAMA, trainer="hf", **_TP_LORA),
    Cell(name="tp-lora-hf-bf16", config=LLAMA, trainer="hf", precision="bf16", **_TP_LORA),
    Cell(name="tp-lora-hf-checkpointing", config=LLAMA, trainer="hf", checkpointing="full", **_TP_LORA),
)

_SP: dict[str, Any] = {"sp": 2, "num_processes": 2, "zero": _MILLION}

SEQUENCE_PARALLEL = (
    Cell(name="sp-zero1-fp32", config=LLAMA, seq_len=128, strategy="zero1", **_SP),
    Cell(name="sp-zero1-bf16", config=LLAMA, seq_len=128, strategy="zero1", precision="bf16", **_SP),
    Cell(name="sp-zero2-bf16", config=LLAMA, seq_len=128, strategy="zero2", precision="bf16", **_SP),
    Cell(name="sp-zero3-bf16", config=LLAMA, seq_len=128, strategy="zero3", precision="bf16", **_SP),
    Cell(name="sp-zero3-checkpointing", config=LLAMA, seq_len=128, strategy="zero3", checkpointing="full", **_SP),
    Cell(name="sp-zero3-qwen3", config=QWEN3, seq_len=128, strategy="zero3", **_SP),
)

PADDED = tuple(
    Cell(name=f"padding-{name}", config=config, padding=True, **settings)
    for name, config, settings in (
        ("fp32", LLAMA, {}),
        ("fp32-b1", LLAMA, {"micro_batch": 1}),
        ("bf16", LLAMA, {"precision": "bf16", "trainer": "hf"}),
        ("eager", LLAMA, {"attention": "eager"}),
        ("lora-checkpointing", LLAMA, {"method": "lora", "precision": "bf16", "checkpointing": "full"}),
        ("ddp", LLAMA, {"strategy": "ddp", "num_processes": 2}),
        ("fsdp2", LLAMA, {"precision": "bf16", **_FSDP}),
        ("zero3", LLAMA, {"precision": "bf16", "strategy": "zero3", "num_processes": 2}),
        ("gpt2", GPT2, {}),
        *((name, ARCHITECTURES[name], {"seq_len": 128, "attention": "eager"}) for name in ("gemma2", "bloom", "mamba")),
        *(
            (name, ARCHITECTURES[name], {"seq_len": 128})
            for name in ("bert", "modernbert", "t5", "opt", "qwen3_moe", "gemma3_text")
        ),
    )
)


def _seeing(name: str, model: str, *, tower: dict[str, Any] | None = None, **values: Any) -> Cell:
    """A model with images of its usual size; with ``tower`` one of many layers, of which those are its settings."""
    config = ARCHITECTURES[model]
    if tower is not None:
        text = config["text_config"] | {"num_hidden_layers": 9}
        config = config | {"vision_config": config["vision_config"] | {"depth": 12} | tower, "text_config": text}
    given = {"seq_len": 128, **values}
    return Cell(name=f"images-{name}-{model}", config=config, images=True, image_size=IMAGE_SIZES[model], **given)


_WINDOWS: dict[str, Any] = {"fullatt_block_indexes": [3, 7, 11]}
_DEEP_STACK: dict[str, Any] = {"deepstack_visual_indexes": [3, 6, 9]}
_TWO: dict[str, Any] = {"num_processes": 2, "precision": "bf16"}

IMAGES = (
    _seeing("b1-eager", "qwen3_vl", micro_batch=1, attention="eager"),
    _seeing("b3", "mistral3", micro_batch=3, precision="bf16-params"),
    _seeing("deep", "qwen2_5_vl", tower=_WINDOWS),
    _seeing("deep-checkpointing", "qwen2_5_vl", tower=_WINDOWS, precision="bf16", checkpointing="full"),
    _seeing("deep-lora", "qwen2_5_vl", tower=_WINDOWS, micro_batch=3, method="lora"),
    _seeing("deep", "qwen3_vl", tower=_DEEP_STACK),
    _seeing("deep-checkpointing", "qwen3_vl", tower=_DEEP_STACK, precision="bf16", checkpointing="full"),
    _seeing("deep-lora", "qwen3_vl", tower=_DEEP_STACK, micro_batch=1, method="lora", lora_targets="attention"),
    _seeing("ddp", "qwen2_5_vl", strategy="ddp", **_TWO),
    _seeing("zero2", "qwen2_5_vl", strategy="zero2", zero=_MILLION, **_TWO),
    _seeing("zero3-lora", "smolvlm", strategy="zero3", method="lora", zero=_MILLION, **_TWO),
    _seeing("fsdp2", "qwen2_5_vl", strategy="fsdp2", checkpointing="full", **_TWO),
)

FROZEN = tuple(
    Cell(name=f"frozen-{name}", config=config, freeze=freeze, **settings)
    for name, config, freeze, settings in (
        ("embeddings", LLAMA, "embed_tokens", {}),
        ("embeddings-bf16", LLAMA, "embed_tokens,lm_head", {"precision": "bf16", "trainer": "hf"}),
        ("embeddings-checkpointing", LLAMA, "embed_tokens", {"precision": "bf16", "checkpointing": "full"}),
        ("mlp", LLAMA, "mlp", {"precision": "bf16"}),
        ("attention-checkpointing", LLAMA, "self_attn", {"checkpointing": "full"}),
        ("blocks", LLAMA, "layers", {}),
        ("blocks-and-embeddings-bf16", LLAMA, "layers,embed_tokens", {"precision": "bf16"}),
        ("tied", TIED, "embed_tokens", {"optimizer": "adamw_torch"}),
        ("gpt2-tied", GPT2, "wte,wpe", {"precision": "bf16-params"}),
        ("accumulation", LLAMA, "mlp,embed_tokens", {"gradient_accumulation_steps": 2}),
        ("bert", ARCHITECTURES["bert"], "embeddings", {"seq_len": 128}),
        ("t5-encoder", ARCHITECTURES["t5"], "encoder", {"seq_len": 128}),
        ("vision-tower-gemma3", ARCHITECTURES["gemma3"], "vision_tower", {"images": True, "seq_len": 128}),
        ("vision-tower-qwen3-vl", ARCHITECTURES["qwen3_vl"], "visual",
         {"images": True, "image_size": IMAGE_SIZES["qwen3_vl"], "seq_len": 128, "precision": "bf16"}),
        ("ddp", LLAMA, "mlp,embed_tokens", {"precision": "bf16", "strategy": "ddp", "num_processes": 2}),
        ("fsdp2", LLAMA, "mlp,embed_tokens", _FSDP),
        ("fsdp2-bf16", LLAMA, "mlp,embed_tokens", {"precision": "bf16", **_FSDP}),
        ("fsdp2-blocks", LLAMA, "layers,embed_tokens", {"precision": "bf16", **_FSDP}),
        ("zero3-vision-tower", ARCHITECTURES["gemma3"], "vision_tower", {"images": True, "seq_len": 128,
         "strategy": "zero3", "num_processes": 2, "zero": _MILLION, "precision": "bf16"}),
        ("fsdp1", LLAMA, "mlp,embed_tokens", _FSDP1),
        ("fsdp1-bf16", LLAMA, "mlp,embed_tokens", {"precision": "bf16", **_FSDP1}),
        ("zero2", LLAMA, "mlp,embed_tokens", {"precision": "bf16", "strategy": "zero2", "zero": _MILLION,
         "num_processes": 2}),
        ("zero3", LLAMA, "mlp,embed_tokens", {"precision": "bf16", "strategy": "zero3", "zero": _MILLION,
         "num_processes": 2}),
        ("zero3-blocks", LLAMA, "layers,embed_tokens", {"precision": "bf16", "strategy": "zero3", "zero": _MILLION,
         "num_processes": 2}),
    )
)  # fmt: skip

CELLS = (
    *SINGLE,
    *FROZEN,
    *PADDED,
    *METHODS,
    *COMBINED,
    *DDP,
    *DDP_SETTINGS,
    *FSDP1,
    *FSDP2,
    *ZERO,
    *ZERO_SETTINGS,
    *ZERO_MORE,
    *TENSOR_PARALLEL,
    *TENSOR_PARALLEL_ADAPTERS,
    *SEQUENCE_PARALLEL,
    *architecture_cells(),
    *IMAGES,
)


def find(pattern: str) -> tuple[Cell, ...]:
    """The cells whose names contain ``pattern``."""
    return tuple(cell for cell in CELLS if pattern in cell.name)
