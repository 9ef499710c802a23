"""Writing without surprises: nothing is overwritten unless asked, and every path is said."""

from __future__ import annotations

import hashlib
from pathlib import Path

from launchkit.cli.console import Console
from launchkit.errors import OutputExistsError, PlanFileError
from launchkit.plan import Plan
from launchkit.serialize import document_text, plan_document, plan_from_text

DEFAULT_PLAN = Path(".launchkit/plan.json")


def read_plan(path: Path) -> Plan:
    """The plan in a file; ``PlanFileError`` where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PlanFileError(f"{path} does not exist; write a plan with launchkit plan MODEL") from None
    except UnicodeDecodeError:
        raise PlanFileError(f"{path} is no text file; write a plan with launchkit plan MODEL") from None
    return plan_from_text(text, name=str(path))


def keep_plan(plan: Plan, *, output: Path | None, force: bool) -> Path:
    """Writes a plan to ``output``, or else beside the last ones under a name that overwrites none of them."""
    text = document_text(plan_document(plan))
    path = output or _free_path(text, force=force)
    if not (path.is_file() and path.read_text(encoding="utf-8") == text):
        write(path, text, force=force)
    return path


def write(path: Path, text: str, *, force: bool) -> None:
    """Writes one file and the directories above it; an existing one only by ``force``."""
    check_free([path], force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def check_free(paths: list[Path], *, force: bool) -> None:
    """Raises before anything is written, so that a set of files is written whole or not at all."""
    taken = [str(path) for path in paths if path.exists()]
    if taken and not force:
        raise OutputExistsError(f"{', '.join(taken)} exists already; add --force to overwrite")


def show(path: Path, text: str, *, console: Console) -> None:
    """A file as ``--dry-run`` shows it."""
    console.text(f"# {path}\n{text.rstrip()}\n\n")


def _free_path(text: str, *, force: bool) -> Path:
    """``.launchkit/plan.json``, or a name made from the content where another plan lies there."""
    if force or not DEFAULT_PLAN.exists() or DEFAULT_PLAN.read_text(encoding="utf-8") == text:
        return DEFAULT_PLAN
    return DEFAULT_PLAN.with_name(f"plan-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json")
