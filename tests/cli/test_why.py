"""``launchkit why``: the screen, the document, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launchkit.cli.main import main

LOGS = Path(__file__).parents[1] / "diagnosis" / "logs"


def test_the_screen_has_the_sentence_the_evidence_and_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    path = LOGS / "flatten.log"
    assert main(["why", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == " ✗ rank 0 failed first: FSDP1 cannot join torch.float32 and torch.bfloat16 in one flat parameter"
    )
    labels = [line[1:13].strip() for line in lines[1:]]
    assert [label for label in labels if label] == ["run", "where", "log says", "means", "others", "next"]
    assert any("raised in /home/user/job/fail.py:54" in line for line in lines)
    assert any("--strategy fsdp2" in line for line in lines)


@pytest.mark.parametrize("columns", ["60", "80", "140"])
def test_no_line_is_wider_than_the_terminal(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    main(["why", str(LOGS / "trainer-notemplate.log")])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= int(columns) for line in lines if "https" not in line and "/" not in line)


def test_the_document_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "--json", "-q", str(LOGS / "sigkill.log")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["state"], document["cause"]) == (1, "failed", "killed")
    assert (document["rank"], document["error"]) == (1, "ended by SIGKILL")
    assert document["place"]["line"] == 13


def test_without_a_run_the_newest_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["why"]) == 2
    assert capsys.readouterr().err.startswith("launchkit: no run is in runs, where launchkit launch writes them;")
    (tmp_path / "runs" / "1" / "logs").mkdir(parents=True)
    (tmp_path / "runs" / "1" / "command.txt").touch()
    (tmp_path / "runs" / "1" / "logs" / "rank0.log").write_text("MemoryError\n")
    assert main(["why"]) == 0
    assert capsys.readouterr().out.startswith(" ✗ rank 0 failed: out of host memory\n run          runs/1\n")


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", str(tmp_path / "gone")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
