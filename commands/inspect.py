"""`nemodiff inspect`: what an engine folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import click

from . import options


@click.command()
@options.engine
@options.json_output()
def inspect(engine: Path, as_json: bool) -> None:
    """Describe ENGINE without loading it."""
    from ..builder.inspect import describe, lines

    described = describe(engine)
    click.echo(json.dumps(described, indent=2) if as_json else "\n".join(lines(described)))
