"""What commands print: answers, their statistics, and errors as one line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from ..contract import counted, kv_bytes_per_token
from ..errors import NemodiffError
from .calls import CallLines, spelled

if TYPE_CHECKING:
    from ..batch.lines import Line
    from ..engine_info import EngineInfo
    from ..runtime.events.events import Event
    from ..runtime.loading import LoadedEngine
    from ..runtime.requests.generation import Generation


def follow(
    engine: LoadedEngine, events: Iterable[Event], *, stream: bool, show_denoise: bool, tools: bool = False
) -> Iterator[Generation]:
    """The answers as they become complete; on the way text or passes are printed as they come.

    tools: whether calls are shown as such instead of the text that they are.
    """
    from ..runtime.events.events import Finished, Step, Text
    from ..runtime.events.terminal import line

    calls = CallLines()
    for event in events:
        if isinstance(event, Step) and show_denoise:
            click.echo(line(engine, event), err=True)
        elif isinstance(event, Text) and stream:
            text = "".join(calls.push(part.part, part.text) for part in event.parts) if tools else event.text
            click.echo(text, nl=False)
        elif isinstance(event, Finished):
            if stream and tools:
                click.echo(calls.end(), nl=False)
            yield event.generation


def print_lines(
    results: Iterator[tuple[Line, Generation | NemodiffError]], *, as_json: bool, stats: EngineInfo | None
) -> int:
    """Print answers, and what was refused: one line on standard error, or an object in the answer's place.

    With the engine's description also their statistics. Returns how many lines were refused.
    """
    refused = 0
    printed = set[str]()
    for line, result in results:
        if isinstance(result, NemodiffError):
            refused += 1
            if as_json:
                click.echo(json.dumps({**line.labels, "error": {"message": str(result), "line": line.number}}))
            else:
                click.echo(f"Error: {one_line(str(line.refusal(result)))}", err=True)
            continue
        text = spelled(result) if result.tool_calls else result.text
        click.echo(json.dumps({**line.labels, **result.as_dict()}) if as_json else text)
        print_warnings(result, printed)
        if stats:
            print_statistics(result, stats)
    return refused


def print_warnings(answer: Generation, printed: set[str]) -> None:
    """Each warning that was not printed before, as a line on standard error."""
    for warning in answer.warnings:
        if warning not in printed:
            printed.add(warning)
            click.echo(f"Warning: {one_line(warning)}", err=True)


def print_statistics(answer: Generation, info: EngineInfo) -> None:
    """One line on standard error: passes, tokens per pass, times and memory."""
    passes = ", ".join(f"{count} {kind}" for kind, count in answer.nfe.items() if count)
    ms = answer.timings_ms
    rate = len(answer.token_ids) / ms["total"] * 1e3
    tpf = "-" if answer.decode_tpf is None else f"{answer.decode_tpf:.2f}"
    kept = "" if answer.acceptance.mean is None else f", {answer.acceptance.mean:.2f} accepted per verify"
    kept += f", drafter adapter on {counted(answer.adapter_tokens, 'token')}" if answer.adapter_tokens else ""
    images = f" after images of {', '.join(map(str, answer.image_tokens))} tokens" if answer.image_tokens else ""
    click.echo(
        f"{answer.mode}: {counted(len(answer.token_ids), 'token')} ({answer.finish_reason}){images} in {passes}; "
        f"{tpf} tokens per pass{kept}; {ms['prefill']:.1f} ms to the first token, {ms['total']:.1f} ms in all, "
        f"{rate:.0f} tokens/s; {kv_bytes_per_token(info.model, info.build):,} bytes of K/V per token",
        err=True,
    )


def one_line(text: str) -> str:
    """The text with line ends and terminal controls escaped: names out of a file may hold them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
