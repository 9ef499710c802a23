"""Axolotl's own training step on the CPU beside the prediction: ``python -m bench.axolotl [--only NAME]``.

Axolotl is installed without its pins into an environment that borrows torch, transformers, PEFT and accelerate from
this interpreter, so that both sides run the same; of TRL it takes the version that it was written for. Each case is a
configuration as a user would write it, trained for three steps on random text of a tiny model with random weights.
Exit code 1 where a peak is further off than ``TOLERATED``.

Omits: flash attention, which has no CPU kernel, and several processes.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import launchkit

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "build" / "axolotl-venv"
# What Axolotl imports on the way to its trainer and this interpreter may not have; none of it takes part in a step.
PACKAGES = (
    *("axolotl==0.19.0", "trl==1.9.0", "triton==3.6.0", "datasets==4.8.4", "optimum==1.16.2", "python-dotenv"),
    *("addict", "colorama", "pillow", "fire", "termcolor", "art", "einops", "numba", "llvmlite", "scipy", "evaluate"),
    *("schedulefree", "posthog", "axolotl-contribs-lgpl", "axolotl-contribs-mit", "distro", "fastcore", "kernels"),
    *("httpx", "httpcore", "langdetect", "immutabledict", "dill", "multiprocess", "xxhash", "pyarrow", "pandas"),
    *("pytz", "tzdata", "platformdirs"),
)
ABSENT = ("wandb",)  # imported, never used: an empty module does
SEQ_LEN, NUM_STEPS, NUM_WORDS = 128, 3, 4096
TOLERATED = 0.005

LLAMA = {
    "model_type": "llama",
    "vocab_size": NUM_WORDS,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 256, "num_hidden_layers": 2}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}
LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
QLORA = {**LORA, "adapter": "qlora", "load_in_4bit": True}
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@dataclass(frozen=True, kw_only=True)
class Case:
    """``keys`` are what Axolotl's file says besides the usual, ``flags`` what launchkit is asked."""

    name: str
    config: Mapping[str, Any] = field(default_factory=lambda: LLAMA)
    keys: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    Case(name="full-fp32", keys={"bf16": False}, flags={"precision": "fp32"}),
    Case(name="full-bf16"),
    Case(name="full-bf16-eager", keys={"attn_implementation": "eager"}, flags={"attention": "eager"}),
    Case(name="full-bf16-packed", keys={"sample_packing": True}, flags={"packing": True}),
    Case(name="full-bf16-packed-eager",
         keys={"sample_packing": True, "attn_implementation": "eager"},
         flags={"packing": True, "attention": "eager"}),
    Case(name="full-bf16-accumulation", keys={"gradient_accumulation_steps": 2}, flags={"global_batch": 4}),
    Case(name="full-bf16-checkpointing", keys=CHECKPOINTING, flags={"checkpointing": "full"}),
    Case(name="full-bf16-adafactor", keys={"optimizer": "adafactor"}, flags={"optimizer": "adafactor"}),
    Case(name="full-bf16-qwen3-tied", config=QWEN3),
    Case(name="full-bf16-mixtral", config=MIXTRAL),
    Case(name="lora-bf16", keys=LORA, flags={"method": "lora"}),
    Case(name="lora-bf16-packed", keys={**LORA, "sample_packing": True}, flags={"method": "lora", "packing": True}),
    Case(name="lora-bf16-checkpointing",
         keys={**LORA, **CHECKPOINTING},
         flags={"method": "lora", "checkpointing": "full"}),
    Case(name="lora-bf16-reentrant",
         keys={**LORA, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
         flags={"method": "lora", "checkpointing": "reentrant"}),
    Case(name="lora-bf16-mixtral",
         config=MIXTRAL,
         keys={**LORA, "lora_target_linear": False, "lora_target_modules": ["q_proj", "v_proj"]},
         flags={"method": "lora", "lora_targets": "q_proj,v_proj"}),
    Case(name="qlora-bf16", keys=QLORA, flags={"method": "qlora"}),
    Case(name="qlora-bf16-checkpointing",
         keys={**QLORA, **CHECKPOINTING},
         flags={"method": "qlora", "checkpointing": "full"}),
)  # fmt: skip


def environment(directory: Path) -> Path:
    """The interpreter of Axolotl's environment, made where it is missing."""
    python = directory / "bin" / "python"
    if python.exists():
        return python
    venv.create(directory, with_pip=True)
    packages = directory / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], check=True)
    for name in ABSENT:
        (packages / name).mkdir()
        (packages / name / "__init__.py").touch()
    return python


def write_model(config: Mapping[str, Any], folder: Path) -> None:
    """Random bf16 weights, and a tokenizer of a token for each word."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    marks = ("<s>", "</s>", "[UNK]")
    words = [f"w{index}" for index in range(NUM_WORDS - len(marks))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate((*words, *marks))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    fields = dict(config)
    built = AutoConfig.for_model(
        fields.pop("model_type"), **fields, bos_token_id=len(words), eos_token_id=len(words) + 1
    )
    AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16).save_pretrained(folder)


def write_data(path: Path) -> None:
    """Texts of half a sequence to a whole one, so that batches are padded."""
    source = random.Random(0)
    texts = [
        " ".join(f"w{source.randrange(NUM_WORDS - 3)}" for _ in range(source.randint(60, SEQ_LEN - 8)))
        for _ in range(128)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def measured(case: Case, folder: Path, *, python: Path) -> dict[str, Any]:
    """The peaks of each step of Axolotl's run, and its weights by format."""
    write_data(folder / "data.jsonl")
    keys = {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "num_dataset_shards_to_save": 1,
        "output_dir": str(folder / "out"),
        "sequence_len": SEQ_LEN,
        "pad_to_sequence_len": True,  # as long as planned
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-4,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": True,
        "attn_implementation": "sdpa",
        "save_strategy": "no",
        "val_set_size": 0.0,
        "special_tokens": {},
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False),
        **case.keys,
    }
    configuration, out = folder / "axolotl.yaml", folder / "out.json"
    configuration.write_text(yaml.safe_dump(keys))
    command = [str(python), "-P", str(Path(__file__).with_name("axolotl_worker.py")), str(configuration), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600, check=False)
    if not out.exists():
        raise RuntimeError(f"{case.name}: Axolotl stopped\n{run.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def predicted(case: Case, folder: Path, *, state: str) -> int:
    flags = {"precision": "bf16-params", "optimizer": "adamw_torch", **case.flags}
    asked = {"gpus": "cpu", "trainer": "axolotl", "micro_batch": 2, "seq_len": SEQ_LEN, "state": state, **flags}
    return launchkit.estimate(str(folder / "model"), **asked).estimate.allocated_peak_bytes


def compare(case: Case, *, python: Path) -> tuple[float, float]:
    """Relative errors of the first and of a later step; prints them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(case.config, folder / "model")
        found = measured(case, folder, python=python)
        pairs = {"first": found["peaks"][0], "steady": found["peaks"][-1]}
        errors = {state: predicted(case, folder, state=state) / peak - 1 for state, peak in pairs.items()}
    told = ", ".join(f"{state} {pairs[state]:>11,} {error:+.2%}" for state, error in errors.items())
    print(f"{case.name:28} {told}  weights {found['weights']}", flush=True)
    return errors["first"], errors["steady"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="where Axolotl is, or will be, installed")
    arguments = parser.parse_args()
    python = environment(arguments.environment.resolve())
    errors = [abs(error) for case in CASES if arguments.only in case.name for error in compare(case, python=python)]
    print(f"{len(errors)} peaks, worst {max(errors):.2%}")
    return int(max(errors) > TOLERATED)


if __name__ == "__main__":
    sys.exit(main())
