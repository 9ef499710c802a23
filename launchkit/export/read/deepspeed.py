"""DeepSpeed's JSON, as a file of its own: it says how the job is spread, and of the rest next to nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launchkit.export import known_keys
from launchkit.export.lint import Tool
from launchkit.export.read.engines import DEEPSPEED_UNRELATED, read_deepspeed
from launchkit.export.read.reading import Draft, Place, Reading
from launchkit.export.read.section import AUTO, Section
from launchkit.scenario import Trainer


def read_deepspeed_config(config: Mapping[str, Any], place: Place) -> Reading:
    """The reading of a file for ``deepspeed.initialize`` or for ``TrainingArguments(deepspeed=…)``.

    The Trainer fills in the word ``auto``, which a script of its own does not know.
    """
    keys, draft = Section(config, file=place.file), Draft(tool=Tool.DEEPSPEED)
    is_trainers = any(value == AUTO for value in config.values())
    draft.flag("trainer", Trainer.HF if is_trainers else Trainer.LOOP)
    if not is_trainers:
        draft.assumed.append('no value is "auto": a script with a step of its own (--trainer hf for the Trainer)')
    read_deepspeed(keys, draft, place)
    return draft.finish(keys, known=known_keys.DEEPSPEED, unrelated=DEEPSPEED_UNRELATED)
