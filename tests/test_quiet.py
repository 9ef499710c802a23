"""What libraries log stays off the terminal, and only while it is meant to."""

from __future__ import annotations

import logging

import pytest

from launchkit.quiet import without_logs


def test_logs_are_back_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    """Also after an error, and as they were."""
    log = logging.getLogger("some library")
    with pytest.raises(ZeroDivisionError), without_logs():
        log.critical("of itself")
        raise ZeroDivisionError
    log.warning("of its use")
    assert caplog.messages == ["of its use"]
