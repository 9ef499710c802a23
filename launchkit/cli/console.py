"""Where a command's words go: people's text, the one JSON document, and notes on the side."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from launchkit.report.text import Canvas

PIPE_COLUMNS = 100
MAXIMUM_COLUMNS = 140  # wider lines are harder to read, not easier
# For terminals whose encoding lacks these characters.
PLAIN = str.maketrans(
    {"✓": "+", "✗": "x", "▇": "#", "·": "-", "×": "x", "–": "-", "−": "-", "…": "...", "→": "->", "≥": ">="}
)


@dataclass(kw_only=True)
class Console:
    """Mutable on purpose: the options every verb has (``--json -q -v --debug``) are set here while argv is read."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False

    def canvas(self) -> Canvas:
        """The width and colour of the stream that people's text goes to."""
        return Canvas(width=_width(self._people), colour=_has_colour(self._people))

    def text(self, text: str) -> None:
        """The answer for people: stdout, or stderr beside a JSON document."""
        if not self.quiet:
            _write(self._people, text)

    def note(self, text: str) -> None:
        """A remark on the side: stderr, one line."""
        if not self.quiet:
            _write(sys.stderr, text + "\n")

    def error(self, message: str, *, exit_code: int) -> None:
        """The one line that ends a failed command, and its document where JSON was asked for."""
        _write(sys.stderr, f"launchkit: {message}\n")
        if self.json:
            self.document({"error": {"message": message, "exit_code": exit_code}})

    def document(self, document: Mapping[str, object]) -> None:
        """The one JSON document of a command, if it was asked for."""
        if self.json:
            from launchkit.serialize import SCHEMA_VERSION, document_text  # lazy: --help needs none of the nouns

            sys.stdout.write(document_text({"schema_version": SCHEMA_VERSION, **document}))
            sys.stdout.flush()

    @property
    def _people(self) -> TextIO:
        return sys.stderr if self.json else sys.stdout


def _write(stream: TextIO, text: str) -> None:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(PLAIN).encode("ascii", "replace").decode()
    stream.write(text)
    stream.flush()


def _width(stream: TextIO) -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return min(MAXIMUM_COLUMNS, os.get_terminal_size(stream.fileno()).columns or PIPE_COLUMNS)
    except (OSError, ValueError):
        return PIPE_COLUMNS


def _has_colour(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"
