"""The built-in fine-tune's job."""

from __future__ import annotations

import pytest

from launchkit.errors import PlanFileError
from launchkit.launch.job import FineTuneJob, split_gguf, weights_dtype_of
from tests.builders import candidate


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/m/a.gguf", ("/m", "a.gguf")),
        ("a.GGUF", (".", "a.GGUF")),
        ("org/model", ("org/model", "")),
        ("/m/gguf", ("/m/gguf", "")),
    ],
)
def test_split_gguf(path: str, expected: tuple[str, str]) -> None:
    assert split_gguf(path) == expected


@pytest.mark.parametrize(
    ("strategy", "precision", "method", "dtype"),
    [
        ("single", "fp32", "full", "float32"),
        ("single", "bf16", "full", "float32"),
        ("ddp", "bf16", "lora", "float32"),
        ("fsdp2", "bf16", "full", "float32"),
        ("fsdp2", "bf16", "lora", "bfloat16"),
        ("fsdp", "fp16", "lora", "float16"),
        ("zero2", "bf16", "full", "bfloat16"),
        ("zero3", "fp16", "full", "float16"),
        ("zero2", "fp32", "full", "float32"),
        ("ddp", "bf16-params", "full", "bfloat16"),
        ("single", "bf16-pure", "full", "bfloat16"),
        ("single", "bf16", "qlora", "bfloat16"),
    ],
)
def test_weights_dtype(strategy: str, precision: str, method: str, dtype: str) -> None:
    assert weights_dtype_of(candidate(strategy=strategy, precision=precision, method=method)) == dtype


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_path": 1}'])
def test_a_file_that_is_no_job(text: str) -> None:
    with pytest.raises(PlanFileError, match=r"x\.json is not a job file"):
        FineTuneJob.from_text(text, name="x.json")
