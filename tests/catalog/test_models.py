"""From a name to a source of programs: the catalogue, this disk, the hub, the cache, the tracer."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchkit.catalog import models
from launchkit.catalog.cache import TraceCache
from launchkit.catalog.codec import ProgramFile, encode
from launchkit.catalog.fingerprint import fingerprint
from launchkit.catalog.index import Index, index_document, models_directory, read_rows
from launchkit.catalog.models import Found, TracedModel, find_model, load_index
from launchkit.errors import HubError, LaunchkitError, MissingExtraError, ModelConfigError, UnknownModelError
from launchkit.hub.local import ModelFiles
from launchkit.hub.safetensors import StoredWeights
from launchkit.hub.validate import validate_config
from launchkit.model import ModelProfile
from launchkit.program import StepProgram
from launchkit.scenario import Attention, Checkpointing, Compute, DeviceKind, Loss, Method, TraceKey, Trainer
from tests.builders import profile, smallest_program

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "vocab_size": 100,
}
PROFILE = profile(
    name="first/name",
    fingerprint=fingerprint(CONFIG),
    num_parameters=1_000_000,
    hidden_size=64,
    vocab_size=100,
    attentions=(Attention.SDPA,),
)
PROGRAM = smallest_program()
KEY = TraceKey(
    device=DeviceKind.CUDA,
    method=Method.FULL,
    compute=Compute.BF16,
    checkpointing=Checkpointing.NONE,
    attention=Attention.SDPA,
    loss=Loss.PLAIN,
    trainer=Trainer.HF,
)
OTHER_KEY = replace(KEY, checkpointing=Checkpointing.FULL)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and a cache of the test's own."""
    monkeypatch.setenv("LAUNCHKIT_HOME", str(tmp_path / "home"))

    def no_hub(model_id: str, *, hint: str = "") -> dict[str, Any]:
        raise HubError(f"{model_id} was asked of the hub; {hint}")

    monkeypatch.setattr(models, "fetch_config", no_hub)


class Tracer(types.ModuleType):
    """Stands in for ``launchkit.trace``: counts what it is asked."""

    def __init__(self) -> None:
        super().__init__("launchkit.trace")
        self.asked: list[str] = []
        self.error: LaunchkitError | None = None

    def profile_model(self, config: dict[str, Any], *, name: str) -> ModelProfile:
        self.asked.append("profile")
        if self.error is not None:
            raise self.error
        return replace(PROFILE, name=name, source="traced")

    def trace_model(self, config: dict[str, Any], key: TraceKey, *, progress: Any = None) -> StepProgram:
        self.asked.append(key.text)
        return PROGRAM


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Tracer:
    found = Tracer()
    monkeypatch.setitem(sys.modules, "launchkit.trace", found)
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model's directory, without weights."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def shipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """A catalogue that holds one row, ``first/name``, with the program of ``KEY``."""
    root = tmp_path / "models"
    for name in ("configs", "programs"):
        (root / name).mkdir(parents=True)
    row = {
        "id": "first/name",
        "aliases": {"first/name-longer": {"max_position_embeddings": 9000}},
        "source": "a test",
        "trace": True,
        "config": CONFIG,
    }
    (root / "configs" / "first--name.json").write_text(json.dumps(row))
    document = index_document(read_rows(root), equivalent_fingerprints={"saved": fingerprint(CONFIG)})
    (root / "index.json").write_text(json.dumps(document))
    file = root / "programs" / f"{fingerprint(CONFIG)}.json.gz"
    file.write_bytes(encode(PROFILE, {KEY.text: PROGRAM}))
    index = Index(root)
    monkeypatch.setattr(models, "load_index", lambda: index)
    return index


def test_a_catalogued_id_needs_no_tracer(shipping: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "launchkit.trace", None)
    source = find_model("FIRST/Name")
    assert source.program(KEY) == PROGRAM
    assert (source.profile.name, source.profile.source) == ("first/name", "catalogue")


def test_lengths_and_formats_are_the_configurations_own(shipping: Index) -> None:
    profile = find_model("first/name").profile
    assert (profile.max_position_embeddings, profile.checkpoint_itemsize) == (512, 4)
    assert find_model("first/name-longer").profile.max_position_embeddings == 9000


def test_a_directory_of_a_known_shape_needs_no_tracer(
    shipping: Index, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "launchkit.trace", None)
    source = find_model(str(directory))
    assert source.program(KEY) == PROGRAM
    assert (source.profile.name, source.profile.source) == (str(directory), "local")


def test_a_configuration_given_by_file_goes_before_the_name(shipping: Index, directory: Path) -> None:
    profile = find_model("any/name", config_path=str(directory / "config.json")).profile
    assert (profile.name, profile.source) == ("any/name", "local")


def test_a_hub_model_of_a_known_shape_needs_no_tracer(shipping: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "launchkit.trace", None)
    monkeypatch.setattr(models, "fetch_config", lambda name, *, hint: CONFIG | {"_name_or_path": "x"})
    source = find_model("their/fine-tune")
    assert source.program(KEY) == PROGRAM
    assert (source.profile.name, source.profile.source) == ("their/fine-tune", "hub")


def test_an_unknown_id_is_asked_of_the_hub_with_a_suggestion(shipping: Index) -> None:
    with pytest.raises(HubError, match=r"^first/nane was asked of the hub; did you mean first/name"):
        find_model("first/nane")


def test_a_key_that_does_not_ship_is_traced_once(shipping: Index, tracer: Tracer) -> None:
    source = find_model("first/name")
    assert source.program(OTHER_KEY) == source.program(OTHER_KEY) == PROGRAM
    assert find_model("first/name").program(OTHER_KEY) == PROGRAM
    assert tracer.asked == [OTHER_KEY.text]


def test_a_program_is_at_hand_where_it_ships_or_is_cached_or_the_model_is_traced_anyway(
    shipping: Index, directory: Path, tracer: Tracer
) -> None:
    source = find_model("first/name")
    assert (source.has_program(KEY), source.has_program(OTHER_KEY)) == (True, False)
    source.program(OTHER_KEY)
    assert source.has_program(replace(OTHER_KEY, evaluation=True))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 77}))
    assert not find_model(str(directory)).has_program(KEY)
    find_model(str(directory)).program(KEY)
    unshipped = find_model(str(directory))
    assert (unshipped.has_program(KEY), unshipped.has_program(OTHER_KEY)) == (True, False)


def test_an_unknown_shape_is_traced_once(directory: Path, tracer: Tracer) -> None:
    for _ in range(2):
        source = find_model(str(directory))
        assert source.program(KEY) == PROGRAM
        assert source.profile.num_parameters == PROFILE.num_parameters
        assert source.profile.source == "local"
    assert tracer.asked == [KEY.text, "profile"]


def test_a_damaged_cache_entry_is_made_again(directory: Path, tracer: Tracer, tmp_path: Path) -> None:
    find_model(str(directory)).program(KEY)
    (entry,) = (tmp_path / "home").rglob("*.json.gz")
    entry.write_bytes(b"damaged")
    assert find_model(str(directory)).program(KEY) == PROGRAM
    assert tracer.asked.count(KEY.text) == 2
    assert ProgramFile.read(entry).program(KEY.text) == PROGRAM


def test_a_damaged_install_traces(shipping: Index, tracer: Tracer) -> None:
    path = shipping.programs_path(fingerprint(CONFIG))
    assert path is not None
    path.write_bytes(b"damaged")
    assert find_model("first/name").program(KEY) == PROGRAM
    assert tracer.asked == [KEY.text, "profile"]


def test_a_configuration_as_transformers_saves_it_is_the_same_model(shipping: Index) -> None:
    assert shipping.programs_path("saved") == shipping.programs_path(fingerprint(CONFIG)) is not None
    assert shipping.programs_path("another") is None


def test_without_the_tracing_extra_it_says_what_to_install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "launchkit.trace", None)
    source = find_model(str(directory))
    for ask in (lambda: source.profile, lambda: source.program(KEY)):
        with pytest.raises(MissingExtraError, match=r"pip install 'launchkit-planner\[trace\]'"):
            ask()


@pytest.mark.parametrize(
    ("trusted", "message"),
    [
        (False, r"built by code in its repository and launchkit does not run it without --trust-remote-code \(why\)"),
        (True, r"only classes of transformers can be traced, whatever --trust-remote-code says \(why\)"),
    ],
)
def test_code_in_the_repository_is_refused(directory: Path, tracer: Tracer, trusted: bool, message: str) -> None:
    remote = CONFIG | {"auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    (directory / "config.json").write_text(json.dumps(remote))
    tracer.error = ModelConfigError("why; what to do")
    source = find_model(str(directory), trust_remote_code=trusted)
    with pytest.raises(ModelConfigError, match=message):
        _ = source.profile


def test_a_refusal_without_code_in_the_repository_stays_as_it_is(directory: Path, tracer: Tracer) -> None:
    tracer.error = ModelConfigError("why; what to do")
    with pytest.raises(ModelConfigError, match=r"^why; what to do$"):
        _ = find_model(str(directory)).profile


@pytest.mark.parametrize(
    ("elements", "note"),
    [
        (1_000_000, ""),
        (1_000_900, ""),  # buffers
        (1_006_400, ""),  # the tied head stored twice: 100 × 64
        (2_000_000, "hold 2.00M elements and config.json describes 1.00M parameters: the plan follows config.json"),
    ],
)
def test_weights_of_another_size_are_noted(tmp_path: Path, elements: int, note: str) -> None:
    stored = StoredWeights(num_elements=elements, num_elements_by_dtype={"BF16": elements})
    profile = source_with(stored, tmp_path).profile
    assert profile.checkpoint_itemsize == 2  # what is stored, not what config.json says
    assert note in " ".join(profile.notes) if note else profile.notes == ()


def test_packed_weights_are_not_compared(tmp_path: Path) -> None:
    stored = StoredWeights(num_elements=500_000, num_elements_by_dtype={"U8": 500_000})
    assert "not cross-checked" in source_with(stored, tmp_path).profile.notes[0]


def source_with(stored: StoredWeights, directory: Path) -> TracedModel:
    """A source whose files hold ``stored``, with the profile in its cache."""
    cache = TraceCache(PROFILE.fingerprint, directory=directory, versions={})
    cache.store_profile(PROFILE)
    found = Found(name="x", source="local", files=ModelFiles(config=CONFIG, stored=stored))
    return TracedModel(found=found, fingerprint=PROFILE.fingerprint, cache=cache)


ROWS = read_rows(models_directory())


def test_the_index_is_that_of_the_rows() -> None:
    """Run scripts/build-catalogue --index after changing a row."""
    document = json.loads((models_directory() / "index.json").read_bytes())
    assert document == index_document(ROWS, equivalent_fingerprints=document["equivalent_fingerprints"])


def test_no_id_occurs_twice() -> None:
    ids = [name.lower() for row in ROWS for name in (row.id, *row.aliases)]
    assert sorted(ids) == sorted(set(ids))


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_every_row_has_a_valid_configuration_and_a_source(row: Any) -> None:
    validate_config(row.config, where=row.id)
    assert row.source
    assert (row.num_parameters_published == 0) or row.published_source
    assert (row.num_published_excess == 0) == (row.excess == "")
    for overrides in row.aliases.values():
        assert fingerprint(dict(row.config) | dict(overrides)) == row.fingerprint


def test_programs_belong_to_rows() -> None:
    shipped = {path.name.partition(".")[0] for path in (models_directory() / "programs").glob("*.json.gz")}
    assert shipped <= {row.fingerprint for row in ROWS if row.trace}


def test_the_families_that_must_be_there() -> None:
    types_traced = {row.config["model_type"] for row in ROWS if row.trace}
    wanted = "llama mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3 phi3 gpt2 bert t5"
    assert set(wanted.split()) <= types_traced
    assert len({row.fingerprint for row in ROWS if row.trace}) >= 35


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("qwen/qwen3-8", "Qwen/Qwen3-8B"),
        ("lama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B-Instuct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("openai/gpt2", "openai-community/gpt2"),
    ],
)
def test_did_you_mean(typed: str, first: str) -> None:
    assert load_index().suggest(typed)[0] == first


def test_nothing_alike_suggests_nothing() -> None:
    assert load_index().suggest("zzzzzzzzzzzz/qqqqqqqqqq") == ()


@pytest.mark.parametrize(
    ("alias", "row"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
        ("unsloth/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
        ("QWEN/QWEN2.5-7B-INSTRUCT", "Qwen/Qwen2.5-7B-Instruct"),
    ],
)
def test_aliases_lead_to_rows(alias: str, row: str) -> None:
    index = load_index()
    found, wanted = index.find(alias), index.find(row)
    assert found is not None and wanted is not None and found.row == wanted.row


def test_finding_a_catalogued_model_imports_no_heavy_library() -> None:
    program = """
import sys
from launchkit.catalog.models import find_model
model = find_model("Qwen/Qwen3-8B")
assert model.config["hidden_size"] == 4096
heavy = {"torch", "transformers", "accelerate", "peft", "deepspeed", "huggingface_hub", "numpy"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["two words", "", "\0", "a" * 5000])
def test_what_is_no_name_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(UnknownModelError, match="neither a file, a directory nor a hub id") as caught:
        find_model(name)
    assert len(str(caught.value)) < 250


def test_a_directory_without_a_model_is_not_asked_of_the_hub(
    shipping: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(UnknownModelError, match=r"^empty holds no config.json; pass a model's directory"):
        find_model("empty")
