"""`nemodiff trace`: what `run --trace` has written."""

from __future__ import annotations

from pathlib import Path

import click

from .answers import one_line
from .inputs import spare_inputs
from .options import OUTPUT_FILE, PATH


@click.group()
def trace() -> None:
    """Examine the files that run --trace writes."""


@trace.command(short_help="Summarize each request in FILE.")
@click.argument("file", type=PATH)
def show(file: Path) -> None:
    """Summarize each request in FILE, a trace in JSON lines: its passes, times and drafts."""
    from ..runtime.events.trace import read

    click.echo("\n".join(one_line(line) for line in read(file)[1]))


@trace.command()
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="Write the page to this HTML file.")
def view(files: tuple[Path, ...], output: Path) -> None:
    """Write one HTML page that plays the traces of FILES side by side.

    The page needs no server.
    """
    from ..runtime.events.trace import read
    from ..serving.http.page_export import html
    from ..whole_file import whole

    spare_inputs(output, *files)
    text = html([(file.stem, read(file)[0]) for file in files])
    with whole(output) as stage:
        stage.write_text(text, encoding="utf-8")
    click.echo(f"written      {output}; open it in a browser", err=True)
