"""`nemodiff verify`: whether an engine gives what its model gives."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import click

from ..contract import counted
from ..engine_folder import VERIFY_FILE, write_record
from ..errors import RequestError
from . import options
from .answers import one_line
from .inputs import spare_inputs
from .streams import TEXT

# What --layers looks at: every kind of pass, at near and at far positions.
_SCRIPTS = 3
_BLOCKS = 12


@click.command(short_help="Check ENGINE against its model, and its exact modes against ar.")
@options.engine
@click.option(
    "--against",
    help="Compare with this checkpoint (a folder or a hub id) or with this engine. [default: the engine itself, each "
    "pass in a fresh cache]",
)
@click.option(
    "--adapter",
    type=options.PATH,
    help="Take the drafter adapter from this folder; with a checkpoint. [default: the checkpoint's linear_spec_lora]",
)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    type=TEXT,
    multiple=True,
    help="Use this prompt; may be repeated; one too long for the engine loses its beginning. [default: six built-in "
    "ones]",
)
@click.option("--raw", is_flag=True, help="Take the prompts as they are, without the chat template.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Compare answers of at most this many tokens.",
)
@click.option("--layers", is_flag=True, help="Find the first layer that strays; needs the extra verify.")
@click.option(
    "--save-outputs",
    type=options.OUTPUT_FILE,
    help="Write the values of all layers to this file, for Polygraphy's tools; with --layers.",
)
@options.threads
@options.device
@options.json_output()
def verify(
    engine: Path,
    against: str | None,
    adapter: Path | None,
    prompts: tuple[str, ...],
    raw: bool,
    max_new_tokens: int,
    layers: bool,
    save_outputs: Path | None,
    threads: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Check that ENGINE gives what its model gives, and that its exact modes give what ar gives.

    Every token of every pass is equal, a near tie that rounding may decide, or wrong. The result is printed and kept in
    the engine folder as verify.json; the exit code is 1 if anything is wrong.
    """
    # Before numpy comes in: threads of its BLAS spin between the reference's products, which has threads of its own.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from tqdm import tqdm

    from ..runtime.loading import load
    from ..verification.prompts import token_ids
    from ..verification.recorder import columns
    from ..verification.references import open_reference, other_weights
    from ..verification.verify import failures
    from ..verification.verify import verify as run

    if save_outputs is not None and not layers:
        raise click.UsageError("--save-outputs goes with --layers")
    spare_inputs(save_outputs, engine, against, adapter)
    if layers:
        from ..verification.layers import blame, compare_layers, import_polygraphy, save_results

        import_polygraphy()  # before the work begins
    loaded = load(engine, threads=threads, device=device)
    reference, name = open_reference(loaded, against, adapter, threads)
    if max_new_tokens >= loaded.info.build.max_seq_len:
        raise RequestError(
            f"max_new_tokens is {max_new_tokens}, allowed: 1 to {loaded.info.build.max_seq_len - 1}, one less than the "
            "engine's max_seq_len; ask for fewer"
        )
    ids = token_ids(loaded, prompts, max_new_tokens, raw=raw)
    click.echo(
        f"verifying    {engine} ({loaded.info.manifest.backend}, {loaded.info.build.dtype_text}) against {name} in "
        f"{reference.precision}, {counted(len(ids), 'prompt')}",
        err=True,
    )
    with tqdm(total=len(ids) + 1, desc="verifying", disable=None, file=sys.stderr) as bar:
        report, scripts = run(loaded, ids, reference, max_new_tokens=max_new_tokens, advance=bar.update)
    values = None
    few = [script.shortened(_BLOCKS) for script in scripts if script.blocks][:_SCRIPTS]
    if layers and few:
        sample = columns(loaded.info.model.vocab_size)
        with failures(report, "layers"):
            report.layers, values = compare_layers(loaded.backend, engine, reference, few, sample)
        report.blame = blame(report.layers)
    if against is not None and not report.ok:
        report.other_weights = other_weights(loaded.info, against, adapter)
    record = {"date": time.strftime("%Y-%m-%d"), "against": name, **report.as_dict()}
    kept = f"kept in {engine / VERIFY_FILE}"
    try:
        write_record(engine, VERIFY_FILE, record)
    except OSError as error:
        kept = f"not kept, {engine} cannot be written ({error.strerror})"
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        click.echo("\n".join(one_line(line) for line in report.lines()))
    click.echo(f"{'verified' if report.ok else 'WRONG':12} {engine}; {kept}", err=True)
    if values is not None and save_outputs is not None:
        save_results(values, save_outputs)
    if not report.ok:
        raise click.exceptions.Exit(1)
