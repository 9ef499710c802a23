"""A progress bar for what takes longer than a second, on a terminal only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from launchkit.catalog.models import Progress
from launchkit.cli.console import Console

PATIENCE_SECONDS = 1.0


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress | None]:
    """A callback ``(done, total, what)`` that draws on stderr once a second has passed; None where nobody watches."""
    if console.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console as RichConsole  # lazy: most commands end before a bar is due
    from rich.progress import Progress as RichProgress

    started = time.monotonic()
    with RichProgress(console=RichConsole(stderr=True), transient=True, disable=False) as bars:
        task = bars.add_task("", total=None, visible=False)

        def advance(done: int, total: int, what: str) -> None:
            is_due = time.monotonic() - started > PATIENCE_SECONDS
            bars.update(task, completed=done, total=total, description=what, visible=is_due)

        yield advance
