"""``launchkit explain [TERM]``."""

from __future__ import annotations

import click

from launchkit.catalog.presets import load_presets
from launchkit.cli.console import Console
from launchkit.cli.options import console_options
from launchkit.report.explain import TERMS, find_term, render_term, render_terms, term_document
from launchkit.report.presets import render_presets
from launchkit.serialize import encode


@click.command(name="explain")
@click.argument("words", metavar="[TERM]", nargs=-1)
@console_options
@click.pass_obj
def command(console: Console, /, words: tuple[str, ...]) -> None:
    """Where a number comes from, what it counts and what it leaves out; without TERM, the list of terms; with
    presets, the list of those."""
    if not words:
        console.text(render_terms(canvas=console.canvas()))
        console.document({"terms": [term_document(term) for term in TERMS]})
        return
    term = find_term(" ".join(words))
    document = term_document(term)
    console.text(render_term(term, canvas=console.canvas()))
    if term.name == "preset":
        console.text(render_presets(load_presets(), canvas=console.canvas()))
        document["presets"] = encode(load_presets())
    console.document(document)
