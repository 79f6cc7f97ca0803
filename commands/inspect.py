"""`nemodiff inspect`: what an engine folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..contract import counted
from . import options


@click.command()
@options.engine
@click.option("--check", is_flag=True, help="Read every file too, and refuse one that is not as it was built.")
@options.json_output()
def inspect(engine: Path, check: bool, as_json: bool) -> None:
    """Describe ENGINE without loading it."""
    from ..builder.inspect import check_files, describe, lines

    if check:
        check_files(engine)
    described = describe(engine)
    click.echo(json.dumps(described, indent=2) if as_json else "\n".join(lines(described)))
    if check:
        click.echo(f"{'checked':12} {counted(len(described['files']), 'file')}, all as built", err=True)
