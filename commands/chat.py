"""`nemodiff chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RequestError
from ..runtime.text.files import not_utf8
from . import options
from .answers import follow, one_line, print_statistics, print_warnings

if TYPE_CHECKING:
    from ..runtime.text.messages import Message


@click.command(
    cls=options.RequestCommand, left_out=("chat", "prefill_chunk", "logprobs", "confidences", "prompt_logprobs")
)
@options.engine
@options.generation_config
@options.threads
@options.device
@options.statistics
def chat(engine: Path, threads: int | None, device: str | None, stats: bool, **choices: Any) -> None:
    """Hold a conversation with ENGINE.

    /reset forgets the conversation, /exit or the end of input leaves it.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    from ..runtime.loading import load
    from ..runtime.scheduler import Scheduler

    if sys.stdin is None:
        raise click.UsageError("standard input is closed; give it lines to answer, or use: nemodiff run")
    loaded = load(engine, threads=threads, device=device)
    with Scheduler(loaded, rows=1) as scheduler:  # it keeps the K/V of the conversation from turn to turn
        messages: list[Message] = []
        printed = set[str]()
        while (line := _read_line()) is not None:
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                messages = []
            elif line.startswith("/"):
                click.echo(f"unknown command {line.split()[0]}; allowed: /reset, /exit", err=True)
            elif line:
                turn: list[Message] = [*messages, {"role": "user", "content": line}]
                try:
                    events = scheduler.submit(turn, **choices)
                    answer = next(follow(loaded, events, stream=True, show_denoise=False))
                except RequestError as error:
                    click.echo(f"Error: {one_line(str(error))}; /reset starts over", err=True)
                    continue
                click.echo()
                print_warnings(answer, printed)
                if stats:
                    print_statistics(answer)
                messages = [*turn, {"role": "assistant", "content": answer.text}]


def _read_line() -> str | None:
    """The next line of standard input, None at its end. Raises RequestError."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise not_utf8("standard input", error) from None
