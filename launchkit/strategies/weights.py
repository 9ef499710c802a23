"""In which dtype a job's weights are loaded: what planning counts, what the built-in fine-tune does."""

from __future__ import annotations

from launchkit.scenario import Method, Precision, Scenario, Trainer


def loaded_dtype(scenario: Scenario) -> str:
    """What ``from_pretrained`` is told as ``dtype``: the one that the strategy's rewrite counts the weights in."""
    precision = scenario.training.precision
    if precision in (Precision.BF16_PARAMS, Precision.BF16_PURE):
        return "bfloat16"
    if not (precision.is_mixed and _holds_sixteen_bits(scenario)):
        return "float32"
    return "float16" if precision is Precision.FP16 else "bfloat16"


def loaded_itemsize(scenario: Scenario) -> int:
    """Bytes per element of ``loaded_dtype``."""
    return 4 if loaded_dtype(scenario) == "float32" else 2


def _holds_sixteen_bits(scenario: Scenario) -> bool:
    """Whether mixed precision starts from 16-bit weights rather than from fp32 ones.

    Under autocast it does not. DeepSpeed's engine holds 16-bit weights and makes its own fp32 master; accelerate's FSDP
    upcasts what is trained and leaves frozen weights as they were loaded; 4-bit ones are unpacked into 16 bits.
    """
    training, kind = scenario.training, scenario.strategy.kind
    if kind.zero_stage or training.method is Method.QLORA:
        return True
    return kind.is_fsdp and training.method is Method.LORA and training.trainer is not Trainer.LOOP
