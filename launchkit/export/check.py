"""What ``launchkit check`` answers: a file that somebody wrote, estimated and linted, with what to change in it."""

from __future__ import annotations

from dataclasses import dataclass

from launchkit.export.edits import Edit
from launchkit.export.lint import Finding, Severity, Tool
from launchkit.hardware import Cluster
from launchkit.plan import Candidate


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """Edits that belong together. ``saved_bytes`` are of the allocated peak, ``time_factor`` of an optimizer step over
    as many tokens, 0 where the tokens differ; ``fits`` says whether these edits alone leave room enough."""

    edits: tuple[Edit, ...]
    saved_bytes: int
    time_factor: float
    fits: bool


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """A file of another tool, judged. ``candidate`` is None where the scenario would be refused by what runs it,
    or is not modelled, for the reason in ``refusal``.

    ``changes`` alter one setting each; ``together`` is the least of them that fits where none does alone, or only
    shorter sequences do; ``more_gpus`` is what to give as ``--gpus`` instead. What the file leaves open or says of
    something that is counted as something else is in ``assumed``; ``ignored`` bears on memory or speed and is not
    counted; ``unrelated`` bears on neither.
    """

    path: str
    tool: Tool
    model: str
    cluster: Cluster
    candidate: Candidate | None = None
    refusal: str = ""
    findings: tuple[Finding, ...] = ()
    changes: tuple[FileChange, ...] = ()
    together: FileChange | None = None
    more_gpus: str = ""
    assumed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings by which the file does not run, or not as written."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)
