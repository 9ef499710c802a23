"""From a file on disk to a ``FileCheck``: what the pure readers, the planner and the lint have to be given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launchkit import strategies
from launchkit.errors import ConfigFileError, IllegalScenarioError, MissingExtraError
from launchkit.export.check import FileChange, FileCheck
from launchkit.export.edits import edits
from launchkit.export.lint import Finding, Severity, Tool, lint, tool_of
from launchkit.export.read import (
    ADVICE,
    MAXIMUM_FILE_BYTES,
    Place,
    Reading,
    parse_config,
    read_config,
    repeated_keys,
    spread_of,
)
from launchkit.hardware import Cluster, format_gpus, parse_spec
from launchkit.model import ModelSource
from launchkit.plan import Candidate
from launchkit.planner.changes import Change, changes
from launchkit.planner.evaluate import Bench, judge
from launchkit.request import Request
from launchkit.scenario import Checkpointing, Scenario


@dataclass(frozen=True, kw_only=True)
class FileText:
    """A file as it was read: where, whose, its text and the values in it."""

    path: Path
    tool: Tool
    text: str
    config: Mapping[str, Any]

    @classmethod
    def at(cls, path: Path) -> FileText:
        """Raises ``ConfigFileError`` for what is no file of these tools."""
        text = read_config_file(path)
        config = parse_config(text, name=path.name)
        tool = tool_of(config)
        if tool is None:
            raise ConfigFileError(f"{path.name} has no key that Axolotl, accelerate, DeepSpeed or TRL know; {ADVICE}")
        return cls(path=path, tool=tool, text=text, config=config)

    def cluster(self, gpus: str | None, *, find: Callable[[str | None], Cluster]) -> Cluster:
        """The GPUs that the file's job takes: as many as it starts processes, of the kind that was given or is here.

        Where ``gpus`` says how many there are, a file that starts more gets no more.
        """
        machines, processes, on_cpu = spread_of(
            self.config, tool=self.tool, file=self.path.name, open_file=self.open_file
        )
        kind = gpus or ("cpu" if on_cpu else "auto")
        if processes and parse_spec(kind).num_gpus is None:
            counts = f"{machines}x{max(1, processes // machines)}x" if machines > 1 else f"{processes}x"
            return find(counts + kind)
        cluster = find(kind)
        if not 0 < processes < cluster.num_gpus or machines > 1 or processes > cluster.node.num_gpus:
            return cluster
        return replace(cluster, num_nodes=1, node=replace(cluster.node, num_gpus=processes, name=""))

    def open_file(self, name: str) -> str | None:
        """A file that this one names, looked for where the tools do, in the current directory, else beside it."""
        places = (Path(name).expanduser(), self.path.parent / name)
        found = next((place for place in places if place.is_file()), None)
        return None if found is None else read_config_file(found)

    def read(self, *, cluster: Cluster, given: Request) -> Reading:
        """What the file says, and those that it names."""
        place = Place(file=self.path.name, cluster=cluster, given=given, open_file=self.open_file)
        return read_config(self.config, tool=self.tool, place=place)


def read_config_file(path: Path) -> str:
    """The text of a regular file of reasonable size; ``ConfigFileError`` for anything else."""
    if path.is_dir():
        raise ConfigFileError(f"{path} is a directory; {ADVICE}")
    if not path.exists():
        raise ConfigFileError(f"{path} does not exist; {ADVICE}")
    if not path.is_file():
        raise ConfigFileError(f"{path} is no regular file; {ADVICE}")
    num_bytes = path.stat().st_size
    if num_bytes > MAXIMUM_FILE_BYTES:
        raise ConfigFileError(f"{path} holds {num_bytes:,} bytes, too many for a configuration; {ADVICE}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigFileError(f"{path} is no text; {ADVICE}") from None


def judge_file(file: FileText, reading: Reading, *, source: ModelSource, cluster: Cluster, given: Request) -> FileCheck:
    """The estimate of what the file says, the lint's findings and the changes that would help."""
    findings = _findings(file, cluster=cluster)
    found = {finding.path for finding in findings}
    check = FileCheck(
        path=str(file.path),
        tool=reading.tool,
        model=source.profile.name,
        cluster=cluster,
        findings=findings,
        assumed=(*reading.assumed, *_defaults(reading, given)),
        ignored=tuple(text for text in reading.ignored if text.split(" ")[0] not in found),
        unrelated=reading.unrelated,
    )
    bench = Bench(source=source, cluster=cluster)
    try:
        resolution = reading.scenario(given, model=source.profile, cluster=cluster)
    except IllegalScenarioError as error:
        return replace(check, refusal=str(error))
    reason = strategies.refusal(resolution.scenario, source.profile, bench.cluster_of(resolution.scenario))
    if reason is not None:
        return replace(check, refusal=reason)
    candidate, nearness = _judged(bench, resolution.scenario)
    candidate = replace(candidate, notes=(*resolution.notes, *candidate.notes))
    check = replace(check, candidate=candidate, assumed=(*check.assumed, *nearness))
    return _with_changes(check, candidate, bench=bench, config=file.config)


def _judged(bench: Bench, scenario: Scenario) -> tuple[Candidate, tuple[str, ...]]:
    """The candidate; where its program would have to be traced and cannot be, the nearest one that may ship.

    Dropout keeps a mask and an input in each adapter; a re-entrant backward holds one block more at its peak.
    """
    try:
        return judge(bench, scenario), ()
    except MissingExtraError as error:
        training = scenario.training
        reenters = training.checkpointing is Checkpointing.REENTRANT
        near = replace(
            training,
            lora_dropout=0.0,
            checkpointing=Checkpointing.FULL if reenters else training.checkpointing,
        )
        if near == training:
            raise
        parts = ["without lora_dropout"] * (training.lora_dropout > 0) + ["with full checkpointing"] * reenters
        told = f"counted {' and '.join(parts)}, which takes less, since {str(error).partition(';')[0]}"
        return judge(bench, replace(scenario, training=near)), (told,)


def _defaults(reading: Reading, given: Request) -> tuple[str, ...]:
    """What the file does not say and nobody gave, in one line."""
    flags = reading.defaults(given)
    return (f"not said: {', '.join(flags)}",) if flags else ()


def _findings(file: FileText, *, cluster: Cluster) -> tuple[Finding, ...]:
    repeated = tuple(
        Finding(path=key, problem="stands twice, and the last one counts", fix="keep one", severity=Severity.WARNING)
        for key in repeated_keys(file.text)
    )
    return (*lint(file.config, tool=file.tool, cluster=cluster), *repeated)


def _with_changes(check: FileCheck, given: Candidate, *, bench: Bench, config: Mapping[str, Any]) -> FileCheck:
    found = changes(bench, given)

    def in_file(change: Change) -> FileChange | None:
        try:
            made = edits(given, change.candidate, cluster=bench.cluster, tool=check.tool, config=config)
        except IllegalScenarioError:  # the tool cannot be told so
            return None
        if not made:
            return None
        return FileChange(edits=made, saved_bytes=change.saved_bytes, time_factor=change.time_factor, fits=change.fits)

    singles = [made for change in found.singles if (made := in_file(change))]
    more = found.more_gpus
    return replace(
        check,
        changes=tuple(singles),
        together=in_file(found.together) if found.together else None,
        more_gpus=f"--gpus {format_gpus(more[0])} with {more[1]}" if more else "",
    )
