"""What planning answers: estimates, candidates, the plan. All of it serialises (``to_json``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.scenario import Scenario


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of the largest rank, in bytes. ``at_peak`` holds live bytes by owner (every ``Owner``) at the moment
    of the allocated peak, plus ``cuda_context``, ``nccl`` and ``fragmentation``; without these three it sums to
    ``allocated_peak_bytes``. ``steady_bytes`` is what is live between steps."""

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

    @property
    def fits(self) -> bool:
        """Fits means that the top of the range is within the usable memory."""
        return self.device_peak_high_bytes <= self.device_usable_bytes


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
class Candidate:
    """A scenario and what was read off its program."""

    model: ModelProfile
    num_parameters: int
    num_trainable: int
    scenario: Scenario
    estimate: Estimate
    step: StepTime
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A candidate that lost, and the reason in a few words."""

    candidate: Candidate
    reason: str


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
