"""The user's cache of traced models: written atomically, keyed by everything that a trace depends on.

::

    <cache>/traces/<fingerprint>/<toolchain>/profile.json
    <cache>/traces/<fingerprint>/<toolchain>/<trace key>.json.gz
    <cache>/traces/<fingerprint>/<toolchain>/<trace key>.refused.json    why there is no program

``toolchain`` is a digest of the versions that traced. A changed version looks elsewhere, so nothing stale is read: what
was refused because a package was missing is tried again once it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import launchkit
from launchkit.catalog.codec import SCHEMA_VERSION, ProgramFile, encode, profile_from_json
from launchkit.errors import LaunchkitError, MissingExtraError, ModelConfigError, ProgramError, TraceError
from launchkit.model import ModelProfile
from launchkit.program import StepProgram
from launchkit.scenario import TraceKey

TRACED_WITH = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "liger-kernel",
    "trl",
    "deepspeed",
    "torchao",
)
_REFUSALS = {kind.__name__: kind for kind in (TraceError, ModelConfigError, MissingExtraError)}


def cache_directory() -> Path:
    """Where launchkit caches: ``LAUNCHKIT_HOME``, else ``$XDG_CACHE_HOME/launchkit``, else ``~/.cache/launchkit``."""
    home = os.environ.get("LAUNCHKIT_HOME")
    if home:
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "launchkit"


def toolchain_versions() -> dict[str, str]:
    """What a trace made now would be made with: the installed packages, read from their metadata without importing
    them, and a digest of the tracer's own source."""
    from importlib import metadata  # lazy: costs 15 ms, and planning from the catalogue needs none of it

    versions = {"launchkit": launchkit.__version__}
    for package in TRACED_WITH:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    versions["tracer"] = _tracer_digest()
    return versions


def _tracer_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted((Path(launchkit.__file__).parent / "trace").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class TraceCache:
    """The cached traces of one architecture. A damaged or unreadable entry counts as absent; a cache that cannot be
    written costs the next run a trace, so it stops nothing."""

    def __init__(
        self, fingerprint: str, *, directory: Path | None = None, versions: Mapping[str, str] | None = None
    ) -> None:
        self._fingerprint = fingerprint
        self._root = (cache_directory() if directory is None else directory) / "traces"
        self._given_versions = versions

    @cached_property
    def versions(self) -> Mapping[str, str]:
        """The toolchain whose traces are read and written."""
        return toolchain_versions() if self._given_versions is None else self._given_versions

    @cached_property
    def directory(self) -> Path:
        """Where this architecture's entries for this toolchain lie."""
        text = json.dumps([SCHEMA_VERSION, dict(self.versions)], sort_keys=True)
        return self._root / self._fingerprint / hashlib.sha256(text.encode()).hexdigest()[:12]

    def program_path(self, key: TraceKey) -> Path:
        return self.directory / f"{_file_name(key)}.json.gz"

    def refusal_path(self, key: TraceKey) -> Path:
        return self.directory / f"{_file_name(key)}.refused.json"

    def holds(self, key: TraceKey) -> bool:
        """Whether the program of ``key`` lies here, or why there is none."""
        return self.program_path(key).is_file() or self.refusal_path(key).is_file()

    def load_profile(self) -> ModelProfile | None:
        """The cached profile, or None."""
        try:
            return profile_from_json(json.loads((self.directory / "profile.json").read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def store_profile(self, profile: ModelProfile) -> None:
        self._write(self.directory / "profile.json", json.dumps(asdict(profile)).encode())

    def load_program(self, key: TraceKey) -> StepProgram | None:
        """The cached program, or None."""
        try:
            return ProgramFile.read(self.program_path(key)).program(key.text)
        except (OSError, ProgramError, KeyError):
            return None

    def store_program(self, key: TraceKey, program: StepProgram, *, profile: ModelProfile) -> None:
        self._write(self.program_path(key), encode(profile, {key.text: program}))

    def load_refusal(self, key: TraceKey) -> LaunchkitError | None:
        """Why this toolchain traces no program of ``key``, or None where nobody tried."""
        try:
            found = json.loads(self.refusal_path(key).read_bytes())
            return _REFUSALS[found["kind"]](found["message"]) if found["key"] == key.text else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def store_refusal(self, key: TraceKey, reason: LaunchkitError) -> None:
        """Remembers ``reason`` if it is one that another try would find again."""
        kind = type(reason).__name__
        if kind in _REFUSALS:
            found = {"key": key.text, "kind": kind, "message": str(reason)}
            self._write(self.refusal_path(key), json.dumps(found).encode())

    def _write(self, path: Path, data: bytes) -> None:
        with contextlib.suppress(OSError):
            write_atomically(path, data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``path`` so that a reader sees the old file or the whole new one, whenever the writer dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.urandom(4).hex()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


LONGEST_NAME = 200  # characters; most file systems take 255 bytes, the ending and a temporary one among them


def _file_name(key: TraceKey) -> str:
    """The key's text where that makes a name, else as much of it as does, and a digest."""
    name = key.text.replace("/", "_")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 20]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
