"""Events written to a file as they happen, and read back as a summary.

With the suffix `.json` the file is a timeline in the Trace Event Format, a track per request; with any other suffix it
is JSON lines, the whole events as they are. Lines are written whole, so a killed run leaves a usable file, and so does
a full disk, where the last line is cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ...contract import counted
from ...errors import RequestError
from ...whole_file import naming
from ..loading import LoadedEngine
from .events import BlockStarted, Event, Pieces, Started, Step, Text, as_dict

SCHEMA = 1  # of the lines


@contextlib.contextmanager
def record(path: Path | None, engine: LoadedEngine) -> Iterator[Callable[[Event], Event]]:
    """What to pass each event through; without a path it does nothing. The file is made at the first event."""
    file: TextIO | None = None
    timeline = path is not None and path.suffix == ".json"

    def write(event: Event) -> Event:
        nonlocal file
        if path is None:
            return event
        with naming(path):
            if file is None:
                file = path.open("w", encoding="utf-8", buffering=1)
                if timeline:
                    file.write("[\n" + json.dumps(_named("process_name", 0, f"nemodiff {engine.folder.name}")))
                else:
                    file.write(json.dumps(header(engine, event)) + "\n")
            if timeline:
                file.write("".join(",\n" + json.dumps(entry) for entry in _timeline(event)))
                file.flush()
            else:
                file.write(json.dumps(as_dict(event)) + "\n")
        return event

    try:
        yield write
    finally:
        if path is not None and file is not None:
            with naming(path), file:
                file.write("\n]\n" if timeline else "")


def header(engine: LoadedEngine, event: Event) -> dict[str, Any]:
    """The first line, before `event`: `unix` is the time of day at `at`, of all other lines' clock."""
    now = time.time() - (time.perf_counter() - event.at)
    return {
        "event": "trace",
        "schema": SCHEMA,
        "engine": engine.folder.name,
        "mask_id": engine.info.model.mask_id,
        "unix": round(now, 3),
        "at": event.at,
    }


def _timeline(event: Event) -> list[dict[str, Any]]:
    """An event as entries of the Trace Event Format: times in microseconds, a thread per request."""
    track = event.request + 1
    where = {"pid": 1, "tid": track, "ts": event.at * 1e6}
    if isinstance(event, Started):
        return [_named("thread_name", track, f"request {event.request}, {event.mode}")]
    if isinstance(event, Pieces):
        return []
    if isinstance(event, Step):
        args = {
            "position": event.start,
            "tokens": len(event.before),
            "committed": [dataclasses.asdict(c) for c in event.committed],
            "rows": event.rows,
        }
        if event.kept is not None:
            args |= {"kept": event.kept, "refused": event.refused}
        return [{"name": event.kind, "cat": "pass", "ph": "X", **where, "dur": event.seconds * 1e6, "args": args}]
    if isinstance(event, BlockStarted):
        args = {"position": event.start, "length": event.length}
        return [{"name": "block", "cat": "block", "ph": "i", "s": "t", **where, "args": args}]
    if isinstance(event, Text):
        return [{"name": "text", "cat": "text", "ph": "i", "s": "t", **where, "args": {"text": event.text}}]
    spent = event.generation.timings_ms["total"] * 1e3
    return [
        {
            "name": "request",
            "cat": "request",
            "ph": "X",
            **where,
            "ts": event.at * 1e6 - spent,
            "dur": spent,
            "args": as_dict(event),
        }
    ]


def _named(what: str, track: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": track, "args": {"name": name}}


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The events of a file of JSON lines, its header left out, and their summary. Raises RequestError."""
    lines: list[str] = []
    try:
        whole, _, last = path.read_text(encoding="utf-8-sig").rpartition("\n")
        values = [json.loads(line) for line in whole.splitlines()]
        with contextlib.suppress(ValueError):  # nothing, or what a full disk has cut
            values.append(json.loads(last))
        header, *events = values
        right = header["event"] == "trace"
        if right and header["schema"] == SCHEMA:
            right = all(isinstance(event["event"], str) and type(event["request"]) is int for event in events)
            firsts = {event["request"]: event["event"] for event in reversed(events)}
            right = right and set(firsts.values()) == {"started"}  # and there is a request
            lines = summary(events)  # whose fields must be there
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}; give a file written by: nemodiff run --trace FILE") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        right = False
    if not right:
        raise RequestError(f"{path}: not JSON lines of events; write them with: nemodiff run --trace FILE.jsonl")
    if header["schema"] != SCHEMA:
        raise RequestError(f"{path}: schema is {header['schema']!r}, allowed: {SCHEMA}; write it again")
    return events, lines


def summary(events: Iterable[dict[str, Any]]) -> list[str]:
    """Lines for a terminal: per request its passes, where its time went, and what became of proposals."""
    spent: dict[int, dict[str, list[float]]] = {}
    proposals: dict[int, list[int]] = {}
    lines: list[str] = []
    for event in events:
        number = event["request"]
        if event["event"] == "started":
            spent[number] = {}
        elif event["event"] == "step":
            spent.setdefault(number, {}).setdefault(event["kind"], []).append(event["seconds"] * 1e3)
            if event["kept"] is not None:
                kept, refused = proposals.setdefault(number, [0, 0])
                proposals[number] = [kept + event["kept"], refused + len(event["refused"])]
        elif event["event"] == "finished":
            answer = event["generation"]
            parts = [f"{len(ms)} {kind} {sum(ms):.1f} ms" for kind, ms in spent.pop(number, {}).items()]
            kept, refused = proposals.pop(number, [0, 0])
            drafts = f"; {kept} of {counted(kept + refused, 'drafted token')} kept" if kept + refused else ""
            reused = f" ({answer['reused_tokens']} reused)" if answer["reused_tokens"] else ""
            lines.append(
                f"request {number}, {answer['mode']}: {counted(answer['prompt_tokens'], 'token')} in{reused}, "
                f"{len(answer['token_ids'])} out ({answer['finish_reason']}); {', '.join(parts)}{drafts}; "
                f"{_ms(event['ttft_ms'])} to the first token, {_ms(event['itl_ms'])} between tokens, "
                f"{_ms(event['longest_gap_ms'])} at most"
            )
    return lines + [f"request {number}: not finished" for number in spent]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
