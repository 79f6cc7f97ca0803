"""One request to an ASGI application in this process, without a network."""

from __future__ import annotations

import asyncio
import json
from typing import Any


async def asked(app: Any, path: str, body: Any, **headers: str) -> tuple[int, list[Any]]:
    """The status, and the JSON objects of the answer: one, or those of a stream. A body in bytes is sent as it is."""
    sent_body = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"content-type": "application/json", "content-length": str(len(sent_body))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    pairs = [(name.encode(), value.encode()) for name, value in named.items()]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": pairs}
    given = [{"type": "http.request", "body": sent_body}]
    sent = list[dict[str, Any]]()

    async def receive() -> dict[str, Any]:
        if not given:
            await asyncio.Event().wait()
        return given.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    try:
        await app(scope, receive, send)
    except Exception:  # a defect, which has been answered and is raised for the log of the server
        if not sent:
            raise
    text = b"".join(message.get("body", b"") for message in sent).decode()
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: {")]
    return sent[0]["status"], [json.loads(line) for line in lines or [text]]
