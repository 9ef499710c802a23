"""A fine-tune of Axolotl's own, watched: ``python axolotl_worker.py CONFIG.yaml OUT.json``, in the environment that
``bench.axolotl`` makes. Knows nothing of launchkit.

Weights are copied once the model is loaded: those of the file's format lie in the mapped file else, which torch's
allocator does not see. Source of the driver's parts: axolotl 0.19 ``cli/train.py``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
    "WANDB_DISABLED": "true",
}
MARK = "step::"


def main() -> None:
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile, record_function
    from transformers import TrainerCallback, TrainingArguments

    configuration, out = sys.argv[1:]
    _on_the_cpu(TrainingArguments)
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer

    cfg = load_cfg(configuration)
    data = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())

    class Steps(TrainerCallback):  # type: ignore[misc]
        mark: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gc.collect()
            self.mark = record_function(f"{MARK}{state.global_step}")
            self.mark.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.mark.__exit__(None, None, None)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = setup_model_and_trainer(cfg, data)[0]
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.clone()
        gc.collect()
        trainer.add_callback(Steps())
        trainer.train()

    allocations: list[tuple[int, int]] = []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.typed[0] == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.typed[1].total_allocated))
    marks = [event for event in profiler.profiler.kineto_results.events() if event.name().startswith(MARK)]
    steps = sorted((event.start_ns(), event.end_ns()) for event in marks)
    peaks = [max(total for at, total in allocations if start <= at <= end) for start, end in steps]
    weights: dict[str, int] = {}
    for parameter in trainer.model.parameters():
        kind = f"{str(parameter.dtype).removeprefix('torch.')}{'' if parameter.requires_grad else ', frozen'}"
        weights[kind] = weights.get(kind, 0) + parameter.numel()
    with open(out, "w") as file:
        json.dump({"peaks": peaks, "weights": weights}, file)
    os._exit(0)  # its loader's workers may linger


def _on_the_cpu(arguments: Any) -> None:
    """Axolotl has no way to say ``use_cpu``, without which the Trainer refuses bf16 here."""
    checked = arguments.__post_init__

    def post_init(self: Any) -> None:
        self.use_cpu = True
        checked(self)

    arguments.__post_init__ = post_init


if __name__ == "__main__":
    main()
