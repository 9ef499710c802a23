"""One measurement: a tiny random model and how a step of it is run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What ``bench.accuracy.measure`` runs. Values are spelled as the flags of ``launchkit estimate``.

    ``config`` is a ``config.json`` as a mapping; ``reduce_dtype`` is FSDP's (``bf16`` as accelerate sets it, or
    ``fp32``), ``use_orig_params`` FSDP1's, ``fsdp`` its other arguments as ``--fsdp-settings`` has them; ``ddp`` holds
    DDP's arguments, and as ``comm_hook`` the name of a hook; ``use_cache`` None leaves the model's own default, which
    keeps keys and values of a training step. With an ``evaluation_micro_batch`` the trainer evaluates two batches of it
    behind the last step. Packed rows hold two sequences each; under ``padding`` all rows but the first end in some,
    which a mask tells of. ``zero`` are keys of DeepSpeed's ``zero_optimization`` beside the stage, ``offload`` is
    DeepSpeed's; what ``zero`` does not name has DeepSpeed's own default, or accelerate's where it says ``auto``. ``tp``
    processes share each matrix, ``sp`` each sequence. ``float8_all_gather`` counts for FSDP2 in ``fp8``. ``image_size``
    is that of images which the model's processor leaves as large as they are. ``onednn`` leaves on what torch takes
    products in 16 bits and convolutions from, which goes by the machine.
    """

    name: str
    config: Mapping[str, Any]
    micro_batch: int = 2
    seq_len: int = 64
    gradient_accumulation_steps: int = 1
    method: str = "full"
    freeze: str = ""
    lora_rank: int = 8
    lora_targets: str = "all-linear"
    dora: bool = False
    rslora: bool = False
    lora_dropout: float = 0.0
    lora_modules_to_save: str = ""
    precision: str = "fp32"
    checkpointing: str = "none"
    attention: str = "sdpa"
    optimizer: str = "adamw_torch_fused"
    trainer: str = "loop"
    strategy: str = "single"
    num_processes: int = 1
    sharding: str = "full_shard"
    shard_group_size: int = 0
    reduce_dtype: str = "bf16"
    use_orig_params: bool = True
    ddp: Mapping[str, Any] = field(default_factory=dict)
    fsdp: Mapping[str, Any] = field(default_factory=dict)
    max_grad_norm: float = 0.0
    num_steps: int = 3
    use_cache: bool | None = False
    images: bool = False
    image_size: str = ""
    evaluation_micro_batch: int = 0
    packing: bool = False
    padding: bool = False
    offload: str = "none"
    zero: Mapping[str, Any] = field(default_factory=dict)
    tp: int = 1
    sp: int = 1
    float8_all_gather: bool = True
    onednn: bool = False

    @property
    def is_mixed(self) -> bool:
        """Whether parts of the step compute in bf16 on parameters held in fp32."""
        return self.precision in ("bf16", "fp8")

    @property
    def gathers_float8(self) -> bool:
        """Whether torchao's weights are cast before they are gathered."""
        return self.precision == "fp8" and self.strategy in ("fsdp2", "hsdp") and self.float8_all_gather

    @property
    def fingerprint(self) -> str:
        """Of what is run, so that a measurement of something else is not taken for this cell's."""
        told = {name: value for name, value in asdict(self).items() if name != "name" and value != _DEFAULTS.get(name)}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Cell:
        return cls(**json.loads(text))


_DEFAULTS = asdict(Cell(name="", config={}))
