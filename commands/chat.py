"""`nemodiff chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RequestError
from ..runtime.text.files import not_utf8
from . import options
from .answers import follow, one_line, print_statistics, print_warnings

if TYPE_CHECKING:
    from ..runtime.loading import LoadedEngine
    from ..runtime.scheduler.scheduler import Scheduler
    from ..runtime.text.messages import Message


@click.command(cls=options.RequestCommand, left_out=("logprobs", "confidences", "prompt_logprobs"))
@options.engine
@options.generation_config
@options.loading
@options.statistics
def chat(
    engine: Path,
    loading: dict[str, Any],
    stats: bool,
    **choices: Any,
) -> None:
    """Hold a conversation with ENGINE.

    /reset forgets the conversation, /exit or the end of input leaves it. With --tools the next line after a call is its
    result.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    from ..runtime.loading import load
    from ..runtime.requests.options import make_options
    from ..runtime.requests.settings import settle
    from ..runtime.scheduler.scheduler import Scheduler

    if sys.stdin is None:
        raise click.UsageError("standard input is closed; give it lines to answer, or use: nemodiff run")
    loaded = load(engine, **loading, progress=True)
    settle(loaded.info, loaded.text, 0, make_options(choices))  # refuses now what every turn would be refused for
    with Scheduler(loaded, rows=1) as scheduler:  # it keeps the K/V of the conversation from turn to turn
        messages: list[Message] = []
        conversation = _Conversation(loaded, scheduler, choices, stats)
        while (line := _read_line()) is not None:
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                messages = []
            elif line.startswith("/"):
                click.echo(f"unknown command {one_line(line)}; allowed: /reset, /exit", err=True)
            elif line:
                said = conversation.say(messages, line)
                if said is None:
                    return
                messages = said


@dataclasses.dataclass
class _Conversation:
    """Answers lines one after the other; `printed` are the warnings that were shown."""

    engine: LoadedEngine
    scheduler: Scheduler
    choices: dict[str, Any]
    stats: bool
    printed: set[str] = dataclasses.field(default_factory=set)

    def say(self, messages: list[Message], line: str) -> list[Message] | None:
        """The messages with a line and its answer, or without where that fails; None at the end of input."""
        tools = self.choices["tools"] is not None
        turns: list[Message] = [*messages, {"role": "user", "content": line}]
        while True:
            try:
                events = self.scheduler.submit(turns, **self.choices)
                answer = next(follow(self.engine, events, stream=True, show_denoise=False, tools=tools))
            except RequestError as error:
                click.echo(f"Error: {one_line(str(error))}; /reset starts over", err=True)
                return messages
            click.echo()
            print_warnings(answer, self.printed)
            if self.stats:
                print_statistics(answer, self.engine.info)
            if not answer.tool_calls or answer.finish_reason != "stop":  # one that was cut has no result
                return [*turns, {"role": "assistant", "content": answer.text}]
            message = answer.as_message()
            turns.append(message)
            for call in message["tool_calls"]:
                name = call["function"]["name"]
                result = _read_line(f"result of {name}> ")
                if result is None:
                    return None
                turns.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": result})


def _read_line(prompt: str = "> ") -> str | None:
    """The next line of standard input, None at its end. Raises RequestError."""
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            click.echo(err=True)  # the end of input was typed after the prompt
        return None
    except UnicodeDecodeError as error:
        raise not_utf8("standard input", error) from None
