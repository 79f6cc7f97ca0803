"""A record of each request: its id, its status and times, and what the engine did for it; as lines, as spans, or both.

A client may send the id in `X-Request-Id`; without it the server makes one. Every response has it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...runtime.events.events import Event, Finished, Started, Text
from .targets import in_origin_form

Format = Literal["text", "json"]
LEFT = 499  # nginx's number for a client that left before its answer began
_HEADER = "x-request-id"
_LONGEST = 128  # characters of a client's id
_LOGGER = logging.getLogger("nemodiff.requests")


@dataclasses.dataclass
class Answer:
    """What is known of one answer. Times are seconds of `time.perf_counter`; blocks: when text came, and its tokens."""

    started: float | None = None
    blocks: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    finished: Finished | None = None

    @property
    def state(self) -> Literal["waiting", "running", "finished"]:
        """How far it has come."""
        if self.finished is not None:
            return "finished"
        return "waiting" if self.started is None else "running"


@dataclasses.dataclass(eq=False)
class Record:
    """One HTTP request. began, first, ended: seconds of `time.perf_counter`; first: when its response began.

    method, path: empty where the request was refused before they were read. status: LEFT for a client that left before
    its response began. error: what a stream ended with after its status had been sent.
    """

    id: str
    method: str
    path: str
    headers: Headers
    began: float
    first: float | None = None
    ended: float = 0.0
    status: int = 0
    error: str | None = None
    answers: dict[int, Answer] = dataclasses.field(default_factory=dict)

    def observe(self, index: int, events: Sequence[Event]) -> None:
        """Take in what happened to one answer; the scheduler's worker calls this."""
        answer = self.answers.get(index)
        if answer is None:
            answer = self.answers[index] = Answer()
        for event in events:
            if isinstance(event, Started):
                answer.started = event.at
            elif isinstance(event, Text) and event.token_ids:
                answer.blocks.append((event.at, len(event.token_ids)))
            elif isinstance(event, Finished):
                answer.finished = event

    @property
    def failed(self) -> bool:
        """Whether the server has not given what was asked for."""
        return self.status >= 500 or self.error is not None

    def fields(self) -> dict[str, Any]:
        """The record as plain values: milliseconds, and sums over its answers."""
        done = [answer.finished.generation for answer in self.answers.values() if answer.finished is not None]
        fields: dict[str, Any] = {
            "request_id": self.id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "ms": round((self.ended - self.began) * 1e3, 3),
        }
        if self.error is not None:
            fields["error"] = self.error
        if self.first is not None:
            fields["first_byte_ms"] = round((self.first - self.began) * 1e3, 3)
        if done:
            fields |= {
                "mode": done[0].mode,
                "prompt_tokens": sum(one.prompt_tokens for one in done),
                "completion_tokens": sum(len(one.token_ids) for one in done),
                "reused_tokens": sum(one.reused_tokens for one in done),
                "passes": sum(sum(one.nfe.values()) for one in done),
                "queued_ms": round(max(one.timings_ms["queued"] for one in done), 3),
                "finish_reasons": [one.finish_reason for one in done],
            }
        return fields


def record_of(request: Request) -> Record | None:
    """The record of a request, None where nobody keeps one."""
    return getattr(request.state, "record", None)


class RequestLog:
    """An ASGI application that keeps a record of each request to another.

    Args:
        app: answers the requests.
        sinks: get every finished record.
    """

    def __init__(self, app: ASGIApp, sinks: Sequence[Callable[[Record], None]]) -> None:
        self.open: set[Record] = set()  # of requests that have not ended
        self._app = app
        self._sinks = sinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = in_origin_form(scope)
        headers = Headers(scope=scope)
        given = headers.get(_HEADER, "")
        usable = 0 < len(given) <= _LONGEST and given.isascii() and given.isprintable()
        record = Record(given if usable else _new_id(), scope["method"], scope["path"], headers, time.perf_counter())
        state = scope.setdefault("state", {})
        state["record"] = record
        self.open.add(record)

        async def recording_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                if "instead" not in state:
                    record.first = time.perf_counter()
                    record.status = int(message["status"])
                message["headers"] = [*message.get("headers", []), (_HEADER.encode(), record.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, recording_send)
        finally:
            record.status = state.get("instead", record.status)  # of the connection: what the client got, or LEFT
            record.ended = time.perf_counter()
            self.open.discard(record)
            self._tell(record)

    def around(self, app: ASGIApp) -> RequestLog:
        """Records of another application's requests, for the same sinks."""
        return RequestLog(app, self._sinks)

    def tell_unread(self, status: int, waited: float) -> None:
        """Record a request that was refused before it was read, so many seconds after it was to come."""
        now = time.perf_counter()
        self._tell(Record(_new_id(), "", "", Headers({}), now - waited, ended=now, status=status))

    def _tell(self, record: Record) -> None:
        for sink in self._sinks:
            sink(record)


def _new_id() -> str:
    return uuid.uuid4().hex


def log_record(record: Record) -> None:
    """Write a record as a line."""
    fields = record.fields()
    level = logging.ERROR if record.failed else logging.INFO
    text = " ".join(f"{name}={_word(value)}" for name, value in fields.items())
    _LOGGER.log(level, text, extra={"fields": fields})


def log_message(message: str, **fields: Any) -> None:
    """Say something of the server itself; in JSON, `fields` stand beside the message."""
    _LOGGER.info(message, extra={"fields": {"message": message, **fields}})


def _word(value: Any) -> str:
    """A value in a line of text; what a client wrote is quoted where it could pass for more than one value."""
    plain = not isinstance(value, str) or (value != "" and value.isprintable() and not set(value) & set(' "='))
    return str(value) if plain else json.dumps(value)


def written_time(seconds: float) -> str:
    """Seconds since 1970 as the lines have it, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and the fields of a request's record."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line: dict[str, Any] = {
            "time": written_time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up_logging(format: Format) -> None:
    """Send the records, what the server itself says, and what other packages complain of, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if format == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    for name in (None, "nemodiff", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger("nemodiff").setLevel(logging.INFO)
    logging.captureWarnings(True)
