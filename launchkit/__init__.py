"""Will it fit, how fast, and how do I start it: planning and launching fine-tunes."""

from __future__ import annotations

__version__ = "0.1.0"
