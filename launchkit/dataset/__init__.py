"""Data sets on this disk: what is in them, and how many tokens their examples have."""

from __future__ import annotations

from launchkit.dataset.measure import measure_lengths
from launchkit.dataset.records import Messages, Record, read_examples, read_records

__all__ = ["Messages", "Record", "measure_lengths", "read_examples", "read_records"]
