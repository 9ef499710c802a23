"""What is written, in full."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launchkit.errors import IllegalScenarioError
from launchkit.export import Target, config_files
from tests.export.cases import GOLDEN, Case


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_files_are_the_golden_ones(case: Case, golden: Callable[[str, str], None]) -> None:
    """Every file of a case, one after another; a target that cannot be told gives its reason instead."""
    texts: dict[str, str] = {}
    for target in Target:
        try:
            files = config_files(case.candidate, case.cluster, targets=(target,), data="org/chats")
            texts |= {file.name: file.text for file in files}
        except IllegalScenarioError as refusal:
            texts[target] = f"{refusal}\n"
    golden(f"{case.name}.txt", "\n".join(f"==> {name} <==\n{text}" for name, text in texts.items()))
