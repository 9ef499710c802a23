"""Variables and files that change a run without being asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launchkit.checkup.facts import Facts
from launchkit.checkup.rows import Level, Row, ok, problem, warning
from launchkit.launch.environment import SECRET

_LAUNCHERS = r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT"
_SHOWN_NAMES = 4


@dataclass(frozen=True, kw_only=True)
class Variables:
    """Variables that do one thing together. ``value`` of None means any; ``applies`` narrows where it matters."""

    names: re.Pattern[str]
    does: str
    fix: str
    value: re.Pattern[str] | None = None
    level: Level = Level.WARNING
    applies: Callable[[Facts], bool] = lambda facts: True


def _re(text: str) -> re.Pattern[str]:
    return re.compile(text)


# Sources: torch's docs (distributed, cuda environment variables), accelerate/utils/environment.py and state.py,
# deepspeed/accelerator/real_accelerator.py, NCCL's "Environment Variables".
TABLE = (
    Variables(
        names=_re(rf"^(?:{_LAUNCHERS})$"),
        does="a script started without a launcher joins a process group and waits for others",
        fix="unset {names}",
    ),
    Variables(
        names=_re(r"^(?:ACCELERATE_|FSDP_|PARALLELISM_CONFIG_)"),
        does="Accelerator() and the Trainer obey them whatever the script says",
        fix="unset {names}",
    ),
    Variables(
        names=_re(r"^NCCL_P2P_DISABLE$"),
        value=_re(r"^[1-9]"),
        does="traffic between GPUs goes through host memory",
        fix="unset {names}, where GPUs have peer-to-peer",
    ),
    Variables(
        names=_re(r"^NCCL_(?:IB|SHM)_DISABLE$"),
        value=_re(r"^[1-9]"),
        does="NCCL leaves its faster transport unused",
        fix="unset {names}",
    ),
    Variables(
        names=_re(r"^(?:NCCL_BLOCKING_WAIT|TORCH_NCCL_BLOCKING_WAIT|CUDA_LAUNCH_BLOCKING)$"),
        value=_re(r"^[1-9]"),
        does="every step waits: for finding errors only",
        fix="unset {names}",
    ),
    Variables(
        names=_re(r"^TORCH_DISTRIBUTED_DEBUG$"),
        value=_re(r"(?i)^(?:info|detail)$"),
        does="collectives are checked, which is slow",
        fix="unset {names}",
    ),
    Variables(
        names=_re(r"^PYTORCH_NO_CUDA_MEMORY_CACHING$"),
        does="torch allocates without its cache: slow, and unlike any plan",
        fix="unset {names}",
    ),
    Variables(
        names=_re(r"^PYTORCH_(?:CUDA_|HIP_)?ALLOC_CONF$"),
        does="the allocator keeps memory otherwise than plans assume",
        fix="unset {names}, or mind that reserved memory differs",
    ),
    Variables(
        names=_re(r"^DS_ACCELERATOR$"),
        value=_re(r"^cpu$"),
        applies=lambda facts: bool(facts.detection.gpus),
        does="DeepSpeed leaves the GPUs unused",
        fix="unset {names}",
    ),
    Variables(
        names=_re(r"^LD_LIBRARY_PATH$"),
        value=_re(r"cuda|cudnn|nccl"),
        does="its CUDA libraries stand before those that torch brings",
        fix="unset {names}, where torch reports a missing symbol or another CUDA",
    ),
    Variables(
        names=_re(r"^(?:TRANSFORMERS_OFFLINE|HF_DATASETS_OFFLINE)$"),
        value=_re(r"(?i)^(?:1|on|yes|true)$"),
        does="nothing is downloaded",
        fix="unset {names}",
    ),
    Variables(
        names=_re(r"^HF_ENDPOINT$"),
        does="models come from another hub",
        fix="unset {names}, where that is not meant",
    ),
    Variables(
        names=_re(r"^CUDA_VISIBLE_DEVICES$"),
        level=Level.OK,
        does="these GPUs alone are seen",
        fix="",
    ),
)


def check_variables(facts: Facts) -> Iterator[Row]:
    """One row for each line of the table that applies. Of a single variable the value is shown."""
    for line in TABLE:
        found = {
            name: value
            for name, value in sorted(facts.environment.items())
            if line.names.match(name) and (line.value is None or line.value.search(value))
        }
        if found and line.applies(facts):
            names = list(found)
            text = _setting(names[0], found[names[0]]) if len(names) == 1 else _shortened(names)
            yield Row(level=line.level, fact=f"{text}: {line.does}", fix=line.fix.format(names=" ".join(names)))


def _setting(name: str, value: str) -> str:
    return f"{name} is set" if SECRET.search(name) else f"{name}={value}"


def _shortened(names: list[str]) -> str:
    rest = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {rest} more are set" if rest > 0 else " are set")


def check_interface(facts: Facts) -> Iterator[Row]:
    """NCCL's and gloo's variables name interfaces by their beginnings; ``=`` means exactly, ``^`` all but these."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = facts.environment.get(name, "")
        if not value or value.startswith("^") or not facts.interfaces:
            continue
        wanted = [part.strip() for part in value.lstrip("=").split(",")]
        if any(interface.startswith(part) for part in wanted for interface in facts.interfaces):
            yield ok(f"{name}={value}")
        else:
            there = ", ".join(facts.interfaces)
            yield problem(f"{name}={value} is no network interface here ({there})", f"unset {name}")


def check_files(facts: Facts) -> Iterator[Row]:
    """Configurations that a tool reads when it is given none."""
    for path, effect in facts.hidden_files.items():
        yield warning(f"{path} is there: {effect}", f"mv {path} {path}.unused")


def check_nothing(facts: Facts) -> Iterator[Row]:
    """Said where nothing of the kind is set."""
    if not any(True for check in (check_variables, check_interface, check_files) for _ in check(facts)):
        yield ok("no variable and no hidden file changes what runs do")
