"""An engine's settings as short text, in its own names: ``reduce_bucket_size=5e7,overlap_comm=false``.

One table per engine names each key once: what it may be, and which field of ``ZeroSettings``, ``DdpSettings`` or
``FsdpSettings`` it sets. The command line reads them, and a scenario is told in them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import partial
from typing import Any

from launchkit.errors import IllegalScenarioError, UsageError
from launchkit.scenario import BackwardPrefetch, CommHook, DdpSettings, FsdpSettings, StrategyKind, Wrap, ZeroSettings
from launchkit.units import MIB

_SWITCHES = {"true": True, "false": False}
_LARGEST_CAP_MIB = 1_000_000  # a bucket of more is a typing slip


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How a value is written: ``read`` raises ``ValueError``, upon which ``fault`` says what is wrong and what to type
    instead (``{key}`` and ``{written}`` are filled in)."""

    read: Callable[[str], Any]
    write: Callable[[Any], str]
    fault: str


def _read_count(written: str) -> int:
    """A whole number; DeepSpeed's documentation writes ``5e8`` for one."""
    number = float(written)
    if not 0 <= number < float("inf") or number != int(number):
        raise ValueError(written)
    return int(number)


def _read_cap(written: str) -> int:
    cap = _read_count(written)
    if not 1 <= cap <= _LARGEST_CAP_MIB:
        raise ValueError(written)
    return cap * MIB


def _choice(words: Mapping[str, Any]) -> _Form:
    """One of ``words``, in any case; a value is written as the first word that stands for it."""

    def read(written: str) -> Any:
        try:
            return words[written.lower()]
        except KeyError as error:
            raise ValueError(written) from error

    fault = f"is unknown; write {{key}}= and one of {', '.join(words)}"
    return _Form(read=read, write=partial(word_of, words), fault=fault)


def word_of(words: Mapping[str, Any], value: StrEnum | bool) -> str:
    """The first of the engine's ``words`` that stands for ``value``."""
    return next(word for word, meant in words.items() if meant == value)


_SWITCH = replace(_choice(_SWITCHES), fault="is neither on nor off; write {key}=true or {key}=false")
_COUNT = _Form(read=_read_count, write=str, fault="is not a whole number of elements; write {key}=5e7")
_TEXT = _Form(read=str, write=str, fault="")
_CAP = _Form(
    read=_read_cap,
    write=lambda value: str(value // MIB),
    fault=f"is not a whole number of MiB from 1 to {_LARGEST_CAP_MIB:,}; write {{key}}=25",
)
_FORMS = {"bool": _SWITCH, "int": _COUNT, "str": _TEXT}


@dataclass(frozen=True, kw_only=True)
class _Key:
    """What a key sets: a field of the settings, for the kinds of strategy that heed it."""

    field: str
    form: _Form
    kinds: Collection[StrategyKind]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """One option. ``prefix`` is what accelerate's files begin each name with, and may be left out; ``example`` is a
    strategy under which the option means something."""

    option: str
    default: Any
    keys: Mapping[str, _Key]
    example: StrategyKind
    prefix: str = ""
    kinds: frozenset[StrategyKind] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", frozenset(kind for key in self.keys.values() for kind in key.kinds))

    def read(self, text: str, *, kind: StrategyKind | None = None, auto: Mapping[str, int] | None = None) -> Any:
        """The fields that ``text`` sets, by name. ``auto`` holds the values of keys for which that word stands.

        Raises ``UsageError`` for what is no value, ``IllegalScenarioError`` for what ``kind`` does not heed.
        """
        if kind is not None and kind not in self.kinds:
            raise IllegalScenarioError(
                f"{self.option} says nothing under --strategy {kind}; add --strategy {self.example}"
            )
        values: dict[str, Any] = {}
        for name, written in self._pairs(text):
            key = self._key(name)
            if kind is not None and kind not in key.kinds:
                raise IllegalScenarioError(
                    f"{self.option} {name} says nothing under --strategy {kind}; leave it out, or add --strategy "
                    f"{next(iter(key.kinds))}"
                )
            is_auto = auto is not None and written == "auto" and name in auto
            values[key.field] = auto[name] if auto is not None and is_auto else self._value(name, key, written)
        return values

    def text(self, settings: Any, *, kind: StrategyKind) -> str:
        """What to type to get ``settings`` under ``kind``: every key that is not the default's; empty where none is."""
        return ",".join(f"{name}={written}" for name, written in self.changed(settings, kind=kind).items())

    def changed(self, settings: Any, *, kind: StrategyKind) -> dict[str, str]:
        """The keys that ``kind`` heeds and that are not the default's, as they are typed."""
        return {
            name: key.form.write(getattr(settings, key.field))
            for name, key in self.keys.items()
            if kind in key.kinds and getattr(settings, key.field) != getattr(self.default, key.field)
        }

    def _pairs(self, text: str) -> Iterator[tuple[str, str]]:
        for part in text.replace(" ", "").split(","):
            if part:
                name, _, written = part.partition("=")
                yield name.removeprefix(self.prefix), written

    def _key(self, name: str) -> _Key:
        key = self.keys.get(name)
        if key is not None:
            return key
        near = difflib.get_close_matches(name, self.keys, n=1)
        advice = f"did you mean {near[0]}?" if near else f"it takes {', '.join(self.keys)}"
        raise UsageError(f"{self.option} {name} is unknown; {_ELSEWHERE.get(name, advice)}")

    def _value(self, name: str, key: _Key, written: str) -> Any:
        try:
            return key.form.read(written)
        except ValueError as error:
            fault = key.form.fault.format(key=name)
            raise UsageError(f"{self.option} {name}={written} {fault}") from error


# What accelerate calls a setting of FSDP's that has a flag of its own here.
_ELSEWHERE = {
    "sharding_strategy": "type --fsdp-sharding shard_grad_op",
    "reshard_after_forward": "type --fsdp-sharding shard_grad_op for false",
    "offload_params": "type --offload params",
    "activation_checkpointing": "type --checkpointing full",
    "min_num_params": "it is SIZE_BASED_WRAP's, which is not modelled; type auto_wrap_policy=TRANSFORMER_BASED_WRAP",
    "version": "type --strategy fsdp for 1, --strategy fsdp2 for 2",
}

_ZERO_KINDS = tuple(kind for kind in StrategyKind if kind.zero_stage)
_FSDP_KINDS = tuple(kind for kind in StrategyKind if kind.is_fsdp)
_FSDP1 = (StrategyKind.FSDP,)
_DDP = (StrategyKind.DDP,)
_HOOKS = {"no": CommHook.NONE, "none": CommHook.NONE, "fp16": CommHook.FP16, "bf16": CommHook.BF16}
STATE_DICTS = {"FULL_STATE_DICT": True, "SHARDED_STATE_DICT": False}
WRAPS = {"TRANSFORMER_BASED_WRAP": Wrap.BLOCKS, "NO_WRAP": Wrap.MODEL}
PREFETCHES = {
    "BACKWARD_PRE": BackwardPrefetch.PRE,
    "BACKWARD_POST": BackwardPrefetch.POST,
    "NO_PREFETCH": BackwardPrefetch.NONE,
}


def _words(named: Mapping[str, Any]) -> _Form:
    return _choice({name.lower(): value for name, value in named.items()})


ZERO = EngineSettings(
    option="--zero-settings",
    default=ZeroSettings(),
    keys={
        row.name: _Key(field=row.name, form=_FORMS[str(row.type).removesuffix(" | None")], kinds=_ZERO_KINDS)
        for row in fields(ZeroSettings)
    },
    example=StrategyKind.ZERO3,
)
# accelerate's ``DistributedDataParallelKwargs``, which holds the arguments of torch's ``DistributedDataParallel``.
DDP = EngineSettings(
    option="--ddp-settings",
    default=DdpSettings(),
    keys={
        "bucket_cap_mb": _Key(field="bucket_cap_bytes", form=_CAP, kinds=_DDP),
        **{
            name: _Key(field=name, form=_SWITCH, kinds=_DDP)
            for name in ("gradient_as_bucket_view", "find_unused_parameters", "static_graph", "broadcast_buffers")
        },
        "comm_hook": _Key(field="comm_hook", form=_choice(_HOOKS), kinds=_DDP),
    },
    example=StrategyKind.DDP,
)
# accelerate's ``fsdp_config``, and of its plugin ``limit_all_gathers``.
FSDP = EngineSettings(
    option="--fsdp-settings",
    default=FsdpSettings(),
    keys={
        "backward_prefetch": _Key(field="backward_prefetch", form=_words(PREFETCHES), kinds=_FSDP1),
        **{
            name: _Key(field=name, form=_SWITCH, kinds=_FSDP1)
            for name in ("forward_prefetch", "use_orig_params", "limit_all_gathers")
        },
        "auto_wrap_policy": _Key(field="wrap", form=_words(WRAPS), kinds=_FSDP1),
        "cpu_ram_efficient_loading": _Key(field="cpu_ram_efficient_loading", form=_SWITCH, kinds=_FSDP_KINDS),
        "state_dict_type": _Key(field="full_state_dict", form=_words(STATE_DICTS), kinds=_FSDP_KINDS),
    },
    example=StrategyKind.FSDP,
    prefix="fsdp_",
)


def auto_sizes(hidden_size: int) -> dict[str, int]:
    """What ``auto`` stands for, in elements. Source: transformers 5.23 ``HfTrainerDeepSpeedConfig``, accelerate 1.15
    ``Accelerator._prepare_deepspeed``."""
    return {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
