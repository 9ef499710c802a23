"""What launchers say of the workers that they lost: torchrun's summary, DeepSpeed's and accelerate's last words."""

from __future__ import annotations

import re
import time

from launchkit.diagnosis.evidence import Exit

# torch/distributed/elastic/multiprocessing/errors/__init__.py, ChildFailedError._format_failure; printed by torchrun,
# and by accelerate, which calls it.
_FAILURE = re.compile(
    r"time\s+: (?P<time>\S+)\s+(?:host\s+: \S*\s+)?rank\s+: (?P<rank>\d+) .*?exitcode\s+: (?P<code>-?\d+)", re.DOTALL
)
_ROOT = re.compile(r"Root Cause \(first observed failure\)")
# torch/distributed/elastic/multiprocessing/api.py: the first worker that its agent saw failing.
_AGENT = re.compile(r"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<rank>\d+) ")
# deepspeed/launcher/launch.py, sigkill_handler. The command before it is the one that was started last, whichever
# process failed: no rank can be read off it.
_DEEPSPEED = re.compile(r"exits with return code = (?P<code>-?\d+)")
# torch/distributed/elastic/multiprocessing/api.py, SignalException.
_SIGNALLED = re.compile(r"SignalException: Process \d+ got signal: (\d+)")


def launcher_exits(text: str) -> tuple[Exit, ...]:
    """The workers that a launcher saw ending badly, the first one first; those that it ended itself (SIGTERM) too."""
    summary = [_exit(match, seconds=_seconds(match["time"])) for match in _FAILURE.finditer(text)]
    if summary and _ROOT.search(text):
        summary = [summary[-1], *summary[:-1]]  # the root cause stands last
    found = summary or [_exit(match) for match in _AGENT.finditer(text)]
    found += [Exit(rank=None, exit_code=int(match["code"])) for match in _DEEPSPEED.finditer(text)]
    return tuple(ended for ended in found if ended.exit_code)


def received_signal(text: str) -> int:
    """The signal that a launcher was sent, 0 for none."""
    match = _SIGNALLED.search(text)
    return int(match[1]) if match else 0


def _exit(match: re.Match[str], *, seconds: float = 0.0) -> Exit:
    return Exit(rank=int(match["rank"]), exit_code=int(match["code"]), unix_seconds=seconds)


def _seconds(text: str) -> float:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%d_%H:%M:%S"))
    except ValueError:
        return 0.0
