"""One rank of ``bench.host``: loads a model, or trains it, while a thread watches its resident memory."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SAMPLE_SECONDS = 0.005


class Watch:
    """Samples of this process: seconds on the machine's clock, private bytes, bytes of mapped files."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.samples.append((time.monotonic(), *resident()))


def resident() -> tuple[int, int]:
    """Private bytes and bytes of mapped files, from ``/proc/self/status``."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, mapped, shared = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return anonymous + shared, mapped


def run(case: dict[str, Any], folder: Path, rank: int) -> None:
    """One rank of ``case``; its samples go to a file in ``folder``."""
    import torch
    import trl  # noqa: F401  # what a fine-tune has imported by the time it loads
    from transformers import Trainer  # noqa: F401

    torch.set_num_threads(1)
    with Watch() as watch:
        training = PREPARE[case["strategy"]](case)
        time.sleep(4 * SAMPLE_SECONDS)
        if case["num_steps"]:
            _train(training, case)
    (folder / f"rank{rank}.json").write_text(json.dumps(watch.samples))
    os._exit(0)  # engines now and then abort while they shut down


def _load(case: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(case["model"], dtype=getattr(torch, case["loaded"]))


class Training(NamedTuple):
    """A model that is ready to be trained, and how: ``kept`` is what must live as long."""

    model: Any
    backward: Callable[[Any], None]
    step: Callable[[], None]
    kept: Any = None


def _train(training: Training, case: dict[str, Any]) -> None:
    """Steps on random tokens, as the plain loop runs them."""
    import torch

    from bench.host import FIELDS, SEQ_LEN

    for _ in range(case["num_steps"]):
        tokens = torch.randint(FIELDS["vocab_size"], (2, SEQ_LEN))
        training.backward(training.model(input_ids=tokens, labels=tokens).loss)
        training.step()


def _looped(model: Any) -> Training:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Training(model.train(), lambda loss: loss.backward(), step)


def _alone(case: dict[str, Any]) -> Training:
    return _looped(_load(case))


def _replicate(case: dict[str, Any]) -> Training:
    import torch

    torch.distributed.init_process_group("gloo")
    return _looped(torch.nn.parallel.DistributedDataParallel(_load(case)))


def _shard(case: dict[str, Any]) -> Training:
    from launchkit.finetune import cpu_fsdp

    cpu_fsdp.install()
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "ACCELERATE_MIXED_PRECISION": case["mixed"],
    }
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = _load(case)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=True))

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Training(model.train(), accelerator.backward, step, accelerator)


def _partition(case: dict[str, Any]) -> Training:
    from launchkit.finetune import cpu_fsdp

    os.environ["DS_ACCELERATOR"] = "cpu"
    cpu_fsdp.skip_shared_memory_extension()
    import deepspeed
    import torch
    from transformers.integrations import HfDeepSpeedConfig

    zero: dict[str, Any] = {"stage": int(case["strategy"][-1])}
    where = {"device": "cpu", "pin_memory": False}  # pinning takes a GPU's driver
    if case["offload"] != "none":
        zero["offload_optimizer"] = where
    if case["offload"] == "all":
        zero["offload_param"] = where
    config = {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case["mixed"] == "bf16"},
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
    }
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    registered = HfDeepSpeedConfig(config)  # makes from_pretrained shard; weakly referenced
    model = _load(case)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    engine.train()
    return Training(engine, engine.backward, engine.step, registered)


PREPARE: dict[str, Callable[[dict[str, Any]], Training]] = {
    "single": _alone,
    "ddp": _replicate,
    "fsdp2": _shard,
    "zero2": _partition,
    "zero3": _partition,
}
