"""What a file says, in launchkit's own words, and the scenario that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from launchkit.engine_settings import DDP, FSDP, ZERO, auto_sizes
from launchkit.export.layout import default_lora_modules, named_targets
from launchkit.export.lint import Tool
from launchkit.export.read.section import AUTO, Section
from launchkit.hardware import Cluster
from launchkit.model import ModelProfile
from launchkit.request import Request, Resolution, find_flag, resolve
from launchkit.scenario import Checkpointing, Method, Precision, Scenario, Trainer

# What a file says of one engine or one method means nothing once another was asked for.
_OF_STRATEGY = ("strategy", "fsdp_sharding", "fp8_all_gather", "offload", "tp", "cp", "sp")
_OF_FP8 = ("fp8_backend", "fp8_all_gather")
_OF_ADAPTER = ("lora_rank", "lora_targets", "lora_dropout", "lora_modules_to_save", "dora", "rslora")
_DECISIVE = (
    *("method", "strategy", "precision", "optimizer", "micro_batch", "seq_len", "checkpointing", "attention", "loss"),
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a file is read: its name in messages, the GPUs it would run on, the flags that were given beside it, and
    how to get at a file that it names (None where that is not there)."""

    file: str
    cluster: Cluster
    given: Request = field(default_factory=Request)
    open_file: Callable[[str], str | None] = lambda name: None

    @property
    def adapts(self) -> bool:
        """Whether adapters were asked for, which most of these files cannot say."""
        return self.given.method in (Method.LORA, Method.QLORA)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A file in launchkit's words.

    ``flags`` are scenario flags as ``Request`` takes them; the fields behind it are what no flag says, of which
    ``fsdp``, ``ddp`` and ``zero`` are fields of ``FsdpSettings``, ``DdpSettings`` and ``ZeroSettings``. ``assumed`` is
    what the file leaves open or says in a way that is counted as something near, ``ignored`` what bears on memory or
    speed and is not counted, ``unrelated`` the keys that bear on neither.
    """

    tool: Tool
    model: str = ""
    flags: Mapping[str, object] = field(default_factory=dict)
    accumulation: int | None = None
    max_grad_norm: float | None = None
    fsdp: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()

    def scenario(self, given: Request, *, model: ModelProfile, cluster: Cluster) -> Resolution:
        """The scenario of the file, where flags that were given win over it."""
        request = Request.from_flags({**self._flags_beside(given), **given.given()})
        is_adapter = request.method not in (None, Method.FULL)
        if is_adapter and request.lora_targets is None and self.tool is Tool.TRL:
            request = replace(request, lora_targets=",".join(default_lora_modules(model.model_type)))
        if request.lora_targets is not None and given.lora_targets is None:
            request = replace(request, lora_targets=named_targets(request.lora_targets, model_type=model.model_type))
        resolution = resolve(request, model=model, cluster=cluster)
        scenario = self._with_settings(resolution.scenario, given, hidden_size=model.hidden_size)
        if self.accumulation is not None and given.global_batch is None:
            batch = replace(scenario.batch, gradient_accumulation_steps=self.accumulation)
            scenario = replace(scenario, batch=batch)
        return Resolution(scenario=scenario, notes=resolution.notes)

    def defaults(self, given: Request) -> tuple[str, ...]:
        """The flags that neither the file nor anybody gave, with the defaults that stand for them."""
        open_names = [name for name in _DECISIVE if name not in self.flags and getattr(given, name) is None]
        flags = [find_flag(name) for name in open_names]
        return tuple(f"{flag.option} {flag.default}" for flag in flags)

    def _flags_beside(self, given: Request) -> dict[str, object]:
        overruled: tuple[str, ...] = ()
        if given.strategy is not None:
            overruled += _OF_STRATEGY
        if given.method is Method.FULL:
            overruled += _OF_ADAPTER
        if given.precision not in (None, Precision.FP8):
            overruled += _OF_FP8
        if given.global_batch is None:
            overruled += ("global_batch",)
        return {name: value for name, value in self.flags.items() if name not in overruled}

    def _with_settings(self, scenario: Scenario, given: Request, *, hidden_size: int) -> Scenario:
        """The settings that have no flag; those of an engine only while the file's own is in force."""
        training, strategy = scenario.training, scenario.strategy
        if given.strategy is None:
            # What was given beside the file goes over what the file says, key by key.
            fsdp = replace(strategy.fsdp, **{**self.fsdp, **FSDP.read(given.fsdp_settings or "")})
            ddp = replace(strategy.ddp, **{**self.ddp, **DDP.read(given.ddp_settings or "")})
            typed = ZERO.read(given.zero_settings or "", auto=auto_sizes(hidden_size))
            zero = replace(strategy.zero, **{**self._zero_fields(hidden_size), **typed})
            strategy = replace(strategy, fsdp=fsdp, ddp=ddp, zero=zero)
        if self.max_grad_norm is not None and (given.trainer is None or training.trainer is not Trainer.LOOP):
            training = replace(training, max_grad_norm=self.max_grad_norm)
        # Where an engine must re-enter, that is what its full checkpointing is.
        full = replace(training, checkpointing=Checkpointing.FULL)
        if training.checkpointing is Checkpointing.REENTRANT and full.must_reenter(strategy.kind):
            training = full
        return replace(scenario, training=training, strategy=strategy)

    def _zero_fields(self, hidden_size: int) -> dict[str, Any]:
        """``auto`` as the Trainer fills it in; left at DeepSpeed's default where it fills in nothing."""
        sizes = auto_sizes(hidden_size)
        values = {name: sizes.get(name) if value == AUTO else value for name, value in self.zero.items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True)
class Draft:
    """A reading while it is made."""

    tool: Tool
    model: str = ""
    flags: dict[str, object] = field(default_factory=dict)
    accumulation: int | None = None
    max_grad_norm: float | None = None
    fsdp: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def flag(self, name: str, value: object) -> None:
        """Sets a flag, where there is a value."""
        if value is not None:
            self.flags[name] = value

    def finish(self, keys: Section, *, known: frozenset[str], unrelated: tuple[str, ...]) -> Reading:
        """The reading, with the keys that nobody read: those whose name begins as one of ``unrelated`` bear on nothing,
        and those that are not ``known`` are the lint's."""
        rest = [path for path, _ in keys.unread()]
        harmless = [
            path for path in rest if path.startswith(unrelated) or path.rpartition(".")[2].startswith(unrelated)
        ]
        others = [path for path in rest if path not in harmless and ("." in path or path in known)]
        return Reading(
            tool=self.tool,
            model=self.model,
            flags=self.flags,
            accumulation=self.accumulation,
            max_grad_norm=self.max_grad_norm,
            fsdp=self.fsdp,
            ddp=self.ddp,
            zero=self.zero,
            assumed=tuple(self.assumed),
            ignored=(*self.ignored, *(f"{path} is not modelled" for path in others)),
            unrelated=tuple(harmless),
        )
