"""Bodies of the APIs as what the runtime takes, and whole answers as their objects: every field, without a server."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nemodiff.runtime.events.events import Event, Finished, Started, Text
from nemodiff.runtime.requests.generation import Acceptance, Generation
from nemodiff.runtime.tools.answer import Delta, ToolCall
from nemodiff.serving.http.body_parts import Message
from nemodiff.serving.http.dialects.messages_body import Messages
from nemodiff.serving.http.dialects.messages_writer import MessagesWriter
from nemodiff.serving.http.dialects.responses_body import Responses
from nemodiff.serving.http.dialects.responses_writer import ResponsesWriter

PARTS = [
    Delta("reasoning", "Hm."), Delta("content", "I "), Delta("content", "look."), Delta("call", "eu.weather"),
    Delta("arguments", '{"city": '), Delta("arguments", '"Rome"}'), Delta("call", "clock", 1),
    Delta("arguments", "{}", 1),
]  # fmt: skip
PNG = "data:image/png;base64,AAAA"


def generation(**values: Any) -> Generation:
    fields = {
        "text": "", "token_ids": [7, 8, 9], "prompt_tokens": 10, "reused_tokens": 4, "finish_reason": "stop",
        "mode": "ar", "block_length": 32, "threshold": 0.9, "nfe": {}, "decode_tpf": None, "e2e_tpf": None,
        "acceptance": Acceptance(None, [], []), "adapter_tokens": 0, "timings_ms": {}, "reasoning": "Hm.",
        "content": "I look.", "reasoning_tokens": 2,
        "tool_calls": [ToolCall("eu.weather", '{"city": "Rome"}'), ToolCall("clock", "{}")],
    }  # fmt: skip
    return Generation(**(fields | values))


def events_of(writer: MessagesWriter | ResponsesWriter, finished: Generation, parts: list[Delta]) -> list[Any]:
    """What a writer makes of a request's events."""

    async def happened() -> AsyncIterator[tuple[int, Event]]:
        yield 0, Started(0, 0.0, "ar", 32, finished.prompt_tokens, finished.reused_tokens, [], 0)
        yield 0, Text(0, 0.0, "", [7], None, None, parts[:2])
        yield 0, Text(0, 0.0, "", [8, 9], None, None, parts[2:])
        yield 0, Finished(0, 0.0, finished, None, None, None)

    async def collected() -> list[Any]:
        return [item async for item in writer.events(happened())]

    return asyncio.run(collected())


@pytest.fixture
def same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0")


MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "tiny"}
BLOCKS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "Hm.", "signature": ""},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "id": "toolu_0", "name": "eu.weather", "input": {"city": "Rome"}},
    {"type": "tool_use", "id": "toolu_0", "name": "clock", "input": {}},
]
USAGE = {"input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 3}


@pytest.mark.usefixtures("same_ids")
def test_an_answer_is_anthropic_s_message() -> None:
    writer = MessagesWriter("tiny", id="1")
    end = {"stop_reason": "tool_use", "stop_sequence": None}
    assert writer.full(generation()) == {**MESSAGE, "content": BLOCKS, **end, "usage": USAGE}
    ends = {
        ("length", None): ("max_tokens", None),
        ("stop", None): ("end_turn", None),
        ("stop", "."): ("stop_sequence", "."),
        ("length", "."): ("max_tokens", None),
    }
    for (reason, stop), (told, sequence) in ends.items():
        whole = writer.full(generation(tool_calls=[], reasoning="", finish_reason=reason, stop_text=stop))
        assert whole["content"] == BLOCKS[1:2]
        assert (whole["stop_reason"], whole["stop_sequence"]) == (told, sequence)


@pytest.mark.usefixtures("same_ids")
def test_an_answer_is_a_stream_of_anthropic_s_blocks() -> None:
    def begun(index: int, **empty: Any) -> dict[str, Any]:
        return {"type": "content_block_start", "index": index, "content_block": BLOCKS[index] | empty}

    def delta(index: int, kind: str, **values: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **values}}

    def ended(index: int) -> dict[str, Any]:
        return {"type": "content_block_stop", "index": index}

    open_message = {**MESSAGE, "content": [], "stop_reason": None, "stop_sequence": None}
    assert events_of(MessagesWriter("tiny", id="1"), generation(), PARTS) == [
        {"type": "message_start", "message": {**open_message, "usage": USAGE | {"output_tokens": 0}}},
        begun(0, thinking=""),
        delta(0, "thinking_delta", thinking="Hm."),
        delta(0, "signature_delta", signature=""),
        ended(0),
        begun(1, text=""),
        delta(1, "text_delta", text="I "),
        delta(1, "text_delta", text="look."),
        ended(1),
        begun(2, input={}),
        delta(2, "input_json_delta", partial_json='{"city": '),
        delta(2, "input_json_delta", partial_json='"Rome"}'),
        ended(2),
        begun(3),
        delta(3, "input_json_delta", partial_json="{}"),
        ended(3),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": USAGE},
        {"type": "message_stop"},
    ]


def test_anthropic_s_turns_are_messages() -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    linked = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    shown = {"type": "image_url", "image_url": {"url": PNG}}
    blocks = [
        {"type": "text", "text": "Look:"},
        picture,
        linked,
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x"}, picture]},
        {"type": "tool_result", "tool_use_id": "b", "content": "no", "is_error": True},
        {"type": "text", "text": "And"},
        {"type": "text", "text": "now?"},
    ]
    said = [
        {"type": "redacted_thinking", "data": "?"},
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "I "},
        {"type": "text", "text": "look."},
        {"type": "tool_use", "id": "a", "name": "f", "input": {"n": 1}},
    ]
    body = Messages.model_validate(
        {
            "max_tokens": 5,
            "system": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "system", "content": "He waves."},
                {"role": "assistant", "content": said},
                {"role": "user", "content": blocks},
            ],
        }
    )
    function = {"name": "f", "arguments": '{"n": 1}'}
    assert body.turns() == [
        {"role": "system", "content": "Be\n\nbrief."},
        {"role": "user", "content": "Hello"},
        {"role": "user", "content": "He waves."},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"id": "a", "type": "function", "function": function}],
            "reasoning_content": "Hm.",
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look:"},
                shown,
                {"type": "image_url", "image_url": {"url": "http://x/y.png"}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "x"}, shown]},
        {"role": "tool", "tool_call_id": "b", "content": "Error: no"},
        {"role": "user", "content": "And\n\nnow?"},
    ]


def test_anthropic_s_fields_are_options() -> None:
    schema = {"type": "object"}
    tool = {"name": "f", "description": "d", "input_schema": schema, "strict": True}
    asked = {"max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}

    def options(**fields: Any) -> dict[str, Any]:
        return Messages.model_validate(asked | fields).options()

    assert options() == {"max_new_tokens": 5}
    function = {"name": "f", "description": "d", "parameters": schema, "strict": True}
    assert options(
        tools=[tool, {"name": "g", "input_schema": schema}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 7},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}},
        stop_sequences=["x"],
        temperature=0.5,
    ) == {
        "max_new_tokens": 5,
        "tools": [
            {"type": "function", "function": function},
            {"type": "function", "function": {"name": "g", "parameters": schema}},
        ],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "thinking": True,
        "thinking_budget": 7,
        "chat_template_kwargs": {"reasoning_effort": "low"},
        "json_schema": schema,
        "stop": ["x"],
        "temperature": 0.5,
    }
    assert options(thinking={"type": "disabled", "budget_tokens": 7}) == {"max_new_tokens": 5, "thinking": False}
    assert options(thinking={"type": "adaptive"})["thinking"]
    for choice, word in (({"type": "auto"}, "auto"), ({"type": "none"}, "none"), ({"type": "tool", "name": "f"}, "f")):
        chosen = options(tool_choice=choice)
        assert (chosen["tool_choice"], chosen["parallel_tool_calls"]) == (word, True)
    begun = [*asked["messages"], {"role": "assistant", "content": "b"}]  # type: ignore[misc]
    assert options(messages=begun)["continue_final_message"]


RESPONSES = Responses.model_validate(
    {
        "input": "a",
        "instructions": "Be brief.",
        "max_output_tokens": 5,
        "temperature": 0.5,
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low"},
        "metadata": {"order": "7"},
        "text": {"format": {"type": "json_object"}},
        "tools": [
            {"type": "namespace", "name": "eu", "tools": [{"type": "function", "name": "weather"}]},
            {"type": "function", "name": "clock", "description": "d", "strict": True},
            {"type": "web_search"},
        ],
    }
)
OUTPUT: list[dict[str, Any]] = [
    {"id": "rs_0", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {
        "id": "msg_0",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
    },
    {"name": "weather", "namespace": "eu", "arguments": '{"city": "Rome"}'},
    {"name": "clock", "arguments": "{}"},
]
for call in OUTPUT[2:]:
    call |= {"id": "fc_0", "call_id": "call_0", "type": "function_call"}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 2,
    "error": None,
    "incomplete_details": None,
    "model": "tiny",
    "instructions": "Be brief.",
    "max_output_tokens": 5,
    "temperature": 0.5,
    "top_p": None,
    "parallel_tool_calls": False,
    "previous_response_id": None,
    "reasoning": {"effort": "low", "summary": None},
    "store": False,
    "text": {"format": {"type": "json_object"}},
    "tool_choice": "auto",
    "tools": [
        {
            "type": "namespace",
            "name": "eu",
            "description": "",
            "tools": [
                {"type": "function", "name": "weather", "description": None, "parameters": None, "strict": False}
            ],
        },
        {"type": "function", "name": "clock", "description": "d", "parameters": None, "strict": True},
        {"type": "web_search"},
    ],
    "top_logprobs": None,
    "truncation": "disabled",
    "metadata": {"order": "7"},
}
USED = {
    "input_tokens": 10,
    "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
    "output_tokens": 3,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 13,
}
WARNINGS = ["w", "tool web_search: left out, since no server runs it here"]


def whole_output(*statuses: str) -> list[dict[str, Any]]:
    return [item | {"status": status} for item, status in zip(OUTPUT, statuses, strict=False)]


@pytest.mark.usefixtures("same_ids")
def test_an_answer_is_openai_s_response() -> None:
    writer = ResponsesWriter("tiny", "1", 2, RESPONSES)
    done = {"usage": USED, "warnings": WARNINGS}
    output = whole_output(*["completed"] * 4)
    assert writer.full(generation(warnings=["w"])) == {**RESPONSE, "status": "completed", "output": output, **done}
    cut = writer.full(generation(warnings=["w"], finish_reason="length", tool_calls=[]))
    details = {"incomplete_details": {"reason": "max_output_tokens"}}
    output = whole_output("completed", "incomplete")
    assert cut == {**RESPONSE, **done, **details, "status": "incomplete", "output": output}
    bare = ResponsesWriter("tiny", "1", 2, Responses.model_validate({"input": "a"})).full(generation(tool_calls=[]))
    assert "warnings" not in bare
    assert (bare["parallel_tool_calls"], bare["tools"], bare["metadata"]) == (True, [], {})
    assert (bare["reasoning"], bare["text"]) == ({"effort": None, "summary": None}, {"format": {"type": "text"}})


@pytest.mark.usefixtures("same_ids")
@pytest.mark.parametrize("cut", [False, True])
def test_an_answer_is_a_stream_of_openai_s_items(cut: bool) -> None:
    last = "incomplete" if cut else "completed"
    output = whole_output("completed", "completed", "completed", last)

    def item(index: int, **empty: Any) -> dict[str, Any]:
        shown = OUTPUT[index] | {"status": "in_progress"} | empty
        return {"type": "response.output_item.added", "output_index": index, "item": shown}

    def done(index: int) -> dict[str, Any]:
        return {"type": "response.output_item.done", "output_index": index, "item": output[index]}

    def at(index: int, kind: str, **values: Any) -> dict[str, Any]:
        inside = {} if "arguments" in kind else {"content_index": 0}
        return {"type": f"response.{kind}", "item_id": OUTPUT[index]["id"], "output_index": index, **inside, **values}

    def part(index: int, text: str) -> dict[str, Any]:
        return {"part": OUTPUT[index]["content"][0] | {"text": text}}

    response = {**RESPONSE, "status": "in_progress", "output": [], "usage": None}
    warnings = {"warnings": WARNINGS[1:]}
    details = {"incomplete_details": {"reason": "max_output_tokens"}} if cut else {}
    expected = [
        {"type": "response.created", "response": response},
        {"type": "response.in_progress", "response": response},
        item(0, content=[]),
        at(0, "content_part.added", **part(0, "")),
        at(0, "reasoning_text.delta", delta="Hm."),
        at(0, "reasoning_text.done", text="Hm."),
        at(0, "content_part.done", **part(0, "Hm.")),
        done(0),
        item(1, content=[]),
        at(1, "content_part.added", **part(1, "")),
        at(1, "output_text.delta", delta="I ", logprobs=[]),
        at(1, "output_text.delta", delta="look.", logprobs=[]),
        at(1, "output_text.done", text="I look.", logprobs=[]),
        at(1, "content_part.done", **part(1, "I look.")),
        done(1),
        item(2, arguments=""),
        at(2, "function_call_arguments.delta", delta='{"city": '),
        at(2, "function_call_arguments.delta", delta='"Rome"}'),
        at(2, "function_call_arguments.done", name="weather", arguments='{"city": "Rome"}'),
        done(2),
        item(3, arguments=""),
        at(3, "function_call_arguments.delta", delta="{}"),
        at(3, "function_call_arguments.done", name="clock", arguments="{}"),
        done(3),
        {
            "type": f"response.{last}",
            "response": {**response, **details, "status": last, "output": output, "usage": USED, **warnings},
        },
    ]
    ended = generation(finish_reason="length" if cut else "stop")
    told = events_of(ResponsesWriter("tiny", "1", 2, RESPONSES), ended, PARTS)
    assert told == [event | {"sequence_number": number} for number, event in enumerate(expected)]


def test_openai_s_items_are_messages() -> None:
    image = {"type": "input_image", "image_url": PNG}
    body = Responses.model_validate(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [{"type": "input_text", "text": "Look:"}, image]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "H"}]},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "m."}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "I "}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "won't."}]},
                {"type": "function_call", "call_id": "a", "namespace": "eu", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "b", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "a", "output": "x"},
                {"type": "function_call_output", "call_id": "b", "output": [image]},
                {"role": "assistant", "content": "Yes."},
                {"role": "system", "content": "He waves."},
            ],
        }
    )
    shown = {"type": "image_url", "image_url": {"url": PNG}}
    calls = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for id, name in (("a", "eu.f"), ("b", "g"))
    ]
    assert body.turns() == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, shown]},
        {"role": "assistant", "content": "I won't.", "tool_calls": calls, "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "a", "content": "x"},
        {"role": "tool", "tool_call_id": "b", "content": [shown]},
        {"role": "assistant", "content": "Yes.", "tool_calls": []},
        {"role": "system", "content": "He waves."},
    ]


def test_openai_s_fields_are_options() -> None:
    def options(**fields: Any) -> dict[str, Any]:
        return Responses.model_validate({"input": "a"} | fields).options()

    assert options() == {"tool_choice": "auto"}
    schema = {"type": "object"}
    given = RESPONSES.model_dump(by_alias=True, exclude_none=True)
    asked = given | {"text": {"format": {"type": "json_schema", "schema": schema}}}
    functions = [{"name": "eu.weather"}, {"name": "clock", "description": "d", "strict": True}]
    assert options(**asked) == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "tools": [{"type": "function", "function": function} for function in functions],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "thinking": True,
        "chat_template_kwargs": {"reasoning_effort": "low"},
        "json_schema": schema,
    }
    allowed = [{"type": "function", "name": "clock"}, {"type": "mcp", "name": "eu"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": allowed}
    assert options(tools=given["tools"], tool_choice=choice) == {
        "tools": [{"type": "function", "function": functions[1]}],
        "tool_choice": "required",
    }
    choice["tools"] = [{"type": "namespace", "name": "eu"}]
    assert options(tools=given["tools"], tool_choice=choice)["tools"][0]["function"] == functions[0]
    none = options(reasoning={"effort": "none"})
    assert (none["thinking"], none["chat_template_kwargs"]) == (False, {"reasoning_effort": "none"})
    assert options(tool_choice={"type": "function", "name": "clock", "namespace": "eu"})["tool_choice"] == "eu.clock"
    assert options(text={"format": {"type": "json_object"}})["json_schema"] == {"type": "object"}
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    assert options(include=include)["logprobs"] == 0
    assert options(include=include, top_logprobs=3)["logprobs"] == 3


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        (
            {"role": "tool", "content": [{"type": "text", "text": "a"}], "tool_call_id": "x", "name": "f"},
            {"role": "tool", "content": "a", "tool_call_id": "x", "name": "f"},
        ),
        ({"role": "assistant", "refusal": "No."}, {"role": "assistant", "content": "No.", "tool_calls": []}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": "", "tool_calls": []}),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "reasoning": "Hm."},
            {"role": "assistant", "content": "No.", "tool_calls": [], "reasoning_content": "Hm."},
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": PNG}}]},  # noqa: E501
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": PNG}}]},  # noqa: E501
        ),
        (
            {"role": "system", "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}, {"type": "text", "text": "."}]}]},  # noqa: E501
            {"role": "system", "content": [{"type": "thinking", "thinking": "Hm."}]},
        ),
    ],
)  # fmt: skip
def test_a_message_of_a_chat_is_the_runtime_s(given: dict[str, Any], plain: dict[str, Any]) -> None:
    assert Message.model_validate(json.loads(json.dumps(given))).plain() == plain
