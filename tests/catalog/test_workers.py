"""Traces side by side: what is answered, in which order, and what becomes of it when a worker dies."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest

from launchkit.catalog import workers
from launchkit.catalog.codec import ProgramFile
from launchkit.catalog.workers import TraceWorkers
from launchkit.errors import TraceError
from launchkit.scenario import Attention, Checkpointing, Compute, DeviceKind, Loss, Method, TraceKey, Trainer
from tests.builders import profile

KEY = TraceKey(
    device=DeviceKind.CPU,
    method=Method.FULL,
    compute=Compute.FP32,
    checkpointing=Checkpointing.NONE,
    attention=Attention.SDPA,
    loss=Loss.PLAIN,
    trainer=Trainer.LOOP,
)
KEYS = tuple(replace(KEY, single_sequence=single, attention=kind) for single in (False, True) for kind in Attention)[:4]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 128,
}

# A worker that answers with how many keys it had before, or refuses, or dies.
STAND_IN = """
import pickle, sys
from launchkit.errors import TraceError
pickle.load(sys.stdin.buffer)
number = 0
while True:
    try:
        key = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    if {dies} == number:
        sys.exit(1)
    pickle.dump(TraceError("no") if {refuses} == number else str(number).encode(), sys.stdout.buffer)
    sys.stdout.buffer.flush()
    number += 1
"""


def made(*, num_processes: int = 1, dies: int = -1, refuses: int = -1) -> TraceWorkers:
    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", STAND_IN.format(dies=dies, refuses=refuses)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with mock.patch.object(workers, "_start", start):
        return TraceWorkers({}, profile=profile(), keys=KEYS, num_processes=num_processes)


def test_keys_are_traced_in_their_order() -> None:
    found = made()
    assert [found.answer(key) for key in KEYS] == [b"0", b"1", b"2", b"3"]
    assert found.num_done == len(KEYS)


def test_what_is_waited_for_goes_first() -> None:
    found = made()
    assert found.answer(KEYS[3]) in (b"0", b"1")  # the first one may have begun
    assert sorted(found.answer(key) for key in KEYS) == [b"0", b"1", b"2", b"3"]


def test_a_refusal_is_handed_on() -> None:
    found = made(refuses=1)
    assert isinstance(found.answer(KEYS[1]), TraceError)
    assert found.answer(KEYS[2]) == b"2"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_a_lost_worker_leaves_is_answered_by_nobody(num_processes: int) -> None:
    found = made(dies=1, num_processes=num_processes)
    answers = [found.answer(key) for key in KEYS]
    assert answers.count(b"0") == num_processes
    assert answers.count(None) == len(KEYS) - num_processes


def test_closing_ends_the_processes() -> None:
    found = made(num_processes=2)
    found.close()
    assert all(answer in (None, b"0", b"1", b"2", b"3") for answer in map(found.answer, KEYS))


def test_progress_says_how_many_are_done() -> None:
    said: list[tuple[int, int, str]] = []
    made().answer(KEYS[0], progress=lambda *told: said.append(told))
    assert all(total == len(KEYS) and done <= total for done, total, _ in said)


def test_a_real_worker_traces() -> None:
    found = TraceWorkers(LLAMA, profile=profile(), keys=KEYS[:1], num_processes=1)
    answer = found.answer(KEYS[0])
    assert isinstance(answer, bytes)
    assert ProgramFile(answer, where="the answer").program(KEYS[0].text).stages
