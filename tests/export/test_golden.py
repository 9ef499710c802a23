"""What is written, in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from launchkit.errors import IllegalScenarioError
from launchkit.export import Target, config_files
from tests.export.cases import GOLDEN, Case, case


@pytest.mark.parametrize("each", GOLDEN, ids=lambda each: each.name)
def test_files_are_the_golden_ones(each: Case, golden: Callable[[str, str], None]) -> None:
    """Every file of a case, one after another; a target that cannot be told gives its reason instead."""
    texts: dict[str, str] = {}
    for target in Target:
        try:
            files = config_files(each.candidate, each.cluster, targets=(target,), data="org/chats")
            texts |= {file.name: file.text for file in files}
        except IllegalScenarioError as refusal:
            texts[target] = f"{refusal}\n"
    golden(f"{each.name}.txt", "\n".join(f"==> {name} <==\n{text}" for name, text in texts.items()))


@pytest.mark.parametrize(
    ("conf", "axolotl_says_it"), [("expandable_segments:True", True), ("max_split_size_mb:64", False)]
)
def test_commands_tell_the_allocator(conf: str, axolotl_says_it: bool) -> None:
    """Where the tool does not by itself."""
    each = case("ddp", strategy="ddp", method="lora", precision="bf16-params")
    candidate = replace(each.candidate, scenario=replace(each.candidate.scenario, alloc_conf=conf))
    files = config_files(candidate, each.cluster, targets=("accelerate", "axolotl"), data="org/chats")
    commands = {file.name: line for file in files for line in file.text.splitlines() if line.startswith("# Run: ")}
    assert commands["accelerate.yaml"].startswith(f"# Run: PYTORCH_ALLOC_CONF={conf} accelerate launch")
    assert ("PYTORCH_ALLOC_CONF" in commands["axolotl.yaml"]) is not axolotl_says_it
