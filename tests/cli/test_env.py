"""The block for bug reports: complete, and without secrets."""

from __future__ import annotations

import json

import pytest

from launchkit import __version__
from launchkit.cli.env import relevant_variables
from launchkit.cli.main import main


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_TOKEN": "hf_secret"}, {"HF_TOKEN": "(set, not shown)"}),
        ({"LAUNCHKIT_API_KEY": "secret"}, {"LAUNCHKIT_API_KEY": "(set, not shown)"}),
        ({"NCCL_P2P_DISABLE": "1", "PATH": "/bin"}, {"NCCL_P2P_DISABLE": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "", "AWS_SECRET": "x"}, {"CUDA_VISIBLE_DEVICES": ""}),
    ],
)
def test_variables_that_matter(environment: dict[str, str], expected: dict[str, str]) -> None:
    assert relevant_variables(environment) == expected


def test_text_and_document_say_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["env", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["launchkit"] == __version__
    assert document["environment"]["HF_TOKEN"] == "(set, not shown)"
    assert document["hardware"]["host"]["num_cpu_cores"] >= 1
    assert "launchkit " in captured.err and __version__ in captured.err
    assert "hardware.host.num_cpu_cores" in captured.err
    assert "hf_secret" not in captured.out + captured.err
