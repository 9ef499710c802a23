"""The catalogue's table of contents: which ids it knows, their configurations, and where their programs lie.

::

    profiles/models/index.json                    every id, its aliases and fingerprint; made by scripts/build-catalogue
    profiles/models/configs/<owner>--<name>.json  one row per model: configuration, source, published size
    profiles/models/programs/<fingerprint>.json.gz   the traced programs of one architecture (see codec)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from launchkit.catalog.files import profiles_directory
from launchkit.catalog.fingerprint import fingerprint

SCHEMA_VERSION = 1
MAX_SUGGESTIONS = 3


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model as ``profiles/models/configs`` describes it.

    ``aliases`` are other ids of the same shape, each with the fields in which its configuration differs.
    ``num_published_excess`` is how many of the published parameters are not in the model that is trained (buffers, a
    tied head stored twice), explained by ``excess``. ``trace`` says whether its programs ship.
    """

    id: str
    config: Mapping[str, Any]
    source: str
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    num_parameters_published: int = 0
    published_source: str = ""
    num_published_excess: int = 0
    excess: str = ""
    trace: bool = False

    @property
    def file_name(self) -> str:
        return f"{self.id.replace('/', '--')}.json"

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.config)

    @property
    def num_parameters(self) -> int:
        """What the traced model must have; 0 where nothing is published."""
        return self.num_parameters_published - self.num_published_excess


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the index knows of one id."""

    id: str
    row: str
    fingerprint: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


def models_directory() -> Path:
    """Where the catalogue of models lies."""
    return profiles_directory() / "models"


class Index:
    """``index.json`` as read from ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        data = json.loads((directory / "index.json").read_bytes())
        self._entries: dict[str, Entry] = {}
        self._equivalent: Mapping[str, str] = data["equivalent_fingerprints"]
        for model in data["models"]:
            for name, overrides in ((model["id"], {}), *model["aliases"].items()):
                self._entries[name.lower()] = Entry(
                    id=name, row=model["row"], fingerprint=model["fingerprint"], overrides=overrides
                )

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Every id and alias, in the hub's spelling."""
        return tuple(entry.id for entry in self._entries.values())

    def find(self, name: str) -> Entry | None:
        """The entry of a hub id in any case, or None."""
        return self._entries.get(name.lower())

    def config(self, entry: Entry) -> dict[str, Any]:
        """The configuration of an entry."""
        config: dict[str, Any] = json.loads((self.directory / "configs" / entry.row).read_bytes())["config"]
        return config | dict(entry.overrides)

    def programs_path(self, fingerprint: str) -> Path | None:
        """The file with the programs of an architecture, or None where they do not ship."""
        path = programs_path(self.directory, self._equivalent.get(fingerprint, fingerprint))
        return path if path.is_file() else None

    def suggest(self, name: str) -> tuple[str, ...]:
        """Known ids that look like ``name``, the likeliest first: by name without owner, then by spelling."""
        import difflib  # lazy: needed only on the way to an error

        wanted = name.lower()
        by_name: dict[str, list[str]] = {}
        for key, entry in self._entries.items():
            by_name.setdefault(key.rpartition("/")[2], []).append(entry.id)
        short = wanted.rpartition("/")[2]
        found = [*by_name.get(short, ())]
        for name_only in difflib.get_close_matches(short, by_name, n=MAX_SUGGESTIONS, cutoff=0.75):
            found += by_name[name_only][:1]
        found += [self._entries[key].id for key in difflib.get_close_matches(wanted, self._entries, n=MAX_SUGGESTIONS)]
        return tuple(dict.fromkeys(found))[:MAX_SUGGESTIONS]


def programs_path(directory: Path, fingerprint: str) -> Path:
    """Where the programs of an architecture lie, or would."""
    return directory / "programs" / f"{fingerprint}.json.gz"


def read_rows(directory: Path) -> tuple[ModelRow, ...]:
    """Every row of ``directory/configs``, by id."""
    rows = (_row(json.loads(path.read_bytes())) for path in (directory / "configs").glob("*.json"))
    return tuple(sorted(rows, key=lambda row: row.id.lower()))


def _row(data: Mapping[str, Any]) -> ModelRow:
    excess = data.get("published_excess", {})
    return ModelRow(
        id=data["id"],
        config=data["config"],
        source=data["source"],
        aliases=data.get("aliases", {}),
        num_parameters_published=data.get("num_parameters_published", 0),
        published_source=data.get("published_source", ""),
        num_published_excess=excess.get("num_parameters", 0),
        excess=excess.get("what", ""),
        trace=data["trace"],
    )


def index_document(rows: Iterable[ModelRow], *, equivalent_fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What ``index.json`` holds for these rows.

    ``equivalent_fingerprints`` maps the fingerprint of a configuration as transformers saves it, with every default
    spelled out, to that of the row it came from.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "models": [
            {"id": row.id, "row": row.file_name, "fingerprint": row.fingerprint, "aliases": dict(row.aliases)}
            for row in rows
        ],
        "equivalent_fingerprints": dict(sorted(equivalent_fingerprints.items())),
    }
