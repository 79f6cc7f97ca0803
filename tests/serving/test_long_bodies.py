"""Bodies of very many parts: other requests go on meanwhile, and what is wrong is told as of a short one.

Nothing is timed: what takes time must be in another thread than the event loop, and stop at the first problem.
"""

from __future__ import annotations

import asyncio
import difflib
import gc
import json
import re
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PATIENCE
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from stand_ins.asgi import asked
from starlette.requests import Request

import nemodiff
from nemodiff.runtime.scheduler.scheduler import Scheduler
from nemodiff.runtime.text.codec import TextCodec, TokenOffsets
from nemodiff.serving.http import handlers, responses
from nemodiff.serving.http.app import Limits, Server
from nemodiff.serving.http.body import Chat, Completion, Detokenize, Tokenize, Watched
from nemodiff.serving.http.body_parts import Body, ConversationPart
from nemodiff.serving.http.dialects.messages_body import Counted, Messages
from nemodiff.serving.http.dialects.messages_writer import MessagesWriter
from nemodiff.serving.http.dialects.responses_body import Responses
from nemodiff.serving.http.dialects.responses_writer import ResponsesWriter
from nemodiff.serving.http.error_responses import on_validation_error
from nemodiff.serving.http.fim_body import Fim
from nemodiff.serving.http.token_values import TokenValues

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "x"}
PADDING = {"metadata": {"note": "x" * 100_000}}
ROUTES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    COMPLETIONS: {"prompt": "x"},
    "/v1/messages": {"messages": [USER], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [USER]},
    "/v1/responses": {"input": [USER], "max_output_tokens": 2},
    "/tokenize": {"messages": [USER]},
    "/events": {"messages": [USER], "max_tokens": 2},
}


@pytest.fixture
def server(engine: nemodiff.LoadedEngine) -> Iterator[Server]:
    with Scheduler(engine, rows=1) as scheduler:
        limits = Limits(image_urls=True)
        served = Server(engine, scheduler, limits, "tiny", {"mode": "linear_spec", "max_new_tokens": 2})
        yield served
        served.close()


@pytest.mark.parametrize("path", ROUTES)
def test_a_long_body_is_read_outside_of_the_event_loop(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Threads are told by what parsing, checking and choosing options call."""
    seen: dict[str, set[int]] = {}

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            if name != "loads" or isinstance(arguments[0], bytes):  # a body, and no answer
                seen.setdefault(name, set()).add(threading.get_ident())
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    watch(json, "loads")
    watch(Body, "_ignores")
    watch(ConversationPart, "_ignores")
    for kind in (Chat, Completion, Watched, Messages, Responses):
        watch(kind, "options")
        watch(kind, "prompts")
    answers = []
    for padding in ({}, PADDING):
        seen.clear()
        body = {**ROUTES[path], **padding}
        if path == COMPLETIONS:
            body["user"] = "me"
        else:
            body["messages" if "messages" in body else "input"] = [{**USER, "note": 1}]

        async def ask(body: dict[str, Any] = body) -> tuple[int, list[Any]]:
            seen["loop"] = {threading.get_ident()}
            return await asked(server.app, path, body)

        status, answer = asyncio.run(ask())
        assert status == 200, answer
        answers.append(answer[0].get("choices", answer[0].get("content", answer[0].get("tokens", True))))
        loop = seen.pop("loop")
        assert seen.keys() >= {"loads", "_ignores"}
        assert not loop & (seen.get("options", set()) | seen.get("prompts", set()))
        if padding:
            assert not any(loop & threads for threads in seen.values())
    assert answers[0] == answers[1]


WRONG: list[tuple[str, Any]] = [
    (CHAT, {"messages": [{"role": "usr", "content": "x"}]}),
    (CHAT, {"messages": [USER], "temperatur": 1}),
    (CHAT, {"messages": [USER], "stop": ["x"] * 2000}),
    (CHAT, {"messages": [USER], "top_p": 7}),
    (CHAT, {"messages": [USER], "model": "other"}),
    (CHAT, {}),
    (COMPLETIONS, {"prompt": [1, "a"]}),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(2000)}}),
    ("/v1/messages", {"messages": [USER]}),
    ("/v1/responses", {"input": "x", "previous_response_id": "y"}),
    ("/tokenize", {"messages": [USER], "prompt": "x"}),
]


@pytest.mark.parametrize(("path", "body"), WRONG)
def test_what_is_wrong_is_told_of_a_long_body_as_of_a_short_one(server: Server, path: str, body: Any) -> None:
    short, long = (asyncio.run(asked(server.app, path, {**body, **padding})) for padding in ({}, PADDING))
    assert short == long
    assert short[0] == (404 if "model" in body else 400)


NO_OBJECTS = [b"[1, 2", b'{"a": 1} x', b"[" * 5, b"\xff", b"", b"[1]", b'"x"', b"5", b"[" * 9000, b"9" * 5000]


TOO_MANY = {
    "lists": b'{"messages": [' + b"[]," * 300_000,
    "nested": b'{"metadata": ' + b"[" * 300_000,
    "objects": b'{"prompt": [' + b'{"a":1},' * 300_000,
    "names": b'{"logit_bias": {' + b'"a":1,' * 300_000,
    "with strings": b"[" + b'["[\\"[",{"{":"}"}],' * 150_000,
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("text", TOO_MANY)
def test_too_many_lists_and_objects_are_never_read(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, text: str
) -> None:
    """Making them would hold every thread."""
    real = json.loads
    monkeypatch.setattr(json, "loads", lambda given: pytest.fail("read") if isinstance(given, bytes) else real(given))
    status, (answer,) = asyncio.run(asked(server.app, path, TOO_MANY[text]))
    assert status == 400
    told = r"the body holds 30000\d (lists and objects|names in objects), allowed: at most 262144; send fewer"
    assert re.fullmatch(told, answer["error"]["message"])


LEGAL: dict[str, tuple[str, Any]] = {
    "text of brackets": ("/tokenize", {"prompt": '[{"' * 400_000}),
    "token ids": ("/detokenize", {"tokens": [130] * 600_000}),
    "prompts of token ids": (COMPLETIONS, {"prompt": [[130] * 10_000] * 60}),
    "texts": (COMPLETIONS, {"prompt": ['[{"a": [1, 2]}, {}],' * 1_500] * 60}),
    "messages": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 50_000}),
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_a_request_may_need_is_read(server: Server, name: str) -> None:
    path, body = LEGAL[name]
    wrong = {} if path in ("/tokenize", "/detokenize") else {"temperature": -1}  # told once all else has been read
    status, (answer,) = asyncio.run(asked(server.app, path, {**body, **wrong}))
    assert (status, answer.get("error", {}).get("param")) == (400 if wrong else 200, next(iter(wrong), None))


@pytest.mark.parametrize(("path", "body"), WRONG)
def test_a_refused_body_is_not_kept(server: Server, path: str, body: Any) -> None:
    """Nothing of it waits for the collector of cycles."""
    large = json.dumps({**body, "metadata": {"note": "x" * 1_000_000}}).encode()
    asyncio.run(asked(server.app, path, large))
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(5):
            asyncio.run(asked(server.app, path, large))
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < 1_000_000


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: f"{text[:8].decode(errors='replace')} {len(text)}")
@pytest.mark.parametrize("kind", ["application/json", "text/plain", ""])
def test_what_is_no_object_is_told_alike_too(server: Server, text: bytes, kind: str) -> None:
    def ask(body: bytes) -> tuple[int, str]:
        status, (answer,) = asyncio.run(asked(server.app, CHAT, body, content_type=kind))
        return status, answer["error"]["message"]

    short, long = ask(text), ask(text + b" " * 100_000)
    assert short[0] == 400
    assert short == long or (text == b"" and long[1].startswith("the body is not JSON")) or kind != "application/json"


class Unwritten(list[Any]):
    def __repr__(self) -> str:
        raise AssertionError


@pytest.mark.parametrize("place", [("body",), ("body", "stop")])
def test_a_wrong_value_is_not_written_as_a_whole(place: tuple[str, ...]) -> None:
    """Its millions of parts would be, on the event loop."""
    values = Unwritten([1] * 100)
    problem = {"type": "dict_type", "loc": place, "msg": "Input should be an object", "input": values}
    request = Request({"type": "http", "path": CHAT, "headers": []})
    told = asyncio.run(on_validation_error(request, RequestValidationError([problem], body={"stop": values})))
    assert f" {[1] * 100!r:.60}".encode() in told.body


@pytest.mark.parametrize("name", ["temperatur" + "e" * 100_000, "e" * 100_000])
def test_a_name_of_any_length_is_compared_with_others_quickly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = list[int]()
    real = difflib.get_close_matches

    def watched(word: str, *arguments: Any) -> list[str]:
        lengths.append(len(word))
        return real(word, *arguments)

    monkeypatch.setattr(difflib, "get_close_matches", watched)
    with pytest.raises(ValidationError, match="is not supported; leave it out"):
        Chat.model_validate({"messages": [USER], name: 1})
    assert lengths[0] < 100


@pytest.mark.parametrize(
    ("path", "fields", "owner", "name"),
    [
        (CHAT, {"prompt_logprobs": 1}, responses, "logprobs_by_id"),
        (CHAT, {"prompt_logprobs": 1, "stream": True}, responses, "logprobs_by_id"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, responses, "logprobs_by_id"),
        (COMPLETIONS, {"echo": True, "logprobs": 1, "stream": True}, TokenValues, "echo"),
        (COMPLETIONS, {"echo": True, "logprobs": 1, "stream": True}, TokenOffsets, "push"),
        ("/v1/fim/completions", {"prompt": "x", "suffix": "y"}, TextCodec, "encode_plain"),
        ("/v1/messages", {}, MessagesWriter, "full"),
        ("/v1/responses", {}, ResponsesWriter, "full"),
    ],
)
def test_what_an_answer_tells_of_many_tokens_is_made_outside_of_the_event_loop(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any], owner: Any, name: str
) -> None:
    seen = list[int]()
    real = getattr(owner, name)

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append(threading.get_ident())
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, watched)

    async def ask() -> int:
        status, answer = await asked(server.app, path, {**ROUTES.get(path, {}), **fields})
        assert status == 200, answer
        return threading.get_ident()

    loop = asyncio.run(ask())
    assert seen
    # Of an answer's own tokens, which come a few at a time, a stream tells on the loop.
    assert loop not in (seen if owner is TextCodec else seen[:1])


def test_a_text_of_many_tokens_is_made_outside_of_the_event_loop(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its check, the text itself and the answer's JSON."""
    seen = set[int]()

    def dumps(value: Any) -> bytes:
        seen.add(threading.get_ident())
        return json.dumps(value).encode()

    monkeypatch.setattr(handlers.orjson, "dumps", dumps)

    async def ask() -> int:
        status, (answer,) = await asked(server.app, "/detokenize", {"tokens": [130, 131]})
        assert (status, answer) == (200, {"prompt": server.scheduler._engine.text.decode_all([130, 131])})
        return threading.get_ident()

    assert asyncio.run(ask()) not in seen
    assert seen


def test_a_client_that_leaves_while_it_sends_is_no_failure(server: Server) -> None:
    sent = list[dict[str, Any]]()
    parts = [{"type": "http.request", "body": b"[", "more_body": True}, {"type": "http.disconnect"}]
    headers = [(b"content-type", b"application/json"), (b"content-length", b"100000")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers}

    async def receive() -> dict[str, Any]:
        return parts.pop(0) if len(parts) > 1 else parts[0]

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(server.app(scope, receive, send))
    assert [message["status"] for message in sent if "status" in message] == [200]


def test_what_a_response_repeats_is_not_the_input() -> None:
    body = Responses.model_validate({"input": "x", "instructions": "Be brief."})
    body.input = [object()]  # type: ignore[list-item]  # which nothing can be made of
    response = ResponsesWriter("tiny", body=body)._response([], None)
    assert response["instructions"] == "Be brief."


def lists(schema: Any) -> Iterator[Any]:
    """The lists inside of a core schema."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("type") == "list":
                yield value
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value


@pytest.mark.parametrize("kind", [Chat, Completion, Watched, Tokenize, Detokenize, Fim, Messages, Counted, Responses])
def test_a_list_is_read_up_to_its_first_mistake(kind: type[BaseModel]) -> None:
    """Else a million mistakes are told of, of which one is answered."""
    found = [*lists(kind.__pydantic_core_schema__)]
    assert found
    assert [one for one in found if not one.get("fail_fast")] == []


@pytest.mark.parametrize("name", ["stop", "bad_words", "stop_token_ids", "logit_bias"])
def test_a_bounded_option_is_counted_before_its_values_are_read(name: str) -> None:
    wrong: Any = {str(i): "x" for i in range(1025)} if name == "logit_bias" else [None] * 1025
    with pytest.raises(nemodiff.RequestError, match=f"^{name} has 1025 values, allowed: at most 1024"):
        Chat.model_validate({"messages": [USER], name: wrong})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "slow"}),
        ("/detokenize", {"tokens": [200]}),
        ("/v1/messages/count_tokens", {"messages": [{**USER, "content": "slow"}]}),
    ],
)
def test_many_texts_that_become_tokens_hold_up_no_chat(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    done = threading.Event()

    def wait_for_some(name: str) -> None:
        real = getattr(TextCodec, name)

        def convert(codec: TextCodec, given: Any) -> Any:
            if "slow" in given or given == [200]:
                done.wait(PATIENCE)
            return real(codec, given)

        monkeypatch.setattr(TextCodec, name, convert)

    for name in ("encode", "encode_rendered", "decode_all"):
        wait_for_some(name)

    async def ask() -> None:
        slow = [asyncio.create_task(asked(server.app, path, body)) for _ in range(40)]
        await asyncio.sleep(0.05)
        status, _ = await asyncio.wait_for(asked(server.app, CHAT, {"messages": [USER]}), PATIENCE / 2)
        assert status == 200
        assert not any(task.done() for task in slow)
        done.set()
        assert {status for status, _ in await asyncio.gather(*slow)} == {200}

    try:
        asyncio.run(ask())
    finally:
        done.set()
