"""The printed screens, as golden files at several widths, and the laws that every width keeps."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

import launchkit
from launchkit.plan import CheckpointFiles, Estimate, PhasePeak, Plan, Rejected, RunPhase
from launchkit.report.candidate import OWNERS, bars, device_text, model_name
from launchkit.report.estimate import render_estimate
from launchkit.report.plan import render_plan
from launchkit.report.text import Canvas, columns
from launchkit.report.verdict import Verdict, plan_verdict, verdict
from launchkit.scenario import StrategyKind, Trainer
from launchkit.units import GIB
from tests.report import plans

PLAN_FILE = ".launchkit/plan.json"
WIDTHS = (60, 79, 80, 100, 140)


def _screens(canvas: Canvas) -> dict[str, str]:
    return {
        "plan": render_plan(plans.plan(), canvas=canvas, plan_file=PLAN_FILE),
        "nothing_fits": render_plan(plans.nothing_fits(), canvas=canvas),
        "estimate": render_estimate(plans.candidate(), cluster=plans.CLUSTER, canvas=canvas),
        "estimate_cpu": render_estimate(plans.small_cpu_candidate(), cluster=plans.CPU_CLUSTER, canvas=canvas),
    }


@pytest.mark.parametrize("name", ["plan", "nothing_fits", "estimate", "estimate_cpu"])
@pytest.mark.parametrize("width", [60, 100, 140])
def test_screen_is_as_kept(name: str, width: int, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}_{width}.txt", _screens(Canvas(width=width))[name])


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for name, text in _screens(Canvas(width=width, colour=True)).items():
        widest = max(text.splitlines(), key=columns)
        assert columns(widest) <= width, f"{name}: {widest}"


@pytest.mark.parametrize("width", WIDTHS)
def test_colour_adds_nothing_but_colour(width: int) -> None:
    plain, coloured = _screens(Canvas(width=width)), _screens(Canvas(width=width, colour=True))
    assert {name: re.sub(r"\x1b\[[0-9;]*m", "", text) for name, text in coloured.items()} == plain
    assert "\x1b" not in "".join(plain.values())
    assert all("\x1b" in text for text in coloured.values())


@pytest.mark.parametrize(
    ("peak_gib", "expected", "first_words"),
    [
        (20.0, Verdict.FITS, " ✓ LoRA"),
        (23.2, Verdict.NARROW, " ~ fits only within the error band"),
        (23.6, Verdict.DOES_NOT_FIT, " ✗ does not fit"),
    ],
)
def test_verdict_comes_first(peak_gib: float, expected: Verdict, first_words: str) -> None:
    candidate = plans.candidate(peak_gib=peak_gib)
    assert verdict(candidate.estimate) is expected
    for width in WIDTHS:
        assert render_estimate(candidate, cluster=plans.CLUSTER, canvas=Canvas(width=width)).startswith(first_words)
        assert render_plan(plans.plan(chosen=candidate), canvas=Canvas(width=width)).startswith(first_words)


def _plan_without_room(peak_gib: float) -> Plan:
    loser = replace(plans.rejected()[0], candidate=plans.candidate(peak_gib=peak_gib))
    return plans.plan(chosen=None, alternatives=(), rejected=(loser, *plans.rejected()))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (plans.plan(), Verdict.FITS),
        (plans.plan(chosen=plans.candidate(peak_gib=23.2)), Verdict.NARROW),
        (plans.nothing_fits(), Verdict.DOES_NOT_FIT),
        (_plan_without_room(23.2), Verdict.NARROW),
        (_plan_without_room(40.0), Verdict.DOES_NOT_FIT),
        (plans.plan(chosen=None, rejected=()), Verdict.DOES_NOT_FIT),
    ],
)
def test_plan_has_the_verdict_of_its_best(plan: Plan, expected: Verdict) -> None:
    assert plan_verdict(plan) is expected


def test_every_owner_of_memory_has_a_bar() -> None:
    assert {key for keys in OWNERS.values() for key in keys} == set(plans.estimate().at_peak)


def _with_only(**at_peak: int) -> Estimate:
    empty = dict.fromkeys(plans.estimate().at_peak, 0)
    return replace(plans.estimate(), at_peak={**empty, **at_peak})


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (_with_only(weights=2 * 1024**3), ["   weights 2.0 ▇▇▇▇▇▇▇▇▇▇"]),
        (_with_only(weights=1024**3, logits=512 * 1024**2), ["   weights 1.0 ▇▇▇▇▇▇▇▇▇▇  logits 0.5 ▇▇▇▇▇"]),
        (_with_only(weights=1024**3, inputs=1024), ["   weights 1.0 ▇▇▇▇▇▇▇▇▇▇"]),
    ],
)
def test_bars_are_proportional(estimate: Estimate, expected: list[str]) -> None:
    assert bars(estimate, canvas=Canvas()) == expected


def test_nothing_fits_names_the_closest_and_what_would_fit() -> None:
    text = render_plan(plans.nothing_fits(), canvas=Canvas())
    assert "closest: LoRA · DDP needs 29.2 GiB" in text
    assert "would fit    --method qlora --checkpointing full" in text
    assert "launchkit launch" not in text


def test_plan_that_was_not_kept_says_how_to_keep_it() -> None:
    assert "add --output FILE to keep" in render_plan(plans.plan(), canvas=Canvas())
    text = render_plan(plans.plan(), canvas=Canvas(), how_to_keep="leave out --dry-run")
    assert " next         leave out --dry-run to keep this plan for launchkit launch\n" in text


@pytest.mark.parametrize(
    ("kind", "trainer", "num_nodes", "next_line"),
    [
        (StrategyKind.FSDP2, Trainer.HF, 1, f"launchkit launch --plan {PLAN_FILE}"),
        (
            StrategyKind.FSDP2,
            Trainer.HF,
            2,
            f"launchkit launch --plan {PLAN_FILE} --master-addr <of node 0> --node-rank <0 to 1>, on every node",
        ),
        (StrategyKind.SINGLE, Trainer.HF, 2, f"launchkit launch --plan {PLAN_FILE}"),
        (
            StrategyKind.FSDP2,
            Trainer.AXOLOTL,
            1,
            f"launchkit config {PLAN_FILE} --target axolotl, then axolotl train axolotl.yaml",
        ),
    ],
)
def test_what_comes_next_is_what_can_be_typed(
    kind: StrategyKind, trainer: Trainer, num_nodes: int, next_line: str
) -> None:
    chosen = plans.candidate(of=plans.scenario(kind, training=replace(plans.LORA, trainer=trainer)))
    plan = plans.plan(chosen=chosen, cluster=replace(plans.CLUSTER, num_nodes=num_nodes))
    text = render_plan(plan, canvas=Canvas(width=140), plan_file=PLAN_FILE)
    assert text.endswith(f" next         {next_line}\n")


@pytest.mark.parametrize(
    ("num_considered", "words"), [(0, "as asked"), (1, "1 configuration considered"), (2, "2 con")]
)
def test_what_was_considered_is_counted(num_considered: int, words: str) -> None:
    text = render_plan(replace(plans.nothing_fits(), num_considered=num_considered), canvas=Canvas())
    assert text.startswith(f" ✗ nothing fits 2× RTX 4090: {words}")


@pytest.mark.parametrize(("num_nodes", "words"), [(1, " · host 21.0 GiB"), (2, " · each host 21.0 GiB")])
def test_host_memory_is_that_of_one_node(num_nodes: int, words: str) -> None:
    cluster = replace(plans.CLUSTER, num_nodes=num_nodes)
    assert words in render_estimate(plans.candidate(), cluster=cluster, canvas=Canvas(width=140))


@pytest.mark.parametrize(
    ("kind", "peak_gib", "idle", "searches"),
    [
        (StrategyKind.FSDP2, 20.9, False, False),
        (StrategyKind.SINGLE, 20.9, True, False),
        (StrategyKind.SINGLE, 61.0, True, True),
    ],
)
def test_an_estimate_says_what_is_idle_and_how_to_find_what_fits(
    kind: StrategyKind, peak_gib: float, idle: bool, searches: bool
) -> None:
    candidate = plans.candidate(of=plans.scenario(kind), peak_gib=peak_gib)
    text = render_estimate(candidate, cluster=plans.CLUSTER, canvas=Canvas())
    assert ("1 of 2 GPUs used; --strategy ddp" in text) is idle
    assert ("launchkit plan Qwen/Qwen3-8B --gpus 2x" in text) is searches


@pytest.mark.parametrize(
    ("name", "shown"),
    [("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("./model", "./model"), ("/data/models/mine.gguf", "mine.gguf")],
)
def test_models_go_by_a_short_name(name: str, shown: str) -> None:
    assert model_name(replace(plans.MODEL, name=name)) == shown


def test_what_was_assumed_of_the_cluster_is_a_note() -> None:
    cluster = replace(plans.CLUSTER, notes=("host memory unknown: 128 GiB assumed",))
    line = " note         host memory unknown: 128 GiB assumed\n"
    assert line in render_plan(plans.plan(cluster=cluster), canvas=Canvas())
    assert line in render_estimate(plans.candidate(), cluster=cluster, canvas=Canvas())


def test_all_that_was_considered_is_shown_on_demand() -> None:
    many = plans.plan(alternatives=plans.plan().alternatives * 4, rejected=plans.rejected() * 4)
    short, full = render_plan(many, canvas=Canvas()), render_plan(many, canvas=Canvas(), in_full=True)
    assert (short.count("QLoRA · DDP"), full.count("QLoRA · DDP")) == (2, 4)
    assert (short.count("full · ZeRO-3"), full.count("full · ZeRO-3")) == (2, 4)


@pytest.mark.parametrize(
    ("known_gib", "plausible_gib", "mark", "host"),
    [
        (128, 0, " ✓ ", "host 21.0 GiB"),
        (0, 0, " ✓ ", "host 21.0 GiB"),
        (0, 256, " ✓ ", "host 21.0 GiB"),
        (0, 32, " ? fits if the host has 38.0 GiB · ", "host needs 21.0 GiB"),
    ],
)
def test_a_host_that_is_seldom_had_is_in_the_verdict(known_gib: int, plausible_gib: int, mark: str, host: str) -> None:
    node = replace(plans.CLUSTER.node, host_memory_bytes=known_gib * GIB, plausible_host_bytes=plausible_gib * GIB)
    plan = plans.plan(cluster=replace(plans.CLUSTER, node=node))
    text = render_plan(plan, canvas=Canvas(), plan_file=PLAN_FILE)
    assert text.startswith(f"{mark}LoRA r=16")
    assert f"· {host} (38.0 GiB while loading)" in text
    assert ("if its host has 38.0 GiB" in text) is (plausible_gib == 32)
    assert plan_verdict(plan) is Verdict.FITS


def test_what_lacks_host_memory_alone_is_the_closest() -> None:
    lacking = Rejected(candidate=plans.candidate(peak_gib=11.0), reason="host memory 369.0 while saving")
    text = render_plan(plans.plan(chosen=None, alternatives=(), rejected=(lacking, *plans.rejected())), canvas=Canvas())
    assert "closest: LoRA · FSDP2 takes 11.0 GiB of 23.5 usable per GPU" in text
    assert "; host memory 369.0 while saving, of 128.0 GiB" in " ".join(text.split())


def test_verbose_says_what_the_host_and_the_disk_are_needed_for() -> None:
    peak = PhasePeak(
        phase=RunPhase.LOAD,
        allocated_peak_bytes=4 * GIB,
        device_peak_bytes=5 * GIB,
        device_peak_high_bytes=6 * GIB,
        host_peak_bytes=30 * GIB,
        host_needed_bytes=10 * GIB,
    )
    save = replace(peak, phase=RunPhase.SAVE, device_peak_bytes=8 * GIB, host_peak_bytes=10 * GIB)
    files = CheckpointFiles(
        weights_bytes=10**9,
        engine_weights_bytes=0,
        optimizer_bytes=2 * 10**9,
        total_bytes=3 * 10**9,
        num_kept=2,
        disk_peak_bytes=10 * 10**9,
        write_seconds=1.0,
    )
    estimate = replace(plans.estimate(), phases=(peak, save), checkpoint=files)
    plan = plans.plan(chosen=plans.candidate(estimate=estimate))
    brief, full = (render_plan(plan, canvas=Canvas(), in_full=in_full) for in_full in (False, True))
    lines = (
        " phases       device peak loading 5.0 GiB (host 30.0 GiB) · saving 8.0 GiB (host 10.0 GiB)\n",
        " host         loading 10.0 GiB and 20.0 GiB of mapped files · saving 10.0 GiB\n",
        " disk         weights 1.0 GB · optimizer 2.0 GB · at most at once, with 2 kept 10.0 GB ·\n",
        "              ~1.0 s to write one\n",
    )
    assert all(line in full and line not in brief for line in lines)
    assert "while saving" not in brief  # loading takes more


def test_a_checkpoint_that_takes_minutes_and_a_host_that_saving_fills_are_told_at_once() -> None:
    peak = PhasePeak(
        phase=RunPhase.SAVE,
        allocated_peak_bytes=4 * GIB,
        device_peak_bytes=5 * GIB,
        device_peak_high_bytes=6 * GIB,
        host_peak_bytes=77 * GIB,
        host_needed_bytes=77 * GIB,
    )
    files = CheckpointFiles(
        weights_bytes=10**9,
        engine_weights_bytes=0,
        optimizer_bytes=99 * 10**9,
        total_bytes=100 * 10**9,
        num_kept=2,
        disk_peak_bytes=301 * 10**9,
        write_seconds=200.0,
    )
    estimate = replace(plans.estimate(), phases=(peak,), checkpoint=files)
    text = render_plan(plans.plan(chosen=plans.candidate(estimate=estimate)), canvas=Canvas())
    assert "(77.0 GiB while saving)" in text
    assert "100.0 GB per checkpoint, ~3.3 min to write" in " ".join(text.split())


@pytest.mark.parametrize(
    ("low_gib", "high_gib", "is_simulated", "expected"),
    [
        (13.5, 21.4, False, "13.5–21.4 GiB"),
        (24.0, 30.0, False, "≥ 24.0 GiB"),
        (13.5, 21.4, True, "20.0 GiB"),
        (20.0, 20.0, False, "20.0 GiB"),
    ],
)
def test_what_was_not_simulated_is_a_range(low_gib: float, high_gib: float, is_simulated: bool, expected: str) -> None:
    estimate = replace(
        plans.estimate(20.0),
        device_peak_low_bytes=round(low_gib * GIB),
        device_peak_high_bytes=round(high_gib * GIB),
        is_simulated=is_simulated,
    )
    assert device_text(estimate) == expected


def test_what_may_fit_is_not_called_rejected() -> None:
    """Rows that only a run through the allocator would decide stand apart from those that need too much."""
    found = launchkit.plan("Qwen/Qwen3-8B", gpus="2x4090")
    undecided = [item for item in found.rejected if item.is_undecided]
    assert undecided
    lines = render_plan(found, canvas=Canvas(width=120)).splitlines()
    labels = {line[1:13].strip(): number for number, line in enumerate(lines) if line[1:13].strip()}
    assert labels["may fit: -v"] + len(undecided) == labels["rejected"]
