"""Plans and candidates as JSON documents, and back.

The document that ``plan --json`` prints is the file that ``launch --plan`` reads: one format, ``SCHEMA_VERSION``.
Reading is strict. A file that is not a plan raises ``PlanFileError`` with the path of the first wrong value
(``chosen.estimate.host_peak_bytes``), since a plan is a file that people mail to each other.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from launchkit import __version__
from launchkit.errors import LaunchkitError, PlanFileError
from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.plan import Candidate, DataUse, Estimate, Plan, Rejected, StepTime
from launchkit.request import scenario_flags
from launchkit.scenario import Batch, Scenario, Strategy, Training
from launchkit.strategies.split import mesh_of

if TYPE_CHECKING:
    from launchkit.export.check import FileCheck

SCHEMA_VERSION = 1
MAXIMUM_DOCUMENT_CHARACTERS = 64 * 1024**2


def document_text(document: Mapping[str, object]) -> str:
    """A document as it is printed and written: indented, in the order given, never NaN."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def candidate_document(candidate: Candidate, *, cluster: Cluster) -> dict[str, Any]:
    """The JSON of ``estimate``, and of each candidate in a plan."""
    return {"schema_version": SCHEMA_VERSION, "launchkit": __version__, **_candidate(candidate, cluster=cluster)}


def plan_document(plan: Plan) -> dict[str, Any]:
    """The JSON of ``plan``; ``plan_from_document`` reads it back to an equal ``Plan``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "launchkit": __version__,
        "kind": "plan",
        "request": encode(plan.request),
        "model": encode(plan.model),
        "cluster": encode(plan.cluster),
        "chosen": None if plan.chosen is None else _candidate(plan.chosen, cluster=plan.cluster),
        "alternatives": [_candidate(candidate, cluster=plan.cluster) for candidate in plan.alternatives],
        "rejected": [_rejected(rejected, cluster=plan.cluster) for rejected in plan.rejected],
        "suggestions": encode(plan.suggestions),
        "assumptions": encode(plan.assumptions),
        "notes": encode(plan.notes),
        "num_considered": plan.num_considered,
        "versions": encode(plan.versions),
    }


def check_document(check: FileCheck) -> dict[str, Any]:
    """The JSON of ``check``: the candidate as ``estimate`` gives it, or null and the reason."""
    candidate = check.candidate
    return {
        "schema_version": SCHEMA_VERSION,
        "launchkit": __version__,
        "file": check.path,
        "kind": check.tool.value,
        "model": check.model,
        "cluster": encode(check.cluster),
        "candidate": None if candidate is None else _candidate(candidate, cluster=check.cluster),
        "refusal": check.refusal,
        "findings": encode(check.findings),
        "changes": encode(check.changes),
        "together": encode(check.together),
        "more_gpus": check.more_gpus,
        "assumed": encode(check.assumed),
        "ignored": encode(check.ignored),
        "unrelated": encode(check.unrelated),
    }


def plan_from_text(text: str, *, name: str) -> Plan:
    """The plan that a file's text holds; ``name`` is what to call the file in an error."""
    if len(text) > MAXIMUM_DOCUMENT_CHARACTERS:
        raise PlanFileError(f"{name} holds {len(text):,} characters, too many for a plan; {_ADVICE}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanFileError(f"{name} is not JSON ({_first_line(error)}); {_ADVICE}") from None
    return plan_from_document(document, name=name)


def plan_from_document(document: object, *, name: str = "the document") -> Plan:
    """The plan that a parsed document describes; anything else raises ``PlanFileError``."""
    if not isinstance(document, dict) or document.get("kind") != "plan":
        raise PlanFileError(f"{name} is not a plan of launchkit; {_ADVICE}")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise PlanFileError(f"{name} has schema_version {version!r}, this launchkit reads {SCHEMA_VERSION}; {_ADVICE}")
    try:
        return _plan(document)
    except Mismatch as mismatch:
        raise PlanFileError(f"{name} is not a whole plan: {mismatch}; {_ADVICE}") from None


def encode(value: object) -> Any:
    """Dataclasses, enums, tuples and mappings as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: object, *, path: str) -> Any:
    """The inverse of ``encode`` for a type made of dataclasses, enums, tuples, mappings and plain values."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None and type(None) in arguments else decode(arguments[0], value, path=path)
    if origin is tuple:
        return _decode_tuple(arguments, value, path=path)
    if origin is not None:
        items = _expect(dict, value, path=path)
        return {key: decode(arguments[1], item, path=f"{path}.{key}") for key, item in items.items()}
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, path=path)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _decode_enum(kind, value, path=path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if kind is object or kind is Any else _expect(kind, value, path=path)


_ADVICE = "write one with launchkit plan MODEL --output FILE"


class Mismatch(ValueError):
    """A value in a document that is not what its place wants."""


def _candidate(candidate: Candidate, *, cluster: Cluster) -> dict[str, Any]:
    return {
        "model": {
            **encode(candidate.model),
            "num_parameters": candidate.num_parameters,
            "num_trainable": candidate.num_trainable,
        },
        "scenario": {
            **scenario_flags(candidate.scenario, cluster=cluster),
            "gradient_accumulation_steps": candidate.scenario.batch.gradient_accumulation_steps,
            "max_grad_norm": candidate.scenario.training.max_grad_norm,
            "mesh": mesh_of(candidate.scenario.strategy, cluster),
            "split": encode(candidate.scenario.strategy.split),
            "ddp": encode(candidate.scenario.strategy.ddp),
            "fsdp": encode(candidate.scenario.strategy.fsdp),
            "zero": encode(candidate.scenario.strategy.zero),
        },
        "estimate": {
            **encode(candidate.estimate),
            "basis": encode(candidate.estimate.basis),
            "fits": candidate.estimate.fits,
            "worst_phase": candidate.estimate.worst_phase.value,
        },
        "step": encode(candidate.step),
        "data": encode(candidate.data),
        "notes": list(candidate.notes),
    }


def _rejected(rejected: Rejected, *, cluster: Cluster) -> dict[str, Any]:
    return {**_candidate(rejected.candidate, cluster=cluster), "reason": rejected.reason}


def _plan(document: Mapping[str, Any]) -> Plan:
    model = decode(ModelProfile, _take(document, "model"), path="model")

    def candidates(name: str) -> list[tuple[str, Any]]:
        items = _expect(list, _take(document, name), path=name)
        return [(f"{name}[{index}]", item) for index, item in enumerate(items)]

    chosen = _take(document, "chosen")
    simple = {
        name: decode(hint, _take(document, name), path=name)
        for name, hint in get_type_hints(Plan).items()
        if name not in ("model", "chosen", "alternatives", "rejected")
    }
    return Plan(
        model=model,
        chosen=None if chosen is None else _candidate_from(chosen, model=model, path="chosen"),
        alternatives=tuple(_candidate_from(item, model=model, path=path) for path, item in candidates("alternatives")),
        rejected=tuple(
            Rejected(
                candidate=_candidate_from(item, model=model, path=path),
                reason=_expect(str, _take(item, "reason", path=path), path=f"{path}.reason"),
            )
            for path, item in candidates("rejected")
        ),
        **simple,
    )


def _candidate_from(document: object, *, model: ModelProfile, path: str) -> Candidate:
    items = _expect(dict, document, path=path)
    counts = _expect(dict, _take(items, "model", path=path), path=f"{path}.model")
    return Candidate(
        model=model,
        num_parameters=_expect(int, _take(counts, "num_parameters", path=path), path=f"{path}.model.num_parameters"),
        num_trainable=_expect(int, _take(counts, "num_trainable", path=path), path=f"{path}.model.num_trainable"),
        scenario=_scenario_from(_take(items, "scenario", path=path), path=f"{path}.scenario"),
        estimate=decode(Estimate, _take(items, "estimate", path=path), path=f"{path}.estimate"),
        step=decode(StepTime, _take(items, "step", path=path), path=f"{path}.step"),
        data=decode(DataUse | None, items.get("data"), path=f"{path}.data"),
        notes=decode(tuple[str, ...], _take(items, "notes", path=path), path=f"{path}.notes"),
    )


def _scenario_from(document: object, *, path: str) -> Scenario:
    written = _expect(dict, document, path=path)
    flags = {name: value for name, value in written.items() if value is not None}  # None: the default
    strategy = {"kind": _take(flags, "strategy", path=path), **flags}
    return Scenario(  # the flags are flat in the document: each part takes the fields that bear its names
        training=decode(Training, flags, path=path),
        strategy=decode(Strategy, strategy, path=path),
        batch=decode(Batch, flags, path=path),
        state=decode(get_type_hints(Scenario)["state"], _take(flags, "state", path=path), path=f"{path}.state"),
        alloc_conf=decode(str, flags.get("alloc_conf", ""), path=f"{path}.alloc_conf"),
    )


def _decode_dataclass(kind: Any, value: object, *, path: str) -> Any:
    items = _expect(dict, value, path=path)
    hints = get_type_hints(kind)
    values = {}
    for field in fields(kind):
        optional = field.default is not MISSING or field.default_factory is not MISSING
        if field.name in items or not optional:
            item = _take(items, field.name, path=path)
            values[field.name] = decode(hints[field.name], item, path=f"{path}.{field.name}")
    try:
        return kind(**values)
    except (LaunchkitError, ValueError, TypeError) as error:
        raise Mismatch(f"{path} is refused ({_first_line(error)})") from None


def _decode_tuple(arguments: tuple[Any, ...], value: object, *, path: str) -> tuple[Any, ...]:
    items = _expect(list, value, path=path)
    if arguments[-1] is not Ellipsis and len(items) != len(arguments):
        raise Mismatch(f"{path} has {len(items)} items instead of {len(arguments)}")
    kinds = arguments if arguments[-1] is not Ellipsis else (arguments[0],) * len(items)
    return tuple(
        decode(kind, item, path=f"{path}[{index}]") for index, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )


def _decode_enum(kind: type[Enum], value: object, *, path: str) -> Enum:
    try:
        return kind(value)
    except ValueError:
        raise Mismatch(f"{path} is {value!r}, not one of {', '.join(str(member.value) for member in kind)}") from None


def _take(items: Mapping[str, Any], name: str, *, path: str = "") -> Any:
    if name not in items:
        raise Mismatch(f"{path + '.' if path else ''}{name} is missing")
    return items[name]


def _expect(kind: Any, value: object, *, path: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Mismatch(f"{path} is {_short(value)} where a {kind.__name__} belongs")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
