"""What follows the script on launch's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchkit.cli.launch import split_script_args

PLAN = Path("p.json")


@pytest.mark.parametrize(
    ("words", "plan", "args"),
    [
        ("", None, ""),
        ("--lr 1e-5", None, "--lr 1e-5"),
        ("--plan p.json --lr 1e-5", PLAN, "--lr 1e-5"),
        ("--lr 1e-5 --plan=p.json", PLAN, "--lr 1e-5"),
        ("-- --plan p.json", None, "--plan p.json"),
        ("--plan p.json -- --plan q.json", PLAN, "--plan q.json"),
        ("a -- b", None, "a -- b"),
        ("--planning yes", None, "--planning yes"),
        ("--plan", None, "--plan"),
    ],
)
def test_split_script_args(words: str, plan: Path | None, args: str) -> None:
    assert split_script_args(tuple(words.split())) == (plan, tuple(args.split()))
