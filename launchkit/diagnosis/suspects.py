"""Which ranks ended badly, and the error that speaks for each."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from launchkit.diagnosis.evidence import Evidence, Exit
from launchkit.diagnosis.logs import Fault
from launchkit.diagnosis.rules import SIGNALS, Cause, recognise, recognise_chain, signal_name, signal_of

# What launchers and peers send to whoever is left: no cause of a run's end.
SENT_BY_LAUNCHERS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """One rank that ended badly (None: nobody says which), with the error that speaks for it."""

    rank: int | None
    exit_code: int = 0
    fault: Fault | None = None
    cause: Cause | None = None

    @property
    def is_root(self) -> bool:
        """Whether this could be what went wrong first: not a rank that only lost another, or was told to stop."""
        if self.fault is not None:
            return self.cause is None or not self.cause.is_echo
        return self.exit_code != 0 and signal_of(self.exit_code) not in SENT_BY_LAUNCHERS

    @property
    def is_silent(self) -> bool:
        """Whether it said nothing until its launcher ended it."""
        return self.fault is None and signal_of(self.exit_code) in SENT_BY_LAUNCHERS

    @property
    def error(self) -> str:
        """Its error's first line, or how it ended."""
        if self.fault is not None:
            return self.fault.line
        number = signal_of(self.exit_code)
        return f"ended by {signal_name(number)}" if number else f"exit code {self.exit_code}"


def find_suspects(evidence: Evidence, faults: Sequence[Fault], *, seen: Sequence[Exit]) -> list[Suspect]:
    """Every rank that ended badly, those of which the time is known first, then as its launcher saw them, then as the
    logs show them."""
    own = sorted(evidence.exits, key=lambda ended: ended.unix_seconds)
    done = {ended.rank for ended in own if ended.exit_code == 0}
    ends = _unique([*(ended for ended in own if ended.exit_code), *(ended for ended in seen if ended.rank is not None)])
    nameless = [fault for fault in faults if fault.rank is None]
    suspects = [_suspect(ended, faults, nameless) for ended in ends]
    named = {ended.rank for ended in ends} | done
    for rank in dict.fromkeys(fault.rank for fault in faults if fault.rank is not None and fault.rank not in named):
        suspects.append(_accused([fault for fault in faults if fault.rank == rank], rank=rank))
    if any(suspect.is_root for suspect in suspects):
        return suspects
    unnamed = [ended for ended in seen if ended.rank is None][:1]
    suspects += [_suspect(ended, faults, nameless) for ended in unnamed]
    if not suspects and nameless:
        suspects.append(_accused(nameless, rank=None))
    return suspects


def _unique(ends: Iterable[Exit]) -> list[Exit]:
    """The first word about each rank."""
    found: dict[int | None, Exit] = {}
    for ended in ends:
        found.setdefault(ended.rank, ended)
    return list(found.values())


def _suspect(ended: Exit, faults: Sequence[Fault], nameless: Sequence[Fault]) -> Suspect:
    """A rank that ended badly with its own error; with one that names no rank where it has none, as before torch's
    process group exists, unless a signal says enough."""
    own = [fault for fault in faults if fault.rank == ended.rank]
    said = [fault for fault in own if ended.error and fault.line.startswith(ended.error.split("\n", 1)[0][:200])]
    number = signal_of(ended.exit_code)
    if not own and nameless and number in (0, signal.SIGABRT):
        own = list(nameless)
    if not own:
        return Suspect(rank=ended.rank, exit_code=ended.exit_code, cause=_cause_of_exit(ended))
    native = [fault for fault in own if fault.is_native]
    accused = _accused([*native, *said] if said else own, rank=ended.rank)
    return replace(accused, exit_code=ended.exit_code)


def _cause_of_exit(ended: Exit) -> Cause | None:
    return recognise(ended.error) or SIGNALS.get(signal_of(ended.exit_code))


def _accused(faults: Sequence[Fault], *, rank: int | None) -> Suspect:
    """The error that ended a rank: of its native last words and its last traceback, the first that is known; else the
    traceback. Earlier tracebacks were caught by somebody."""
    tracebacks = [fault for fault in faults if not fault.is_native][-1:]
    last_words = sorted(
        [*(fault for fault in faults if fault.is_native), *tracebacks], key=lambda fault: fault.place.line
    )
    read = [
        Suspect(rank=rank, fault=fault, cause=recognise_chain(fault.messages, code=fault.path)) for fault in last_words
    ]
    known = [suspect for suspect in read if suspect.is_root and suspect.cause is not None]
    unknown = [suspect for suspect in read if suspect.is_root and suspect.fault in tracebacks]
    return (known or unknown or [suspect for suspect in read if suspect.cause] or read)[0]
