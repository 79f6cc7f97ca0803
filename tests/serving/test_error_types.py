"""The `type` of an error is the one of the API whose route was called, whoever refuses and whatever fails."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import pytest
from stand_ins.asgi import asked
from stand_ins.toy_engine import ToyEngine, toy

import nemodiff
from nemodiff.runtime.scheduler.scheduler import Scheduler
from nemodiff.serving.http.app import Limits, Server

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
ASKED = {"messages": [{"role": "user", "content": "Count from 3 to 9."}], "max_tokens": 4000, "min_tokens": 4000}


def defect(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError


def busy(*_: Any, **__: Any) -> None:
    raise nemodiff.BusyError("too many wait; try again later")


@pytest.mark.parametrize(
    ("path", "types"),
    [
        (
            MESSAGES,
            {
                400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
                413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
                504: "timeout_error",
            },
        ),
        *(
            (
                path,
                {
                    400: "invalid_request_error", 401: "invalid_request_error", 404: "invalid_request_error",
                    413: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error",
                    504: "server_error",
                },
            )
            for path in (CHAT, RESPONSES)
        ),
    ],
)  # fmt: skip
def test_types_by_route(
    engine: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch, path: str, types: dict[int, str]
) -> None:
    right = {"input": "Count", "min_tokens": 4000} if path == RESPONSES else ASKED
    limits = Limits(keys=("key",), max_request_bytes=1000, timeout=0.05)

    def error(server: Server, body: Any = right, key: str = "key") -> None:
        status, (told,) = asyncio.run(asked(server.app, path, body, authorization=f"Bearer {key}"))
        found[status] = told["error"]["type"]
        assert told["type"] == "error"

    found = dict[int, str]()
    with Scheduler(toy(engine)) as scheduler:
        server = Server(engine, scheduler, limits, "tiny", {})
        error(server, right | {"temperature": -1})
        error(server, key="wrong")
        error(server, right | {"model": "other"})
        error(server, right | {"user": "x" * 2000})
        error(server)  # takes too long
        for fails in (busy, defect):
            with monkeypatch.context() as patched:
                patched.setattr(Scheduler, "submit_many", fails)
                error(server)
        server.draining.set()
        error(server)
        server.close()
    assert found == types
    if path == MESSAGES:
        from anthropic.types.shared import ErrorType  # a second of processor time

        assert {*types.values()} <= {*get_args(ErrorType), "request_too_large"}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES, "/v1/fim/completions", "/events"])
def test_who_was_admitted_and_comes_after_the_drain_is_refused_like_a_new_one(
    engine: nemodiff.LoadedEngine, path: str
) -> None:
    """A body may still arrive while the server drains, and when it is there nothing may be running any more."""
    bodies: dict[str, Any] = {RESPONSES: {"input": "Count"}, "/v1/fim/completions": {"prompt": "a", "suffix": "b"}}
    scheduler = Scheduler(toy(engine))
    server = Server(engine, scheduler, Limits(), "tiny", {})
    scheduler.close()
    server.infill_queue.close()
    status, (told,) = asyncio.run(asked(server.app, path, bodies.get(path, ASKED)))
    server.close()
    assert (status, told["error"]["code"]) == (503, "draining")
    assert told["error"]["message"].startswith("the server is about to stop; ")


@pytest.mark.parametrize(
    ("path", "kind"), [(MESSAGES, "api_error"), (CHAT, "server_error"), (RESPONSES, "server_error")]
)
def test_types_in_a_stream(engine: nemodiff.LoadedEngine, path: str, kind: str) -> None:
    body = {"input": "Count"} if path == RESPONSES else ASKED
    failing = toy(engine)
    assert isinstance(failing.backend, ToyEngine)
    with Scheduler(failing) as scheduler:
        failing.backend.fails_at = {failing.backend.forwards + 3}
        server = Server(engine, scheduler, Limits(), "tiny", {})
        status, told = asyncio.run(asked(server.app, path, {**body, "stream": True, "mode": "ar"}))
        server.close()
    assert status == 200
    assert len(told) > 1
    assert told[-1]["error"]["type"] == kind
