"""FSDP1 (``FullyShardedDataParallel``), read as FSDP2 with the same units.

Both gather a unit, prefetch one more in the backward pass, and reduce into shards. Omits what sets FSDP1 apart, none
of it measured: it gathers straight into one flat tensor per unit, so that the copy that FSDP2 makes beside its buffer
is counted here and not made there; it pads a unit as a whole, not each parameter; and its gradients pass through a
flat tensor of the unit's size, which takes the place of FSDP2's reduce input. The estimate should err on the high
side, by about one unit.
"""

from __future__ import annotations

from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.scenario import Scenario
from launchkit.strategies import fsdp2

trace_key = fsdp2.trace_key
rewrite = fsdp2.rewrite


def refusal(scenario: Scenario, profile: ModelProfile, cluster: Cluster) -> str | None:
    """What FSDP2 refuses is refused here as well."""
    return fsdp2.refusal(scenario, profile, cluster)
