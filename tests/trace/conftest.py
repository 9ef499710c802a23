"""Tracing needs torch, transformers and peft; without them these tests are not even collected."""

from __future__ import annotations

import importlib.util

_MISSING = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if _MISSING else []
