"""`nemodiff infill` and `nemodiff revise`: a text is completed or corrected where it stands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from ..errors import RequestError
from ..runtime.editing.options import (
    DEFAULT_KEEP,
    DEFAULT_METHOD,
    DEFAULT_ROUNDS,
    DEFAULT_THRESHOLD,
    DEFAULT_WIDTH,
    HELP,
    METHODS,
)
from ..runtime.text.files import called, read_text
from . import options
from .inputs import read_stdin
from .streams import TEXT


@click.command()
@options.engine
@click.option("--prefix", type=TEXT, help=HELP["prefix"])
@click.option("--suffix", type=TEXT, default="", help=HELP["suffix"])
@click.option("--length", type=int, help="Fill the hole with this many tokens. [default: a length that fits]")
@click.option(
    "--template",
    type=TEXT,
    help="Fill every {hole} or {hole:12} of this text, in place of --prefix, --suffix and --length.",
)
@options.editing_prompt
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=DEFAULT_METHOD,
    show_default=True,
    help=HELP["method"],
)
@click.option("--width", type=int, default=DEFAULT_WIDTH, show_default=True, help=HELP["width"])
@click.option(
    "--threshold",
    type=float,
    default=DEFAULT_THRESHOLD,
    show_default=True,
    help="Commit a masked token of method block at this confidence or more.",
)
@click.option(
    "--block-length",
    type=int,
    help="Let method block look at this many tokens at once, hole included. [default: the engine's block length]",
)
@options.threads
@options.device
@options.json_output()
def infill(
    engine: Path,
    prefix: str | None,
    suffix: str,
    length: int | None,
    template: str | None,
    threads: int | None,
    device: str | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Fill the holes of a text with ENGINE.

    The model sees the text before and after a hole.
    """
    from ..runtime.editing.infill import fill, parse_template
    from ..runtime.loading import load

    if (template is None) == (prefix is None):
        raise click.UsageError("give --prefix (with --suffix and --length) or --template")
    if template is not None and (suffix or length is not None):
        raise click.UsageError("--suffix and --length go with --prefix; a template says them itself")
    parts = parse_template(template) if template is not None else [prefix, length, suffix]
    filled = fill(load(engine, threads=threads, device=device), parts, **choices)
    unused = ("threshold", "block_length") if choices["method"] == "search" else ("width",)
    options.warn_unused(click.get_current_context(), unused, f"method {choices['method']}")
    click.echo(json.dumps(dataclasses.asdict(filled)) if as_json else filled.text)


@click.command()
@options.engine
@click.option("--text", type=TEXT, help="Revise this text. [default: standard input]")
@click.option("--file", type=options.PATH, help="Revise the text of this file, - for standard input.")
@options.editing_prompt
@click.option(
    "--keep",
    type=float,
    default=DEFAULT_KEEP,
    show_default=True,
    help="Keep a token that has this probability or more after the text before it.",
)
@click.option(
    "--rounds", type=int, default=DEFAULT_ROUNDS, show_default=True, help="Look at a block at most this many times."
)
@click.option(
    "--threshold",
    type=float,
    default=DEFAULT_THRESHOLD,
    show_default=True,
    help="Commit a masked token at this confidence or more.",
)
@click.option("--block-length", type=int, help="Look at this many tokens at once. [default: the engine's block length]")
@options.threads
@options.device
@options.json_output()
def revise(
    engine: Path,
    text: str | None,
    file: Path | None,
    threads: int | None,
    device: str | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Correct a text with ENGINE.

    Tokens that the model finds improbable are decoded again; the number of tokens stays.
    """
    from ..runtime.editing.revise import revise as revise_text
    from ..runtime.loading import load

    if text is not None and file is not None:
        raise click.UsageError("give --text or --file, not both")
    if file is not None:
        text = read_text(file).removesuffix("\n")
        if not text:
            raise RequestError(f"{called(file)}: no text to revise; give a file that holds some")
    elif text is None:
        text = read_stdin("no text: give --text TEXT, --file FILE, or text on standard input")
    revised = revise_text(load(engine, threads=threads, device=device), text, **choices)
    click.echo(json.dumps(dataclasses.asdict(revised)) if as_json else revised.text)
