"""The peaks of a whole run, and what they do to a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchkit import planner
from launchkit.hardware import Cluster
from launchkit.plan import Basis, Candidate, PhasePeak, RunPhase
from launchkit.planner.evaluate import Bench, run_of
from launchkit.planner.host import HostUse, greatest_need
from launchkit.report.candidate import worst_moment
from launchkit.report.verdict import Verdict, verdict
from launchkit.request import Request
from launchkit.scenario import Offload
from launchkit.serialize import document_text, plan_document, plan_from_text
from launchkit.units import GB, GIB, MIB
from tests.builders import candidate as built
from tests.builders import cluster, estimate, scenario
from tests.planner.sources import WrittenSource

BLOCK_PARAMETERS = 134_217_728
ORDER = [RunPhase.LOAD, RunPhase.FIRST_STEP, RunPhase.STEADY_STEP, RunPhase.LONGEST_BATCH, RunPhase.SAVE]


def judged(num_layers: int = 4, *, on: Cluster | None = None, **fields: object) -> Candidate:
    settings = {"seq_len": 512, **fields}
    return planner.estimate(WrittenSource(num_layers), cluster=on or cluster(), scenario=scenario(**settings))


def peaks(candidate: Candidate) -> dict[RunPhase, PhasePeak]:
    return {peak.phase: peak for peak in candidate.estimate.phases}


def cpus(num_processes: int) -> Cluster:
    return cluster(num_gpus=num_processes, backend="cpu")


def with_host(memory_bytes: int, *, num_gpus: int = 4, disk_bytes: int = 0) -> Cluster:
    gpus = cluster(num_gpus=num_gpus)
    return replace(gpus, node=replace(gpus.node, host_memory_bytes=memory_bytes, disk_free_bytes=disk_bytes))


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "fsdp2", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_phase_has_its_peak_in_the_order_of_a_run(strategy: str, method: str) -> None:
    candidate = judged(strategy=strategy, method=method)
    found = peaks(candidate)
    assert list(found) == ORDER
    assert found[RunPhase.STEADY_STEP].allocated_peak_bytes == candidate.estimate.allocated_peak_bytes
    assert found[RunPhase.STEADY_STEP].device_peak_bytes == candidate.estimate.device_peak_bytes
    for peak in found.values():
        assert 0 < peak.allocated_peak_bytes <= peak.device_peak_bytes <= peak.device_peak_high_bytes
        assert 0 < peak.host_needed_bytes <= peak.host_peak_bytes


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_the_first_step_lacks_the_optimizer_s_states(strategy: str) -> None:
    found = peaks(judged(strategy=strategy, seq_len=8192))
    first, steady = found[RunPhase.FIRST_STEP], found[RunPhase.STEADY_STEP]
    assert first.allocated_peak_bytes < steady.allocated_peak_bytes


@pytest.mark.parametrize("state", ["first", "steady"])
def test_both_states_say_the_same_of_what_is_allocated(state: str) -> None:
    """Whichever step is simulated, the other one's peak is read off its own program."""
    found = peaks(judged(on=cpus(2), strategy="ddp", precision="fp32", state=state))
    other = peaks(judged(on=cpus(2), strategy="ddp", precision="fp32"))
    for phase in (RunPhase.FIRST_STEP, RunPhase.STEADY_STEP):
        assert found[phase].allocated_peak_bytes == other[phase].allocated_peak_bytes


@pytest.mark.parametrize(
    ("fields", "copies"),
    [
        ({"strategy": "single", "precision": "bf16"}, 1),  # stored in 16 bits, wanted in fp32
        ({"strategy": "single", "precision": "bf16-pure"}, 0),  # views of the mapped file
        ({"strategy": "ddp", "precision": "bf16"}, 4),
        ({"strategy": "fsdp2", "precision": "bf16"}, 4),  # on every rank, whatever cpu_ram_efficient_loading says
        ({"strategy": "fsdp2", "precision": "bf16-params", "method": "lora"}, 0),
        ({"strategy": "zero2", "precision": "bf16"}, 0),
        ({"strategy": "zero3", "precision": "fp32"}, 0),  # sharded as it is built
        ({"strategy": "ddp", "precision": "bf16-params", "method": "qlora"}, 0),
    ],
)
def test_copies_of_weights_on_the_host_while_loading(fields: dict[str, object], copies: int) -> None:
    source = WrittenSource(4)
    bench = Bench(source=source, cluster=cluster())
    run = run_of(bench, scenario(**fields))
    none = run_of(bench, scenario(strategy=fields["strategy"], precision="bf16-pure"))
    use = run.host_loading()
    assert use.needed_bytes - none.host_loading().needed_bytes == copies * 4 * source.num_parameters
    assert use.mapped_bytes == 2 * source.num_parameters


@pytest.mark.parametrize(
    ("fields", "copies_bytes"),
    [
        ({"strategy": "ddp", "precision": "bf16"}, 4),  # the fp32 weights of one file
        ({"strategy": "fsdp2", "precision": "bf16"}, 8),  # the full optimizer state, after the full weights
        ({"strategy": "zero2", "precision": "bf16"}, 4 * 2),  # 16-bit weights on each of four ranks
        ({"strategy": "zero3", "precision": "bf16"}, 2),
        ({"strategy": "zero3", "precision": "bf16", "gather_16bit_weights_on_model_save": False}, 0),
        ({"strategy": "fsdp2", "precision": "bf16", "full_state_dict": False}, 0),
    ],
)
def test_what_is_gathered_on_the_host_to_be_saved(fields: dict[str, object], copies_bytes: int) -> None:
    source = WrittenSource(4)
    run = run_of(Bench(source=source, cluster=cluster()), scenario(**fields))
    gathered = run.host_saving().needed_bytes - run.host_training(0).needed_bytes
    assert gathered == pytest.approx(copies_bytes * source.num_parameters, rel=1e-5)


def test_quantising_holds_one_weight_in_sixteen_bits_beside_those_packed() -> None:
    found = peaks(judged(strategy="single", method="qlora", precision="bf16-params"))
    packed = BLOCK_PARAMETERS // 2 * 4
    assert found[RunPhase.LOAD].allocated_peak_bytes > packed + 2 * BLOCK_PARAMETERS


def test_zero_flattens_on_the_device_only_where_both_copies_fit() -> None:
    """40 blocks are 10.7 GB in 16 bits: the flat copy beside them fits 24 GiB; that of 60 does not."""
    fits, too_much = (
        peaks(judged(layers, strategy="zero2", offload="optimizer", checkpointing="full")) for layers in (40, 60)
    )
    assert fits[RunPhase.LOAD].allocated_peak_bytes == pytest.approx(40 * BLOCK_PARAMETERS * 4, rel=0.01)
    assert too_much[RunPhase.LOAD].allocated_peak_bytes < 60 * BLOCK_PARAMETERS * 4


@pytest.mark.parametrize("processes", [1, 2])
def test_on_the_cpu_the_host_holds_the_tensors(processes: int) -> None:
    strategy = "single" if processes == 1 else "ddp"
    candidate = judged(on=cpus(processes), strategy=strategy, precision="fp32")
    training = candidate.estimate.host_peak_bytes - processes * candidate.estimate.allocated_peak_bytes
    assert 500 * MIB < training / processes < GIB


def test_a_single_process_that_loads_as_stored_reads_nothing_yet() -> None:
    found = peaks(judged(on=cpus(1), strategy="single", precision="bf16-pure"))
    assert found[RunPhase.LOAD].host_peak_bytes < 600 * MIB


def test_the_moment_that_asks_most_counts_no_pages_that_the_kernel_can_drop() -> None:
    uses = {"while loading": HostUse(9 * GIB, 100 * GIB), "while saving": HostUse(12 * GIB)}
    assert greatest_need(uses) == ("while saving", 12 * GIB)


@pytest.mark.parametrize(("spare_bytes", "lacks"), [(0, False), (-1, True)])
def test_a_host_lacks_from_the_first_missing_byte_on(spare_bytes: int, lacks: bool) -> None:
    point = scenario(strategy="fsdp2")
    need = Bench(source=WrittenSource(12), cluster=with_host(1024 * GIB)).host_need(point)
    bench = Bench(source=WrittenSource(12), cluster=with_host(need.needed_bytes + spare_bytes))
    assert bench.host_shortage(point) == (need if lacks else None)


def test_a_load_that_would_be_killed_is_rejected_with_the_reason() -> None:
    """12 blocks in fp32 on four ranks are 26 GB of copies, which a host of 24 GiB does not hold."""
    flags = Request.from_flags({"strategy": "fsdp2", "method": "full"})
    ample = planner.plan(WrittenSource(12), cluster=with_host(1024 * GIB), request=flags)
    short = planner.plan(WrittenSource(12), cluster=with_host(24 * GIB), request=flags)
    assert ample.chosen is not None and short.chosen is None
    without_offload = next(r for r in short.rejected if r.candidate.scenario.strategy.offload is Offload.NONE)
    assert without_offload.candidate.estimate.fits
    assert without_offload.reason.startswith("host memory") and without_offload.reason.endswith("while loading")


def test_an_estimate_says_what_would_kill_it_and_what_fills_the_disk() -> None:
    notes = " ".join(judged(12, on=with_host(24 * GIB, disk_bytes=50 * GB), strategy="ddp").notes)
    assert "host memory are needed while loading and a node has 24.0 GiB" in notes and "exit code −9" in notes
    assert "of disk (2 kept, one being written, the final model), 50.0 GB are free" in notes
    assert judged(2, on=with_host(1024 * GIB, disk_bytes=10**13)).notes == ()


def test_a_phase_that_does_not_fit_decides() -> None:
    step = estimate()
    loading = PhasePeak(
        phase=RunPhase.LOAD,
        allocated_peak_bytes=30 * GIB,
        device_peak_bytes=31 * GIB,
        device_peak_high_bytes=32 * GIB,
        host_peak_bytes=GIB,
        host_needed_bytes=GIB,
    )
    steady = replace(loading, phase=RunPhase.STEADY_STEP, device_peak_bytes=20 * GIB, device_peak_high_bytes=21 * GIB)
    whole = replace(step, phases=(loading, steady))
    assert (
        step.fits
        and verdict(step) is Verdict.FITS
        and worst_moment(replace(built(), estimate=step)) == "worst moment: the loss"
    )
    assert not whole.fits and verdict(whole) is Verdict.DOES_NOT_FIT
    assert worst_moment(replace(built(), estimate=whole)) == "worst moment: loading the model"
    assert (
        replace(step, phases=(replace(steady, phase=RunPhase.FIRST_STEP), steady)).worst_phase is RunPhase.STEADY_STEP
    )


def test_phases_and_checkpoint_survive_a_file() -> None:
    plan = planner.plan(WrittenSource(2), cluster=cluster(), request=Request.from_flags({}))
    document = plan_document(plan)
    assert plan.chosen is not None
    assert [peak["phase"] for peak in document["chosen"]["estimate"]["phases"]] == [str(phase) for phase in ORDER]
    assert document["chosen"]["estimate"]["worst_phase"] in list(RunPhase)
    assert document["chosen"]["estimate"]["basis"].keys() == plan.chosen.estimate.at_peak.keys()
    assert document["chosen"]["estimate"]["checkpoint"]["num_kept"] == 2
    assert plan_from_text(document_text(document), name="plan.json") == plan


def test_how_a_part_of_the_peak_is_known() -> None:
    """What the cache adds is simulated where the allocator was run, and assumed elsewhere; the context always is."""
    plan = planner.plan(WrittenSource(2), cluster=cluster(), request=Request.from_flags({}))
    assert plan.chosen is not None
    run = plan.chosen.estimate
    cheap = replace(run, is_simulated=False)
    assert (run.basis["fragmentation"], cheap.basis["fragmentation"]) == (Basis.SIMULATED, Basis.ASSUMED)
    assert run.basis["cuda_context"] is Basis.ASSUMED and run.basis["activations"] is Basis.TRACED
