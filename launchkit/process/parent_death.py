"""Ties to the parent process that the standard library does not offer (Linux; elsewhere they do nothing).

Source: ``prctl(2)``. A death signal is sent when the *thread* that forked exits, and is cleared in a forked child.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(death_signal: signal.Signals = signal.SIGKILL) -> None:
    """The kernel sends ``death_signal`` to this process when its parent dies."""
    _prctl(PR_SET_PDEATHSIG, death_signal)


def adopt_orphans() -> None:
    """Descendants whose parent dies become this process's children instead of init's: it can still find them."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_process(pid: int) -> None:
    """This process is killed once process ``pid``, which need not be its parent, is gone. Costs a sleeping thread."""
    if not hasattr(os, "pidfd_open"):
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    except OSError:
        return  # a kernel or sandbox without pidfds: the other ties remain
    threading.Thread(target=_kill_self_after, args=(descriptor,), name="launchkit-guard-watch", daemon=True).start()


def _kill_self_after(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    poller.poll()
    os.kill(os.getpid(), signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, int(value), 0, 0, 0)
