"""The `nemodiff` command: build, export, inspect, run, chat, infill, revise, serve, trace, triton.

Standard output carries answers only; progress, statistics and errors go to standard error. A user's mistake is one
line and exit code 1 (2 for a wrong flag). Spellings with underscores (`--max_batch_size`) are accepted too. Modules
that take time to import are imported by the command that needs them.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .contract import (
    BACKEND_DTYPES,
    COMPILED,
    DEFAULT_MAX_BATCH_SIZE,
    DEFAULT_MAX_SEQ_LEN,
    EXPORT_FORMATS,
    ITEMSIZE,
    MAX_BLOCK,
    MODES,
    PREFILL_CHUNK,
    QUANTIZATIONS,
)
from .errors import NemodiffError, RequestError
from .runtime.editing.infill import METHODS
from .runtime.requests.options import AUTO, DEFAULT_NEW_TOKENS
from .runtime.requests.settings import GROUPS
from .runtime.sampling.commit import POLICIES
from .runtime.text.checks import check_text

if TYPE_CHECKING:
    from .runtime.events.events import Event
    from .runtime.loading import LoadedEngine
    from .runtime.requests.generation import Generation

Command = Callable[..., None]


class _Group(click.Group):
    """Turns every problem a user can cause into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NemodiffError as error:
            raise click.ClickException(_printable(str(error))) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            text = f"{error.filename or 'input/output'}: {error.strerror or error}; check the path and its disk"
            raise click.ClickException(_printable(text)) from None
        except MemoryError:
            raise click.ClickException("out of memory; see what would fit: nemodiff build --dry-run") from None


def _printable(text: str) -> str:
    """The text as one line: names out of a file may hold line ends and terminal controls."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token if token in (*MODES, *POLICIES) else token.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.version_option(package_name="nemodiff")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Compile tri-mode language models into one engine and decode with it in every mode."""
    if os.environ.get("NO_COLOR"):  # no-color.org; click itself does not look at it
        ctx.color = False


@main.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Engine folder to write.")
@click.option(
    "--backend", type=click.Choice(list(BACKEND_DTYPES)), default="onnxruntime", show_default=True, help="What runs it."
)
@click.option(
    "--dtype", type=click.Choice(list(ITEMSIZE)), help="Of weights and cache. [default: f32 on onnxruntime, else bf16]"
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(1),
    help=f"Prompt plus generated tokens. [default: {DEFAULT_MAX_SEQ_LEN} or the model's limit]",
)
@click.option(
    "--max-batch-size",
    type=int,
    default=DEFAULT_MAX_BATCH_SIZE,
    show_default=True,
    help="Rows that may share a forward.",
)
@click.option(
    "--block-length", type=click.IntRange(1), help=f"Default block length, 1..{MAX_BLOCK}. [default: the checkpoint's]"
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Folder of a drafter adapter. [default: the checkpoint's linear_spec_lora]",
)
@click.option("--max-input-len", type=int, help=f"Tokens of a prefill pass; TensorRT. [default: {PREFILL_CHUNK}]")
@click.option("--quantization", type=click.Choice(list(QUANTIZATIONS)), help="Of the layers' projections; torch.")
@click.option("--logits/--no-logits", default=True, help="Leave out what sampling needs; TensorRT.")
@click.option("--sm", help="GPUs to compile for; tensorrt-rtx. [default: 80,86,89,120]")
@click.option("--plugins", is_flag=True, help="Use nemodiff's own kernels instead of TensorRT's layers; TensorRT.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="File of measured tactics; tensorrt.")
@click.option("--workspace", type=int, metavar="MIB", help="Scratch memory a layer may use; TensorRT.")
@click.option("--opt-level", type=int, help="0 (fast build) to 5 (fast engine); TensorRT.")
@click.option("--strip-weights", is_flag=True, help="An engine whose weights are put in when it loads; TensorRT.")
@click.option("--refit", is_flag=True, help="An engine whose weights can be replaced; TensorRT.")
@click.option("--version-compatible", is_flag=True, help="Runs in later TensorRT versions too; tensorrt.")
@click.option("--dry-run", is_flag=True, help="Print what would be built and what fits; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON.")
def build(checkpoint: str, output: Path, dry_run: bool, as_json: bool, sm: str | None, **options: Any) -> None:
    """Build CHECKPOINT into an engine folder.

    CHECKPOINT is a folder with config.json and safetensors, or a hub id such as nvidia/Nemotron-Labs-Diffusion-8B,
    optionally with @REVISION.
    """
    from tqdm import tqdm

    from .builder.build import Builder
    from .builder.compilers.tensorrt import Choices

    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run; the build itself prints nothing but its progress")
    compiled = {field.name: options.pop(field.name) for field in dataclasses.fields(Choices) if field.name != "sm"}
    choices = Choices(sm=_parse_sms(sm), **compiled)
    builder = Builder(checkpoint, output, headers_only=dry_run, choices=choices, **options)
    plan = builder.plan()
    if dry_run:
        click.echo(json.dumps(plan.as_dict(), indent=2) if as_json else "\n".join(plan.lines(checkpoint, output)))
        return
    for line in plan.lines(checkpoint, output):
        click.echo(line, err=True)
    bar = tqdm(total=plan.weight_bytes, unit="B", unit_scale=True, desc="writing", disable=None, file=sys.stderr)
    with bar:
        builder.run(bar.update)
    where = "where such a GPU is" if builder.backend in COMPILED else "try"
    click.echo(f"built        {output}; {where}: nemodiff run {output} -p 'Hello'", err=True)


def _parse_sms(text: str | None) -> tuple[int, ...] | None:
    """`80,8.9` -> (80, 89)."""
    if text is None:
        return None
    parts = [part.strip().removeprefix("sm_").replace(".", "") for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise click.UsageError(f"--sm is {text!r}; give compute capabilities like 80,86,89")
    return tuple(map(int, parts))


@main.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(EXPORT_FORMATS),
    default=EXPORT_FORMATS[0],
    show_default=True,
    help="Layout of the folder.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be written; write nothing.")
def export(checkpoint: str, output: Path, layout: str, dry_run: bool) -> None:
    """Write the autoregressive twin of CHECKPOINT for other engines.

    CHECKPOINT is a folder or a hub id, as for build. The twin is a plain Ministral-3 folder with the same weights,
    bit for bit, which decodes as mode ar does.
    """
    from tqdm import tqdm

    from .builder.export import Exporter

    exporter = Exporter(checkpoint, output, layout=layout, headers_only=dry_run)
    plan = exporter.plan()
    for line in plan.lines(checkpoint, output):
        click.echo(line, err=not dry_run)
    if dry_run:
        return
    bar = tqdm(total=plan.weight_bytes, unit="B", unit_scale=True, desc="writing", disable=None, file=sys.stderr)
    with bar:
        exporter.run(bar.update)
    click.echo(f"exported     {output}; load it with transformers' AutoModelForCausalLM.from_pretrained", err=True)


def _biases(_context: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> dict[str, float]:
    """`ID=NUMBER` words as a mapping."""
    found = {}
    for word in words:
        token, _, number = word.partition("=")
        try:
            found[token] = float(number)
        except ValueError:
            raise click.BadParameter(f"{word!r} is not ID=NUMBER, such as 11=-5") from None
    return found


def _file_or_text(_context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """The value itself if it is JSON's object or literal, else what the file of that name holds."""
    if value is None or value.lstrip().startswith("{") or value.strip() in ("true", "false"):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise click.BadParameter(f"{value}: {reason}; give a file or the schema itself, which begins with {{") from None


def _block_length(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    return value if value in (None, AUTO) else int(click.INT(value, parameter, context))


def _decoding_options(command: Command) -> Command:
    """The options that `run` and `chat` share."""
    options = [
        click.option(
            "--mode",
            type=click.Choice((*MODES, AUTO)),
            default="linear_spec",
            show_default=True,
            help="Decoding mode; auto takes the fastest that gives ar's tokens.",
        ),
        click.option(
            "--block-length",
            callback=_block_length,
            metavar="INTEGER|auto",
            help=f"Tokens per block, 1..{MAX_BLOCK}, or auto: the fastest. [default: the engine's]",
        ),
        click.option(
            "--groups", type=click.Choice(GROUPS), default="auto", show_default=True, help="Drafts of quadratic_spec."
        ),
        click.option(
            "--threshold", type=float, help="Confidence that commits a mask. [default: diffusion 0.9, draft 0]"
        ),
        click.option(
            "--max-new-tokens",
            type=int,
            help=f"Limit on generated tokens. [default: {DEFAULT_NEW_TOKENS} or what fits]",
        ),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="Of sampling; 0 is greedy."),
        click.option("--top-k", type=int, default=0, show_default=True, help="Ids that may be drawn; 0 for all."),
        click.option("--top-p", type=float, default=1.0, show_default=True, help="Share of probability to draw from."),
        click.option(
            "--min-p", type=float, default=0.0, show_default=True, help="Least probability, as a share of the highest."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling noise."),
        click.option(
            "--repetition-penalty",
            type=float,
            default=1.0,
            show_default=True,
            help="Over 1 makes what the prompt or the answer holds less likely.",
        ),
        click.option(
            "--presence-penalty", type=float, default=0.0, show_default=True, help="Off the logit of emitted ids."
        ),
        click.option(
            "--frequency-penalty", type=float, default=0.0, show_default=True, help="The same, per time of emission."
        ),
        click.option("--logit-bias", multiple=True, callback=_biases, help="ID=NUMBER added to a logit; repeatable."),
        click.option("--bad-words", multiple=True, help="Text that is not to be completed; may be repeated."),
        click.option("--min-tokens", type=int, default=0, show_default=True, help="No EOS before as many tokens."),
        click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated."),
        click.option("--stop-token-ids", type=int, multiple=True, help="Id that ends the answer; may be repeated."),
        click.option("--system", help="System text."),
        click.option("--thinking", is_flag=True, help="Let the model think first."),
        click.option("--thinking-budget", type=int, help="Tokens after which thinking is ended."),
        click.option(
            "--json-schema", callback=_file_or_text, help="File or text of the JSON schema that the answer follows."
        ),
        click.option("--regex", help="Pattern that the whole answer matches."),
        click.option(
            "--policy",
            type=click.Choice(POLICIES),
            default="threshold",
            show_default=True,
            help="What a pass of diffusion commits.",
        ),
        click.option("--per-step", type=int, help="Masks that policy topk commits per pass."),
        click.option("--entropy-bound", type=float, help="Nats up to which policy entropy commits."),
        click.option("--steps", "block_steps", type=int, help="Most passes of diffusion per block."),
        click.option("--merge-commit", is_flag=True, help="Diffusion: commit a block and begin the next in one pass."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: one per core]"),
        click.option("--device", help="cpu, cuda or cuda:N. [default: what the engine was built for]"),
        click.option("--stats", is_flag=True, help="Passes, tokens per pass and times, on standard error."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="The prompt. [default: standard input]")
@click.option(
    "--input-file", type=click.Path(path_type=Path), help='JSON lines of {"prompt": ...} or {"messages": [...]}.'
)
@click.option(
    "--batch-size", type=int, default=1, show_default=True, help="With --input-file: prompts decoded together."
)
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the chat template.")
@_decoding_options
@click.option("--logprobs", type=int, help="With --json: log-probabilities of the tokens and of as many likeliest.")
@click.option("--confidences", is_flag=True, help="With --json: the confidence of each token of diffusion.")
@click.option("--stream", is_flag=True, help="Print text as it is decided.")
@click.option("--show-denoise", is_flag=True, help="Show blocks filling in, a line per pass, on standard error.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object (per line of --input-file) instead of text."
)
@click.option("--no-prefix-reuse", is_flag=True, help="With --input-file: compute what prompts share for each of them.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write every event to FILE: JSON lines, or for Perfetto if it ends in .json.",
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
    **options: Any,
) -> None:
    """Answer a prompt with ENGINE."""
    if prompt is not None and input_file is not None:
        raise click.UsageError("give --prompt or --input-file, not both")
    if input_file is None and batch_size != 1:
        raise click.UsageError("--batch-size goes with --input-file")
    if input_file is None and no_prefix_reuse:
        raise click.UsageError("--no-prefix-reuse goes with --input-file")
    for name in ("logprobs", "confidences"):
        if options[name] not in (None, False) and not as_json:
            raise click.UsageError(f"--{name} goes with --json")
    if stream and as_json:
        raise click.UsageError("give --stream or --json, not both")
    if input_file is not None and (stream or show_denoise):
        raise click.UsageError("--stream and --show-denoise are for a single prompt, not for --input-file")
    from .runtime.events.trace import record
    from .runtime.generate import events
    from .runtime.loading import load

    options["chat"] = not raw

    def show(answer: Generation) -> None:
        click.echo(json.dumps(answer.as_dict()) if as_json else "" if stream else answer.text)
        _print_stats(answer, stats)

    if input_file is not None:
        lines, reuse = list(_parse_prompts(input_file)), not no_prefix_reuse
        _answer_lines(
            load(engine, threads=threads, device=device), input_file, lines, batch_size, reuse, trace, show, options
        )
        return
    text = prompt if prompt is not None else _read_stdin()
    check_text(text, "--prompt")
    loaded, traced = load(engine, threads=threads, device=device), trace is not None
    told = events(loaded, [text], steps=show_denoise or traced, text=stream or traced, **options)
    with record(trace, loaded) as write:
        show(_follow(loaded, map(write, told), stream, show_denoise))


def _answer_lines(
    loaded: LoadedEngine,
    path: Path,
    lines: list[tuple[int, Any]],
    rows: int,
    prefix_reuse: bool,
    trace: Path | None,
    show: Callable[[Generation], None],
    options: dict[str, Any],
) -> None:
    """Answer the prompts of a file, in its order; all of them are checked before the first is run."""
    from .runtime.events.events import answers
    from .runtime.events.trace import record
    from .runtime.generate import events
    from .runtime.requests.options import make_options
    from .runtime.requests.prepare import prepare

    chosen, prompts = make_options(options), list[Any]()
    for number, prompt in lines:
        try:
            prompts.append(prepare(loaded, prompt, chosen).prompt)
        except RequestError as error:
            raise RequestError(f"{path}, line {number}: {error}") from None
    traced = trace is not None
    told = events(loaded, prompts, rows=rows, prefix_reuse=prefix_reuse, steps=traced, text=traced, **options)
    with record(trace, loaded) as write:
        for answer in answers(map(write, told)):
            show(answer)


def _follow(loaded: LoadedEngine, told: Iterable[Event], streaming: bool, show_denoise: bool) -> Generation:
    """Show one answer as it grows, if asked to, and return it."""
    from .runtime.events.events import Finished, Step, Text
    from .runtime.events.terminal import line

    for event in told:
        if isinstance(event, Step) and show_denoise:
            click.echo(line(loaded, event), err=True)
        elif isinstance(event, Text) and streaming:
            click.echo(event.text, nl=False)
        elif isinstance(event, Finished):
            return event.generation
    raise AssertionError("a request without an end")


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(engine: Path, as_json: bool) -> None:
    """Show what ENGINE is, without loading it."""
    from .builder.inspect import describe, lines

    described = describe(engine)
    click.echo(json.dumps(described, indent=2) if as_json else "\n".join(lines(described)))


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@_decoding_options
def chat(engine: Path, threads: int | None, device: str | None, stats: bool, **options: Any) -> None:
    """Talk with ENGINE; the conversation is kept. /reset forgets it, /exit or end of input leaves."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    from .runtime.loading import load
    from .runtime.scheduler import Scheduler
    from .runtime.text.codec import Message

    if sys.stdin is None:
        raise click.UsageError("standard input is closed; give it lines to answer, or use: nemodiff run")
    loaded = load(engine, threads=threads, device=device)
    with Scheduler(loaded, rows=1) as scheduler:  # it keeps the K/V of the conversation from turn to turn
        messages: list[Message] = []
        while True:
            try:
                said = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except UnicodeDecodeError as error:
                raise RequestError(f"standard input: not UTF-8 at byte {error.start}; convert it first") from None
            if said in ("/exit", "/quit"):
                return
            if said == "/reset":
                messages = []
            elif said.startswith("/"):
                click.echo(f"unknown command {said.split()[0]}; allowed: /reset, /exit", err=True)
            elif said:
                turn: list[Message] = [*messages, {"role": "user", "content": said}]
                try:
                    answer = _follow(loaded, scheduler.submit(turn, **options), True, False)
                except RequestError as error:
                    click.echo(f"Error: {_printable(str(error))}; /reset starts over", err=True)
                    continue
                click.echo()
                _print_stats(answer, stats)
                messages = [*turn, {"role": "assistant", "content": answer.text}]


@main.group()
def trace() -> None:
    """Look at what `run --trace` has written."""


@trace.command("show")
@click.argument("file", type=click.Path(path_type=Path))
def trace_show(file: Path) -> None:
    """Sum up FILE, JSON lines of events: per request its passes, times and drafts."""
    from .runtime.events.trace import read, summary

    click.echo("\n".join(summary(read(file))))


@trace.command("view")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="HTML file to write."
)
def trace_view(files: tuple[Path, ...], output: Path) -> None:
    """Make one HTML file that shows the runs of FILES side by side, to scrub through, without a server."""
    from .runtime.events.trace import read
    from .serving.http.page_export import html

    text = html([(file.stem, read(file)) for file in files])
    output.write_text(text, encoding="utf-8")
    click.echo(f"written      {output}; open it in a browser", err=True)


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--prefix", help="Text before the hole.")
@click.option("--suffix", default="", help="Text behind the hole.")
@click.option("--length", type=int, help="Tokens of the hole. [default: a length that fits]")
@click.option("--template", help="Text with {hole} or {hole:12} where text is missing, instead of the three above.")
@click.option("-p", "--prompt", help="What the text is an answer to. [default: the text stands alone]")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=METHODS[0],
    show_default=True,
    help="search is better, block faster.",
)
@click.option("--width", type=int, default=8, show_default=True, help="Fillings that a search keeps.")
@click.option(
    "--threshold", type=float, default=0.9, show_default=True, help="Confidence that commits a mask of a block."
)
@click.option("--block-length", type=int, help="Tokens of a block, hole included. [default: the engine's]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: one per core]")
@click.option("--device", help="cpu, cuda or cuda:N. [default: what the engine was built for]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def infill(
    engine: Path,
    prefix: str | None,
    suffix: str,
    length: int | None,
    template: str | None,
    threads: int | None,
    device: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fill holes of a text with ENGINE, seeing what stands before and behind them."""
    import dataclasses

    from .runtime.editing.infill import fill, parse_template
    from .runtime.loading import load

    if (template is None) == (prefix is None):
        raise click.UsageError("give --prefix (with --suffix and --length) or --template")
    if template is not None and (suffix or length is not None):
        raise click.UsageError("--suffix and --length go with --prefix; a template says them itself")
    parts = parse_template(template) if template is not None else [prefix, length, suffix]
    filled = fill(load(engine, threads=threads, device=device), parts, **options)
    click.echo(json.dumps(dataclasses.asdict(filled)) if as_json else filled.text)


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--text", help="The text to revise. [default: standard input]")
@click.option("--file", type=click.Path(path_type=Path), help="File with the text to revise.")
@click.option("-p", "--prompt", help="What the text is an answer to. [default: the text stands alone]")
@click.option("--keep", type=float, default=0.05, show_default=True, help="Causal probability that keeps a token.")
@click.option("--rounds", type=int, default=4, show_default=True, help="Most looks at a block.")
@click.option("--threshold", type=float, default=0.9, show_default=True, help="Confidence that commits a mask.")
@click.option("--block-length", type=int, help="Tokens looked at together. [default: the engine's]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: one per core]")
@click.option("--device", help="cpu, cuda or cuda:N. [default: what the engine was built for]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def revise(
    engine: Path,
    text: str | None,
    file: Path | None,
    threads: int | None,
    device: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Decode again with ENGINE what is improbable in a text."""
    import dataclasses

    from .runtime.editing.revise import revise as run_revise
    from .runtime.loading import load

    if text is not None and file is not None:
        raise click.UsageError("give --text or --file, not both")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise RequestError(f"{file}: not UTF-8 at byte {error.start}; convert it first") from None
    given = (
        text if text is not None else _read_stdin("no text: give --text TEXT, --file FILE, or text on standard input")
    )
    revised = run_revise(load(engine, threads=threads, device=device), given, **options)
    click.echo(json.dumps(dataclasses.asdict(revised)) if as_json else revised.text)


@main.group()
def triton() -> None:
    """Serve an engine with Triton Inference Server."""


@triton.command("export")
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--repo", type=click.Path(path_type=Path), required=True, help="Model repository to write into.")
@click.option("--name", default="nemodiff", show_default=True, help="Of the model.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Model-level value; may be repeated.")
@click.option("--link", is_flag=True, help="Link the engine instead of copying it.")
@click.option("--batched", is_flag=True, help="Tensors with a batch dimension of 1, as TensorRT-LLM has them.")
def triton_export(engine: Path, repo: Path, assignments: tuple[str, ...], **choices: Any) -> None:
    """Write ENGINE as a model into Triton's model repository.

    --set takes rows, waiting, threads, device, prefix_reuse, prefill_tokens, stream_interval_ms, and the default of any
    input or field of sampling_parameters, such as mode=ar, max_tokens=200 or stream=true.
    """
    from .serving.triton_server.export import export as run_export
    from .serving.triton_server.export import parse_assignments

    folder = run_export(engine, repo, parameters=parse_assignments(assignments), **choices)
    click.echo(f"exported     {folder}; try: nemodiff triton run {repo}", err=True)


@triton.command("run")
@click.argument("repo", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--http-port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--grpc-port", type=click.IntRange(1, 65535), default=8001, show_default=True)
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=8002, show_default=True)
def triton_run(
    repo: Path, arguments: tuple[str, ...], host: str, http_port: int, grpc_port: int, metrics_port: int
) -> None:
    """Start the Triton server of this machine on REPO. ARGUMENTS, behind --, are for tritonserver."""
    from .serving.triton_server.server import serve as run_server

    run_server(repo, host, (http_port, grpc_port, metrics_port), arguments)


@triton.command("install")
def triton_install() -> None:
    """Get a Triton server for CPUs, beside the packages of this Python: 290 MB, Linux, no container needed."""
    from .serving.triton_server.install import install

    click.echo(f"installed    {install()}; try: nemodiff triton run REPO", err=True)


def _read_stdin(missing: str = "no prompt: give --prompt TEXT, --input-file FILE, or text on standard input") -> str:
    try:  # standard input is None where it was closed
        text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input: not UTF-8 at byte {error.start}; convert it first") from None
    if not text.strip():
        raise click.UsageError(missing)
    return text.removesuffix("\n")


def _parse_prompts(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and prompt (text or messages) of each line of a JSON-lines file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}; give a file of JSON lines") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}, line {number}: not JSON ({error}); one object per line is allowed") from None
        check_text(json.dumps(value, ensure_ascii=False), f"{path}, line {number}")
        messages = value.get("messages") if isinstance(value, dict) else None
        if isinstance(value, dict) and isinstance(value.get("prompt"), str):
            yield number, value["prompt"]
        elif isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            yield number, messages
        else:
            raise RequestError(
                f'{path}, line {number}: allowed: an object with "prompt" (text) or "messages" (a list of role and '
                "content); fix the line"
            )


@main.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key", multiple=True, envvar="NEMODIFF_API_KEY", help="Key that clients must show; may be repeated."
)
@click.option("--served-model-name", help="Name of the model for clients. [default: the folder's]")
@click.option("--mode", type=click.Choice(MODES), default="linear_spec", show_default=True, help="Where none is asked.")
@click.option("--rows", type=int, help="Requests that run at a time. [default: the engine's max batch size]")
@click.option("--max-queue", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--max-request-bytes", type=click.IntRange(1), default=4 << 20, show_default=True, help="Of a request's body."
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=600, show_default=True, help="Seconds per request."
)
@click.option(
    "--drain", type=click.FloatRange(0), default=30, show_default=True, help="Seconds to finish in after SIGTERM."
)
@click.option("--no-prefix-reuse", is_flag=True, help="Compute what prompts share for each of them.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: one per core]")
@click.option("--device", help="cpu, cuda or cuda:N. [default: what the engine was built for]")
def serve(
    engine: Path,
    host: str,
    port: int,
    api_key: tuple[str, ...],
    served_model_name: str | None,
    mode: str,
    max_queue: int,
    max_request_bytes: int,
    timeout: float,
    drain: float,
    no_prefix_reuse: bool,
    **options: Any,
) -> None:
    """Serve ENGINE over HTTP: OpenAI's API, metrics, and a page to watch it decode."""
    try:
        from .serving.http.app import Limits, open_server
        from .serving.http.server import bind
        from .serving.http.server import serve as listen
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is missing; install it: pip install 'nemodiff[serve]'") from None
    limits = Limits(timeout=timeout, max_request_bytes=max_request_bytes, keys=api_key, waiting=max_queue)
    with bind(host, port) as listening:
        server = open_server(
            engine,
            limits=limits,
            name=served_model_name,
            defaults={"mode": mode},
            prefix_reuse=not no_prefix_reuse,
            **options,
        )
        listen(server, listening, drain, lambda address: click.echo(f"serving {server.name} on {address}", err=True))


def _print_stats(answer: Generation, wanted: bool) -> None:
    if not wanted:
        return
    passes = ", ".join(f"{count} {kind}" for kind, count in answer.nfe.items() if count)
    ms = answer.timings_ms
    rate = len(answer.token_ids) / ms["total"] * 1e3
    tpf = "-" if answer.decode_tpf is None else f"{answer.decode_tpf:.2f}"
    kept = "" if answer.acceptance.mean is None else f", {answer.acceptance.mean:.2f} accepted per verify"
    kept += f", drafter adapter on {answer.adapter_tokens} tokens" if answer.adapter_tokens else ""
    click.echo(
        f"{answer.mode}: {len(answer.token_ids)} tokens ({answer.finish_reason}) in {passes}; "
        f"{tpf} tokens per pass{kept}; {ms['prefill']:.1f} ms to the first token, {ms['total']:.1f} ms in all, "
        f"{rate:.0f} tokens/s",
        err=True,
    )
