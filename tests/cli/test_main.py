"""The command as a process sees it: help, usage errors, exit codes, pipes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launchkit import __version__
from launchkit.cli.main import VERBS, main
from launchkit.errors import HubError, LaunchkitError, UnknownGpuError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def explain_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes the verb ``explain`` fail in a given way."""

    def arrange(error: BaseException) -> None:
        def fail(name: str) -> None:
            raise error

        monkeypatch.setattr("launchkit.cli.explain.find_term", fail)

    return arrange


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_names_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    captured = capsys.readouterr()
    assert all(f"  {verb.name}" in captured.out + captured.err for verb in VERBS)


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_has_help_and_the_common_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "-h"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--json", "--quiet", "--verbose", "--debug"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plam"], "launchkit: 'plam' is no verb of launchkit; did you mean launchkit plan?"),
        (["zzz"], "launchkit: 'zzz' is no verb of launchkit; see launchkit --help"),
        (["plan"], "launchkit: Missing argument 'MODEL'; see launchkit plan --help"),
        (["plan", "gpt2", "--zzz"], "launchkit: No such option '--zzz'"),
        (["plan", "gpt2", "--seq-len", "2k"], "launchkit: --seq-len 2k is not a whole number"),
        (["estimate", "gpt2", "--strategy", "zero4"], "launchkit: --strategy zero4 is unknown; did you mean zero3?"),
        (["plan", "gpt2", "--gpus", "2x4090", "--num-gpus", "2"], "launchkit: --gpus 2x4090 already says how many"),
        (["plan", "gpt2", "--ep", "2"], "launchkit: --ep is expert parallelism, which launchkit does not plan; use"),
        (["plan", "gpt2", "--pp", "2"], "launchkit: --pp is pipeline parallelism, which launchkit does not plan; use"),
        (["estimate", "gpt2", "--gpus", "A100", "--cp", "2"], "launchkit: --cp 2 takes 2 GPUs and 1× A100"),
        (["config", "no-such-plan.json"], "launchkit: no-such-plan.json does not exist; write a plan with"),
        (["explain", "logitz"], "launchkit: 'logitz' is no term of launchkit; did you mean logits?"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (UnknownGpuError("fact; advice"), 2, "launchkit: fact; advice\n"),
        (HubError("offline; pass --config FILE"), 1, "launchkit: offline; pass --config FILE\n"),
        (LaunchkitError("two\nlines; advice"), 1, "launchkit: two lines; advice\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "launchkit: /x: Permission denied; check the path"),
        (ValueError("surprise"), 1, "launchkit: unexpected ValueError: surprise; run it again with --debug"),
        (AssertionError(), 1, "launchkit: unexpected AssertionError: no message; run it again with --debug"),
        (KeyboardInterrupt(), 130, "launchkit: interrupted\n"),
    ],
)
def test_whatever_goes_wrong_is_one_line(
    error: BaseException,
    exit_code: int,
    line: str,
    explain_raises: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    explain_raises(error)
    assert main(["explain", "logits"]) == exit_code
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1


def test_debug_shows_the_traceback(
    explain_raises: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    explain_raises(ValueError("surprise"))
    assert main(["explain", "--debug", "logits"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_errors_are_documents_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "logitz", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["error"]["exit_code"] == 2
    assert "logits" in document["error"]["message"]


def test_quiet_leaves_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "logits", "-q", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["term"] == "logits"
    assert captured.err == ""


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment},
        check=False,
    )


def test_help_is_quick_and_imports_little() -> None:
    code = "import sys; from launchkit.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = _python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    heavy = {"torch", "transformers", "rich", "launchkit.api", "launchkit.planner", "yaml", "huggingface_hub"}
    assert not heavy & set(result.stderr.split())
    assert min(seconds) < 0.2


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = f"{sys.executable} -m launchkit explain; echo rc=$? >&2"
    result = subprocess.run(
        ["bash", "-c", f"({script}) | true"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert result.stderr == "rc=0\n"


def test_ctrl_c_is_one_line_and_130() -> None:
    wait = (
        # what starts this test may have SIGINT ignored, as a shell does for its background jobs
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from launchkit.cli import explain, main;"
        "explain.find_term = lambda name: (print('ready', flush=True), time.sleep(30));"
        "sys.exit(main.main(['explain', 'logits']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", wait], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "launchkit: interrupted\n")


def test_a_poor_encoding_gets_poorer_marks() -> None:
    result = _python("from launchkit.cli.main import main; main(['explain', 'logits'])", PYTHONIOENCODING="ascii")
    assert "micro-batch x tokens x vocabulary x 4 bytes" in result.stdout


def test_shells_can_complete_verbs() -> None:
    words = {"_LAUNCHKIT_COMPLETE": "bash_complete", "COMP_WORDS": "launchkit e", "COMP_CWORD": "1"}
    result = _python("from launchkit.cli.main import main; main([])", **words)
    assert result.stdout.split() == ["plain,estimate", "plain,explain", "plain,env"]
