"""What a run left behind, and what can be said of it: the values that ``diagnose`` reads and answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from launchkit.launch.record import RunRecord
from launchkit.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Log:
    """One log file. ``rank`` is whose it is as far as its name says; None where several ranks or a launcher wrote it.

    ``first_line`` is the number of the first line kept: of a very long log that is not 1.
    """

    path: str
    text: str
    rank: int | None = None
    first_line: int = 1


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How one rank ended, by its own word or its launcher's; a negative code is the signal that ended it.

    ``rank`` is None where a launcher does not say which; ``unix_seconds`` of 0 means that nobody wrote the time down.
    """

    rank: int | None
    exit_code: int
    unix_seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """What the trainer logged of one optimizer step."""

    step: int
    loss: float
    gradient_norm: float = 0.0

    @property
    def is_finite(self) -> bool:
        """The Trainer logs a loss of 0 in place of one that is not a number (``logging_nan_inf_filter``); the norm of
        its gradients still tells."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that is known of one run. Only the logs are sure to be there: the rest is what ``launchkit launch``
    writes beside them. ``has_ended`` is None where nothing tells: a log by itself can be of a run that goes on."""

    path: str
    logs: tuple[Log, ...]
    exits: tuple[Exit, ...] = ()
    has_ended: bool | None = None
    record: RunRecord | None = None
    plan: Plan | None = None
    steps: tuple[LoggedStep, ...] = ()

    @property
    def num_steps(self) -> int:
        """The last step that was logged."""
        return max((logged.step for logged in self.steps), default=0)


class State(StrEnum):
    """How a run stands."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A line of a log."""

    path: str
    line: int

    @property
    def text(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What happened, in the order in which people want to know it.

    ``cause`` names the rule that recognised it, empty where none did. ``rank`` is None where it was the launcher, or
    where nobody says. ``code`` is the line of the program that raised. ``numbers`` are the plan's prediction beside
    what the run asked for or measured. ``others`` is what the other ranks said, which is no cause.
    """

    state: State
    headline: str
    cause: str = ""
    rank: int | None = None
    error: str = ""
    place: Place | None = None
    excerpt: tuple[str, ...] = ()
    code: str = ""
    meaning: str = ""
    numbers: tuple[str, ...] = ()
    others: str = ""
    advice: tuple[str, ...] = ()
