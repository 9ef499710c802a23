"""The hyper-parameters that planning does not choose: a row per method, and the same in everything that is written."""

from __future__ import annotations

import pytest

from launchkit.export.axolotl import axolotl_config
from launchkit.export.trl import trl_config
from launchkit.launch.job import Data, fine_tune_job
from launchkit.recipe import RECIPES
from launchkit.scenario import Method
from tests.builders import candidate, cluster


@pytest.mark.parametrize(
    ("method", "learning_rate", "alpha_of_rank_8"), [("full", 2e-5, 0), ("lora", 2e-4, 16), ("qlora", 2e-4, 16)]
)
def test_every_method_has_its_row(method: str, learning_rate: float, alpha_of_rank_8: int) -> None:
    recipe = RECIPES[Method(method)]
    assert (recipe.learning_rate, recipe.lora_alpha(8)) == (learning_rate, alpha_of_rank_8)
    assert "/" in recipe.source and "@" in recipe.source


@pytest.mark.parametrize("method", Method)
def test_what_is_written_is_the_row(method: Method) -> None:
    planned, here = candidate(method=method.value, lora_rank=8), cluster(num_gpus=1)
    axolotl, trl = axolotl_config(planned, here), trl_config(planned, here)
    job = fine_tune_job(planned, here, model_path="m", output_dir="o", data=Data(path="d"), deepspeed_file="")
    recipe = RECIPES[method]
    assert axolotl["learning_rate"] == trl["learning_rate"] == job.learning_rate == recipe.learning_rate
    assert axolotl["lr_scheduler"] == recipe.lr_scheduler
    alphas = {axolotl.get("lora_alpha", 0), trl.get("lora_alpha", 0), job.lora.alpha if job.lora else 0}
    assert alphas == {recipe.lora_alpha(8)}
