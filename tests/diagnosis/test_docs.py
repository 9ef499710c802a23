"""The page of causes has every rule as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchkit.diagnosis.rules import RULES, Rule

PAGE = Path(__file__).parents[2] / "docs" / "why.md"


def row(rule: Rule) -> str:
    """A rule as a line of the page; names in braces are filled in from the log."""
    return f"| `{rule.name}` | {rule.fact.replace('}{', '/').replace('!r', '')} | {rule.source} |"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_page_has_the_rule(rule: Rule) -> None:
    assert row(rule) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_no_other_rule() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| `") for line in lines[lines.index("## Causes") :]) == len(RULES)
