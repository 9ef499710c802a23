"""Adapters and optimizers as Axolotl and TRL both name them."""

from __future__ import annotations

from launchkit.export.read.reading import Draft
from launchkit.export.read.section import Section
from launchkit.optimizers import ALIASES, OPTIMIZERS

# Optimizers that hold what another one of launchkit's table holds.
_SAME_STATES = {
    "adamw_torch_xla": "adamw_torch",
    "adamw_torch_npu_fused": "adamw_torch_fused",
    "adamw_apex_fused": "adamw_torch_fused",
    "ao_adamw_4bit": "adamw_torch_4bit",
    "ao_adamw_8bit": "adamw_torch_8bit",
    "optimi_adamw": "adamw_torch",
    "flash_adamw": "adamw_torch_fused",
}


def read_adapter(keys: Section, draft: Draft) -> None:
    """Rank, dropout and targets; call only where there is an adapter."""
    draft.flag("lora_rank", keys.count("lora_r"))
    draft.flag("lora_dropout", _dropout(keys))
    targets = (*keys.names("lora_target_modules"), *keys.names("lora_target_parameters"))
    patterns = [name for name in targets if not name.replace(".", "").replace("_", "").replace("-", "").isalnum()]
    if patterns:
        draft.assumed.append(f"{keys.where('lora_target_modules')} is a pattern: all linear layers are counted")
    if patterns or "all-linear" in targets or keys.switch("lora_target_linear"):
        targets = ("all-linear",)
    draft.flag("lora_targets", ",".join(targets) or None)
    draft.flag("lora_modules_to_save", ",".join(keys.names("lora_modules_to_save")) or None)


def _dropout(keys: Section) -> float | None:
    dropout = keys.number("lora_dropout")
    return dropout if dropout is None or dropout < 1 else 0.0


def read_optimizer(keys: Section, draft: Draft, *, key: str) -> None:
    """An optimizer by the Trainer's name, with the arguments that tell some apart."""
    name = keys.text(key)
    arguments, targets = keys.get("optim_args"), keys.get("optim_target_modules")
    if name is None:
        return
    found = ALIASES.get(name, name)
    by_arguments = [row.name for row in OPTIMIZERS.values() if (row.hf_name, row.hf_args) == (found, arguments or "")]
    if arguments and by_arguments:
        found = by_arguments[0]
    elif arguments:
        draft.ignored.append(f"optim_args {arguments} is not modelled")
    if found not in OPTIMIZERS:
        nearest = _SAME_STATES.get(found, "adamw_torch_fused")
        draft.assumed.append(f"{keys.where(key)} {name} is not in launchkit's table: {nearest} is counted")
        found = nearest
    elif targets is not None and not OPTIMIZERS[found].target_modules:
        draft.ignored.append("optim_target_modules is not modelled with this optimizer")
    draft.flag("optimizer", found)
