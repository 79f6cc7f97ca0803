"""`nemodiff tune`: the card at hand chooses how an engine's kernels run."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import click

from . import options


@click.command(short_help="Let this GPU choose the fastest kernels of ENGINE.")
@options.engine
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(2),
    default=12,
    show_default=True,
    help="Measure this many turns.",
)
@options.device
@options.json_output()
def tune(engine: Path, repetitions: int, device: str | None, as_json: bool) -> None:
    """Time decode passes of ENGINE, a torch engine, on this GPU in every way to run its kernels.

    The fastest way is kept in the engine folder and used wherever the engine is loaded on such a card with the same
    versions of driver, torch, Triton and nemodiff, but not with --tp-size. It may round 16-bit numbers otherwise than
    the default.
    """
    from ..measurement.tune import lines, open_probes, tune
    from ..tuned import Tuned, named, read_tuned, write_tuned

    probes = open_probes(engine, device)
    here = probes.engine.device.identity
    outcome = tune(
        probes.trial, probes.flips, probes.exact, lambda text: click.echo(f"measuring {text}", err=True), repetitions
    )
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    measured = outcome.as_dict(probes.names)
    write_tuned(engine, Tuned(outcome.choice, here, date), measured)
    for kept in read_tuned(engine):
        if kept.here != here:
            click.echo(f"kept beside it and not used here: {kept.choice}, for {named(kept.here)}", err=True)
    if as_json:
        chosen = {"pdl": outcome.choice.pdl, "own_products": sorted(outcome.choice.own_products)}
        click.echo(json.dumps({"here": here, "date": date, **chosen, **measured}, indent=2))
    else:
        click.echo("\n".join([named(here), "", *lines(outcome, probes.names)]))
