"""What doctor gathers: places, tokens that are not read, files that act unasked, torch in a process of its own."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import pytest

from launchkit.probe import facts
from launchkit.probe.facts import directories, gather, hidden_files, hugging_face_home, token_source
from launchkit.probe.packages import installed_version, needs


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HOME": "/data/hf"}, "/data/hf"),
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/huggingface"),
        ({}, str(Path.home() / ".cache" / "huggingface")),
    ],
)
def test_hugging_face_keeps_its_files(environment: dict[str, str], expected: str) -> None:
    assert str(hugging_face_home(environment)) == expected


def test_a_place_that_does_not_exist_yet_is_judged_by_what_is_above_it(tmp_path: Path) -> None:
    place = directories({"HF_HUB_CACHE": str(tmp_path / "a" / "b")})[0]
    assert (place.path, place.is_writable) == (str(tmp_path / "a" / "b"), True)
    assert place.free_bytes > 0


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not directories({"HF_HUB_CACHE": str(tmp_path / "file" / "hub")})[0].is_writable


def test_a_token_is_found_and_not_read(tmp_path: Path) -> None:
    assert token_source({"HF_HOME": str(tmp_path)}) == ""
    (tmp_path / "token").write_text("hf_secret")
    assert token_source({"HF_HOME": str(tmp_path)}) == str(tmp_path / "token")
    assert token_source({"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}) == "HF_TOKEN"


def test_files_that_act_unasked_are_found(tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    before = hidden_files(environment, directory=tmp_path / "here")
    for path in (
        tmp_path / "hf/accelerate/default_config.yaml",
        tmp_path / "here/.deepspeed_env",
        tmp_path / ".nccl.conf",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = hidden_files(environment, directory=tmp_path / "here")
    assert [Path(path).name for path in found if path not in before] == [
        "default_config.yaml",
        ".deepspeed_env",
        ".nccl.conf",
    ]


STUBS = {
    "whole": (
        "__version__ = '2.13.0'\nclass version:\n    cuda, hip = '12.4', None\n"
        "class cuda:\n    is_available = staticmethod(lambda: True)\n    device_count = staticmethod(lambda: 2)\n"
        "    get_arch_list = staticmethod(lambda: ['sm_80'])\nprint('noise')\n"
    ),
    "broken": "raise OSError('libcudart.so.12: cannot open\\nshared object file')\n",
    "crashing": "import os, sys\nprint('last words', file=sys.stderr, flush=True)\nos.abort()\n",
}


@pytest.fixture
def stub_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory before all others, in which a torch of the test's stands."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(facts.importlib.util, "find_spec", lambda name: object())
    return tmp_path


@pytest.mark.parametrize(
    ("stub", "cuda", "error"),
    [
        ("whole", "12.4", ""),
        ("broken", "", "OSError: libcudart.so.12: cannot open shared"),
        ("crashing", "", "last words"),
    ],
)
def test_torch_answers_from_a_process_of_its_own(stub: str, cuda: str, error: str, stub_torch: Path) -> None:
    (stub_torch / "torch.py").write_text(STUBS[stub])
    for name in ("flash_attn_2_cuda", "torchaudio", "torchvision", "xformers"):
        (stub_torch / f"{name}.py").write_text(
            "raise ImportError('undefined symbol: _ZN3c10')\n" if "flash" in name else ""
        )
    found = facts._torch()
    assert found is not None
    assert found.cuda == cuda
    assert error in found.error and bool(found.error) is bool(error)
    if stub == "whole":
        assert (found.num_devices, found.architectures) == (2, ("sm_80",))
        assert found.broken_extensions == {"flash-attn": "ImportError: undefined symbol: _ZN3c10"}


def test_without_torch_there_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts.importlib.util, "find_spec", lambda name: None)
    assert facts._torch() is None


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (urllib.error.URLError("no route to host"), "no route to host"),
        (TimeoutError("timed out"), "timed out"),
        (urllib.error.HTTPError("https://hf", 403, "Forbidden", Message(), None), ""),  # it is there
    ],
)
def test_the_hub_is_asked_only_on_demand(error: Exception, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert facts._hub({}, online=True).answer == answer
    assert not facts._hub({}, online=False).was_asked


def test_this_machine_is_looked_at_without_importing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(sys.modules)
    monkeypatch.setattr(facts, "_torch", lambda: None)
    found = gather()
    assert found.system.python and found.limits.open_files and found.interfaces
    assert "torch" not in set(sys.modules) - before


def test_extras_of_this_checkout_are_compared_with_what_is_installed() -> None:
    wanted = {need.package: need for need in needs({}) if need.by == "launchkit-planner[trace]"}
    assert set(wanted) == {"torch", "transformers", "peft", "accelerate"}
    assert wanted["torch"].installed == installed_version("torch")
    assert all(need.is_met for need in wanted.values() if need.installed)


def test_what_installed_packages_want_of_each_other_is_read() -> None:
    assert any(
        need.by.startswith("transformers ") and need.package == "tokenizers" for need in needs({"transformers": ""})
    )
