"""What the documentation site has that does not stand in docs/: called by mkdocs as it builds."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from typing import TYPE_CHECKING, Any

from dynaslim import cli

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in the command line, lead to the page of examples, leave notes for scripts out."""
    if page.file.src_uri == "reference/cli.md":
        markdown += command_line()  # made of the verbs, so that it is never behind
    # each note stands on a line of its own; a table right behind it is a table then
    markdown = re.sub(r"(?m)^<!-- .* -->$", "", markdown)
    # examples lie beside docs/, where the site does not reach
    return re.sub(r"\]\(\.\./examples/(\w+)\.py\)", r"](examples.md#\1)", markdown)


def command_line() -> str:
    """A table of the verbs, then the help of each."""
    rows = ["| verb | what it does |", "|---|---|"]
    parts = []
    for name, verb in cli.VERBS.items():
        first = (inspect.getdoc(verb.run) or "").splitlines()[0]
        rows.append(f"| [`{name}`](#{name.replace(' ', '-')}) | {first} |")
        parts.append(f"## {name}\n\n```text\n{help_of(name)}\n```\n")
    return "\n" + "\n".join(rows) + "\n\n" + "\n".join(parts)


def help_of(verb: str) -> str:
    """What `dynaslim VERB --help` prints, 88 columns wide."""
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "88"
    try:
        with contextlib.redirect_stdout(printed):
            code = cli.run([*verb.split(), "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    assert code == 0, f"dynaslim {verb} --help failed"
    return printed.getvalue().rstrip()
