"""``python -m launchkit``."""

from __future__ import annotations

from launchkit.cli.main import run

if __name__ == "__main__":
    run()
