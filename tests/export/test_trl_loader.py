"""TRL's own parser reads what is written for it. Apart from the other loaders, since importing TRL takes seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launchkit.export import config_files
from launchkit.export.trl import trl_config
from tests.export.cases import Case, case, strategy_cases

pytestmark = [pytest.mark.real_loader, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("each", strategy_cases(), ids=lambda each: each.name)
def test_trl_knows_every_key(each: Case) -> None:
    trl = pytest.importorskip("trl")
    known = {
        field.name
        for owner in (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments)
        for field in dataclasses.fields(owner)
    }
    assert set(trl_config(each.candidate, each.cluster)) <= known


def test_trl_parses_the_file(tmp_path: Path) -> None:
    """A GPU's precision cannot be asked for on a machine without one, hence fp32 on CPU."""
    trl = pytest.importorskip("trl")
    each = case("cpu", strategy="ddp", backend="cpu", precision="fp32", method="lora", checkpointing="full")
    (file,) = [file for file in config_files(each.candidate, each.cluster, targets=("trl",)) if file.name == "trl.yaml"]
    (tmp_path / file.name).write_text(file.text)
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    script, training, model = parser.parse_args_and_config(
        args=["--config", str(tmp_path / file.name)], fail_with_unknown_args=True
    )
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 4)
    assert (model.lora_r, model.lora_target_modules) == (16, "all-linear")
    assert script.dataset_name == "train.jsonl"
