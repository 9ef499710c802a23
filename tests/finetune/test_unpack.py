"""GGUF files: unpacked once per node, and kept."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from launchkit.finetune import unpack
from launchkit.launch.job import Data, FineTuneJob, fine_tune_job
from tests.builders import candidate, cluster


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Unpacks nothing; keeps which files would have been."""
    files: list[Path] = []

    def convert(file: Path, directory: Path, *, dtype: str) -> None:
        files.append(file)
        (directory / "config.json").write_text(dtype)

    monkeypatch.setenv("LAUNCHKIT_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(unpack, "_convert", convert)
    return files


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    return path


def job(model: Path, *, precision: str = "fp32") -> FineTuneJob:
    chosen = candidate(precision=precision)
    return fine_tune_job(
        chosen, cluster(), model_path=str(model), output_dir="/o", data=Data(path="/d.jsonl"), deepspeed_file=""
    )


def test_a_file_is_unpacked_once_per_content_and_dtype(gguf: Path, converted: list[Path]) -> None:
    first = unpack.unpacked(job(gguf))
    assert first.gguf_file == ""
    assert Path(first.model_path, "config.json").read_text() == "float32"
    assert unpack.unpacked(job(gguf)) == first
    assert unpack.unpacked(job(gguf, precision="bf16-pure")).model_path != first.model_path
    assert converted == [gguf] * 2
    os.utime(gguf, ns=(0, 0))
    assert unpack.unpacked(job(gguf)).model_path != first.model_path


def test_a_directory_stays_as_it_is(tmp_path: Path, converted: list[Path]) -> None:
    assert unpack.unpacked(job(tmp_path)) == job(tmp_path)
    assert converted == []


def test_a_failure_leaves_nothing_behind(gguf: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, directory: Path, *, dtype: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(unpack, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        unpack.unpacked(job(gguf))
    assert list((gguf.parent / "cache" / "models").iterdir()) == []


def test_the_other_ranks_of_a_node_wait(gguf: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = unpack.directory_for(gguf, dtype="float32")
    monkeypatch.setenv("LOCAL_RANK", "1")
    timer = threading.Timer(0.5, directory.mkdir, kwargs={"parents": True})
    timer.start()
    assert unpack.unpacked(job(gguf)).model_path == str(directory)
    assert directory.exists()
    assert converted == []
