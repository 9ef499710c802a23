"""Options that several verbs share: the console's, and one per scenario flag."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from launchkit.cli import settings
from launchkit.cli.console import Console
from launchkit.request import FLAGS, OTHER_PARALLELISM, Flag, Request, find_flag

Function = Callable[..., Any]
# Names that other launchers use for the number of GPUs.
NUM_GPUS_NAMES = ("--num-processes", "--nproc-per-node", "--num-gpus")


def console_options(function: Function) -> Function:
    """``--json -q -v --debug``: set on the console, never passed to the verb."""
    options = (
        ("--debug", "debug", "show the traceback of an error"),
        ("-v/--verbose", "verbose", "say more (plan: all that was considered)"),
        ("-q/--quiet", "quiet", "say nothing but errors and the JSON document"),
        ("--json", "json", "one JSON document on stdout; text for people goes to stderr"),
    )
    for names, attribute, text in options:
        function = click.option(
            *names.split("/"),
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_setter(attribute),
            help=text,
        )(function)
    return function


def scenario_options(*names: str) -> Callable[[Function], Function]:
    """One option for each flag named, or for all; the verb takes them as ``**typed`` for ``read_request``."""

    def decorate(function: Function) -> Function:
        function = click.option(
            *NUM_GPUS_NAMES,
            "num_gpus",
            type=int,
            metavar="N",
            help="so many GPUs, of the kind that --gpus names or that is found here",
        )(function)
        for flag in reversed(FLAGS):
            if not names or flag.name in names:
                function = _option(flag)(function)
        for name in OTHER_PARALLELISM:
            function = click.option(f"--{name}", metavar="N", hidden=True, expose_value=False, callback=_refuse)(
                function
            )
        return click.option(
            f"--{settings.PRESET}",
            metavar="NAME",
            help="flags of a published recipe; launchkit explain presets lists them",
        )(function)

    return decorate


def read_request(typed: Mapping[str, object], *, console: Console) -> Request:
    """The request that flags, environment and file make together; says what did not come from the flags."""
    environment, directory = settings.current()
    for variable in settings.unknown_variables(environment):
        console.note(f"note: {variable} is no setting of launchkit and does nothing")
    flags = dict(typed)
    num_gpus = flags.pop("num_gpus", None)
    gathered = settings.gather(flags, environment=environment, directory=directory)
    for note in gathered.notes:
        console.note(f"note: {note}")
    if gathered.origins:
        console.note(f"settings: {gathered.text}")
    return gathered.request if num_gpus is None else _with_num_gpus(gathered.request, num_gpus)


def _with_num_gpus(request: Request, num_gpus: object) -> Request:
    kind = request.gpus or "auto"
    if kind[:1].isdigit():
        raise click.UsageError(f"--gpus {kind} already says how many; leave out --num-gpus {num_gpus}")
    given: dict[str, object] = {**request.given(), "gpus": f"{num_gpus}x{kind}"}
    return Request.from_flags(given)


def _option(flag: Flag) -> Callable[[Function], Function]:
    text = flag.help if flag.default in (None, "none", False) else f"{flag.help} [{flag.default}]"
    if flag.kind is bool:
        return click.option(f"{flag.option}/--no-{flag.option[2:]}", flag.name, default=None, help=text)
    return click.option(flag.option, flag.name, metavar=_metavar(flag), help=text)


def _metavar(flag: Flag) -> str:
    if flag.choices:
        return "|".join(flag.choices)
    return {"gpus": "SPEC", "data": "FILE", "config": "FILE"}.get(flag.name, "N" if flag.kind is int else "NAME")


def _refuse(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """A degree of 1 is what everybody has."""
    if parameter.name is not None and value not in (None, "1"):
        find_flag(parameter.name)


def _setter(attribute: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def set_on_console(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            setattr(context.ensure_object(Console), attribute, True)

    return set_on_console
