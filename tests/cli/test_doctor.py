"""``launchkit doctor``: the screen, the document, the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from launchkit.checkup.facts import Facts, Torch
from launchkit.cli import doctor
from launchkit.cli.main import main
from tests.checkup.test_checks import GOOD


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Facts], list[bool]]:
    """Makes the machine a given one; the list records whether the hub was to be asked."""

    def arrange(facts: Facts) -> list[bool]:
        asked: list[bool] = []

        def gather(*, online: bool) -> Facts:
            asked.append(online)
            return facts

        monkeypatch.setattr(doctor, "gather", gather)
        return asked

    return arrange


def test_a_good_machine_exits_with_0(
    machine: Callable[[Facts], list[bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = machine(GOOD)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [" ✓ nothing is broken here", "", " Python and packages"]
    assert asked == [False]


def test_warnings_alone_exit_with_0(machine: Callable[[Facts], list[bool]], capsys: pytest.CaptureFixture[str]) -> None:
    machine(replace(GOOD, environment={"RANK": "0"}))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(" ~ nothing is broken here, 1 warning\n")
    assert "\n   → unset RANK\n" in out


def test_a_problem_exits_with_1_and_the_document_says_the_same(
    machine: Callable[[Facts], list[bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = machine(replace(GOOD, torch=Torch(error="OSError: x")))
    assert main(["doctor", "--online", "--json", "-q"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["num_problems"], document["num_warnings"]) == (1, 1, 0)
    rows = document["groups"][0]["rows"]
    assert {
        "level": "problem",
        "fact": "torch cannot be imported: OSError: x",
        "fix": "pip install --force-reinstall torch",
    } in rows
    assert asked == [True]


def test_colour_is_never_the_only_sign(
    machine: Callable[[Facts], list[bool]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(replace(GOOD, environment={"RANK": "0"}))
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["doctor"])
    assert " \x1b[1;33m~\x1b[0m RANK=0" in capsys.readouterr().out
