"""Measuring a rank from inside: memory by step, step times, and what proves that the strategy is in force."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

from launchkit.finetune.proof import biggest_module, foreign_storages, held_addresses, read_proof
from launchkit.finetune.timeline import AllocationTimeline
from launchkit.launch.environment import MEASURE_VARIABLE, RUN_DIR_VARIABLE
from launchkit.launch.record import WRAPPERS, Metric, Proof, RankRecord
from launchkit.process.worker import global_rank
from launchkit.scenario import StrategyKind
from launchkit.serialize import encode

PROFILED_STEPS = 3  # the first, and two steady ones
PROOF_STEPS = 2  # optimizer states exist after the first step


class StepMeter:
    """Follows one rank. ``resets_peaks`` gives each step its own CUDA peak, at the price of the script's own reading.

    On the CPU ``profile`` records every allocation of torch's CPU allocator up to the third step. It starts before the
    model is loaded, since the profiler counts what it sees allocated.
    """

    def __init__(self, *, profile: bool, resets_peaks: bool) -> None:
        self._on_cuda = torch.cuda.is_available()
        self._resets_peaks = resets_peaks
        self._marks_ns = [time.time_ns()]  # the beginning of training, then the end of each step
        self._cuda_peaks: list[tuple[int, int]] = []
        self._proof: Proof | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._timeline = AllocationTimeline() if profile and not self._on_cuda else None
        self._foreign_bytes = 0
        self._notes: list[str] = []
        self.tokens_per_step = 0
        self.longest_tokens = 0
        if self._timeline is not None:
            self._timeline.start()

    @classmethod
    def from_environment(cls, *, resets_peaks: bool) -> StepMeter:
        """As ``LAUNCHKIT_MEASURE`` says."""
        return cls(profile=os.environ.get(MEASURE_VARIABLE) == "profile", resets_peaks=resets_peaks)

    @property
    def step_seconds(self) -> list[float]:
        return [(end - begin) / 1e9 for begin, end in zip(self._marks_ns, self._marks_ns[1:], strict=False)]

    def begin(self) -> None:
        """Training begins: what came before, loading above all, is not part of the first step."""
        self._marks_ns = [time.time_ns()]
        if self._on_cuda and self._resets_peaks:
            torch.cuda.reset_peak_memory_stats()

    def end_step(self) -> None:
        """An optimizer step is over."""
        if self._on_cuda:
            torch.cuda.synchronize()
            self._cuda_peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
            if self._resets_peaks:
                torch.cuda.reset_peak_memory_stats()
        self._marks_ns.append(time.time_ns())
        num_steps = len(self._marks_ns) - 1
        if num_steps <= PROOF_STEPS:
            self._proof = read_proof(self._optimizer() if self._optimizer else None)
        if num_steps == PROFILED_STEPS:
            self._stop_timeline()

    def watch_optimizer(self) -> None:
        """Remembers the optimizer that steps, whatever wraps it."""

        def remember(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            self._optimizer = weakref.ref(optimizer)

        register_optimizer_step_post_hook(remember)

    def follow_optimizers(self) -> None:
        """For a script that nobody instrumented: each ``optimizer.step()`` ends a step."""
        self.watch_optimizer()
        register_optimizer_step_post_hook(lambda *_: self.end_step())

    def finish(self) -> None:
        """Writes ``rank<k>.json`` into the run directory."""
        self._stop_timeline()
        run_dir = os.environ.get(RUN_DIR_VARIABLE)
        if run_dir:
            path = Path(run_dir) / f"rank{global_rank()}.json"
            path.write_text(json.dumps(encode(self.record()), indent=2) + "\n", encoding="utf-8")

    def record(self) -> RankRecord:
        """What was measured so far."""
        metric, first, steady, reserved = self._peaks()
        return RankRecord(
            rank=global_rank(),
            device=torch.cuda.get_device_name() if self._on_cuda else "cpu",
            metric=metric,
            first_peak_bytes=first,
            steady_peak_bytes=steady,
            reserved_peak_bytes=reserved,
            unseen_frees_bytes=self._unseen_frees_bytes(),
            device_used_bytes=_device_used_bytes() if self._on_cuda else 0,
            max_rss_bytes=max_rss_bytes(),
            num_steps=len(self._marks_ns) - 1,
            step_seconds=tuple(self.step_seconds),
            tokens_per_step=self.tokens_per_step,
            longest_tokens=self.longest_tokens,
            proof=self._proof,
            notes=tuple(self._notes),
        )

    def _peaks(self) -> tuple[Metric, int, int, int]:
        """Metric, peak of the first step, peak of the later ones, reserved peak."""
        if self._on_cuda and self._cuda_peaks:
            allocated = [peak for peak, _ in self._cuda_peaks]
            return (
                Metric.CUDA_ALLOCATED,
                allocated[0],
                max(allocated[1:], default=0),
                max(reserved for _, reserved in self._cuda_peaks),
            )
        if self._timeline is not None and len(self._marks_ns) > 1:
            peaks = [self._timeline.peak_bytes(begin, end) + self._foreign_bytes for begin, end in self._windows()]
            return Metric.CPU_ALLOCATOR, peaks[0], max(peaks[1:], default=0), 0
        return Metric.RSS, max_rss_bytes(), 0, 0

    def _windows(self) -> list[tuple[int, int]]:
        """Begin and end of each profiled step."""
        return list(zip(self._marks_ns, self._marks_ns[1 : PROFILED_STEPS + 1], strict=False))

    def _unseen_frees_bytes(self) -> int:
        """Of the step with the highest peak."""
        timeline = self._timeline
        if timeline is None or len(self._marks_ns) < 2:
            return 0
        highest = max(self._windows(), key=lambda window: timeline.peak_bytes(*window))
        return timeline.ghost_bytes(*highest)

    def _stop_timeline(self) -> None:
        if self._timeline is None or not self._timeline.is_running:
            return
        self._timeline.stop()
        module = biggest_module()
        if module is None:
            return
        foreign = foreign_storages(module, self._timeline.holds)
        self._foreign_bytes = sum(foreign.values())
        self._timeline.leave_out_mappings(foreign)
        # Other strategies keep buffers between steps that no Python object holds, such as DDP's buckets.
        if self._proof is not None and any(WRAPPERS[StrategyKind.FSDP2] in text for text in self._proof.wrappers):
            self._timeline.lay_ghosts(held_addresses(module))


def max_rss_bytes() -> int:
    """The largest resident set of this process so far. ``ru_maxrss`` counts KiB on Linux, bytes on macOS."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _device_used_bytes() -> int:
    """What the driver reports as used on this rank's GPU, all processes together; 0 when NVML is not there."""
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:
        return 0
    return total - free
