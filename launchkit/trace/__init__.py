"""Tracing a training step on fake tensors: the only code, with ``finetune``, that imports torch and transformers."""

from __future__ import annotations

from launchkit.trace.tracing import profile_model, trace_model, traced_with

__all__ = ["profile_model", "trace_model", "traced_with"]
