"""`nemodiff run`: one prompt, or a file of them, is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..contract import counted
from ..runtime.text.files import STDIN
from . import options
from .answers import follow, print_lines, print_statistics, print_warnings
from .calls import spelled
from .inputs import read_stdin, read_stdin_bytes, spare_inputs
from .streams import TEXT

if TYPE_CHECKING:
    from ..runtime.events.events import Event
    from ..runtime.loading import LoadedEngine
    from ..runtime.requests.prepare import Prompt


@click.command(cls=options.RequestCommand)
@options.engine
@click.option("-p", "--prompt", type=TEXT, help="Answer this prompt. [default: standard input]")
@click.option(
    "--input-file",
    type=options.PATH,
    help='Answer every line of this file, - for standard input: a JSON object with "prompt" or "messages", and options '
    "by their names.",
)
@click.option(
    "--batch-size",
    type=int,
    default=1,
    show_default=True,
    help="Decode this many prompts of --input-file at the same time.",
)
@click.option(
    "--image",
    "images",
    type=options.PATH,
    multiple=True,
    metavar="FILE",
    help="Show the model this image before the prompt, - for standard input; may be repeated.",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@options.generation_config
@options.loading
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
    images: tuple[Path, ...],
    raw: bool,
    loading: dict[str, Any],
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
    if images and input_file is not None:
        raise click.UsageError("--image goes with --prompt; a line of --input-file has images in its messages")
    if images and raw:
        raise click.UsageError("--image needs the chat template; leave out --raw")
    if input_file is None and batch_size != 1:
        raise click.UsageError("--batch-size goes with --input-file")
    if input_file is None and no_prefix_reuse:
        raise click.UsageError("--no-prefix-reuse goes with --input-file")
    spare_inputs(trace, engine, input_file, *images)
    from ..batch.answers import answer_lines
    from ..batch.lines import check_lines, read_lines, report_of

    if not as_json and (report := report_of(choices)) is not None:
        raise click.UsageError(f"{options.flag(report)} goes with --json")
    if stream and as_json:
        raise click.UsageError("give --stream or --json, not both")
    if input_file is not None and (stream or show_denoise):
        raise click.UsageError("--stream and --show-denoise are for a single prompt, not for --input-file")
    from ..runtime.events.trace import record
    from ..runtime.loading import load

    flags = {**choices, "chat": not raw}
    # The input is read before the engine, which takes longer.
    single = _one_prompt(prompt, images) if input_file is None else ""
    prompts = [] if input_file is None else read_lines(input_file, as_json=as_json)
    loaded = load(engine, **loading, progress=True)
    watched: dict[str, Any] = {"steps": show_denoise or trace is not None, "text": stream or trace is not None}
    with record(trace, loaded) as write:
        if input_file is None:
            events = _events(loaded, single, flags, watched)
            tools = choices["tools"] is not None
            for answer in follow(loaded, map(write, events), stream=stream, show_denoise=show_denoise, tools=tools):
                text = spelled(answer) if tools else answer.text
                click.echo(json.dumps(answer.as_dict()) if as_json else "" if stream else text)
                print_warnings(answer, set())
                if stats:
                    print_statistics(answer, loaded.info)
            return
        check_lines(loaded, prompts, flags, batch_size)
        watched |= {"rows": batch_size, "prefix_reuse": not no_prefix_reuse}
        refused = print_lines(
            answer_lines(loaded, prompts, flags, write, **watched),
            as_json=as_json,
            stats=loaded.info if stats else None,
        )
    if refused and as_json:
        raise click.ClickException(
            f'{prompts[0].path}: refused {refused} of {counted(len(prompts), "line")}; see "error" in their objects'
        )
    if refused:
        raise click.exceptions.Exit(1)


def _one_prompt(prompt: str | None, images: tuple[Path, ...]) -> Prompt:
    if images.count(STDIN) > 1 or (STDIN in images and prompt is None):
        raise click.UsageError("standard input is one image or the prompt; give the other images by name, and --prompt")
    if prompt is None:
        prompt = read_stdin("no prompt: give --prompt TEXT, --input-file FILE, or text on standard input")
    if not images:
        return prompt
    parts = [{"type": "image", "image": read_stdin_bytes() if image == STDIN else str(image)} for image in images]
    message: Mapping[str, Any] = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
    return [message]


def _events(
    engine: LoadedEngine, prompt: Prompt, flags: Mapping[str, Any], watched: Mapping[str, Any]
) -> Iterator[Event]:
    from ..runtime.generate import sequence_events
    from ..runtime.requests.options import make_options
    from ..runtime.requests.prepare import prepare

    return sequence_events(engine, [prepare(engine, prompt, make_options(flags))], **watched)
