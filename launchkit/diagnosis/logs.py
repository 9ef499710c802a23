"""Finding the errors in a log: tracebacks with what they were raised from, and the last words of native code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from launchkit.diagnosis.evidence import Log, LoggedStep, Place

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# ``[rank1]: `` is torch's own (torch/distributed/distributed_c10d.py), ``[trainer0]:`` what torchrun puts before the
# lines of a local rank (torch/distributed/elastic/multiprocessing/tail_log.py); both may stand there.
PREFIX = re.compile(r"^\[[a-z_]*[a-z](\d+)\]:\s?")
TRACEBACK = "Traceback (most recent call last)"
CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
LOGGER = re.compile(r"^(?:[WEI]\d{4} \S+ \d+ \S+\] |\[\d{4}-\d\d-\d\d \S+\] \[\w+\] \[\S+\] )")
# transformers/trainer_callback.py, PrinterCallback; numbers are quoted since transformers 5.
LOGGED = re.compile(r"\{'loss': '?(?P<loss>[\d.e+-]+|nan|-?inf)'?(?:, 'grad_norm': '?(?P<norm>[\d.e+-]+|nan|-?inf)'?)?")
IGNORED = "Exception ignored in"  # a destructor's, which ends nothing
FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>.*))?$')
EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Invalid|Warning)?(?::\s|:?$)")
BARE_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)(?::\s.*)?$")
# Where an exception's message ends: the next thing that a log is made of.
OTHER = re.compile(r"^(?:[WEI]\d{4} |\[\d{4}-\d\d-\d\d |={5,}|-{5,}|\{'|\[[WEI]\d|terminate called|\s*\d+%\|)")
MAXIMUM_MESSAGE_LINES = 12
MAXIMUM_LINE_CHARACTERS = 4000  # some libraries print a whole command or batch in one line
# Lines that no traceback holds and that still are somebody's last words.
NATIVE = re.compile(
    r"^terminate called|^Fatal Python error|Segmentation fault|^Bus error|^Aborted\b|^(?:\S+: line \d+: +\d+ )?Killed\b"
    r"|Assertion [`'].*failed|\[[EF]\w* ?\d.*\.cpp:\d+\]|^\[E ProcessGroup|NCCL WARN"
    r"|oom[-_]kill|Out of memory: Killed process|CANCELLED AT .* DUE TO"
    r"|: error: (?:unrecognized arguments|the following arguments|argument )|^launchkit: |^Error: "
    r"|\[c10d\] The IPv[46] network addresses of .* cannot be retrieved"
    r"|: fatal error: |\bnvcc: not found|EADDRINUSE"
)
# What a launcher raises because a worker did: never an error of its own.
LAUNCHERS = re.compile(
    r"ChildFailedError|subprocess\.CalledProcessError|torch\.multiprocessing\.spawn\.Process\w+Exception"
    r"|multiprocessing\.api\.SignalException"
)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One line of a traceback."""

    file: str
    line: int
    function: str
    source: str = ""

    @property
    def text(self) -> str:
        return f"{self.file} in {self.function}: {self.source}"

    @property
    def is_own(self) -> bool:
        """Whether the file is the user's, not an installed library's."""
        return not any(part in self.file for part in ("/site-packages/", "/dist-packages/", "/lib/python", "<frozen"))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One error in a log. ``messages`` are those of chained exceptions, the one that was raised last at the end;
    ``place`` is that one's first line. ``frames`` are those of all tracebacks in the chain."""

    rank: int | None
    place: Place
    messages: tuple[str, ...]
    frames: tuple[Frame, ...] = ()

    @property
    def line(self) -> str:
        """What it comes down to: the first line of the last message."""
        return self.messages[-1].split("\n", 1)[0]

    @property
    def text(self) -> str:
        return "\n".join(self.messages)

    @property
    def is_native(self) -> bool:
        """Whether it is a line by itself, not a traceback."""
        return not self.frames

    @property
    def path(self) -> str:
        """The frames, each with its line of source."""
        return "\n".join(frame.text for frame in self.frames)

    @property
    def code(self) -> str:
        """The innermost line of the user's own program; of a library's where there is none."""
        own = [frame for frame in self.frames if frame.is_own] or list(self.frames)
        return f"{own[-1].file}:{own[-1].line}" if own else ""


@dataclass(frozen=True, kw_only=True)
class _Line:
    number: int
    text: str


def find_faults(log: Log) -> tuple[Fault, ...]:
    """Every error in a log, in the order of its lines. Launchers' own are left out."""
    found = [fault for rank, lines in _by_rank(log).items() for fault in _faults(lines, rank=rank, path=log.path)]
    told = [fault for fault in found if not LAUNCHERS.search(fault.line)]
    return tuple(sorted(told, key=lambda fault: fault.place.line))


def find_line(log: Log, pattern: re.Pattern[str]) -> tuple[str, Place] | None:
    """The first line that a pattern meets, without the time and place that its logger put before it."""
    for number, line in enumerate(log.text.split("\n"), start=log.first_line):
        if pattern.search(line.rstrip()):
            return " ".join(LOGGER.sub("", line).split()), Place(path=log.path, line=number)
    return None


def logged_steps(log: Log) -> tuple[LoggedStep, ...]:
    """What the Hugging Face Trainer printed of its steps, whose number it does not print."""
    return tuple(
        LoggedStep(step=0, loss=float(match["loss"]), gradient_norm=float(match["norm"] or 0))
        for match in LOGGED.finditer(log.text)
    )


def last_line(log: Log) -> tuple[str, Place]:
    """The last line that says something."""
    lines = [line for group in _by_rank(log).values() for line in group if line.text.strip()]
    last = max(lines, key=lambda line: line.number, default=_Line(number=log.first_line, text=""))
    return last.text.strip(), Place(path=log.path, line=last.number)


def _by_rank(log: Log) -> dict[int | None, list[_Line]]:
    """The lines of each rank, without the prefix that named it: what ranks write at once is mixed line by line."""
    ranks: dict[int | None, list[_Line]] = {}
    for number, raw in enumerate(log.text.split("\n"), start=log.first_line):
        text, rank = ANSI.sub("", raw).rstrip("\r").rsplit("\r", 1)[-1].rstrip(), log.rank
        while match := PREFIX.match(text):
            text, rank = text[match.end() :], int(match[1])
        ranks.setdefault(rank, []).append(_Line(number=number, text=text[:MAXIMUM_LINE_CHARACTERS]))
    return ranks


def _faults(lines: Sequence[_Line], *, rank: int | None, path: str) -> Iterator[Fault]:
    position = 0
    while position < len(lines):
        line = lines[position]
        if TRACEBACK in line.text:
            is_ignored = position > 0 and lines[position - 1].text.startswith(IGNORED)
            chain, position = _read_chain(lines, position)
            if chain.messages and not is_ignored:
                yield chain.fault(rank=rank, path=path)
        else:
            position += 1
            if BARE_EXCEPTION.match(line.text) or NATIVE.search(line.text):
                message = [line, *_message_after(lines, position)]
                position += len(message) - 1
                yield _Chain(messages=[message]).fault(rank=rank, path=path)


@dataclass
class _Chain:
    """A traceback while it is read: the frames, and each exception's message lines."""

    messages: list[list[_Line]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)

    def fault(self, *, rank: int | None, path: str) -> Fault:
        return Fault(
            rank=rank,
            place=Place(path=path, line=self.messages[-1][0].number),
            messages=tuple("\n".join(line.text.strip() for line in message) for message in self.messages),
            frames=tuple(self.frames),
        )


def _read_chain(lines: Sequence[_Line], position: int) -> tuple[_Chain, int]:
    """A traceback and those that follow from it; the position behind them."""
    chain = _Chain()
    while position < len(lines) and TRACEBACK in lines[position].text:
        position = _read_traceback(lines, position + 1, chain)
        following = _next_said(lines, position)
        if following < len(lines) and lines[following].text.startswith(CHAINED):
            following = _next_said(lines, following + 1)
            position = following if _is_traceback(lines, following) else position
        elif following < len(lines) and lines[following].text.startswith("Original Traceback"):
            position = following
        else:
            break
    return chain, position


def _read_traceback(lines: Sequence[_Line], position: int, chain: _Chain) -> int:
    """Frames up to the exception, and its message."""
    while position < len(lines):
        text = lines[position].text
        if TRACEBACK in text:
            return position
        if match := FRAME.match(text):
            chain.frames.append(_frame(match, source=lines[position + 1 : position + 2]))
        elif EXCEPTION.match(text):
            message = [lines[position], *_message_after(lines, position + 1)]
            chain.messages.append(message)
            return position + len(message)
        position += 1
    return position


def _frame(match: re.Match[str], *, source: Sequence[_Line]) -> Frame:
    text = source[0].text.strip() if source and not FRAME.match(source[0].text) else ""
    return Frame(file=match["file"], line=int(match["line"]), function=match["function"] or "", source=text)


def _message_after(lines: Sequence[_Line], position: int) -> list[_Line]:
    """The further lines of a message, up to the first that is something else."""
    found: list[_Line] = []
    for line in lines[position : position + MAXIMUM_MESSAGE_LINES]:
        ends = not line.text.strip() or TRACEBACK in line.text or line.text.startswith(CHAINED)
        if ends or OTHER.match(line.text) or BARE_EXCEPTION.match(line.text) or NATIVE.search(line.text):
            break
        found.append(line)
    return found


def _next_said(lines: Sequence[_Line], position: int) -> int:
    while position < len(lines) and not lines[position].text.strip():
        position += 1
    return position


def _is_traceback(lines: Sequence[_Line], position: int) -> bool:
    return position < len(lines) and TRACEBACK in lines[position].text
