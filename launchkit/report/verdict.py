"""Whether something fits, in three words, since a prediction has a range."""

from __future__ import annotations

from enum import Enum

from launchkit.hardware import Cluster
from launchkit.plan import Candidate, Estimate, Plan, Rejected
from launchkit.report.text import Ink


class Verdict(Enum):
    """``NARROW``: the likeliest value fits, the top of the range does not. The exit codes are ``plan --check``'s."""

    FITS = 0
    DOES_NOT_FIT = 3
    NARROW = 4

    @property
    def mark(self) -> str:
        return {Verdict.FITS: "✓", Verdict.NARROW: "~", Verdict.DOES_NOT_FIT: "✗"}[self]

    @property
    def ink(self) -> Ink:
        return {Verdict.FITS: Ink.GOOD, Verdict.NARROW: Ink.CARE, Verdict.DOES_NOT_FIT: Ink.BAD}[self]


def verdict(estimate: Estimate) -> Verdict:
    """How one estimate stands to the memory it may use."""
    if estimate.fits:
        return Verdict.FITS
    peaks = (phase.device_peak_bytes for phase in estimate.certain_phases)
    likeliest = max(estimate.device_peak_bytes, *peaks, 0)
    return Verdict.NARROW if likeliest <= estimate.device_usable_bytes else Verdict.DOES_NOT_FIT


def asks_rare_host(estimate: Estimate, cluster: Cluster) -> bool:
    """Whether something fits only on a host with more memory than is likely, since nobody said how much there is."""
    node = cluster.node
    return not node.host_memory_bytes and 0 < node.plausible_host_bytes < estimate.host_needed_bytes


def plan_verdict(plan: Plan) -> Verdict:
    """The chosen candidate's verdict; without one, the best that any rejected candidate had."""
    if plan.chosen is not None:
        return verdict(plan.chosen.estimate)
    narrow = any(verdict(rejected.candidate.estimate) is Verdict.NARROW for rejected in plan.rejected)
    return Verdict.NARROW if narrow else Verdict.DOES_NOT_FIT


def closest_but_for_host(plan: Plan) -> Rejected | None:
    """Of what has room on the device and was rejected all the same, what asks least of the host."""
    fitting = [item for item in plan.rejected if verdict(item.candidate.estimate) is Verdict.FITS]
    return min(fitting, key=lambda item: item.candidate.estimate.host_needed_bytes, default=None)


def closest(plan: Plan) -> Candidate | None:
    """Of what was rejected for its memory, the candidate that needs least."""
    too_large = [item.candidate for item in plan.rejected if verdict(item.candidate.estimate) is not Verdict.FITS]
    return min(too_large, key=lambda candidate: candidate.estimate.allocated_peak_bytes, default=None)
