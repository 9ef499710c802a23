"""Where a scenario evaluates its program."""

from __future__ import annotations

from launchkit.program import Point
from launchkit.scenario import Method, Scenario


def point_of(scenario: Scenario) -> Point:
    """The micro-batch, length and rank of a scenario; a flattened batch is one row."""
    batch = scenario.batch
    rank = 0 if scenario.training.method is Method.FULL else scenario.training.lora_rank
    if scenario.training.flattens_batch:
        return Point(1, batch.micro_batch * batch.seq_len, rank)
    return Point(batch.micro_batch, batch.seq_len, rank)
