"""`nemodiff batch`: files of prompts are answered by as many machines as Ray has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..contract import counted
from . import options
from .streams import TEXT


@click.command(cls=options.RequestCommand, short_help="Answer files of prompts on one machine or a cluster.")
@options.engine
@click.option(
    "--input",
    "inputs",
    type=TEXT,
    multiple=True,
    required=True,
    metavar="FILE|GLOB",
    help="Answer the rows of these files, JSON lines or Parquet, as `run --input-file` does; may be repeated.",
)
@click.option(
    "--output",
    type=options.PATH,
    required=True,
    help="Write the answers into this folder, on storage that all machines share.",
)
@click.option("--format", type=click.Choice(["jsonl", "parquet"]), help="Write this. [default: what the input is]")
@click.option("--address", type=TEXT, help="Use the Ray cluster here. [default: RAY_ADDRESS, or this machine]")
@click.option(
    "--workers", type=click.IntRange(1), help="Load the engine this many times. [default: per GPU, or per machine]"
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Decode this many rows at the same time in each worker. [default: the engine's max batch size]",
)
@click.option(
    "--rows-per-part",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Hand out this many rows at a time; each becomes one file of answers.",
)
@click.option("--raw", is_flag=True, help="Continue the prompts as they are, without the chat template.")
@options.generation_config
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Use this many CPU threads in each worker. [default: a machine's, shared by its workers]",
)
@options.device
def batch(
    engine: Path,
    inputs: tuple[str, ...],
    output: Path,
    format: str | None,
    address: str | None,
    workers: int | None,
    batch_size: int | None,
    rows_per_part: int,
    raw: bool,
    threads: int | None,
    device: str | None,
    **choices: Any,
) -> None:
    """Answer files of prompts with ENGINE on one machine or a Ray cluster.

    The same command goes on where a killed one stopped: what has been answered is kept.
    """
    from tqdm import tqdm

    from ..batch.job import Job, run_job

    job = Job(
        engine,
        inputs,
        output,
        {**choices, "chat": not raw},
        workers=workers,
        rows=batch_size,
        threads=threads,
        device=device,
        address=address,
        rows_per_part=rows_per_part,
        format=format,
    )
    with tqdm(unit="row", disable=None, desc="answering") as bar:

        def progress(done: int, rows: int) -> None:
            bar.total = rows
            bar.n = done
            bar.refresh()

        totals = run_job(job, progress)
    click.echo(
        f"{output}: {counted(totals.answered, 'row')} answered ({counted(totals.tokens, 'token')}) by "
        f"{counted(totals.workers, 'worker')}, "
        f"{totals.kept} kept from before, {totals.failed} failed",
        err=True,
    )
    if totals.failed:
        raise click.ClickException(
            f"{totals.failed} of {counted(totals.rows, 'row')} failed; see {output / 'failed.jsonl'}"
        )
