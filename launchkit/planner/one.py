"""One scenario, without a search."""

from __future__ import annotations

from launchkit import strategies
from launchkit.errors import IllegalScenarioError
from launchkit.hardware import Cluster
from launchkit.lengths import Lengths
from launchkit.model import ModelSource
from launchkit.plan import Candidate
from launchkit.planner.data import with_data
from launchkit.planner.evaluate import Bench, judge
from launchkit.scenario import Scenario


def estimate(source: ModelSource, *, cluster: Cluster, scenario: Scenario, lengths: Lengths | None = None) -> Candidate:
    """Memory and speed of exactly this scenario, and of one pass over data of ``lengths``.

    Raises ``IllegalScenarioError`` where the engine would refuse it, ``TraceError`` where the model's step cannot be
    had.
    """
    bench = Bench(source=source, cluster=cluster, asks_kernels=True)
    reason = strategies.refusal(scenario, source.profile, bench.cluster_of(scenario))
    if reason is not None:
        raise IllegalScenarioError(reason)
    return with_data(bench, judge(bench, scenario), lengths)
