"""All checks, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from launchkit.checkup import environment, gpus, machine, packages
from launchkit.checkup.facts import Facts
from launchkit.checkup.rows import Group, Level, Row

Check = Callable[[Facts], Iterator[Row]]

CHECKS: Mapping[str, tuple[Check, ...]] = {
    "Python and packages": (
        packages.check_python,
        packages.check_needs,
        packages.check_pynvml,
        packages.check_torch,
        packages.check_extensions,
        packages.check_bitsandbytes,
    ),
    "GPUs": (
        gpus.check_found,
        gpus.check_architectures,
        gpus.check_others,
        gpus.check_health,
        gpus.check_pairs,
    ),
    "System and limits": (machine.check_system, machine.check_limits),
    "Disk": (machine.check_disks,),
    "Hub": (machine.check_hub,),
    "Environment": (
        environment.check_nothing,
        environment.check_variables,
        environment.check_interface,
        environment.check_files,
    ),
    "Extensions": (machine.check_builds,),
}


def examine(facts: Facts) -> tuple[Group, ...]:
    """Every check's rows by group; a group without rows is left out."""
    groups = (
        Group(title=title, rows=tuple(row for check in checks for row in check(facts)))
        for title, checks in CHECKS.items()
    )
    return tuple(group for group in groups if group.rows)


def count(groups: tuple[Group, ...], level: Level) -> int:
    """How many rows are of a level."""
    return sum(row.level is level for group in groups for row in group.rows)
