"""`nemodiff run`: one prompt, or a file of them, is answered."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RequestError
from ..runtime.text.checks import check_text
from . import options
from .answers import follow, print_statistics, print_warnings
from .inputs import read_prompts, read_stdin

if TYPE_CHECKING:
    from ..runtime.loading import LoadedEngine
    from ..runtime.requests.sequence import Sequence


@click.command()
@options.engine
@click.option("-p", "--prompt", help="Answer this prompt. [default: standard input]")
@click.option(
    "--input-file",
    type=options.PATH,
    help='Answer every line of this file, a JSON object {"prompt": ...} or {"messages": [...]}.',
)
@click.option(
    "--batch-size",
    type=int,
    default=1,
    show_default=True,
    help="Decode this many prompts of --input-file at the same time.",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@options.request_options("chat", "prefill_chunk")
@options.threads
@options.device
@options.statistics
@click.option("--stream", is_flag=True, help="Print the text as it becomes final.")
@click.option("--show-denoise", is_flag=True, help="Print a line per pass on standard error as the blocks fill in.")
@options.json_output("Print one JSON object per answer instead of its text.")
@click.option(
    "--no-prefix-reuse",
    is_flag=True,
    help="Compute every prompt of --input-file in full, even where it begins like an earlier one.",
)
@click.option(
    "--trace",
    type=options.OUTPUT_FILE,
    help="Write every event to this file, as JSON lines or, if its name ends in .json, as a timeline for Perfetto.",
)
def run(
    engine: Path,
    prompt: str | None,
    input_file: Path | None,
    batch_size: int,
    raw: bool,
    threads: int | None,
    device: str | None,
    stats: bool,
    stream: bool,
    show_denoise: bool,
    as_json: bool,
    no_prefix_reuse: bool,
    trace: Path | None,
    **choices: Any,
) -> None:
    """Answer a prompt with ENGINE."""
    if prompt is not None and input_file is not None:
        raise click.UsageError("give --prompt or --input-file, not both")
    if input_file is None and batch_size != 1:
        raise click.UsageError("--batch-size goes with --input-file")
    if input_file is None and no_prefix_reuse:
        raise click.UsageError("--no-prefix-reuse goes with --input-file")
    for name in ("logprobs", "confidences"):
        if choices[name] not in (None, False) and not as_json:
            raise click.UsageError(f"--{name} goes with --json")
    if stream and as_json:
        raise click.UsageError("give --stream or --json, not both")
    if input_file is not None and (stream or show_denoise):
        raise click.UsageError("--stream and --show-denoise are for a single prompt, not for --input-file")
    from ..runtime.events.trace import record
    from ..runtime.generate import sequence_events
    from ..runtime.loading import check_rows, load

    prompts = list(read_prompts(input_file)) if input_file is not None else [("", _one_prompt(prompt))]
    loaded = load(engine, threads=threads, device=device)
    check_rows(loaded, batch_size)
    events = sequence_events(
        loaded,
        _submitted(_prepared(loaded, prompts, {**choices, "chat": not raw})),
        rows=batch_size,
        prefix_reuse=input_file is not None and not no_prefix_reuse,
        steps=show_denoise or trace is not None,
        text=stream or trace is not None,
    )
    told = set[str]()
    with record(trace, loaded) as write:
        for answer in follow(loaded, map(write, events), stream=stream, show_denoise=show_denoise):
            click.echo(json.dumps(answer.as_dict()) if as_json else "" if stream else answer.text)
            print_warnings(answer, told)
            if stats:
                print_statistics(answer)


def _one_prompt(prompt: str | None) -> str:
    if prompt is None:
        prompt = read_stdin("no prompt: give --prompt TEXT, --input-file FILE, or text on standard input")
    check_text(prompt, "--prompt")
    return prompt


def _prepared(engine: LoadedEngine, prompts: list[tuple[str, Any]], choices: dict[str, Any]) -> list[Sequence]:
    """Every prompt as a request, so that the last one is checked before the first is run. Raises RequestError."""
    from ..runtime.requests.options import make_options
    from ..runtime.requests.prepare import prepare

    options = make_options(choices)
    sequences = []
    for place, prompt in prompts:
        try:
            sequences.append(prepare(engine, prompt, options))
        except RequestError as error:
            raise RequestError(f"{place}: {error}" if place else str(error)) from None
    return sequences


def _submitted(sequences: list[Sequence]) -> Iterator[Sequence]:
    """The requests as rows become free; their times count from then, not from their preparation."""
    for sequence in sequences:
        sequence.submitted = time.perf_counter()
        yield sequence
