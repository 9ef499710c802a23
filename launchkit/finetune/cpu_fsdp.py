"""Making accelerate shard on the CPU, over gloo.

accelerate 1.15 enables FSDP and DeepSpeed for processes on GPUs only: on the CPU an FSDP configuration silently becomes
DDP, and a DeepSpeed one disagrees with itself about the number of processes. Told that several CPU processes are
several devices, it does the same as on GPUs (``ACCELERATE_TORCH_DEVICE=cpu`` names the device).
"""

from __future__ import annotations

import os
from typing import Any


def install() -> None:
    """Call before the first ``Accelerator()``, ``PartialState()`` or ``TrainingArguments()``."""
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    original = PartialState._prepare_backend

    def prepare_backend(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        is_distributed = int(os.environ.get("LOCAL_RANK", "-1")) >= 0
        return (
            ("gloo", DistributedType.MULTI_GPU) if is_distributed and not cpu else original(self, cpu, *args, **kwargs)
        )

    PartialState._prepare_backend = prepare_backend
    skip_shared_memory_extension()


def join_deepspeed() -> None:
    """Lets DeepSpeed join the process group that the training arguments made: on the CPU they leave it out, and ZeRO-3
    would shard the model over one process while it is being built."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def skip_shared_memory_extension() -> None:
    """DeepSpeed on the CPU compiles an all-reduce over shared memory at every first start (half a minute, and a failure
    without a C++ compiler). Marked incompatible, it is left out, and gloo does the work with the same results."""
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        return
    try:
        import deepspeed.ops
    except ImportError:
        return
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
