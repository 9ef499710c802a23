"""Strategies as rewrites of the step program: one module per engine, one row here.

Three questions are asked of every strategy: which trace does it start from (``trace_key``), would its engine refuse
the scenario (``refusal``), and what does one rank of it really do (``rewrite``).
"""

from __future__ import annotations
