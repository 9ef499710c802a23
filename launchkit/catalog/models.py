"""From what a user types for MODEL to a source of its step programs.

The catalogue is asked first, by id; then this disk; then the hub. A configuration from any of them is looked up in the
catalogue again by its fingerprint, so a fine-tune of a known model needs no trace either. What no file answers is
traced on demand and remembered in the user's cache. Planning a catalogued model imports neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from launchkit.catalog.cache import TraceCache
from launchkit.catalog.codec import ProgramFile
from launchkit.catalog.fingerprint import fingerprint
from launchkit.catalog.index import Index, models_directory
from launchkit.errors import LaunchkitError, MissingExtraError, ModelConfigError, ProgramError
from launchkit.hub.local import ModelFiles, is_local, read_local, similar_models
from launchkit.hub.remote import fetch_config
from launchkit.model import ModelProfile, ModelSource
from launchkit.program import StepProgram
from launchkit.quiet import without_logs
from launchkit.scenario import TraceKey
from launchkit.units import count

if TYPE_CHECKING:
    from launchkit.catalog.workers import TraceWorkers

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is being done

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float": 4, "half": 2}
UNSTATED_DTYPE_BYTES = 4  # files older than torch_dtype are fp32: GPT-2, BERT, T5
HEAD_NAMES = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KEY_VALUE_HEAD_NAMES = ("num_key_value_heads", "n_head_kv", "num_kv_heads")
POSITION_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
TOLERATED_MISMATCH = 0.001  # buffers that checkpoints store: rotary tables, routing biases


def find_model(
    name: str,
    *,
    config_path: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ModelSource:
    """The model that ``name`` means: a hub id, a directory, a ``config.json``, a GGUF file.

    ``config_path`` is the configuration to read instead; ``name`` is then only a name. Raises ``UnknownModelError``,
    ``ModelConfigError``, ``HubError`` or ``MissingExtraError``, each one line with what to type next.
    """
    index = load_index()
    found = _find(name, config_path=config_path, index=index, trusted=trust_remote_code)
    shape = fingerprint(found.files.config)
    return TracedModel(found=found, fingerprint=shape, shipped=_shipped_programs(index, shape), progress=progress)


@lru_cache(maxsize=1)
def load_index() -> Index:
    """The index that ships with launchkit."""
    return Index(models_directory())


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a name led: ``source`` is ``catalogue``, ``local`` or ``hub``. ``trusted`` repeats what the user said of
    code in the model's repository."""

    name: str
    source: str
    files: ModelFiles
    trusted: bool = False


def _find(name: str, *, config_path: str | None, index: Index, trusted: bool) -> Found:
    if config_path is not None or is_local(name):
        return Found(name=name, source="local", files=read_local(config_path or name), trusted=trusted)
    entry = index.find(name)
    if entry is not None:
        return Found(name=entry.id, source="catalogue", files=ModelFiles(config=index.config(entry)))
    if os.path.isdir(name):  # as from_pretrained has it: no hub model is asked for by a directory's name
        return Found(name=name, source="local", files=read_local(name), trusted=trusted)
    suggestions = " or ".join([*similar_models(name), *index.suggest(name)])
    hint = f"did you mean {suggestions}?" if suggestions else ""
    return Found(name=name, source="hub", files=ModelFiles(config=fetch_config(name, hint=hint)), trusted=trusted)


def _shipped_programs(index: Index, shape: str) -> ProgramFile | None:
    """The programs that ship for an architecture; None where there are none, or a damaged install must trace."""
    path = index.programs_path(shape)
    try:
        return None if path is None else ProgramFile.read(path)
    except (OSError, ProgramError):
        return None


def _remote_code_error(found: Found, reason: ModelConfigError, *, trusted: bool) -> ModelConfigError:
    """The refusal of a model whose class is code in its repository.

    A file may name such code (``auto_map``) and still be of a type that transformers has since learnt, like
    DeepSeek-V3; that one is traced from transformers' own class and never comes here.
    """
    fact = str(reason).partition(";")[0]
    but = (
        "only classes of transformers can be traced, whatever --trust-remote-code says"
        if trusted
        else "launchkit does not run it without --trust-remote-code"
    )
    return ModelConfigError(
        f"{found.name} is built by code in its repository and {but} ({fact}); upgrade transformers, or pass "
        "--config FILE with a like architecture that it has"
    )


def _tracing() -> Any:
    """``launchkit.trace``. Raises ``MissingExtraError`` where what it needs is not installed."""
    try:
        with without_logs():  # extensions of torchao and the like, which say what they could not load
            return import_module("launchkit.trace")  # lazy: imports torch and transformers
    except ImportError as error:
        raise MissingExtraError(
            "the catalogue does not hold this model's step and torch or transformers, which trace it, are not "
            "installed; pip install 'launchkit-planner[trace]', or plan a catalogued model like Qwen/Qwen3-8B"
        ) from error


class TracedModel:
    """A ``ModelSource`` that answers from the shipped programs, else from the user's cache, else by tracing."""

    def __init__(
        self,
        *,
        found: Found,
        fingerprint: str,
        shipped: ProgramFile | None = None,
        cache: TraceCache | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._found = found
        self._fingerprint = fingerprint
        self._shipped = shipped
        self._cache = cache or TraceCache(fingerprint)
        self._progress = progress
        self._programs: dict[str, StepProgram] = {}
        self._workers: TraceWorkers | None = None
        self._is_tracing = False

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of the model's ``config.json``."""
        return self._found.files.config

    @cached_property
    def profile(self) -> ModelProfile:
        """The profile, under the name that was asked for and with this configuration's own lengths and formats."""
        base = self._architecture()
        source = "traced" if self._found.source == "catalogue" and self._shipped is None else self._found.source
        stored = self._found.files.stored
        return replace(
            base,
            name=self._found.name,
            source=source,
            fingerprint=self._fingerprint,
            max_position_embeddings=_positions(self.config) or base.max_position_embeddings,
            checkpoint_itemsize=_dtype_bytes(self.config) if stored is None else stored.itemsize,
            num_attention_heads=_count(self.config, HEAD_NAMES),
            num_key_value_heads=_count(self.config, KEY_VALUE_HEAD_NAMES) or _count(self.config, HEAD_NAMES),
            layer_types=_layer_types(self.config),
            notes=(*base.notes, *_weight_notes(self._found.files, base)),
        )

    def program(self, key: TraceKey) -> StepProgram:
        """The step program for ``key``; see ``ModelSource``."""
        program = self._programs.get(key.text)
        if program is None:
            program = self._programs[key.text] = self._load(key)
        return program

    def expect(self, keys: Iterable[TraceKey]) -> None:
        """Starts to trace what neither ships nor is cached, if it is more than one program; see ``ModelSource``.

        Of a model that ships, the first key is asked for, which says it of all: those of a trainer's loss, say.
        """
        following = iter(keys)
        first = next(following, None)
        if first is None or self._ships(first):
            return
        missing = [key for key in dict.fromkeys((first, *following)) if not self._is_at_hand(key)]
        if len(missing) < 2 or self._workers is not None:
            return
        from launchkit.catalog.workers import TraceWorkers, affordable_workers  # lazy: seldom needed

        num_processes = affordable_workers(len(missing))
        if num_processes > 1:
            self._workers = TraceWorkers(self.config, profile=self.profile, keys=missing, num_processes=num_processes)

    def _is_at_hand(self, key: TraceKey) -> bool:
        return self._ships(key) or key.text in self._programs or self._cache.holds(key)

    def _ships(self, key: TraceKey) -> bool:
        return self._shipped is not None and key.text in self._shipped

    def has_program(self, key: TraceKey) -> bool:
        """See ``ModelSource``. Of a model that ships, the user's cache is not asked: to name its folder takes time."""
        if self._is_tracing or self._ships(key) or key.text in self._programs:
            return True
        return self._shipped is None and self._is_at_hand(key)

    def _architecture(self) -> ModelProfile:
        """What the fingerprint decides."""
        if self._shipped is not None:
            return self._shipped.profile
        cached = self._cache.load_profile()
        if cached is not None:
            return cached
        tracing = _tracing()
        try:
            profile: ModelProfile = tracing.profile_model(dict(self.config), name=self._found.name)
        except ModelConfigError as error:
            if not self.config.get("auto_map"):
                raise
            raise _remote_code_error(self._found, error, trusted=self._found.trusted) from None
        self._cache.store_profile(profile)
        return profile

    def _load(self, key: TraceKey) -> StepProgram:
        if self._shipped is not None and key.text in self._shipped:
            return self._shipped.program(key.text)
        if key.asks_kernels:  # which holds for this processor and its threads alone
            return self._trace(key)
        cached = self._cache.load_program(key)
        if cached is not None:
            return cached
        refusal = self._cache.load_refusal(key)
        if refusal is not None:
            raise refusal
        program = self._trace(key)
        self._is_tracing = True
        self._cache.store_program(key, program, profile=self.profile)
        return program

    def _trace(self, key: TraceKey) -> StepProgram:
        """By a worker that was asked to, else here."""
        with self._remembering_refusals(key):
            program = self._traced_by_worker(key)
        if program is not None:
            return program
        tracing = _tracing()
        with self._remembering_refusals(key):
            traced: StepProgram = tracing.trace_model(dict(self.config), key, progress=self._progress)
        return traced

    @contextmanager
    def _remembering_refusals(self, key: TraceKey) -> Iterator[None]:
        try:
            yield
        except LaunchkitError as reason:
            self._cache.store_refusal(key, reason)
            raise

    def _traced_by_worker(self, key: TraceKey) -> StepProgram | None:
        """What a worker answers; None where none was asked, or it was lost. Raises what the worker's trace raised."""
        workers = self._workers
        if workers is None or not workers.expects(key):
            return None
        found = workers.answer(key, progress=self._progress)
        if isinstance(found, LaunchkitError):
            raise found
        return None if found is None else ProgramFile(found, where="a trace").program(key.text)


def _parts(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The configuration and, of a multimodal model, its text part, which is the one that is trained on tokens."""
    text = config.get("text_config")
    return (text, config) if isinstance(text, Mapping) else (config,)


def _positions(config: Mapping[str, Any]) -> int:
    """The longest sequence that the configuration admits, 0 where it does not say."""
    return _count(config, POSITION_NAMES)


def _layer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of attention that the configuration lists, each once."""
    listed = next((part["layer_types"] for part in _parts(config) if part.get("layer_types")), ())
    return tuple(sorted({str(kind) for kind in listed}))


def _count(config: Mapping[str, Any], names: Sequence[str]) -> int:
    """The first of ``names`` that the configuration has a positive number for, 0 where it has none."""
    for part in _parts(config):
        for name in names:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return 0


def _dtype_bytes(config: Mapping[str, Any]) -> int:
    """Width of the stored weights, by the configuration's ``torch_dtype`` or ``dtype``."""
    for part in (config, *_parts(config)):
        value = part.get("dtype") or part.get("torch_dtype")
        if isinstance(value, str):
            return DTYPE_BYTES.get(value.removeprefix("torch."), UNSTATED_DTYPE_BYTES)
    return UNSTATED_DTYPE_BYTES


def _weight_notes(files: ModelFiles, profile: ModelProfile) -> tuple[str, ...]:
    """A warning where the weight files beside a configuration hold another number of parameters than it describes."""
    stored = files.stored
    if stored is None:
        return ()
    if stored.is_quantized:
        return (f"the weight files hold {stored.dtype} data: the number of parameters is not cross-checked",)
    described = profile.num_parameters
    tied_twice = described + profile.vocab_size * profile.hidden_size
    off = min(abs(stored.num_elements - expected) for expected in (described, tied_twice))
    if off <= TOLERATED_MISMATCH * described:
        return ()
    return (
        f"the weight files hold {count(stored.num_elements)} elements and config.json describes {count(described)} "
        "parameters: the plan follows config.json",
    )
