"""The command ``launchkit``: finds the verb, runs it, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import difflib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import click
from click.shell_completion import shell_complete

from launchkit import __version__
from launchkit.cli.console import Console
from launchkit.errors import LaunchkitError, UsageError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
# Planning makes hundreds of thousands of small tuples and no cycles; looking for some takes 0.05 s of a 0.6 s plan.
_GC_THRESHOLD = 2_000_000
COMPLETION_VARIABLE = "_LAUNCHKIT_COMPLETE"  # set by the script that the shell sources


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb as ``--help`` shows it; its module ``launchkit.cli.<name>`` is imported only when it runs."""

    name: str
    arguments: str
    help: str


VERBS = (
    Verb(
        name="plan",
        arguments="MODEL",
        help="what to run here: the best configuration, alternatives, and why not others",
    ),
    Verb(name="estimate", arguments="MODEL", help="exactly this scenario, no search"),
    Verb(name="config", arguments="PLAN", help="write accelerate, DeepSpeed and Axolotl files"),
    Verb(name="check", arguments="FILE", help="what somebody's own config takes, what is wrong in it, what to change"),
    Verb(name="launch", arguments="[SCRIPT]", help="run a script, or the built-in fine-tune, as planned"),
    Verb(name="why", arguments="[RUN]", help="what went wrong first in a run, and what to do about it"),
    Verb(name="trace", arguments="MODEL", help="trace a model's training step into the cache"),
    Verb(name="explain", arguments="[TERM]", help="where a number comes from"),
    Verb(name="gpus", arguments="", help="the hardware found here, and the table of known GPUs"),
    Verb(name="doctor", arguments="", help="what would break here, with fixes"),
    Verb(name="env", arguments="", help="versions and settings, as a block for bug reports"),
    Verb(name="demo", arguments="", help="the whole path on a tiny model, on whatever is here"),
)

EPILOGUE = """
Start with:  launchkit plan Qwen/Qwen3-8B --gpus 2x4090
Every verb takes --json, -q, -v, --debug and -h. Settings come from flags, then LAUNCHKIT_*, then
launchkit.toml or [tool.launchkit] in pyproject.toml, then --preset, then defaults.
"""


class LazyVerbs(click.Group):
    """A group whose help needs no verb's imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb.name for verb in VERBS]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
        if args[0] not in self.list_commands(ctx) and not args[0].startswith("-"):
            advice = f"did you mean launchkit {near[0]}?" if near else "see launchkit --help"
            raise UsageError(f"{args[0]!r} is no verb of launchkit; {advice}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"launchkit.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(f"{verb.name} {verb.arguments}".strip(), verb.help) for verb in VERBS])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(EPILOGUE)


def _same_spelling(token: str) -> str:
    """``--seq_len`` and ``--seq-len`` are one flag."""
    return token.replace("_", "-")


@click.group(
    cls=LazyVerbs,
    name="launchkit",
    help="Predicts memory and speed of a fine-tune before it runs, then launches it.",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _same_spelling},
)
@click.version_option(__version__, prog_name="launchkit")
def launchkit() -> None:
    pass


def main(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; never raises."""
    console = Console()
    try:
        return _run(arguments, console=console)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        console.error("interrupted", exit_code=EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _close_quietly()
    except Exception as error:
        return _failed(error, console=console)


def _run(arguments: Sequence[str], *, console: Console) -> int:
    """What ``click.Group.main`` does, without its own way of handling interrupts, pipes and errors."""
    instruction = os.environ.get(COMPLETION_VARIABLE)
    if instruction:
        return shell_complete(launchkit, {}, "launchkit", COMPLETION_VARIABLE, instruction)
    with launchkit.make_context("launchkit", list(arguments) or ["--help"], obj=console) as context:
        result = launchkit.invoke(context)
    return result if isinstance(result, int) else 0


def run() -> None:
    """The console script."""
    gc.set_threshold(_GC_THRESHOLD)
    exit_code = main(sys.argv[1:])
    gc.freeze()  # what is left at the end goes with the process, uncollected
    sys.exit(exit_code)


def _failed(error: Exception, *, console: Console) -> int:
    if console.debug:
        traceback.print_exc()
    message, exit_code = _reading(error)
    console.error(message, exit_code=exit_code)
    return exit_code


def _reading(error: Exception) -> tuple[str, int]:
    """An exception as one line and an exit code."""
    if isinstance(error, LaunchkitError):
        return _one_line(str(error)), error.exit_code
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "launchkit"
        return f"{_one_line(error.format_message()).rstrip('.')}; see {where} --help", EXIT_USAGE
    if isinstance(error, click.ClickException):
        return _one_line(error.format_message()), EXIT_USAGE
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}; check the path and its permissions", EXIT_FAILURE
    fact = _one_line(str(error)) or "no message"
    return f"unexpected {type(error).__name__}: {fact}; run it again with --debug for the traceback", EXIT_FAILURE


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _close_quietly() -> int:
    """The reader of our pipe went away: not an error, but Python must not try to flush into it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
