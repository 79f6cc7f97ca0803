"""`nemodiff bench`: how fast an engine is on this machine, in every mode."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import click

from ..contract import MODES
from . import options
from .inputs import spare_inputs


@click.command(short_help="Measure how fast ENGINE is, in prefill and in every mode.")
@options.engine
@click.option(
    "--compare",
    type=options.PATH,
    help="Measure this engine too, in turns with ENGINE, and print the ratios of ENGINE over it.",
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice([*MODES, "auto"]),
    multiple=True,
    help="Measure this mode; may be repeated. [default: all]",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    multiple=True,
    default=[1],
    show_default=True,
    help="Decode this many requests at a time; may be repeated.",
)
@click.option(
    "--input-len",
    type=click.IntRange(1),
    multiple=True,
    help="Measure the prefill of this many tokens; may be repeated. [default: 512, or as many as the engine takes]",
)
@click.option(
    "--input-file",
    type=options.PATH,
    help='Decode the prompts of this file, - for standard input: a JSON object with "prompt" or "messages" a line. '
    "[default: six short ones]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Stop an answer after this many new tokens.",
)
@click.option(
    "--block-length",
    metavar="INTEGER|auto",
    help="Decode blocks of this many tokens. [default: the default of each mode]",
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Measure this many rounds."
)
@click.option(
    "--warmup",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Run this many rounds before them, and drop them.",
)
@click.option("--no-keep", is_flag=True, help="Do not keep the cost curve in the engine folder.")
@click.option(
    "--plot", type=options.OUTPUT_FILE, help="Draw the figures into this file, such as bench.png; needs the extra plot."
)
@options.threads
@options.device
@options.json_output()
def bench(
    engine: Path,
    compare: Path | None,
    modes: tuple[str, ...],
    concurrency: tuple[int, ...],
    input_len: tuple[int, ...],
    input_file: Path | None,
    max_new_tokens: int,
    block_length: str | None,
    repetitions: int,
    warmup: int,
    no_keep: bool,
    plot: Path | None,
    threads: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure how fast ENGINE is on this machine, in prefill and in every mode.

    The cost of a pass by its tokens is kept in the engine folder, where mode auto and block length auto begin with it.
    docs/bench.md says what each figure is.
    """
    from ..measurement import bench as measured
    from ..measurement.plot import check_plot, draw
    from ..measurement.table import lines
    from ..runtime.loading import load

    if plot is not None:
        spare_inputs(plot, engine, compare, input_file)
        check_plot(plot)
    chosen: dict[str, Any] = {"modes": modes} if modes else {}
    if modes and not {*modes} - {"ar", "auto"}:
        unused = f"mode {' and '.join(sorted({*modes}))}"
        options.warn_unused(click.get_current_context(), ("block_length",), unused)
    if input_file is not None:
        chosen["prompts"] = _prompts(input_file)
    plan = measured.Plan(
        concurrency=concurrency,
        input_lens=input_len or None,
        max_new_tokens=max_new_tokens,
        block_length=_block(block_length),
        rounds=repetitions,
        warmup=warmup,
        **chosen,
    )
    folders = [engine] if compare is None else [engine, compare]
    engines = [load(folder, threads=threads, device=device) for folder in folders]
    outcomes = measured.bench(engines, plan, lambda text: click.echo(f"measuring {text}", err=True))
    if as_json:
        click.echo(json.dumps(measured.result(engines, outcomes, plan), indent=2))
    else:
        click.echo("\n".join(lines(engines, outcomes, plan)))
    if not no_keep:
        for loaded, outcome in zip(engines, outcomes, strict=True):
            _keep(loaded, outcome)
    if plot is not None:
        draw(plot, measured.names(engines), outcomes)


def _keep(engine: Any, outcome: Any) -> None:
    from ..runtime.planning.kept_curve import write_curve

    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    try:
        write_curve(engine.folder, engine.processor, engine.threads, outcome.curve, date)
    except OSError as error:
        click.echo(f"{engine.folder}: the cost curve is not kept ({error.strerror})", err=True)


def _prompts(path: Path) -> list[Any]:
    from ..batch.lines import read_lines

    lines = read_lines(path, as_json=True)
    if unused := sorted({name for line in lines for name in line.options}):
        click.echo(f"Warning: {lines[0].path}: bench does not use the options of lines ({', '.join(unused)})", err=True)
    return [line.prompt for line in lines]


def _block(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text
