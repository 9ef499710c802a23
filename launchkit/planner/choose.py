"""From options to a Plan: the winner, verified through the allocator, what else fits, what does not and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from launchkit import __version__, strategies
from launchkit.alloc_conf import EXPANDABLE, VARIABLE
from launchkit.errors import IllegalScenarioError
from launchkit.hardware import Backend, Cluster, format_gpus
from launchkit.images import TEXT_ALONE
from launchkit.lengths import Lengths
from launchkit.model import ModelProfile, ModelSource
from launchkit.plan import UNDECIDED, Candidate, Plan, Rejected, Suggestion
from launchkit.planner.changes import SHORTEST_SEQUENCE, fully_checkpointed, wider_clusters, with_half_micro_batch
from launchkit.planner.data import fit_to_data, with_data
from launchkit.planner.evaluate import GIVEN_BACK, Bench, judge, sketch
from launchkit.planner.search import Option, Refused, Search
from launchkit.request import Request, decisions, option_text
from launchkit.scenario import (
    UNSHARDED,
    Attention,
    Checkpointing,
    DeviceKind,
    Loss,
    Method,
    Offload,
    Precision,
    Scenario,
    StrategyKind,
    Trainer,
)
from launchkit.strategies.base import trl_narrows_adapters
from launchkit.units import GIB

# Two step times closer than this are equal as far as the clock knows; the simpler engine wins then.
SAME_SPEED = 0.10
SHOWN_ALTERNATIVES = 3
SHOWN_REJECTED = 4
SHOWN_RELAXATIONS = 4
# Of the device's peak: what torch's cache must hold unused for segments that grow in place to be worth a run.
LARGE_CACHE_SHARE = 0.1
SCARCE_SHARE = 0.5  # of what is usable
WORTHWHILE_CACHE_SHARE = 0.02  # less is within what any estimate is off by

# What to try beside what was asked for where nothing fits; each is verified before it is said.
RELAXATIONS: tuple[Mapping[str, str], ...] = (
    {"alloc_conf": EXPANDABLE},
    {"optimizer": "adamw_bnb_8bit"},
    {"optimizer": "adafactor"},
    {"precision": "bf16-params"},
    {"precision": "bf16-pure"},
    {"precision": "bf16-pure", "optimizer": "adafactor"},
    {"loss": "chunked"},
    {"loss": "liger"},
    {"method": "lora"},
    {"method": "qlora"},
)

Progress = Callable[[int, int, str], None]  # runs done, runs in all, what is being run


def plan(
    source: ModelSource,
    *,
    cluster: Cluster,
    request: Request,
    lengths: Lengths | None = None,
    in_full: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """The best way to fine-tune the model of ``source`` on ``cluster`` within ``request``, for data of ``lengths``.

    Without a method asked for: a full fine-tune if it fits without offload, else LoRA, else QLoRA, else offload.
    What is chosen has been run through the allocator. ``in_full`` the best batch of every other strategy is as well,
    and all of them are in the plan, not the first few; ``progress`` hears of that. Raises ``IllegalScenarioError``
    when every combination asked for is one that its engine refuses.
    """
    bench = Bench(source=source, cluster=cluster)
    fitted = fit_to_data(request, lengths, model=source.profile)
    search = Search(bench=bench, request=fitted.request)
    source.expect(search.expected_keys())
    options, refused = _explore(search)
    if not options:
        reasons = dict.fromkeys(item.reason for item in refused)
        raise IllegalScenarioError("; ".join(reasons) or "nothing is left to choose from; give fewer flags")
    chosen, judged = _verified(search, options)
    if in_full:
        judged |= _run_all(bench, options, judged=judged, progress=progress)
    alternatives = _alternatives(bench, options, chosen=chosen, seen=judged, in_full=in_full) if chosen else ()
    shown = {candidate.scenario for candidate in (chosen, *alternatives) if candidate}
    losers = [o for o in options if (not o.fits or o.scenario in judged) and o.scenario not in shown]
    return Plan(
        request=request.given(),
        model=source.profile,
        cluster=cluster,
        chosen=with_data(bench, chosen, lengths) if chosen else None,
        alternatives=tuple(with_data(bench, candidate, lengths) for candidate in alternatives),
        rejected=_rejected(bench, losers, seen=judged, most=len(losers) if in_full else SHOWN_REJECTED),
        suggestions=_suggestions(search, chosen, options, judged),
        assumptions=_assumptions(chosen.scenario if chosen else min(options, key=_need).scenario, source.profile),
        notes=(*fitted.notes, *_notes(fitted.request, source.profile, chosen)),
        num_considered=search.num_considered,
        versions={"launchkit": __version__, **source.profile.versions},
    )


def _explore(search: Search) -> tuple[list[Option], list[Refused]]:
    """Options in the order of preference. Offload is only gone into where nothing fits without it, or it was asked
    for; a method behind one that fits is looked at so that it can be shown beside it."""
    options: list[Option] = []
    refused: list[Refused] = []

    def collect(found: Iterable[Option | Refused]) -> None:
        for item in found:
            (options if isinstance(item, Option) else refused).append(item)  # type: ignore[arg-type]

    for method in search.methods():
        collect(search.options(method, offload=False))
    if not any(option.fits and not option.asks_rare_host for option in options) or search.request.offload not in (
        None,
        Offload.NONE,
    ):
        for method in search.methods():
            collect(search.options(method, offload=True))
    return options, refused


def _verified(search: Search, options: list[Option]) -> tuple[Candidate | None, dict[Scenario, Candidate]]:
    """The first option in the order of preference that fits after its run through the allocator too, and all that were
    run. One that does not fit makes place in ``options`` for the next best batch of its strategy.

    Where none is left, the nearest to fitting is run as well: its cache may add less than was allowed for.
    """
    judged: dict[Scenario, Candidate] = {}
    while unseen := [option for option in options if option.fits and option.scenario not in judged]:
        option = _ranking(unseen)[0]
        candidate = judged[option.scenario] = judge(search.bench, option.scenario)
        if candidate.estimate.fits:
            return candidate, judged
        smaller = search.next_batch(option.scenario, tried=judged)
        if smaller is not None:
            options[options.index(option)] = smaller
    nearest = min(options, key=_need).scenario
    candidate = judged.get(nearest) or judge(search.bench, nearest)
    judged[nearest] = candidate
    fits = candidate.estimate.fits and search.bench.host_shortage(nearest) is None
    return candidate if fits else None, judged


def _ranking(options: Sequence[Option]) -> list[Option]:
    """Best first: a likely host before a rare one, no offload before offload, the fuller method before the lesser, then
    the faster, and of those that are equally fast the simpler engine."""
    ranked: list[Option] = []
    groups: dict[tuple[bool, bool, int], list[Option]] = {}
    for option in options:
        key = (
            option.asks_rare_host,
            option.scenario.strategy.offload is not Offload.NONE,
            list(Method).index(option.scenario.training.method),
        )
        groups.setdefault(key, []).append(option)
    for key in sorted(groups):
        rest = groups[key]
        while rest:
            fastest = min(option.seconds for option in rest)
            close = [option for option in rest if option.seconds <= fastest * (1 + SAME_SPEED)]
            best = min(close, key=lambda option: (option.simplicity, option.seconds))
            ranked.append(best)
            rest = [option for option in rest if option is not best]
    return ranked


def _best_of_each_method_first(ranked: Sequence[Option]) -> list[Option]:
    """What is worth showing: of ranked options the best of every method, then the others."""
    first_of_method: dict[Method, Option] = {}
    for option in ranked:
        first_of_method.setdefault(option.scenario.training.method, option)
    leading = list(first_of_method.values())
    return [*leading, *(option for option in ranked if option not in leading)]


def _run_all(
    bench: Bench, options: Sequence[Option], *, judged: Mapping[Scenario, Candidate], progress: Progress | None
) -> dict[Scenario, Candidate]:
    """Those of ``options`` that were not run through the allocator yet, run."""
    waiting = [option.scenario for option in options if option.scenario not in judged]
    found: dict[Scenario, Candidate] = {}
    for number, scenario in enumerate(waiting):
        if progress:
            progress(number, len(waiting), f"{scenario.training.method} {scenario.strategy.name}")
        found[scenario] = judge(bench, scenario)
    return found


def _alternatives(
    bench: Bench, options: Sequence[Option], *, chosen: Candidate, seen: dict[Scenario, Candidate], in_full: bool
) -> tuple[Candidate, ...]:
    """What fits at the top of its range beside ``chosen``, the best of each method first; without ``in_full`` the first
    few. What may not fit is added to ``seen``."""
    found: list[Candidate] = []
    most = len(options) if in_full else SHOWN_ALTERNATIVES
    for option in _best_of_each_method_first(_ranking([o for o in options if o.fits or in_full])):
        if option.scenario == chosen.scenario or (option.scenario in seen and not in_full):
            continue
        candidate = seen.get(option.scenario) or sketch(bench, option.scenario)
        if candidate.estimate.fits and bench.host_shortage(option.scenario) is None:
            found.append(candidate)
        else:
            seen[option.scenario] = candidate
        if len(found) == most or len(seen) > 2 * most:
            break
    return tuple(found)


def _rejected(
    bench: Bench, options: Sequence[Option], *, seen: Mapping[Scenario, Candidate], most: int
) -> tuple[Rejected, ...]:
    """Those that need too much, the nearest to fitting of each method first, with what weighs most in them."""
    shown = _best_of_each_method_first(sorted(options, key=_need))[:most]
    candidates = [seen.get(option.scenario) or sketch(bench, option.scenario) for option in shown]
    return tuple(Rejected(candidate=candidate, reason=_reason(bench, candidate)) for candidate in candidates)


def _reason(bench: Bench, candidate: Candidate) -> str:
    """What is lacking on the host, of what the device has room for or what is offloaded; else what weighs most on the
    device, unless only the range's top is too much."""
    estimate = candidate.estimate
    lack = bench.host_shortage(candidate.scenario)
    if lack and (estimate.fits or candidate.scenario.strategy.offload is not Offload.NONE):
        return f"host memory {lack.needed_bytes / GIB:.1f} {lack.doing}"
    if estimate.device_peak_bytes <= estimate.device_usable_bytes < estimate.device_peak_high_bytes:
        top = f"{estimate.device_peak_high_bytes / GIB:.1f}"
        return f"may reach {top}" if estimate.is_simulated else UNDECIDED
    owner, num_bytes = max(estimate.at_peak.items(), key=lambda item: item[1])
    return f"{owner.replace('_', ' ')} {num_bytes / GIB:.1f}"


def _need(option: Option) -> int:
    return option.live_bytes


def _suggestions(
    search: Search, chosen: Candidate | None, options: Sequence[Option], judged: Mapping[Scenario, Candidate]
) -> tuple[Suggestion, ...]:
    """What would save memory on the chosen one, or make the nearest one fit."""
    if chosen is not None:
        return tuple(_savings(search, chosen))
    nearest = min(options, key=_need).scenario
    return tuple(_rescues(search, judged[nearest]))


def _savings(search: Search, chosen: Candidate) -> Iterable[Suggestion]:
    scenario, cluster = chosen.scenario, search.bench.cluster
    if scenario.training.checkpointing is Checkpointing.NONE:
        yield from _change(search, chosen, "--checkpointing full", fully_checkpointed(scenario, cluster))
    half = with_half_micro_batch(scenario, cluster)
    yield from _change(search, chosen, f"--micro-batch {half.batch.micro_batch}" if half else "", half)
    yield from _without_holes(search, chosen)


def _without_holes(search: Search, chosen: Candidate) -> Iterable[Suggestion]:
    """Segments that grow in place, where room is scarce and much of what torch reserves is free blocks of the wrong
    sizes, or was given back once for it to fit."""
    estimate, scenario = chosen.estimate, chosen.scenario
    is_full = estimate.device_peak_high_bytes > SCARCE_SHARE * estimate.device_usable_bytes
    is_large = estimate.at_peak["fragmentation"] > LARGE_CACHE_SHARE * estimate.device_peak_bytes
    is_worth_it = (is_full and is_large) or GIVEN_BACK in chosen.notes
    if scenario.alloc_conf or search.bench.cluster.gpu.backend is not Backend.CUDA or not is_worth_it:
        return
    other = judge(search.bench, replace(scenario, alloc_conf=EXPANDABLE))
    search.num_considered += 1
    saved = _saved_bytes(chosen, other)
    if saved > WORTHWHILE_CACHE_SHARE * estimate.device_peak_bytes:
        yield Suggestion(flags=f"--alloc-conf {EXPANDABLE}", saved_bytes=saved, time_factor=1.0)


def _change(search: Search, chosen: Candidate, flags: str, scenario: Scenario | None) -> Iterable[Suggestion]:
    if scenario is None:
        return
    other = sketch(search.bench, scenario)
    search.num_considered += 1
    saved = chosen.estimate.allocated_peak_bytes - other.estimate.allocated_peak_bytes
    if saved > 0:
        yield Suggestion(
            flags=flags, saved_bytes=saved, time_factor=other.step.seconds / max(chosen.step.seconds, 1e-12)
        )


def _rescues(search: Search, nearest: Candidate) -> Iterable[Suggestion]:
    """What makes the scenario nearest to fitting fit: other settings, the fastest few; shorter sequences or more GPUs,
    as far as halving and doubling go."""
    found = [suggestion for flags in RELAXATIONS for suggestion in _relaxed(search, nearest, flags)]
    yield from sorted(found, key=lambda suggestion: suggestion.time_factor)[:SHOWN_RELAXATIONS]
    bench, scenario = search.bench, nearest.scenario
    length = scenario.batch.seq_len // 2
    while length >= SHORTEST_SEQUENCE:
        shorter = replace(scenario, batch=replace(scenario.batch, seq_len=length))
        live = bench.live_peak_bytes(shorter)
        if live <= search.room_bytes(shorter):
            candidate = judge(bench, shorter)
            # In every phase, and on the host: loading and the host know no length.
            if candidate.estimate.fits and bench.host_shortage(shorter) is None:
                yield Suggestion(
                    flags=f"--seq-len {length}", saved_bytes=_saved_bytes(nearest, candidate), time_factor=0.0
                )
            break
        length //= 2
    yield from _more_gpus(search, nearest)


def _saved_bytes(before: Candidate, after: Candidate) -> int:
    """Of the device's peak, torch's cache included: both were run through the allocator."""
    return before.estimate.device_peak_bytes - after.estimate.device_peak_bytes


def _relaxed(search: Search, nearest: Candidate, flags: Mapping[str, str]) -> Iterable[Suggestion]:
    """The scenario nearest to fitting with ``flags`` besides, if its run through the allocator fits. What would have to
    be traced first is left out."""
    bench = search.bench
    request = Request.from_flags({**search.request.given(), **flags})
    if request == search.request:
        return
    other = Search(bench=bench, request=request)
    method = request.method or nearest.scenario.training.method
    scenario = other.base(method, nearest.scenario.strategy)
    refused = strategies.refusal(scenario, bench.source.profile, bench.cluster_of(scenario))
    if refused or scenario == nearest.scenario or not bench.source.has_program(bench.key(scenario)):
        return
    if not other.read(scenario).fits:
        return
    candidate = judge(bench, scenario)
    if candidate.estimate.fits:
        yield Suggestion(
            flags=" ".join(option_text(name, value) for name, value in flags.items()),
            saved_bytes=_saved_bytes(nearest, candidate),
            time_factor=candidate.step.seconds / max(nearest.step.seconds, 1e-12),
        )


def _more_gpus(search: Search, nearest: Candidate) -> Iterable[Suggestion]:
    cluster = search.bench.cluster
    if cluster.gpu.device_kind is DeviceKind.CPU:
        return
    strategy = nearest.scenario.strategy
    if strategy.kind in UNSHARDED:
        strategy = replace(strategy, kind=StrategyKind.FSDP2)
    for wider in wider_clusters(cluster):
        bench = Bench(source=search.bench.source, cluster=wider)
        other = Search(bench=bench, request=search.request)
        scenario = other.base(nearest.scenario.training.method, strategy)
        live = bench.live_peak_bytes(scenario)
        if live <= other.room_bytes(scenario) and bench.host_shortage(scenario) is None:
            candidate = judge(bench, scenario)
            if candidate.estimate.fits:
                flags = f"--gpus {format_gpus(wider)} --strategy {strategy.kind}"
                yield Suggestion(flags=flags, saved_bytes=_saved_bytes(nearest, candidate), time_factor=0.0)
            return


def _assumptions(scenario: Scenario, profile: ModelProfile) -> tuple[str, ...]:
    training, batch = scenario.training, scenario.batch
    attention = {
        Attention.SDPA: "SDPA attention",
        Attention.EAGER: "eager attention",
        Attention.FLASH_ATTENTION_2: "flash attention 2",
        Attention.FLASH_ATTENTION_3: "flash attention 3",
    }[training.attention]
    loss = {
        Loss.PLAIN: "plain cross-entropy",
        Loss.CHUNKED: "cross-entropy in tiles of 4,096 tokens",
        Loss.LIGER: "Liger's loss" if training.trainer is Trainer.AXOLOTL else "Liger's kernels",
        Loss.CCE: "cut cross-entropy",
    }[training.loss]
    lines = [
        f"sequences of {batch.seq_len:,} tokens",
        attention,
        *(["padded batches, with a mask"] if training.padding else []),
        loss,
        training.optimizer,
        f"{training.trainer} trainer",
        *([f"{VARIABLE}={scenario.alloc_conf}"] if scenario.alloc_conf else []),
    ]
    if training.method is not Method.FULL and training.precision is Precision.BF16_PARAMS:
        base = "4 bits" if training.method is Method.QLORA else "bf16"
        lines.append(f"base weights in {base}, adapters in {'bf16' if trl_narrows_adapters(training) else 'fp32'}")
    if profile.num_active_parameters:
        lines.append("tokens spread evenly over the experts")
    return tuple(lines)


def _notes(request: Request, profile: ModelProfile, chosen: Candidate | None) -> tuple[str, ...]:
    has_images = request.images or request.image_size is not None
    notes = [note for note in profile.notes if not (has_images and note == TEXT_ALONE)]
    notes += decisions(request, model=profile)
    if chosen and profile.num_active_parameters and chosen.scenario.training.method is Method.QLORA:
        notes.append(
            "transformers fuses experts into tensors that bitsandbytes leaves unquantised: QLoRA saves little here"
        )
    if chosen and not chosen.step.validated:
        notes.append("times are the clock's and were not checked on this hardware; use them to rank")
    return tuple(notes)
