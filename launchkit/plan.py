"""What planning answers: estimates, candidates, the plan. All of it serialises (``to_json``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from launchkit.hardware import Cluster
from launchkit.lengths import COUNTED_BY_TOKENIZER
from launchkit.model import ModelProfile
from launchkit.program import Owner
from launchkit.scenario import Scenario


class RunPhase(StrEnum):
    """The parts of a run whose peaks differ. Every batch is planned as the longest one, so that the longest batch is a
    steady step. An evaluation is of ``per_device_eval_batch_size`` sequences; it is there where its program is."""

    LOAD = "load"
    FIRST_STEP = "first_step"
    STEADY_STEP = "steady_step"
    LONGEST_BATCH = "longest_batch"
    EVALUATION = "evaluation"  # only of runs that are given something to evaluate on
    SAVE = "save"


class Basis(StrEnum):
    """How a part of the peak is known."""

    TRACED = "traced"  # the allocations of the step itself, run on fake tensors
    SIMULATED = "simulated"  # what models of the engine, the optimizer and the allocator make of them, from source
    ASSUMED = "assumed"  # what was seen elsewhere, in a table with its spread


_BASES: Mapping[str, Basis] = {
    Owner.WEIGHTS: Basis.TRACED,
    Owner.GATHERED_WEIGHTS: Basis.SIMULATED,
    Owner.MASTER_WEIGHTS: Basis.SIMULATED,
    Owner.GRADIENTS: Basis.TRACED,
    Owner.OPTIMIZER_STATES: Basis.SIMULATED,
    Owner.ACTIVATIONS: Basis.TRACED,
    Owner.LOGITS: Basis.TRACED,
    Owner.TEMPORARIES: Basis.TRACED,
    Owner.COMMUNICATION: Basis.SIMULATED,
    Owner.INPUTS: Basis.TRACED,
    "cuda_context": Basis.ASSUMED,
    "nccl": Basis.ASSUMED,
    "fragmentation": Basis.SIMULATED,
}


@dataclass(frozen=True, kw_only=True)
class PhasePeak:
    """Memory in one phase of a run, in bytes: on the largest rank's device, and on the host of the first node.

    ``host_peak_bytes`` is resident memory, each page counted once. ``host_needed_bytes`` leaves out the pages of mapped
    weight files, which the kernel drops when memory runs short: where it is more than the node has, the kernel kills.
    """

    phase: RunPhase
    allocated_peak_bytes: int
    device_peak_bytes: int
    device_peak_high_bytes: int
    host_peak_bytes: int
    host_needed_bytes: int


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """What one checkpoint of a training run writes, in bytes, over all ranks and files.

    ``weights_bytes`` is what ``save_pretrained`` writes (the model, or the adapter alone), ``engine_weights_bytes`` the
    copy that FSDP or DeepSpeed keeps beside it, ``optimizer_bytes`` states and master weights. ``disk_peak_bytes`` is
    what a run holds at once: those kept, the one being written before the oldest goes, and the final model.
    """

    weights_bytes: int
    engine_weights_bytes: int
    optimizer_bytes: int
    total_bytes: int
    num_kept: int
    disk_peak_bytes: int
    write_seconds: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of the largest rank, in bytes. ``at_peak`` holds live bytes by owner (every ``Owner``) at the moment
    of the allocated peak, plus ``cuda_context``, ``nccl`` and ``fragmentation``; without these three it sums to
    ``allocated_peak_bytes``. ``steady_bytes`` is what is live between steps. ``phases`` are those of the whole run,
    where they were asked for: all other figures are the step's. Where ``is_simulated`` is false, the allocator was not
    run: reserved and device peak are then typical values, in a range wide enough for all that its cache may add."""

    allocated_peak_bytes: int
    reserved_peak_bytes: int
    device_peak_bytes: int
    device_peak_low_bytes: int
    device_peak_high_bytes: int
    device_usable_bytes: int
    peak_phase: str
    peak_stage: str
    at_peak: Mapping[str, int]
    steady_bytes: int
    host_peak_bytes: int
    host_load_peak_bytes: int
    checkpoint_bytes: int
    checkpoint: CheckpointFiles | None = None
    phases: tuple[PhasePeak, ...] = ()
    is_simulated: bool = True

    @property
    def fits(self) -> bool:
        """Fits means that the top of the range is within the usable memory, in every phase of every run."""
        tops = (phase.device_peak_high_bytes for phase in self.certain_phases)
        return self.step_fits and all(top <= self.device_usable_bytes for top in tops)

    @property
    def basis(self) -> Mapping[str, Basis]:
        """How each part of ``at_peak`` is known."""
        cache = Basis.SIMULATED if self.is_simulated else Basis.ASSUMED
        return {part: cache if part == "fragmentation" else _BASES[part] for part in self.at_peak}

    @property
    def step_fits(self) -> bool:
        """Whether the top of the step's range is within the usable memory."""
        return self.device_peak_high_bytes <= self.device_usable_bytes

    @property
    def host_needed_bytes(self) -> int:
        """What a node must have in the phase that asks most of it; resident memory where phases are not known."""
        phases = (phase.host_needed_bytes for phase in self.phases)
        return max(phases) if self.phases else max(self.host_peak_bytes, self.host_load_peak_bytes)

    @property
    def certain_phases(self) -> tuple[PhasePeak, ...]:
        """The phases that every run goes through: all but the evaluation."""
        return tuple(peak for peak in self.phases if peak.phase is not RunPhase.EVALUATION)

    @property
    def worst_phase(self) -> RunPhase:
        """The phase whose device peak is highest; of equals the step's."""
        step_first = sorted(self.certain_phases, key=lambda peak: peak.phase is not RunPhase.STEADY_STEP)
        worst = max(step_first, key=lambda peak: peak.device_peak_bytes, default=None)
        return RunPhase.STEADY_STEP if worst is None else worst.phase


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One optimizer step, all its micro-batches together. Not validated on hardware where ``validated`` is false."""

    seconds: float
    compute_seconds: float
    exposed_communication_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float
    validated: bool = False


@dataclass(frozen=True, kw_only=True)
class DataUse:
    """One pass over a data set. ``num_rows`` are its sequences, examples or what they fill end to end when packed;
    ``num_truncated`` examples lose what is beyond the planned length. ``seconds`` is by the clock, with batches as wide
    as they usually are, in a range as wide as published runs are off."""

    path: str
    num_examples: int
    num_rows: int
    mean_tokens: float
    longest_tokens: int
    num_truncated: int
    counted_by: str
    num_steps: int
    seconds: float
    seconds_low: float
    seconds_high: float

    @property
    def is_estimated(self) -> bool:
        """Whether lengths follow from bytes, no tokenizer having counted."""
        return self.counted_by != COUNTED_BY_TOKENIZER


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A scenario and what was read off its program. ``data`` is there where a data set was given and could be read."""

    model: ModelProfile
    num_parameters: int
    num_trainable: int
    scenario: Scenario
    estimate: Estimate
    step: StepTime
    data: DataUse | None = None
    notes: tuple[str, ...] = ()


UNDECIDED = "may fit: -v says"


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A candidate that lost, and the reason in a few words."""

    candidate: Candidate
    reason: str

    @property
    def is_undecided(self) -> bool:
        """Whether it may fit, as far as is known without a run through the allocator."""
        return self.reason == UNDECIDED


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """One change that would make something fit, or fit better: the flags to add and what they bring."""

    flags: str
    saved_bytes: int
    time_factor: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer of ``launchkit plan``. ``chosen`` is None when nothing fits."""

    request: Mapping[str, object]
    model: ModelProfile
    cluster: Cluster
    chosen: Candidate | None
    alternatives: tuple[Candidate, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    suggestions: tuple[Suggestion, ...] = ()
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    num_considered: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
