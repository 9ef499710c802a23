"""Ports."""

from __future__ import annotations

import socket

from launchkit.process.ports import free_port, is_free


def test_a_free_port_is_free_and_a_taken_one_is_not() -> None:
    port = free_port()
    assert is_free(port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert not is_free(port)
