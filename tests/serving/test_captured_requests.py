"""Requests as clients sent them to this server, from `captured_requests.jsonl`: a client with its version on each line.

Texts, ids and schemas in them are shortened; what shape a client gives them is left as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stand_ins.http_server import Served

FILE = Path(__file__).with_name("captured_requests.jsonl")
REQUESTS = [json.loads(line) for line in FILE.read_text().splitlines()]
LIMITS = {"messages": "max_tokens", "responses": "max_output_tokens", "completions": "max_tokens"}
ENDS = {
    "messages": b"event: message_stop\n",
    "responses": (b"event: response.completed\n", b"event: response.incomplete\n"),
    "completions": b"data: [DONE]\n",
}


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=[f"{n}-{r['client']}" for n, r in enumerate(REQUESTS)])
def test_a_client_is_understood(server: Served, number: int) -> None:
    request = REQUESTS[number]
    api = request["path"].partition("?")[0].rpartition("/")[2]
    called = must_call(request["body"])
    body = short(request["body"], LIMITS[api])
    status, headers, content = server.send(request["path"], body, **request.get("headers", {}))
    assert status == 200, content
    if body.get("stream"):
        assert headers["content-type"].startswith("text/event-stream")
        ends = ENDS[api] if isinstance(ENDS[api], tuple) else (ENDS[api],)
        assert any(end in content[-4000:] for end in ends), content[-300:]
        assert b'"error": {' not in content
    else:
        assert json.loads(content)["usage"]
    if called:
        assert any(mark in content for mark in (b'"tool_calls"', b'"tool_use"', b'"function_call"')), content[-300:]


def must_call(body: dict[str, Any]) -> bool:
    """Whether the answer has to call a tool."""
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        return choice["type"] in ("function", "tool", "any")
    return choice == "required"


def short(body: dict[str, Any], name: str) -> dict[str, Any]:
    """A request whose answer is short, as that of this model would go on for its whole limit; calls have a bit more."""
    name = "max_completion_tokens" if "max_completion_tokens" in body else name
    return {**body, name: 48 if must_call(body) else min(9, body.get(name) or 9)}
