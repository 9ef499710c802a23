"""Traces made side by side, for a model of which a plan will ask for many: processes that import torch once each and
trace what is expected, in its order, while the search goes on."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from launchkit.children import environment_of_child
from launchkit.errors import LaunchkitError
from launchkit.model import ModelProfile
from launchkit.scenario import TraceKey
from launchkit.units import GIB

if TYPE_CHECKING:
    from launchkit.catalog.models import Progress

# Resident memory of a process that traces a model of any size: torch, transformers and PEFT, and the trace.
WORKER_BYTES = GIB
MAX_WORKERS = 8

_PROGRESS_SECONDS = 0.2  # between two looks at how far the workers are

Answer = bytes | LaunchkitError | None  # an encoded program, why there is none, or None where the worker was lost


def affordable_workers(num_keys: int) -> int:
    """How many processes may trace ``num_keys`` programs: one per processor core, in half of the free memory."""
    import psutil  # lazy: planning a catalogued model needs no worker

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_keys, cores, psutil.virtual_memory().available // 2 // WORKER_BYTES, MAX_WORKERS)


class TraceWorkers:
    """Processes that trace ``keys`` of one model, the first ones first. They end when all are traced, or with this
    process."""

    def __init__(
        self, config: Mapping[str, Any], *, profile: ModelProfile, keys: Sequence[TraceKey], num_processes: int
    ) -> None:
        self._model = (dict(config), profile)
        self._answers: dict[str, Future[Answer]] = {key.text: Future() for key in keys}
        self._waiting = deque(keys)
        self._lock = threading.Lock()
        self._num_running = num_processes
        processes = [_start() for _ in range(num_processes)]
        self._finalizer = weakref.finalize(self, _end, processes)
        for process in processes:
            threading.Thread(target=self._serve, args=(process,), daemon=True).start()

    @property
    def num_done(self) -> int:
        return sum(answer.done() for answer in self._answers.values())

    def expects(self, key: TraceKey) -> bool:
        return key.text in self._answers

    def answer(self, key: TraceKey, *, progress: Progress | None = None) -> Answer:
        """What became of ``key``, one of the expected, which is traced before all that has not begun."""
        with self._lock, contextlib.suppress(ValueError):
            self._waiting.remove(key)
            self._waiting.appendleft(key)
        answer = self._answers[key.text]
        while not answer.done():
            if progress:
                progress(self.num_done, len(self._answers), "tracing training steps")
            wait([answer], timeout=_PROGRESS_SECONDS)
        return answer.result()

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._give_up()
        self._finalizer()

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        """Gives one process a key after the other."""
        assert process.stdin and process.stdout
        key: TraceKey | None = None
        with contextlib.suppress(OSError), process:
            try:
                pickle.dump(self._model, process.stdin)
                while (key := self._next()) is not None:
                    pickle.dump(key, process.stdin)
                    process.stdin.flush()
                    self._answers[key.text].set_result(pickle.load(process.stdout))
            except (OSError, EOFError, pickle.UnpicklingError):  # it was ended, by us or by the system
                if key is not None:
                    self._answers[key.text].set_result(None)
        self._leave()

    def _next(self) -> TraceKey | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def _leave(self) -> None:
        """With the last process gone nobody will answer what is left."""
        with self._lock:
            self._num_running -= 1
            is_last = not self._num_running
        if is_last:
            self._give_up()

    def _give_up(self) -> None:
        with self._lock:
            left, self._waiting = self._waiting, deque()
        for key in left:
            self._answers[key.text].set_result(None)


def _start() -> subprocess.Popen[bytes]:
    """A worker with this process's own launchkit, one thread, and nothing imported from the working directory."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "launchkit.catalog.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment_of_child(OMP_NUM_THREADS="1"),
    )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
