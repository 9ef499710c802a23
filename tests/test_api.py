"""The Python API: light to import, the same flags as the command line, no torch for what the catalogue holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import launchkit
from launchkit import api
from launchkit.catalog.fingerprint import fingerprint
from launchkit.catalog.models import load_index
from launchkit.catalog.presets import find_preset
from launchkit.errors import UsageError
from launchkit.request import Request
from launchkit.serialize import plan_document
from tests.report import plans

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "accelerate", "peft", "deepspeed", "rich")


def _shipped_model() -> str | None:
    """A model of the catalogue whose step programs ship with launchkit."""
    index = load_index()
    for name in index.ids:
        entry = index.find(name)
        if entry is not None and index.programs_path(fingerprint(index.config(entry))) is not None:
            return name
    return None


def _python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_launchkit_imports_next_to_nothing() -> None:
    modules = _python("import launchkit, sys; print(*sys.modules)").split()
    assert [name for name in modules if name.startswith("launchkit.")] == []


def test_the_function_survives_its_namesake_module() -> None:
    code = "import launchkit; from launchkit.plan import Plan; print(launchkit.plan.__name__, Plan.__name__)"
    assert _python(code).split() == ["plan", "Plan"]
    assert launchkit.plan is launchkit.__dict__["plan"]


def test_flags_reach_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Request]] = []

    def plan_request(model: str, request: Request, **_: object) -> object:
        asked.append((model, request))
        return plans.plan()

    monkeypatch.setattr(api, "plan_request", plan_request)
    assert launchkit.plan("gpt2", gpus="4x4090", seq_len=4096, packing=True) == plans.plan()
    assert [(model, request.given()) for model, request in asked] == [
        ("gpt2", {"gpus": "4x4090", "seq_len": 4096, "packing": True})
    ]


def test_a_preset_stands_below_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []
    monkeypatch.setattr(api, "plan_request", lambda model, request, **_: asked.append(request))
    monkeypatch.setattr(api, "estimate_request", lambda model, request, **_: (asked.append(request), None))
    launchkit.plan("gpt2", preset="vicuna-7b", seq_len=64, optimizer=None)
    launchkit.estimate("gpt2", preset="vicuna-7b")
    vicuna = find_preset("vicuna-7b").flags
    assert [request.given() for request in asked] == [{**vicuna, "seq_len": 64}, vicuna]
    with pytest.raises(UsageError, match="--preset vicuna is unknown; did you mean vicuna-7b"):
        launchkit.plan("gpt2", preset="vicuna")


@pytest.mark.parametrize("call", [launchkit.plan, launchkit.estimate])
def test_a_wrong_flag_is_one_line(call: object) -> None:
    assert callable(call)
    with pytest.raises(UsageError, match="'seqlen' is no setting of launchkit; did you mean seq_len"):
        call("gpt2", seqlen=4)


@pytest.mark.parametrize(
    ("spec", "num_gpus", "name"), [("2xcpu", 2, "CPU"), ("4x4090", 4, "RTX 4090"), ("2x8xH100", 16, "H100 SXM")]
)
def test_clusters_are_found_by_their_spec(spec: str, num_gpus: int, name: str) -> None:
    cluster = api.find_cluster(spec)
    assert (cluster.num_gpus, cluster.gpu.name.split("-")[0]) == (num_gpus, name.split("-")[0])


@pytest.mark.skipif(_shipped_model() is None, reason="this checkout has no traced programs in profiles/models")
@pytest.mark.parametrize("verb", ["plan", "estimate"])
def test_planning_a_catalogued_model_imports_no_torch(verb: str) -> None:
    arguments = [verb, _shipped_model(), "--gpus", "2x4090", "--json", "-q"]
    code = f"from launchkit.cli.main import main; import sys; assert main({arguments}) == 0; print(*sys.modules)"
    modules = set(_python(code).splitlines()[-1].split())
    assert modules & set(HEAVY) == set()


@pytest.mark.parametrize(("host_memory", "fits"), [("1TiB", True), ("64GiB", False)])
def test_host_memory_is_what_the_user_says(host_memory: str, fits: bool) -> None:
    plan = launchkit.plan("Qwen/Qwen3-8B", gpus="4x4090", method="full", host_memory=host_memory)
    assert (plan.chosen is not None) is fits
    document = plan_document(plan)
    assert document["request"]["host_memory"] == host_memory
    assert document["cluster"]["node"]["host_memory_bytes"] == (1024**4 if fits else 64 * 1024**3)
