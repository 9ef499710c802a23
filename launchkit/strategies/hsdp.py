"""HSDP: FSDP2 within a shard group (one node unless told otherwise), and an all-reduce between the groups' replicas."""

from __future__ import annotations

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.scenario import Scenario
from launchkit.strategies import fsdp2

trace_key = fsdp2.trace_key
rewrite = fsdp2.rewrite


def refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What FSDP2 refuses, and a single shard group, which has no replicas."""
    size = fsdp2.shard_group_size(scenario.strategy, cluster)
    if size == fsdp2.num_sharing_ranks(scenario.strategy, cluster):
        return f"--strategy hsdp on {cluster.text} makes one shard group of all {size} ranks; use --strategy fsdp2"
    return fsdp2.refusal(scenario, profile, cluster)
