"""Step programs as bytes: one gzip-compressed JSON-lines file per architecture.

The first line is a header: the model's profile, and for each variant (``TraceKey.text``) the number of its line.
Every other line is one record, pooled over all variants: a section, a parameter group, a size table, a variant.
Reading a variant parses the lines it names and no others, so a file of eighty variants loads as fast as one.

::

    header    {"schema_version", "profile", "origins", "sizes", "variants": {key: line}}
    sizes     [[denominator, coefficient, b, s, r, coefficient, b, s, r, …], …]  the sizes, named elsewhere by index;
                  of tiles [0, row_bytes, most, parts, coefficient, b, s, r, …]
    section   {"group", "uses", "events", "kernels", …}                          events as lists, told apart by length:
                  [slot, size, owner, parameter] alloc · [origin, slot, size] free · [origin, slot] free of the size
                  that the section itself allocated under that slot · [owner] free all
    group     [name, [[name, shape, itemsize, trainable, lora_rank_axis, packed_bytes, extra_bytes, has_gradient?,
                  gradient_numel?, is_split?], …]]
    variant   {"stages", "sections", "groups", "group_counts", "persistent", …}  sections and groups as line numbers
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from launchkit.errors import ProgramError
from launchkit.model import ModelProfile
from launchkit.program import (
    Alloc,
    Anchor,
    Collective,
    CollectiveKind,
    Copy,
    Event,
    Free,
    FreeAll,
    Group,
    Kernel,
    Moment,
    Owner,
    Parameter,
    ParameterGroup,
    Persistent,
    Phase,
    Section,
    Size,
    Stage,
    StepProgram,
    TensorRef,
    Term,
    Tiles,
)
from launchkit.scenario import Attention

SCHEMA_VERSION = 1

# The position in these tables is what a file stores: append, never reorder.
OWNERS = tuple(Owner)
KINDS = tuple(CollectiveKind)
MOMENTS = tuple(Moment)
GROUPS = tuple(Group)
OWNER_INDEX = {owner: index for index, owner in enumerate(OWNERS)}

_TENSOR_CORES, _FLOAT8 = 1, 2  # marks of a kernel

_TERM_WIDTH, _TILES_WIDTH = len(Term._fields), len(Tiles._fields)


def encode(profile: ModelProfile, programs: Mapping[str, StepProgram]) -> bytes:
    """One file's bytes: the profile, and every program under its ``TraceKey.text``. The same arguments give the
    same bytes."""
    writer = _Writer()
    variants = {key: writer.variant(programs[key]) for key in sorted(programs)}
    header = {
        "schema_version": SCHEMA_VERSION,
        "profile": asdict(profile),
        "origins": list(writer.origins),
        "sizes": writer.line(list(writer.sizes)),
        "variants": variants,
    }
    return gzip.compress("\n".join((_dump(header), *writer.lines)).encode(), mtime=0)


class ProgramFile:
    """A decoded file: its profile at once, each program when it is asked for."""

    def __init__(self, data: bytes, *, where: str) -> None:
        self._where = where
        self._sizes: dict[int, Size] = {}
        self._sections: dict[int, Section] = {}
        try:
            self._lines = gzip.decompress(data).decode().split("\n")
            header = json.loads(self._lines[0])
            if header["schema_version"] != SCHEMA_VERSION:
                raise ProgramError(
                    f"{where} has schema version {header['schema_version']}, this launchkit reads "
                    f"{SCHEMA_VERSION}; delete it, it is made again"
                )
            self.profile = profile_from_json(header["profile"])
            self._variants: dict[str, int] = header["variants"]
            self._origins = [(stage, Anchor(anchor), layer) for stage, anchor, layer in header["origins"]]
            self._size_table: list[list[int]] = json.loads(self._lines[header["sizes"]])
        except _BROKEN as error:
            raise _broken(where, error) from error

    @classmethod
    def read(cls, path: Path) -> ProgramFile:
        """Read one file. Raises ``ProgramError`` where it is damaged, ``OSError`` where it cannot be read."""
        return cls(path.read_bytes(), where=str(path))

    @property
    def keys(self) -> tuple[str, ...]:
        """The variants held, as ``TraceKey.text``."""
        return tuple(self._variants)

    def __contains__(self, key: str) -> bool:
        return key in self._variants

    def program(self, key: str) -> StepProgram:
        """The program of one variant. Raises ``KeyError`` where the file does not hold it."""
        line = self._variants[key]
        try:
            return self._variant(json.loads(self._lines[line]))
        except _BROKEN as error:
            raise _broken(self._where, error) from error

    def _variant(self, data: dict[str, Any]) -> StepProgram:
        groups = [self._group(line) for line in data["groups"]]
        return StepProgram(
            stages=tuple(_stage(stage) for stage in data["stages"]),
            sections=tuple(self._section(line) for line in data["sections"]),
            groups={group.name: group for group in groups},
            group_counts=dict(data["group_counts"]),
            persistent=tuple(
                Persistent(self._size(size), OWNERS[owner], count) for size, owner, count in data["persistent"]
            ),
            host_persistent_bytes=data["host_persistent_bytes"],
            minimum_micro_batch=data["minimum_micro_batch"],
            meta=data["meta"],
        )

    def _size(self, index: int) -> Size:
        size = self._sizes.get(index)
        if size is None:
            denominator, *flat = self._size_table[index]
            tiles = None if denominator else Tiles(*flat[:_TILES_WIDTH])
            numbers = flat[_TILES_WIDTH:] if tiles else flat
            terms = tuple(Term(*numbers[i : i + _TERM_WIDTH]) for i in range(0, len(numbers), _TERM_WIDTH))
            size = self._sizes[index] = Size(terms, denominator or 1, tiles)
        return size

    def _group(self, line: int) -> ParameterGroup:
        name, parameters = json.loads(self._lines[line])
        return ParameterGroup(name=name, parameters=tuple(_parameter(row) for row in parameters))

    def _section(self, line: int) -> Section:
        section = self._sections.get(line)
        if section is None:
            section = self._sections[line] = self._parse_section(json.loads(self._lines[line]))
        return section

    def _parse_section(self, data: dict[str, Any]) -> Section:
        size = self._size
        return Section(
            events=self._events(data["events"]),
            group=data["group"],
            uses=tuple(data["uses"]),
            kernels=tuple(
                Kernel(count, size(flops), size(n), bool(marks & _TENSOR_CORES), bool(marks & _FLOAT8))
                for count, flops, n, marks in data["kernels"]
            ),
            collectives=tuple(
                Collective(KINDS[kind], size(n), MOMENTS[moment], GROUPS[group])
                for kind, n, moment, group in data["collectives"]
            ),
            copies=tuple(Copy(bool(to), size(n), MOMENTS[moment]) for to, n, moment in data["copies"]),
        )

    def _events(self, rows: list[list[int]]) -> tuple[Event, ...]:
        events: list[Event] = []
        allocated: dict[int, Size] = {}
        for row in rows:
            if len(row) == 4:
                size = allocated[row[0]] = self._size(row[1])
                events.append(Alloc(row[0], size, OWNERS[row[2]], row[3]))
            elif len(row) == 1:
                events.append(FreeAll(OWNERS[row[0]]))
            else:
                size = self._size(row[2]) if len(row) == 3 else allocated[row[1]]
                events.append(Free(TensorRef(*self._origins[row[0]], row[1]), size))
        return tuple(events)


def profile_from_json(data: Mapping[str, Any]) -> ModelProfile:
    """A profile from its ``dataclasses.asdict`` as JSON read it. Fields that a newer version added are left out."""
    known = {field.name for field in fields(ModelProfile)}
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in known
    }
    values["attentions"] = tuple(Attention(value) for value in data["attentions"])
    return ModelProfile(**values)


# What damaged bytes can raise on their way through gzip, JSON and the tables.
_BROKEN = (OSError, EOFError, zlib.error, ValueError, KeyError, IndexError, TypeError)


def _broken(where: str, error: BaseException) -> ProgramError:
    return ProgramError(f"{where} is damaged ({type(error).__name__}); delete it, it is made again")


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class _Writer:
    """Collects lines, sizes and origins, each once, numbered in the order of first use (line 0 is the header)."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.sizes: dict[tuple[int, ...], int] = {}
        self.origins: dict[tuple[str, str, int], int] = {}

    def line(self, value: Any) -> int:
        return self.lines.setdefault(_dump(value), len(self.lines) + 1)

    def size(self, size: Size) -> int:
        head = (0, *size.tiles) if size.tiles else (size.denominator,)
        flat = (*head, *(number for term in size.terms for number in term))
        return self.sizes.setdefault(flat, len(self.sizes))

    def variant(self, program: StepProgram) -> int:
        meta = dict(program.meta)
        if json.loads(_dump(meta)) != meta:
            raise ProgramError("a program's meta holds values that JSON does not keep; use strings, numbers and lists")
        return self.line(
            {
                "stages": [self._stage(stage) for stage in program.stages],
                "sections": [self._section(section) for section in program.sections],
                "groups": [self._group(name, group) for name, group in program.groups.items()],
                "group_counts": dict(program.group_counts),
                "persistent": [[self.size(p.size), OWNER_INDEX[p.owner], p.count] for p in program.persistent],
                "host_persistent_bytes": program.host_persistent_bytes,
                "minimum_micro_batch": program.minimum_micro_batch,
                "meta": meta,
            }
        )

    def _stage(self, stage: Stage) -> list[Any]:
        return [stage.name, stage.phase, stage.stack, int(stage.reverse), _run_lengths(stage.layers)]

    def _group(self, name: str, group: ParameterGroup) -> int:
        if name != group.name:
            raise ProgramError(f"parameter group {group.name!r} is filed under {name!r}; use one name")
        return self.line([name, [_parameter_row(parameter) for parameter in group.parameters]])

    def _section(self, section: Section) -> int:
        size = self.size
        return self.line(
            {
                "group": section.group,
                "uses": section.uses,
                "events": self._events(section.events),
                "kernels": [
                    [k.count, size(k.flops), size(k.num_bytes), k.tensor_cores * _TENSOR_CORES | k.float8 * _FLOAT8]
                    for k in section.kernels
                ],
                "collectives": [
                    [KINDS.index(c.kind), size(c.num_bytes), MOMENTS.index(c.moment), GROUPS.index(c.group)]
                    for c in section.collectives
                ],
                "copies": [[int(c.to_device), size(c.num_bytes), MOMENTS.index(c.moment)] for c in section.copies],
            }
        )

    def _events(self, events: Iterable[Event]) -> list[list[int]]:
        rows: list[list[int]] = []
        allocated: dict[int, Size] = {}
        for event in events:
            if isinstance(event, Alloc):
                if event.stream or event.lag:
                    raise ProgramError("a strategy's program is not kept in a file; encode the one that was traced")
                allocated[event.slot] = event.size
                rows.append([event.slot, self.size(event.size), OWNER_INDEX[event.owner], event.parameter])
            elif isinstance(event, FreeAll):
                rows.append([OWNER_INDEX[event.owner]])
            else:
                stage, anchor, layer, slot = event.ref
                origin = self.origins.setdefault((stage, anchor.value, layer), len(self.origins))
                known = allocated.get(slot) == event.size
                rows.append([origin, slot] if known else [origin, slot, self.size(event.size)])
        return rows


def _run_lengths(values: Iterable[int]) -> list[int]:
    """``7 7 7 2`` as ``7 3 2 1``: value and count, flat."""
    runs: list[int] = []
    for value in values:
        if runs and runs[-2] == value:
            runs[-1] += 1
        else:
            runs += [value, 1]
    return runs


def _stage(row: list[Any]) -> Stage:
    name, phase, stack, reverse, runs = row
    layers = tuple(value for i in range(0, len(runs), 2) for value in runs[i : i + 1] * runs[i + 1])
    return Stage(name=name, phase=Phase(phase), layers=layers, stack=stack, reverse=bool(reverse))


def _parameter_row(parameter: Parameter) -> list[Any]:
    return [
        parameter.name,
        parameter.shape,
        parameter.itemsize,
        int(parameter.trainable),
        parameter.lora_rank_axis,
        parameter.packed_bytes,
        parameter.extra_bytes,
        *_gradient_columns(parameter),
    ]


def _gradient_columns(parameter: Parameter) -> tuple[int, ...]:
    if parameter.is_split:
        return int(parameter.has_gradient), parameter.gradient_numel, 1
    if parameter.gradient_numel:
        return int(parameter.has_gradient), parameter.gradient_numel
    return () if parameter.has_gradient else (0,)


def _parameter(row: list[Any]) -> Parameter:
    name, shape, itemsize, trainable, lora_rank_axis, packed_bytes, extra_bytes, *rest = row
    return Parameter(
        name=name,
        shape=tuple(shape),
        itemsize=itemsize,
        trainable=bool(trainable),
        lora_rank_axis=lora_rank_axis,
        packed_bytes=packed_bytes,
        extra_bytes=extra_bytes,
        has_gradient=bool(rest[0]) if rest else True,
        gradient_numel=rest[1] if len(rest) > 1 else 0,
        is_split=len(rest) > 2,
    )
