"""scripts/build-catalogue: which programs are traced, and that no model of another size than published ships."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from launchkit.catalog.cache import write_atomically
from launchkit.catalog.codec import ProgramFile, encode
from launchkit.catalog.index import ModelRow, models_directory, programs_path, read_rows
from launchkit.scenario import Attention, Trainer
from tests.builders import profile, smallest_program

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "build-catalogue"
ROW = ModelRow(id="a/b", config={"model_type": "llama"}, source="a test", num_parameters_published=1000, trace=True)
PROFILE = profile(num_parameters=1000, attentions=(Attention.SDPA, Attention.EAGER))


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    """The script as a module; it has no suffix, so it needs a loader by name."""
    loader = importlib.machinery.SourceFileLoader("build_catalogue", str(SCRIPT))
    spec = importlib.util.spec_from_loader("build_catalogue", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_catalogue"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def test_every_key_is_traced_once(script: types.ModuleType) -> None:
    texts = [key.text for key in script.trace_keys(ROW, PROFILE)]
    assert len(texts) == len(set(texts))
    assert "cuda/full/autocast-bf16/none/sdpa/plain/hf/bn" in texts
    assert "cuda/qlora/bf16-autocast/full/sdpa/plain/hf/all-linear/b1/cast" in texts
    assert "cpu/full/fp32/none/sdpa/plain/loop/bn" in texts
    assert "cuda/lora/bf16-autocast/none/sdpa/plain/hf/all-linear/bn/evaluation" in texts
    assert "cuda/qlora/bf16-autocast/full/sdpa/chunked/trl/all-linear/b1/cast" in texts


def test_only_causal_models_are_traced_under_trl(script: types.ModuleType) -> None:
    encoder = replace(PROFILE, task="sequence-classification")
    assert Trainer.TRL in {key.trainer for key in script.trace_keys(ROW, PROFILE)}
    assert Trainer.TRL not in {key.trainer for key in script.trace_keys(ROW, encoder)}


def test_what_a_file_holds_is_kept_where_asked(script: types.ModuleType, tmp_path: Path) -> None:
    work = script.Work(directory=tmp_path / "work", versions={})
    (architecture,) = script.architectures([ROW])
    first, second, *_ = script.trace_keys(ROW, PROFILE)
    cache = work.cache(architecture.fingerprint)
    cache.store_profile(PROFILE)
    path = programs_path(tmp_path, architecture.fingerprint)
    for keep, expected in ((False, {second.text}), (True, {first.text, second.text})):
        write_atomically(path, encode(PROFILE, {first.text: smallest_program()}))
        cache.store_program(second, smallest_program(), profile=PROFILE)
        script.write_programs(architecture, work=work, directory=tmp_path, keep=keep)
        assert set(ProgramFile.read(path).keys) == expected


def test_large_models_are_not_traced_for_cpus(script: types.ModuleType) -> None:
    large = replace(ROW, num_parameters_published=8 * 10**9)
    assert {key.device.value for key in script.trace_keys(large, PROFILE)} == {"cuda"}


def test_a_short_window_is_traced_on_both_sides(script: types.ModuleType) -> None:
    windowed = {key.beyond_window for key in script.trace_keys(ROW, replace(PROFILE, sliding_window=512))}
    unreachable = {key.beyond_window for key in script.trace_keys(ROW, replace(PROFILE, sliding_window=10**6))}
    assert (windowed, unreachable) == ({False, True}, {False})


def test_a_model_without_sdpa_is_traced_eager(script: types.ModuleType) -> None:
    eager = replace(PROFILE, attentions=(Attention.EAGER,))
    assert {key.attention for key in script.trace_keys(ROW, eager)} == {Attention.EAGER}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW, ""),
        (replace(ROW, num_parameters_published=0), ""),
        (replace(ROW, num_parameters_published=1100, num_published_excess=100, excess="buffers"), ""),
        (replace(ROW, num_parameters_published=1100), "1,000 parameters traced, 1,100 published"),
        (
            replace(ROW, num_parameters_published=1100, num_published_excess=50, excess="buffers"),
            "1,000 parameters traced, 1,050 published without buffers",
        ),
    ],
)
def test_counts_are_compared_with_the_published_ones(script: types.ModuleType, row: ModelRow, message: str) -> None:
    assert script.count_error(row, PROFILE) == message


def test_rows_of_one_shape_are_traced_once(script: types.ModuleType) -> None:
    found = script.architectures(read_rows(models_directory()))
    assert len(found) >= 35
    assert len({architecture.fingerprint for architecture in found}) == len(found)
    sizes = [architecture.row.num_parameters for architecture in found]
    assert sizes == sorted(sizes)
