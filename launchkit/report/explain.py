"""The words of the screens and documents: what each number is, how it comes about, what it leaves out."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from launchkit.errors import UsageError
from launchkit.report.text import Canvas, Ink


@dataclass(frozen=True, kw_only=True)
class Term:
    """One word and its explanation; ``also`` are other names for it, ``see`` what to read next, ``page`` the page of
    the documentation that goes into it."""

    name: str
    text: str
    formula: str = ""
    omits: str = ""
    also: tuple[str, ...] = ()
    see: tuple[str, ...] = ()
    page: str = ""


ENGINES_PAGE = "docs/fsdp-or-deepspeed.md"
ACCURACY_PAGE = "docs/accuracy.md"
SPLIT_PAGE = "docs/parallel.md"
FILES_PAGE = "docs/configs.md"

TERMS: tuple[Term, ...] = (
    Term(
        name="estimate",
        text="The training step is traced on fake tensors as a list of allocations, kernels and messages; the strategy "
        "rewrites that list into what one rank does; a model of PyTorch's caching allocator runs it. The peak is read "
        "off that run, not multiplied out of parameter counts.",
        omits="libraries that allocate outside PyTorch, and what your own script keeps alive between steps.",
        see=("allocated", "reserved", "range"),
        page=ACCURACY_PAGE,
    ),
    Term(
        name="range",
        text="The lowest and the highest device peak that the known spreads allow: CUDA context, NCCL buffers and "
        "fragmentation differ between drivers and runs. Something fits when the top of the range does.",
        also=("device_peak_low_bytes", "device_peak_high_bytes", "band"),
        see=("device_peak", "usable"),
        page=ACCURACY_PAGE,
    ),
    Term(
        name="basis",
        text="How each part of the peak is known. traced: allocations of the step itself, run on fake tensors. "
        "simulated: what models of the engine, the optimizer and torch's allocator make of them, from their sources. "
        "assumed: what was seen on other machines, in a table with its spread (CUDA context, NCCL).",
        also=("traced", "simulated", "assumed"),
        see=("estimate", "range", "cuda_context", "nccl"),
        page=ACCURACY_PAGE,
    ),
    Term(
        name="is_simulated",
        text="Whether a candidate was run through the model of the allocator. In a plan what is chosen always was, "
        "what is shown beside it only with -v (in_full=True in Python): a run takes a tenth of a second. Without it "
        "what is allocated is known to 0.2 % (2 % of small models), and the device's peak as a range that leaves room "
        "for the most that the cache was seen to add; ≥ stands before what does not fit even without.",
        also=("≥",),
        see=("reserved", "fragmentation"),
    ),
    Term(
        name="allocated",
        text="Bytes in live tensors at the worst moment of the step, as torch.cuda.max_memory_allocated() reports.",
        formula="the sum of at_peak without cuda_context, nccl and fragmentation",
        also=("allocated_peak_bytes",),
        see=("reserved",),
    ),
    Term(
        name="reserved",
        text="Bytes that the caching allocator holds from the driver, as torch.cuda.max_memory_reserved() reports: "
        "the live tensors, and the gaps between them. It is what runs out.",
        also=("reserved_peak_bytes",),
        see=("fragmentation", "allocated"),
    ),
    Term(
        name="device_peak",
        text="What nvidia-smi would show at the worst moment, per GPU and for the largest rank.",
        formula="reserved + cuda_context + nccl",
        also=("device_peak_bytes", "peak"),
        see=("range", "usable"),
    ),
    Term(
        name="usable",
        text="The memory of one GPU that a process can have: what the driver reports, less what it keeps for itself "
        "and what other processes hold already.",
        also=("device_usable_bytes",),
    ),
    Term(
        name="weights",
        text="The parameters that a rank keeps between steps: all of them under ddp and zero1/2, its shard under FSDP "
        "and zero3. fp32 under mixed precision without ZeRO; 4 bits and their scales under qlora.",
        formula="parameters × bytes each ÷ shards",
        see=("gathered_weights", "master_weights", "precision"),
    ),
    Term(
        name="gathered_weights",
        text="Full copies of sharded weights while a layer needs them. FSDP holds about two blocks (the one that "
        "computes and the one prefetched) plus the root; zero3 up to stage3_max_live_parameters.",
        also=("gathered",),
        see=("fsdp2", "zero3"),
        page=ENGINES_PAGE,
    ),
    Term(
        name="master_weights",
        text="The fp32 copy that DeepSpeed's optimizer updates when the model computes in 16 bits; sharded at every "
        "ZeRO stage, on the host under optimizer offload.",
        formula="4 bytes × trainable parameters ÷ shards",
        also=("master",),
        page=ENGINES_PAGE,
    ),
    Term(
        name="gradients",
        text="Gradients of the trainable parameters, in the dtype of the weights. Accumulation does not multiply them; "
        "ddp may hold them twice (buckets), zero2/3 and FSDP keep a shard after reducing.",
        formula="trainable parameters × bytes each ÷ shards",
        see=("communication",),
    ),
    Term(
        name="optimizer_states",
        text="What the optimizer remembers per parameter: two moments for the Adam family, one byte each in the 8-bit "
        "variants, almost nothing for Adafactor and SGD. They appear with the first optimizer step.",
        formula="trainable parameters × bytes of state ÷ shards",
        also=("optimizer", "adam"),
        see=("state",),
    ),
    Term(
        name="activations",
        text="What the forward saves for the backward. It grows with tokens per micro-batch and with depth; attention "
        "adds tokens squared only in the eager implementation.",
        see=("checkpointing", "attention", "logits"),
    ),
    Term(
        name="logits",
        text="The output of the head, one score per token and vocabulary entry, and the copies that the loss makes of "
        "it in fp32. With a vocabulary of 150 000 it is often the largest item of all.",
        formula="micro-batch × tokens × vocabulary × 4 bytes, two to three times under the plain loss",
        see=("loss",),
    ),
    Term(
        name="temporaries",
        text="Memory that lives within an operation or a layer: workspaces of cuBLAS and attention, casts, and what "
        "the optimizer step makes (foreach makes temporaries of parameter size, fused does not).",
        also=("temporary",),
    ),
    Term(
        name="communication",
        text="Buffers that gradients and weights are packed into for a collective: DDP's buckets, DeepSpeed's "
        "reduce_bucket_size and allgather buffers (500 million elements each by default, whatever the model's size).",
        also=("buckets",),
        see=("zero2", "ddp"),
        page=ENGINES_PAGE,
    ),
    Term(name="inputs", text="The batch itself: token ids, mask, labels and positions."),
    Term(
        name="cuda_context",
        text="What the driver takes per process for its context and for loaded kernels; no tensor holds it. It "
        "depends on the GPU's generation and comes from a table of measurements.",
        also=("context",),
    ),
    Term(
        name="nccl",
        text="Buffers of NCCL's communicators, per GPU; they grow with the number of ranks and channels.",
    ),
    Term(
        name="fragmentation",
        text="Memory that the caching allocator holds and no tensor uses at the peak: remainders of blocks, and under "
        "DDP and FSDP what loading left behind. launchkit simulates the allocator's blocks, since measured values run "
        "from 1.7 % to 14.2 % of what is allocated, and further under FSDP.",
        formula="reserved − allocated",
        also=("slack",),
        see=("reserved", "alloc_conf"),
    ),
    Term(
        name="alloc_conf",
        text="PYTORCH_ALLOC_CONF of the run, which launchkit's model of the allocator takes too: expandable_segments, "
        "max_split_size_mb, max_non_split_rounding_mb, roundup_power2_divisions, garbage_collection_threshold. "
        "expandable_segments:True lets segments grow in place, so that freed blocks of one size serve another: where "
        "weights come and go (FSDP, ZeRO-3, checkpointing) most of the fragmentation goes. Of the GPUs found here "
        "the variable counts as it is set; Axolotl sets expandable segments itself.",
        omits="the time that mapping memory takes: little once a run is warm.",
        also=("expandable_segments", "allocator", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
        see=("fragmentation", "reserved"),
    ),
    Term(
        name="host",
        text="Memory of one node's processes together: the framework, pinned buffers, and offloaded states or weights. "
        "While loading in another dtype than the stored one, every process holds a whole copy of the weights, also "
        "under FSDP's cpu_ram_efficient_loading; while saving, rank 0 gathers them under FSDP and ZeRO-3, and every "
        "rank clones them under ZeRO-1 and 2. Of CPU processes it counts what glibc keeps of freed tensors too. "
        "Exit code −9 means this ran out.",
        omits="dataloader workers, of which there are none unless asked for: forked ones share their parent's pages "
        "and add some 12 MiB each, with rows in Python lists more in time; the page cache.",
        also=("host_peak_bytes", "host_load_peak_bytes", "host_needed_bytes"),
        see=("offload", "phases"),
    ),
    Term(
        name="phases",
        text="The peaks of a whole run: loading, the first step (no optimizer states yet), a steady step, the longest "
        "batch, an evaluation, saving. Every batch is planned as long as --seq-len, so that the longest batch is a "
        "steady step. An evaluation is of per_device_eval_batch_size sequences (8; of Axolotl the micro-batch); it is "
        "shown where its program ships or the model was traced, and counts neither for what fits nor for the worst "
        "phase, since a run evaluates only where it is given something to evaluate on. Host memory is counted twice: "
        "resident, and needed, which leaves out the mapped weight files that the kernel can drop.",
        also=("worst_phase", "load"),
        see=("worst moment", "host", "checkpoint"),
    ),
    Term(
        name="checkpoint",
        text="Disk space of one saved checkpoint: the model as it is held, or the adapter alone; beside it the copy "
        "that FSDP, ZeRO-1 and ZeRO-2 keep to resume from, and the optimizer's states, under ZeRO with the fp32 master "
        "weights. At most, a run holds those kept, the one being written and the final model.",
        omits="the tokenizer, random states and training arguments, below 1 % of any model worth tuning.",
        also=("checkpoint_bytes",),
    ),
    Term(
        name="worst moment",
        text="The part of the step in which the peak comes: forward, loss, backward or optimizer. What lowers the "
        "peak depends on it: a chunked loss does nothing for a peak in the optimizer.",
        also=("peak_phase", "peak_stage"),
    ),
    Term(
        name="step time",
        text="Kernels run at the GPU's roofline with measured efficiencies, messages at the link's bandwidth beside "
        "them, copies on a third stream. A ~ says that nobody measured this GPU and model together.",
        also=("seconds", "speed"),
        see=("mfu", "exposed communication"),
    ),
    Term(
        name="exposed communication",
        text="The part of the messages between GPUs that no computation hides.",
        also=("exposed_communication_seconds",),
    ),
    Term(
        name="mfu",
        text="Model FLOPs utilisation: what the model needs, recomputation not counted, over what the GPU could do "
        "in the same time at its dense peak.",
        formula="FLOPs of the model's step ÷ (step time × peak FLOPs per second)",
    ),
    Term(name="single", text="One process on one GPU; nothing is sharded and nothing is sent."),
    Term(
        name="ddp",
        text="Every GPU holds everything and averages gradients. It shards nothing, so it never makes a model fit; it "
        "is the fastest where it does.",
        also=("DistributedDataParallel",),
        page=ENGINES_PAGE,
    ),
    Term(
        name="fsdp",
        text="PyTorch's FullyShardedDataParallel, first version: blocks as flat parameters, sharded over the GPUs and "
        "gathered one block at a time.",
        also=("fsdp1",),
        see=("fsdp2", "gathered_weights"),
        page=ENGINES_PAGE,
    ),
    Term(
        name="fsdp2",
        text="fully_shard: each parameter is sharded along its first dimension, so frozen and trainable ones mix "
        "freely. Under accelerate the trainable shards are fp32 and the computation is bf16.",
        see=("gathered_weights", "hsdp"),
        page=ENGINES_PAGE,
    ),
    Term(
        name="hsdp",
        text="FSDP within a node, data parallel between nodes: more memory, less traffic on the network.",
        page=ENGINES_PAGE,
    ),
    Term(
        name="zero1",
        text="DeepSpeed stage 1: optimizer states and master weights are sharded.",
        see=("zero2",),
        page=ENGINES_PAGE,
    ),
    Term(
        name="zero2",
        text="DeepSpeed stage 2: gradients are sharded too. Its buckets are allocated at full size, so that zero2 "
        "can need less than zero3 for small models.",
        see=("communication",),
        page=ENGINES_PAGE,
    ),
    Term(
        name="zero3",
        text="DeepSpeed stage 3: weights are sharded too and gathered on use, within stage3_max_live_parameters.",
        see=("gathered_weights",),
        page=ENGINES_PAGE,
    ),
    Term(
        name="split",
        text="Ranks that share one copy's step: tp shares each matrix, cp each sequence in a ring, sp each sequence "
        "and its heads. What is shared is divided among them; norms and some activations are there on each.",
        also=("tp", "cp", "sp", "tensor parallel", "context parallel", "ulysses"),
        see=("fsdp2", "zero3"),
        page=SPLIT_PAGE,
    ),
    Term(
        name="files",
        text="What launchkit config writes of a plan: accelerate's, DeepSpeed's, Axolotl's and TRL's configuration, "
        "from the fields that the estimate counted.",
        also=("config", "accelerate", "axolotl", "trl", "deepspeed"),
        page=FILES_PAGE,
    ),
    Term(
        name="offload",
        text="What lives on the host instead of the GPU: optimizer states (optimizer), weights (params), both (all), "
        "or both on a disk (nvme). It trades device memory for host memory and PCIe time.",
        see=("host",),
        page=ENGINES_PAGE,
    ),
    Term(
        name="method",
        text="full trains every parameter. lora freezes them and trains two thin matrices per target layer. qlora "
        "also packs the frozen ones to 4 bits. Neither changes the activations much.",
        also=("lora", "qlora", "full"),
    ),
    Term(
        name="precision",
        text="bf16 and fp16 are mixed precision with fp32 held somewhere: fp32 weights under autocast (single, ddp), "
        "fp32 shards with 16-bit compute (fsdp), 16-bit weights with an fp32 master (zero). bf16-params holds "
        "weights, gradients and states in bf16 with autocast on, bf16-pure without it. fp16's loss scaling works in "
        "place, and TF32 only shortens the products of fp32: neither changes a byte. fp8 is bf16 whose linear layers, "
        "all but the first and the last, are torchao's, as accelerate and Axolotl put them in: activations are kept in "
        "bf16, and each product casts both factors to 8 bits. FSDP2 gathers weights in 8 bits, or in 16 with "
        "--no-fp8-all-gather. With --fp8-backend te all linear layers and layer norms are Transformer Engine's, on one "
        "GPU or under DDP: each layer keeps its input and its weight in 8 bits until its backward pass, the weight "
        "twice where the GPU multiplies in one layout only (Ada, Hopper, consumer Blackwell). fp8 takes compute "
        "capability 8.9; MS-AMP's is not planned.",
        also=("bf16", "fp16", "bf16-params", "bf16-pure", "fp32", "fp8", "fp8-backend"),
        page=ENGINES_PAGE,
    ),
    Term(
        name="checkpointing",
        text="full keeps only each block's input and computes the block again in the backward: less memory, about a "
        "third more computation. selective keeps the attention's output besides; offload holds the blocks' inputs on "
        "the host; reentrant is full with torch's use_reentrant, transformers' default before version 5: it takes the "
        "output of the block that is computed again besides.",
        also=("gradient checkpointing", "activation checkpointing"),
        see=("activations",),
    ),
    Term(
        name="attention",
        text="sdpa lets PyTorch choose a kernel that never writes the matrix of scores; eager writes it, tokens "
        "squared per head; flash_attention_2 is the separate package, flash_attention_3 that for Hopper, which "
        "accumulates the gradients of grouped keys and values in fp32.",
        also=("sdpa", "eager", "flash_attention_2", "flash_attention_3"),
    ),
    Term(
        name="loss",
        text="plain makes all logits at once and widens them to fp32. chunked is what TRL's trainer does: it goes over "
        "4,096 tokens by 32,768 entries at a time, in a buffer of that size whatever the vocabulary's. liger makes the "
        "gradients in the forward pass, by chunks whose logits take about what their hidden states take, and keeps "
        "the head's gradient through the backward. cce never writes logits. With liger the Trainer and TRL also take "
        "Liger's norms, gated activations and rotary embeddings (TRL keeps its own loss then), and Axolotl's files "
        "the loss alone.",
        formula="chunked: min(tokens, 4,096) × 32,768 × itemsize; liger: 2^⌈log2(tokens ÷ ⌈vocabulary ÷ hidden⌉)⌉ × "
        "vocabulary × itemsize, and hidden × vocabulary × itemsize of gradient",
        also=("chunked", "liger", "cce"),
        see=("logits",),
    ),
    Term(
        name="batch",
        text="Sequences per GPU and forward pass (micro-batch) times accumulation steps times GPUs. Only the "
        "micro-batch costs memory.",
        formula="global batch = micro-batch × accumulation × GPUs",
        also=("micro-batch", "global-batch", "accumulation"),
    ),
    Term(
        name="packing",
        text="Several examples fill one sequence, so that every micro-batch has all its tokens. TRL makes one row of a "
        "micro-batch: flash attention is told where examples end, sdpa and eager get a mask of tokens squared.",
        formula="mask: (micro-batch × tokens)² bytes, and in the compute dtype in each layer that keeps it",
    ),
    Term(
        name="preset",
        text="The flags of a published recipe under one name. What you type, set in LAUNCHKIT_* or write in "
        "launchkit.toml wins over them; they win over the defaults.",
        omits="the GPUs, the attention and the trainer, which stay yours; the learning rate and the data; and the "
        "dropout of adapters, for which --lora-dropout stands.",
        also=("presets",),
    ),
    Term(
        name="state",
        text="first is the step before optimizer states and buckets exist, steady any later one. Which of the two is "
        "the peak depends on the model; a run fails at step 0 or not until step 1 accordingly.",
        also=("steady", "first"),
        see=("optimizer_states",),
    ),
    Term(
        name="freeze",
        text="--freeze NAMES leaves parts of a full fine-tune as they are: no gradients, no optimizer states, and no "
        "backward pass through what lies ahead of all that is trained. A name is a run of components of a parameter's "
        "path (embed_tokens, vision_tower, self_attn.q_proj), * any text in one; layers of a stack are frozen all or "
        "none. The built-in fine-tune freezes them; a script of your own calls requires_grad_(False) on them before it "
        "makes its optimizer. Frozen weights keep the format of the others; FSDP1 makes their gradients all the same.",
        also=("frozen", "requires_grad", "unfrozen_parameters"),
        see=("gradients", "optimizer_states"),
    ),
    Term(
        name="data",
        text="--data FILE makes plan and estimate read the examples. Where no --seq-len is given, the plan is for the "
        "longest of them, as far as the model was made for it: the batch that runs out of memory is the one that holds "
        "it. Packed sequences keep their usual length. Tokens are counted by the model's own tokenizer and chat "
        "template, all of them in small files and 4,100 examples of large ones, and remembered; without a tokenizer at "
        "hand they are estimated from bytes, and a note says so. The time of an epoch is that of its steps, each as "
        "wide as the longest of the examples that usually meet in it; its range is how far families of published runs "
        "are from the clock.",
        formula="steps = ⌈sequences ÷ global batch⌉; usual width = Σ qᵢ ((i/n)ᵇ − ((i−1)/n)ᵇ) over the n quantiles of "
        "length, of b sequences side by side",
        omits="evaluations, checkpoints, what loading data costs, and sorting by length.",
        also=("epoch", "num_steps", "longest_tokens"),
        see=("range",),
    ),
)


def find_term(name: str) -> Term:
    """The term of that name or one of its other names; ``UsageError`` with the nearest one otherwise."""
    names = {_canonical(word): term for term in TERMS for word in (*term.also, term.name)}
    term = names.get(_canonical(name))
    if term is not None:
        return term
    near = difflib.get_close_matches(_canonical(name), names, n=1)
    advice = f"did you mean {names[near[0]].name}?" if near else "launchkit explain lists them all"
    raise UsageError(f"{name!r} is no term of launchkit; {advice}")


def render_term(term: Term, *, canvas: Canvas) -> str:
    """One term, in full."""
    lines = [canvas.paint(f" {term.name}", Ink.LABEL), *_paragraph(term.text, canvas=canvas)]
    for label, text in (("formula", term.formula), ("omits", term.omits), ("also", ", ".join(term.also))):
        if text:
            lines += canvas.section(label, [text])
    lines += canvas.section("see", [f"launchkit explain {name}" for name in term.see], separator=", ")
    lines += canvas.section("read", [term.page] if term.page else [])
    return "\n".join(lines) + "\n"


def render_terms(*, canvas: Canvas) -> str:
    """The list of all terms."""
    lines = canvas.flow([term.name for term in TERMS], first=" ", rest=" ", separator=", ")
    return "\n".join([*lines, *canvas.section("next", ["launchkit explain <term>"])]) + "\n"


def term_document(term: Term) -> dict[str, object]:
    """A term as JSON."""
    return {
        "term": term.name,
        "text": term.text,
        "formula": term.formula,
        "omits": term.omits,
        "also": list(term.also),
        "see": list(term.see),
        "page": term.page,
    }


def _paragraph(text: str, *, canvas: Canvas) -> list[str]:
    return canvas.flow(text.split(), first="   ", rest="   ", separator=" ")


def _canonical(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
