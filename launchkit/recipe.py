"""What planning does not choose and no memory depends on: customary starting points, one row per method.

The exporters and the built-in fine-tune write these. Warm-up and weight decay are written nowhere, so that each
trainer's own defaults stand; so does the schedule, except for Axolotl, which refuses a file without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launchkit.scenario import Method

KEPT_CHECKPOINTS = 2  # the ``save_total_limit`` of the built-in fine-tune, and of the disk space that is planned


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyper-parameters of one method. ``lr_scheduler`` is a name of transformers' ``SchedulerType``; the scale of an
    adapter's update is ``lora_alpha ÷ rank``."""

    learning_rate: float
    source: str
    lr_scheduler: str = "cosine"  # Axolotl's examples, all but a few
    lora_alpha_per_rank: int = 0

    def lora_alpha(self, rank: int) -> int:
        """PEFT's ``lora_alpha`` for adapters of ``rank``. Formula: alpha = ``lora_alpha_per_rank`` × rank."""
        return self.lora_alpha_per_rank * rank


RECIPES: Mapping[Method, Recipe] = {
    Method.FULL: Recipe(
        learning_rate=2e-5,
        source="tatsu-lab/stanford_alpaca@761dc5b README.md; huggingface/alignment-handbook@925acdf "
        "recipes/zephyr-7b-beta/sft/config_full.yaml; axolotl-ai-cloud/axolotl@067b021 examples/llama-3/fft-8b.yaml",
    ),
    Method.LORA: Recipe(
        learning_rate=2e-4,
        lora_alpha_per_rank=2,
        source="rate: axolotl-ai-cloud/axolotl@067b021 examples/phi/lora-3.5.yaml; "
        "alpha: pytorch/torchtune@bd2a0fc recipes/configs/llama3_1/8B_lora_single_device.yaml",
    ),
    Method.QLORA: Recipe(
        learning_rate=2e-4,
        lora_alpha_per_rank=2,
        source="rate: artidoro/qlora@7f4e95a scripts/finetune_guanaco_7b.sh; "
        "both: axolotl-ai-cloud/axolotl@067b021 examples/qwen3/qlora-fsdp.yaml",
    ),
}
