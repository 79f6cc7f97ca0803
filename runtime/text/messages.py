"""The turns of a conversation, checked and in the form that chat templates expect."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import RequestError
from .checks import check_json, check_parts, check_text

Message = Mapping[str, Any]
CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"
MISTRAL_CALL = "[TOOL_CALLS]"
MISTRAL_ID = "[CALL_ID]"
MISTRAL_ARGUMENTS = "[ARGS]"
CALL_MARKS = (CALL_OPEN, CALL_CLOSE, MISTRAL_CALL, MISTRAL_ID, MISTRAL_ARGUMENTS)
OPEN_END = "TheAnswerGoesOnHere"  # no template takes it apart, and none strips the space before it
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_ROLES = ("system", "user", "assistant", "tool")


def checked_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: without what is null in them, and with the arguments of calls as objects.

    A message has a role and content, which is text, or a list of `{"type": "text"}` with a text, `{"type": "image"}`
    where an image is, and `{"type": "thinking"}` with thoughts. An assistant's may have `tool_calls` in OpenAI's form
    beside it or instead of it, and `reasoning_content`. Raises RequestError.
    """
    checked = []
    for message in messages:
        plain = {name: value for name, value in message.items() if value is not None}
        calls = plain.get("tool_calls")
        if calls and plain.get("role") == "assistant":
            plain["tool_calls"] = _checked_calls(calls)
            plain.setdefault("content", "")
        else:
            plain.pop("tool_calls", None)
        if plain.get("role") not in _ROLES or not _is_content(plain.get("content")):
            raise RequestError(
                f"message {dict(message)!r:.100} is malformed; allowed: role ({', '.join(_ROLES)}) and content as text"
            )
        checked.append(plain)
    return checked


def check_texts(messages: Iterable[Message]) -> None:
    """Refuse messages whose texts no tokenizer takes, by their places. Raises RequestError."""
    for number, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, (list, tuple)) else [{"text": content}]
        for text in (part.get(kind) for part in parts if isinstance(part, Mapping) for kind in ("text", "thinking")):
            if isinstance(text, str):
                check_text(text, f"messages.{number}.content")


def with_open_end(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages with `OPEN_END` where the text of the last one, an assistant's, goes on. Raises RequestError."""
    last = messages[-1]
    role, content = last["role"], last["content"]
    if role != "assistant":
        wrong = f"is the {role}'s"
    elif last.get("tool_calls"):
        wrong = "calls tools"
    elif not isinstance(content, str):
        wrong = "is not text but a list of parts"
    else:
        return [*messages[:-1], {**last, "content": content + OPEN_END}]
    raise RequestError(
        f"continue_final_message is true and the last message {wrong}, allowed: the assistant's, of text; leave it out"
    )


def _is_content(content: Any) -> bool:
    """Whether it is text, or parts of text and places of images."""
    if isinstance(content, str):
        return True
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return False
    kinds = {"image": None, "thinking": "thinking"}  # where the text of a part stands
    texts = [part.get(kind) for part in content if (kind := kinds.get(str(part.get("type")), "text")) is not None]
    return all(isinstance(text, str) for text in texts)


def with_short_ids(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have ids of nine letters and digits, as Mistral's templates want them."""
    short = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": [{**call, "id": _short_id(call.get("id"))} for call in calls]}
        if message.get("role") == "tool":
            message = {**message, "tool_call_id": _short_id(message.get("tool_call_id"))}
        short.append(message)
    return short


def _short_id(given: Any) -> str:
    text = str(given or "")
    return text if _SHORT_ID.fullmatch(text) else hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:9]


def _checked_calls(calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise RequestError(f"tool_calls is {calls!r:.60}, allowed: a list of calls")
    checked = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"tool_calls holds {call!r:.60}, allowed: an object with a function and its name in it")
        arguments = _arguments(function.get("arguments"), function["name"])
        checked.append({**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return checked


def _arguments(given: Any, name: str) -> dict[str, Any]:
    """The arguments of a call as an object; clients send JSON text, and empty text where there are none.

    Of a call that was cut there is the beginning, which agents send back with the error that they made of it.
    """
    value = given
    if isinstance(given, str):
        check_parts(given, "tool_calls")
        try:
            value = json.loads(given, parse_constant=str) if given.strip() else {}  # models write NaN
        except (ValueError, RecursionError):
            value = _begun(given)
    elif given is None:
        value = {}
    if not isinstance(value, Mapping):
        raise RequestError(
            f"the arguments of a call of {name!r:.60} are {given!r:.60}, allowed: a JSON object; send that of the call"
        )
    check_json(value, "tool_calls")
    return dict(value)


def _begun(text: str) -> Any:
    """What there is of JSON text that was cut; None where it is wrong before its end."""
    from pydantic_core import from_json

    try:
        return from_json(text, allow_inf_nan=False, allow_partial="trailing-strings")
    except (ValueError, TypeError):  # which half of a surrogate pair is to it
        return None
