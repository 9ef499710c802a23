"""What the hub can answer, and the one line that each answer becomes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launchkit.errors import HubError, LaunchkitError, ModelConfigError, UnknownModelError
from launchkit.hub.remote import HuggingFaceHub, explain, fetch_config, is_model_id

CONFIG = {"model_type": "llama", "hidden_size": 64}
TOKEN = "hf_thisIsASecretThatMustNotBePrinted"

# What the hub's server says per repository: status, X-Error-Code, body. The codes are those that huggingface_hub reads.
ANSWERS: dict[str, tuple[int, str, bytes]] = {
    "open/model": (200, "", json.dumps(CONFIG).encode()),
    "gated/model": (403, "GatedRepo", b""),
    "absent/model": (404, "RepoNotFound", b""),
    "private/model": (401, "RepoNotFound", b""),
    "bare/model": (404, "EntryNotFound", b""),
    "broken/model": (500, "", b""),
    "huge/model": (200, "", b" " * 5 * 1024**2),
    "hostile/model": (200, "", b'{"model_type": "llama", "hidden_size": "4096"}'),
}

EXPECTED: dict[str, tuple[type[LaunchkitError], str]] = {
    "gated/model": (
        HubError,
        r"is gated; accept the licence at http://.*/gated/model, then `hf auth login`, or pass --",
    ),
    "absent/model": (UnknownModelError, r"has no model absent/model that you may read; check the spelling"),
    "private/model": (UnknownModelError, r"has no model private/model that you may read; .*`hf auth login`"),
    "bare/model": (UnknownModelError, r"bare/model has no config\.json on .*; pass --config FILE"),
    "broken/model": (HubError, r"could not be read from .* \(HTTP 500\); try again, or pass --config FILE"),
    "huge/model": (ModelConfigError, r"is 5242880 bytes long, a config\.json has at most"),
    "hostile/model": (ModelConfigError, r'hidden_size is "4096", not a whole number'),
}


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        repository = "/".join(self.path.strip("/").split("/")[:2])
        status, code, body = ANSWERS[repository]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test's output stays quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


@pytest.fixture
def hub(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HuggingFaceHub:
    """The real client, a server of ours, and an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_ENDPOINT", server)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return HuggingFaceHub()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPECTED)
def test_every_refusal_is_one_line_that_says_what_to_do(hub: HuggingFaceHub, name: str) -> None:
    error, message = EXPECTED[name]
    with pytest.raises(error, match=message) as caught:
        fetch_config(name, hub=hub)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_a_configuration_is_fetched(hub: HuggingFaceHub) -> None:
    assert fetch_config("open/model", hub=hub) == CONFIG


class Fake:
    """A hub that raises, or has the file in its cache."""

    def __init__(self, *, error: Exception | None = None, path: Path | None = None) -> None:
        self.error = error
        self.path = path

    def cached(self, model_id: str) -> Path | None:
        return self.path

    def num_bytes(self, model_id: str) -> int | None:
        assert self.error is not None
        raise self.error

    def download(self, model_id: str) -> Path:
        raise AssertionError("the length is asked for first")


def test_the_cache_is_read_without_the_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert fetch_config("any/model", hub=Fake(path=tmp_path / "config.json")) == CONFIG


def test_no_network_is_told_with_the_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    error = ConnectionError(f"Authorization: Bearer {TOKEN}")
    with pytest.raises(HubError) as caught:
        fetch_config("Qwen/Qwen3-8", hint="did you mean Qwen/Qwen3-8B?", hub=Fake(error=error))
    assert str(caught.value) == (
        "Qwen/Qwen3-8 is not in the catalogue and huggingface.co cannot be reached; did you mean Qwen/Qwen3-8B? "
        "else check the network, or pass --config FILE"
    )


def test_offline_mode_is_named() -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    told = explain(errors.OfflineModeIsEnabled("config.json"), model_id="a/b", hint="")
    assert isinstance(told, HubError)
    assert "HF_HUB_OFFLINE is set; unset it, or pass --config FILE" in str(told)


def test_what_is_not_foreseen_is_a_line_too() -> None:
    told = explain(RuntimeError(f"secret {TOKEN}"), model_id="a/b", hint="")
    assert isinstance(told, HubError)
    assert "(RuntimeError); try again" in str(told) and TOKEN not in str(told)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", True),
        ("Qwen/Qwen2.5-0.5B", True),
        ("01-ai/Yi-6B", True),
        ("a/b/c", False),
        ("two words", False),
        ("a//b", False),
        ("../b", False),
        ("a/b..c", False),
        ("a--b", False),
        ("a/b\n", False),
        ("https://huggingface.co/a/b", False),
        ("", False),
        ("x" * 97, False),
    ],
)
def test_what_the_hub_could_have(name: str, expected: bool) -> None:
    assert is_model_id(name) is expected


def test_a_name_that_is_nothing_is_unknown_without_a_request() -> None:
    with pytest.raises(UnknownModelError, match="'two words' is neither a file, a directory nor a hub id; give owner/"):
        fetch_config("two words", hub=Fake())
