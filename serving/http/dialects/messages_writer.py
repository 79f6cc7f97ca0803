"""Answers of `/v1/messages`, whole and as Anthropic's stream of blocks."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from ....errors import RequestError
from ....runtime.events.events import Event, Finished, Started, Text
from ....runtime.requests.generation import Generation
from ....runtime.text.checks import check_json
from ....runtime.tools.answer import Delta
from ..responses import finish_reason
from .dialect import Writer

_KINDS = {"reasoning": "thinking", "content": "text"}


class MessagesWriter(Writer):
    """See `Writer`."""

    def full(self, generation: Generation) -> dict[str, Any]:
        """See `Writer.full`."""
        content: list[dict[str, Any]] = []
        if generation.reasoning:
            content.append({"type": "thinking", "thinking": generation.reasoning, "signature": ""})
        if generation.content:
            content.append({"type": "text", "text": generation.content})
        for call in generation.tool_calls:
            content.append({**_tool_use(call.name), "input": _object(call.arguments)})
        return self._message(content) | _end(generation) | {"usage": _usage(generation, len(generation.token_ids))}

    async def events(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[dict[str, Any]]:
        """See `Writer.events`."""
        blocks = _Blocks()
        async for _, event in events:
            if isinstance(event, Started):
                yield {"type": "message_start", "message": {**self._message([]), "usage": _usage(event, 0)}}
            elif isinstance(event, Text):
                for part in event.parts:
                    for item in blocks.take(part):
                        yield item
            elif isinstance(event, Finished):
                for item in blocks.close():
                    yield item
                generation = event.generation
                usage = _usage(generation, len(generation.token_ids))
                yield {"type": "message_delta", "delta": _end(generation), "usage": usage}
                yield {"type": "message_stop"}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }


class _Blocks:
    """The blocks of a streamed answer, one after the other."""

    def __init__(self) -> None:
        self._count = 0
        self._open: str | None = None  # the kind of the last block

    def take(self, part: Delta) -> Iterator[dict[str, Any]]:
        """The events of a new part."""
        if part.part == "call":
            yield from self._begin("tool_use", {**_tool_use(part.text), "input": {}})
        elif part.part == "arguments":
            yield self._delta({"type": "input_json_delta", "partial_json": part.text})
        else:
            kind = _KINDS[part.part]
            if self._open != kind:
                signature = {"signature": ""} if kind == "thinking" else {}
                yield from self._begin(kind, {"type": kind, kind: "", **signature})
            yield self._delta({"type": f"{kind}_delta", kind: part.text})

    def close(self) -> Iterator[dict[str, Any]]:
        """The end of the last block."""
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._count - 1}

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self._open = kind
        self._count += 1
        yield {"type": "content_block_start", "index": self._count - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._count - 1, "delta": delta}


def _tool_use(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": name}


def _object(arguments: str) -> dict[str, Any]:
    """Arguments as an object; those that were cut, or that no client could read, are given as none."""
    try:
        value = json.loads(arguments)
        check_json(value, "the arguments")
    except (ValueError, RecursionError, RequestError):
        return {}
    return value if isinstance(value, dict) else {}


def _end(generation: Generation) -> dict[str, Any]:
    reason = {"tool_calls": "tool_use", "length": "max_tokens"}.get(finish_reason(generation), "end_turn")
    if generation.stop_text is not None and reason == "end_turn":
        return {"stop_reason": "stop_sequence", "stop_sequence": generation.stop_text}
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(answer: Started | Generation, emitted: int) -> dict[str, Any]:
    return {
        "input_tokens": answer.prompt_tokens - answer.reused_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answer.reused_tokens,
        "output_tokens": emitted,
    }
