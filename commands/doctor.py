"""`nemodiff doctor`: what this machine can build and run, and what would mend the rest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from ..version import __version__
from . import options
from .answers import one_line


@click.command()
@options.json_output("Print one JSON object, for a bug report.")
def doctor(as_json: bool) -> None:
    """Look at what this machine can build and run.

    Each line is ok, missing (an extra that is not installed) or wrong, with what mends it. The exit code is 1 if
    anything is wrong.
    """
    from ..doctor.diagnose import diagnose

    checks = diagnose(Path.cwd())
    wrong = any(check.state == "wrong" for check in checks)
    if as_json:
        values = {
            "nemodiff": __version__,
            "ok": not wrong,
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        click.echo(json.dumps(values, indent=2))
    else:
        for check in checks:
            remedy = f"; {check.remedy}" if check.remedy else ""
            click.echo(one_line(f"{check.state:8} {check.name:14} {check.found}{remedy}"))
    if wrong:
        raise click.exceptions.Exit(1)
