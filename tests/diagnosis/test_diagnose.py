"""Logs as they were, and what they must be read as. ``logs`` holds what real runs of two gloo ranks wrote."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchkit.diagnosis.diagnose import diagnose
from launchkit.diagnosis.evidence import Diagnosis, Evidence, Exit, Log, LoggedStep, State
from launchkit.diagnosis.logs import logged_steps
from launchkit.diagnosis.rules import RULES, is_echo, recognise_chain
from launchkit.launch.record import RunRecord
from launchkit.plan import PhasePeak, Plan, RunPhase
from launchkit.process.evidence import read_evidence
from launchkit.units import GIB
from tests import builders
from tests.diagnosis.cases import CASES, DEVICE_ASSERT, GPU_OUT_OF_MEMORY, NCCL_TIMEOUT, raised

LOGS = Path(__file__).with_name("logs")
FAILED, STOPPED, FINISHED = State.FAILED, State.STOPPED, State.FINISHED

# log: state, cause (empty: not known), rank, a part of the sentence
RECORDED = {
    "accelerate-simple": (FAILED, "no-launcher", None, "started without a launcher"),
    "anomaly": (FAILED, "not-a-number", 0, "not a number"),
    "cross": (FAILED, "target-out-of-range", 0, "a label is no class"),
    "cuda": (FAILED, "torch-without-cuda", 0, "built without CUDA"),
    "deepspeed-args": (FINISHED, "", None, "no error"),
    "deepspeed-kill": (FAILED, "killed", None, "a process failed: killed"),
    "deepspeed-mpi": (FAILED, "deepspeed-no-launcher", None, "without a launcher"),
    "deepspeed-nocompiler": (FAILED, "no-compiler", None, "no compiler"),
    "deepspeed-port": (FAILED, "port-in-use", None, "the rendezvous port is taken"),
    "deepspeed-resume": (FAILED, "resume-other-world", 0, "of 2 ranks, this run has 1"),
    "deepspeed-save": (FINISHED, "", None, "no error"),
    "device": (FAILED, "devices", 0, "different devices"),
    "disk": (FAILED, "disk-full", 0, "the disk is full"),
    "disk2": (FAILED, "disk-full", 0, "the disk is full"),
    "dtype": (FAILED, "dtypes", 1, "(float and c10::BFloat16)"),
    "exception": (FAILED, "", 1, "rank 1 failed first: ValueError: bad sample 17"),
    "exit3": (FAILED, "", 1, "exit code 3"),
    "files": (FAILED, "open-files", 1, "too many open files"),
    "flatten": (FAILED, "fsdp-mixed-dtypes", 0, "cannot join torch.float32 and torch.bfloat16"),
    "flattenint": (FAILED, "fsdp-integers", 0, "cannot flatten quantised"),
    "import": (FAILED, "missing-package", 0, "flash_attn is not installed"),
    "index": (FAILED, "token-out-of-range", 1, "beyond the model's embedding"),
    "inplace": (FAILED, "in-place", 1, "was overwritten"),
    "int": (STOPPED, "interrupted", None, "interrupted (Ctrl-C)"),
    "memoryerror": (FAILED, "host-memory", 1, "out of host memory"),
    "noaddr": (FAILED, "master-address", None, "node 0 was not reached"),
    "nograd": (FAILED, "nothing-trainable", 1, "depends on nothing"),
    "oom": (FAILED, "host-memory", 1, "out of host memory"),
    "port": (FAILED, "port-in-use", None, "the rendezvous port is taken"),
    "shapes": (FAILED, "shapes", 0, "(2x4 and 3x2)"),
    "shm": (FAILED, "worker-killed", 0, "a dataloader's worker was killed"),
    "sigbus": (FAILED, "bus-error", 1, "shared memory"),
    "sigkill": (FAILED, "killed", 1, "rank 1 failed first: killed, probably out of host memory"),
    "sigsegv": (FAILED, "segmentation-fault", 1, "a crash in native code"),
    "state": (FAILED, "other-shapes-saved", 1, "of another model"),
    "timeout": (FAILED, "collective-timeout", 0, "rank 0 gave up first"),
    "trainer-arch": (FAILED, "new-architecture", None, "llama9"),
    "trainer-badjson": (FAILED, "bad-json", None, "not JSON"),
    "trainer-bf16": (FAILED, "no-gpu", None, "no GPU is seen"),
    "trainer-bnb": (FINISHED, "", None, "no error"),
    "trainer-column": (FAILED, "missing-column", None, "no column 'text'"),
    "trainer-columns": (FAILED, "unused-columns", None, "(question)"),
    "trainer-empty": (FAILED, "no-data", None, "no examples"),
    "trainer-flash": (FAILED, "flash-attention", None, "not installed"),
    "trainer-keyerror": (FAILED, "missing-column", None, "no column 'text'"),
    "trainer-lora": (FAILED, "lora-targets", None, "query_key_value"),
    "trainer-nan": (FINISHED, "", None, "no error"),
    "trainer-nocausal": (FAILED, "no-such-model", None, "no such model"),
    "trainer-notemplate": (FAILED, "no-chat-template", None, "no chat template"),
    "trainer-offline": (FAILED, "no-hub", None, "cannot be reached"),
    "trainer-pad": (FAILED, "no-padding-token", None, "no padding token"),
    "trainer-positions": (FAILED, "position-out-of-range", None, "longer than the model has positions"),
    "trainer-resume": (FAILED, "no-checkpoint", None, "no checkpoint"),
    "trainer-vocab": (FAILED, "token-out-of-range", None, "beyond the model's embedding"),
    "unused": (FAILED, "ddp-unused", 0, "DDP waits"),
    "workererr": (FAILED, "missing-column", 0, "no column 'text'"),
}


def read(text: str, *, rank: int | None = None, **fields: object) -> Diagnosis:
    """The diagnosis of one log."""
    log = Log(path="run.log", text=text, rank=rank)
    return diagnose(Evidence(path="run.log", logs=(log,), **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(path.stem for path in LOGS.glob("*.log")))
def test_recorded_runs(name: str) -> None:
    found = diagnose(read_evidence(LOGS / f"{name}.log"))
    state, cause, rank, part = RECORDED[name]
    assert (found.state, found.cause, found.rank) == (state, cause, rank)
    assert part in found.headline
    if state is FAILED:
        line = (LOGS / f"{name}.log").read_text(encoding="utf-8").split("\n")[found.place.line - 1]  # type: ignore[union-attr]
        assert found.excerpt[0].split()[-1] in line
        assert found.advice or found.cause in ("", "shapes")


@pytest.mark.parametrize(("rule", "text"), CASES, ids=[f"{number}-{rule}" for number, (rule, _) in enumerate(CASES)])
def test_described_runs(rule: str, text: str) -> None:
    found = read(text)
    assert (found.state, found.cause) == (FAILED, rule)
    assert "{" not in found.headline and "()" not in found.headline
    assert found.advice


def test_every_rule_has_a_log() -> None:
    seen = {cause for _, cause, _, _ in RECORDED.values()} | {rule for rule, _ in CASES} | {"launchkit"}
    assert {rule.name for rule in RULES} <= seen


def test_every_rule_names_its_source_and_its_name_once() -> None:
    assert all(rule.source and rule.fact for rule in RULES)
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("sigkill", "rank 0, after it: the connection to another rank broke"),
        ("timeout", "rank 1 said nothing until the launcher ended it: look there"),
        ("unused", "rank 1 the same"),
        ("deepspeed-resume", ""),
    ],
)
def test_the_other_ranks_are_no_cause(name: str, others: str) -> None:
    assert diagnose(read_evidence(LOGS / f"{name}.log")).others == others


def test_the_user_s_own_line_is_named() -> None:
    assert diagnose(read_evidence(LOGS / "workererr.log")).code == "/home/user/job/fail.py:88"


def test_what_a_library_caught_is_no_cause() -> None:
    caught = raised("ImportError: cannot import name 'x' from 'y'") + "WARNING falls back to the slow path\n"
    assert read(caught + raised("ValueError: the end")).error == "ValueError: the end"


def test_a_destructor_s_traceback_is_no_cause() -> None:
    text = (
        raised("ValueError: the end") + "Exception ignored in: <function A.__del__ at 0x7f>\n" + raised("KeyError: 'a'")
    )
    assert read(text).error == "ValueError: the end"


def test_the_assertion_of_a_kernel_says_more_than_the_traceback() -> None:
    found = read(DEVICE_ASSERT)
    assert (found.place.line if found.place else 0) == 2
    assert "srcIndex" in found.error


def test_of_several_logs_the_first_exit_counts() -> None:
    logs = tuple(Log(path=f"rank{rank}.log", text=raised(f"ValueError: {rank}"), rank=rank) for rank in range(3))
    ends = ((0, 5.0), (1, 4.0), (2, 6.0))
    exits = tuple(Exit(rank=rank, exit_code=1, unix_seconds=at, error=f"ValueError: {rank}") for rank, at in ends)
    found = diagnose(Evidence(path="run", logs=logs, exits=exits))
    assert (found.rank, found.error) == (1, "ValueError: 1")
    assert found.place is not None and found.place.text == "rank1.log:8"


def test_colours_and_progress_bars_do_not_hide_an_error() -> None:
    text = "\x1b[31mTraceback (most recent call last):\x1b[0m\n  File 'a.py', line 1\n 5%|x| 1/9\rValueError: the end\n"
    assert read(text).error == "ValueError: the end"


def test_a_line_without_end_is_read_in_no_time() -> None:
    began = time.monotonic()
    assert read("RuntimeError: Error building extension 'x'" + " size mismatch for Error building" * 30_000).cause
    assert time.monotonic() - began < 1.0


def test_a_log_that_is_long_keeps_its_line_numbers() -> None:
    log = Log(path="a", text=raised("ValueError: x"), first_line=1001)
    place = diagnose(Evidence(path="a", logs=(log,))).place
    assert place is not None and place.line == 1008


@pytest.mark.parametrize(("text", "part"), [("", "no error"), ("\n\n", "no error"), ("{'loss': '1.5'}", "no error")])
def test_nothing_bad_is_said_of_a_log_without_errors(text: str, part: str) -> None:
    assert part in read(text).headline


def test_the_trainer_hides_a_loss_that_is_no_number_but_not_its_gradients() -> None:
    log = Log(path="a", text=(LOGS / "trainer-nan.log").read_text(encoding="utf-8"))
    assert [step.is_finite for step in logged_steps(log)] == [True, False, False]
    assert "2 of 3 logged steps" in diagnose(read_evidence(LOGS / "trainer-nan.log")).numbers[0]


def plan_of(**overrides: object) -> Plan:
    phases = tuple(
        PhasePeak(
            phase=phase,
            allocated_peak_bytes=18 * GIB,
            device_peak_bytes=20 * GIB,
            device_peak_high_bytes=21 * GIB,
            host_peak_bytes=host * GIB,
            host_needed_bytes=host * GIB,
        )
        for phase, host in ((RunPhase.LOAD, 90), (RunPhase.STEADY_STEP, 8))
    )
    chosen = builders.candidate(strategy="ddp", micro_batch=2)
    chosen = replace(chosen, estimate=replace(chosen.estimate, phases=phases))
    other = builders.candidate(strategy="fsdp2")
    small = replace(other.estimate, device_peak_bytes=9 * GIB, host_peak_bytes=GIB)
    made = builders.plan(chosen=chosen, alternatives=(replace(other, estimate=small),), **overrides)
    return replace(made, request={"gpus": "2x4090", "micro_batch": 2})


def test_out_of_gpu_memory_is_set_beside_the_plan() -> None:
    steps = tuple(LoggedStep(step=step, loss=2.0) for step in (1, 2))
    found = read(GPU_OUT_OF_MEMORY, rank=1, plan=plan_of(), steps=steps)
    assert found.headline == "rank 1 failed: out of GPU memory in the backward pass of step 3"
    assert found.numbers == (
        "asked for 226 MiB with 19.1 GiB allocated, 337 MiB kept by torch unused, 210 MiB free of the GPU's 23.6 GiB",
        "predicted for a step: 18.0 GiB allocated, 20.0 GiB on the device of 23.0 GiB usable",
    )
    assert found.advice == (
        "nvidia-smi: of this GPU's memory 3.00 GiB by process 4242 is held",
        "PYTORCH_ALLOC_CONF=expandable_segments:True before the command: what was asked for was there, in pieces",
        "launchkit plan meta-llama/Llama-3.1-8B --gpus 2x4090 --micro-batch 2 --strategy fsdp2",
    )


@pytest.mark.parametrize(
    ("host_gib", "part"), [(64, "launchkit plan"), (256, "sudo dmesg")], ids=["the plan says so", "the plan does not"]
)
def test_a_killed_rank_is_set_beside_the_host_s_memory(host_gib: int, part: str) -> None:
    plan = plan_of()
    node = replace(plan.cluster.node, host_memory_bytes=host_gib * GIB)
    plan = replace(plan, cluster=replace(plan.cluster, node=node))
    found = read("", rank=0, exits=(Exit(rank=0, exit_code=-9),), plan=plan)
    assert found.headline == "rank 0 failed: killed, probably out of host memory"
    assert (
        found.numbers[0] == f"predicted host memory: 90.0 GiB at most (loading) of {host_gib}.0 GiB that the node has"
    )
    assert part in found.advice[0]


def record(**overrides: object) -> RunRecord:
    values: dict[str, object] = {
        "run_dir": "runs/1",
        "command": ("torchrun",),
        "engine": "torchrun",
        "strategy": "DDP",
        "exit_code": 0,
        "seconds": 1.0,
        "predicted": {},
    }
    return RunRecord(**(values | overrides))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "state", "headline"),
    [
        ({"record": record(), "has_ended": True}, FINISHED, "the run finished"),
        (
            {"record": record(), "steps": (LoggedStep(step=4, loss=0.0, gradient_norm=float("nan")),)},
            FINISHED,
            "the run finished, but not with a number for a loss",
        ),
        ({"record": record(exit_code=130, stopped_by="SIGINT")}, STOPPED, "the run was interrupted (Ctrl-C)"),
        ({"record": record(exit_code=143, stopped_by="SIGTERM")}, STOPPED, "the run was ended from outside (SIGTERM)"),
        ({"has_ended": False, "steps": (LoggedStep(step=4, loss=2.5),)}, State.RUNNING, "the run goes on: step 4"),
        ({"has_ended": True}, STOPPED, "the run has no result: launchkit itself was ended"),
        ({"record": record(exit_code=1, failure="rank 0 vanished")}, FAILED, "the run failed with exit code 1: rank 0"),
    ],
)
def test_how_a_run_of_launchkit_stands(fields: dict[str, object], state: State, headline: str) -> None:
    found = read("", **fields)
    assert found.state is state
    assert found.headline.startswith(headline)


def test_a_run_that_finished_is_not_searched_for_errors() -> None:
    assert read(raised("ValueError: caught"), record=record()).state is FINISHED


def test_an_echo_is_the_cause_only_where_there_is_no_other() -> None:
    assert recognise_chain(["ValueError: x", "ncclRemoteError"]) is None
    assert is_echo("torch.distributed.DistBackendError: NCCL error\nncclRemoteError: A call failed")
    assert "gave up first" in read(NCCL_TIMEOUT).headline


LINES = sorted({line for path in LOGS.glob("*.log") for line in path.read_text(encoding="utf-8").split("\n")})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(LINES), st.text(max_size=40)), max_size=40))
def test_no_log_is_too_strange(lines: list[str]) -> None:
    found = read("\n".join(lines))
    assert found.headline
    if found.place is not None:
        assert 1 <= found.place.line <= "\n".join(lines).count("\n") + 1
