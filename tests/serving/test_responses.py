"""`/v1/responses` by OpenAI's own client: text, thoughts, functions, streams, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import openai
import pydantic
import pytest
from stand_ins.http_server import Served

from nemodiff.runtime.requests.token_logprobs import TokenLogprobs
from nemodiff.serving.http.token_values import ContentTokens

QUESTION = "What is the weather in Rome?"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tell it.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city", "days"],
    },
}
TIME: Any = {"type": "function", "name": "time", "parameters": {"type": "object", "properties": {}}}
LOGPROBS: Any = ["message.output_text.logprobs"]
MODES = ("ar", "linear_spec", "quadratic_spec")


def named(name: str, **more: str) -> dict[str, Any]:
    return {"type": "function", "name": name, **more}


def test_text_is_that_of_a_chat(server: Served, client: openai.OpenAI) -> None:
    parts: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = server.ask("/v1/chat/completions", {"messages": parts})
    answer = client.responses.create(model="tiny", input=QUESTION, instructions="Be brief.", max_output_tokens=99999)
    assert answer.output_text == chat["choices"][0]["message"]["content"]
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert answer.usage.total_tokens == chat["usage"]["total_tokens"]
    assert client.responses.create(model="tiny", input=parts).output_text == answer.output_text


def test_sampling_options_have_their_own_names(server: Served) -> None:
    options = {"logit_bias": {"348": -100}, "bad_words": ["7"], "min_tokens": 9, "stop_token_ids": [145]}
    asked = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 30, **options}
    text = server.ask("/v1/chat/completions", asked)["choices"][0]["message"]["content"]
    assert (
        text
        != server.ask("/v1/chat/completions", {**asked, **dict.fromkeys(options)})["choices"][0]["message"]["content"]
    )
    answer = server.ask("/v1/responses", {"input": QUESTION, "max_output_tokens": 30, **options})
    assert answer["output"][0]["content"][0]["text"] == text
    assert server.ask("/v1/messages", asked)["content"][0]["text"] == text


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_is_the_whole_answer_in_order(client: openai.OpenAI, mode: str) -> None:
    asked: dict[str, Any] = {
        "model": f"tiny:{mode}",
        "input": QUESTION,
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "weather"},
        "reasoning": {"effort": "low"},
        "extra_body": {"thinking_budget": 6},
    }
    whole = client.responses.create(**asked)
    assert [item.type for item in whole.output] == ["reasoning", "function_call"]
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens in range(1, 8)
    kinds, numbers = [], []
    with client.responses.stream(**asked) as stream:
        for event in stream:
            kinds.append(event.type)
            numbers.append(event.sequence_number)
        streamed = stream.get_final_response()
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-2:] == ["response.output_item.done", "response.completed"]
    assert numbers == list(range(len(numbers)))
    call, ours = whole.output[1], streamed.output[1]
    assert call.type == "function_call"
    assert ours.type == "function_call"
    assert (ours.name, ours.arguments) == (call.name, call.arguments)
    assert json.loads(call.arguments)["days"] <= 9
    thoughts = [
        item.content[0].text
        for item in (whole.output[0], streamed.output[0])
        if item.type == "reasoning" and item.content
    ]
    assert len(thoughts) == 2
    assert thoughts[0] == thoughts[1]


def test_text_and_its_end_are_streamed(client: openai.OpenAI) -> None:
    text, done = "", []
    for event in client.responses.create(model="tiny", input=QUESTION, max_output_tokens=5, stream=True):
        text += event.delta if event.type == "response.output_text.delta" else ""
        done += [event.text] if event.type == "response.output_text.done" else []
    assert done == [text]
    assert event.type == "response.incomplete"
    assert event.response.incomplete_details is not None
    assert event.response.incomplete_details.reason == "max_output_tokens"
    assert event.response.output_text == text


def test_a_long_number_comes_back_in_a_stream_too(server: Served) -> None:
    body = {"input": QUESTION, "max_output_tokens": 3, "metadata": {"order": 10**30}}
    whole = server.ask("/v1/responses", body)
    _, _, content = server.send("/v1/responses", body | {"stream": True})
    last = json.loads(content.decode().rstrip().rpartition("data: ")[2])["response"]
    assert last["metadata"] == whole["metadata"] == {"order": 10**30}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WEATHER], "tool_choice": "required", "reasoning": {"effort": "low"}, "thinking_budget": 4},
        {"max_output_tokens": 3, "metadata": {"order": "7"}},
        {"include": LOGPROBS, "top_logprobs": 2, "max_output_tokens": 9},
    ],
)
def test_what_is_sent_is_of_openai_s_types(server: Served, fields: dict[str, Any]) -> None:
    """The client takes what comes without a check, and fails where a field is used that is not there."""
    body = {"input": QUESTION, **fields}
    whole = openai.types.responses.Response.model_validate(server.ask("/v1/responses", body))
    assert whole.metadata == fields.get("metadata", {})
    checked = pydantic.TypeAdapter[Any](openai.types.responses.ResponseStreamEvent)
    _, _, content = server.send("/v1/responses", {**body, "stream": True})
    events = [json.loads(part.partition("data: ")[2]) for part in content.decode().split("\n\n") if part]
    *_, last = [checked.validate_python(event) for event in events]
    assert [item.status for item in whole.output] == [item.status for item in last.response.output]  # type: ignore[union-attr]
    assert whole.output[-1].status == whole.status  # type: ignore[union-attr]


def test_a_conversation_goes_on_after_a_call(server: Served, client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="tiny", input=QUESTION, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = first.output
    assert call.type == "function_call"
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        {"role": "user", "content": "And?"},
    ]
    second = client.responses.create(model="tiny", input=items, tools=[WEATHER], max_output_tokens=4)
    function = {"name": call.name, "arguments": call.arguments}
    plain = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "x", "function": function}]},
        {"role": "tool", "content": "sunny"},
        {"role": "user", "content": "And?"},
    ]
    nested = {"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "type"}}
    assert second.usage is not None
    assert server.ask("/tokenize", {"messages": plain, "tools": [nested]})["count"] == second.usage.input_tokens


def test_functions_of_a_namespace_are_called_by_both_names(client: openai.OpenAI) -> None:
    spaces: Any = [{"type": "namespace", "name": name, "description": "", "tools": [WEATHER]} for name in ("eu", "us")]
    asked: dict[str, Any] = {
        "model": "tiny",
        "input": QUESTION,
        "tools": [{"type": "web_search"}, *spaces],
        "tool_choice": {"type": "function", "namespace": "us", "name": "weather"},
        "max_output_tokens": 300,
    }
    whole = client.responses.create(**asked)
    (call,) = whole.output
    assert call.type == "function_call"
    assert (call.namespace, call.name) == ("us", "weather")
    assert (whole.model_extra or {})["warnings"] == ["tool web_search: left out, since no server runs it here"]
    with client.responses.stream(**asked) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert (streamed.namespace, streamed.name, streamed.arguments) == ("us", "weather", call.arguments)
    talk: Any = [
        {"role": "user", "content": QUESTION},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    flat = [item | {"name": f"us.{item['name']}", "namespace": None} if "name" in item else item for item in talk]
    both = [client.responses.create(model="tiny", input=i, max_output_tokens=4, tools=spaces) for i in (talk, flat)]
    assert both[0].output_text == both[1].output_text
    assert both[0].usage is not None
    assert both[1].usage is not None
    assert both[0].usage.input_tokens == both[1].usage.input_tokens


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    class Point(pydantic.BaseModel):
        x: int

    parsed = client.responses.parse(model="tiny", input=QUESTION, text_format=Point).output_parsed
    assert isinstance(parsed, Point)
    form: Any = {"format": {"type": "json_object"}}
    assert isinstance(json.loads(client.responses.create(model="tiny", input=QUESTION, text=form).output_text), dict)


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_the_only_ones(client: openai.OpenAI, server: Served, mode: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": QUESTION, "max_output_tokens": 300}
    choice: Any = {"type": "allowed_tools", "mode": mode, "tools": [named("weather"), {"type": "web_search"}]}
    tools = [TIME, WEATHER, {"type": "web_search"}]
    limited = client.responses.create(**asked, tools=tools, tool_choice=choice)
    alone = client.responses.create(**asked, tools=[WEATHER], tool_choice=mode)
    assert limited.output_text == alone.output_text
    assert [(i.name, i.arguments) for i in limited.output if i.type == "function_call"] == [
        (i.name, i.arguments) for i in alone.output if i.type == "function_call"
    ]
    assert [item.type for item in limited.output] == (["function_call"] if mode == "required" else ["message"])
    assert [tool.type for tool in limited.tools] == ["function", "function", "web_search"]
    assert limited.tool_choice.model_dump() == choice  # type: ignore[union-attr]
    nested = [
        {"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in tools if "name" in t
    ]
    body = {"messages": [{"role": "user", "content": QUESTION}], "tools": nested, "max_tokens": 300}
    body["tool_choice"] = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": [{"type": "function", "function": {"name": "weather"}}]},
    }
    message = server.ask("/v1/chat/completions", body)["choices"][0]["message"]
    assert (message["content"] or "") == limited.output_text
    assert [call["function"]["name"] for call in message.get("tool_calls", [])] == [
        item.name for item in limited.output if item.type == "function_call"
    ]


def test_allowed_tools_may_be_of_a_namespace(client: openai.OpenAI) -> None:
    space: Any = {"type": "namespace", "name": "eu", "description": "", "tools": [WEATHER, TIME]}
    for allowed in (named("weather", namespace="eu"), {"type": "namespace", "name": "eu"}):
        choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [allowed]}
        answer = client.responses.create(
            model="tiny", input=QUESTION, tools=[TIME, space], tool_choice=choice, parallel_tool_calls=False
        )
        (call,) = answer.output
        assert call.type == "function_call"
        assert call.namespace == "eu"


@pytest.mark.parametrize("thoughts", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_logprobs_are_those_of_the_text_alone(server: Served, client: openai.OpenAI, mode: str, thoughts: bool) -> None:
    asked: dict[str, Any] = {"model": f"tiny:{mode}", "input": QUESTION, "include": LOGPROBS, "top_logprobs": 3}
    if thoughts:
        asked |= {"reasoning": {"effort": "low"}, "extra_body": {"thinking_budget": 6}}
    whole = client.responses.create(**asked)
    message = whole.output[-1]
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs
    assert bytes(b for one in part.logprobs for b in one.bytes).decode() == part.text
    assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in part.logprobs)
    chat: dict[str, Any] = {"model": f"tiny:{mode}", "messages": [{"role": "user", "content": QUESTION}]}
    chat |= {"logprobs": True, "top_logprobs": 3, "max_tokens": 300}
    chat |= {"reasoning_effort": "low", "thinking_budget": 6} if thoughts else {}
    every = server.ask("/v1/chat/completions", chat)["choices"][0]["logprobs"]["content"]
    ours = [one.model_dump() for one in part.logprobs]
    at = len(every) - len(ours) - 1  # the end of the text is a token too
    assert ours == every[at:-1]
    assert (at > 0) == thoughts
    deltas, done = [], []
    for event in client.responses.create(**asked, stream=True):
        if event.type == "response.output_text.delta":
            deltas += [one.logprob for one in event.logprobs]
        elif event.type == "response.output_text.done":
            done += [one.logprob for one in event.logprobs]
        elif event.type == "response.completed":
            last = event.response.output[-1]
    assert deltas == done == [one.logprob for one in part.logprobs]
    assert last.type == "message"
    assert last.content == message.content


SPOKEN = ["<t>", "ab", "c", "</t>", "\n", b"H\xc3", b"\xa9", " yo", " \n<call>", "yo", "</call>", "\n", " end", "<end>"]


@pytest.mark.parametrize("size", [1, 2, 99])
def test_tokens_of_thoughts_calls_and_marks_are_not_those_of_text(size: int) -> None:
    """However the parts are cut."""
    raw = [token if isinstance(token, bytes) else token.encode() for token in SPOKEN]
    codec: Any = SimpleNamespace(token_bytes=raw.__getitem__, name=lambda i: str(SPOKEN[i]))
    tokens = ContentTokens(codec)
    tokens.tell(range(len(raw)), [TokenLogprobs(-0.5, [], 1)] * len(raw))
    taken = {}
    for part, text in (("thoughts", "abc"), ("content", "Hé yo"), ("more", "\nend")):
        pieces = [tokens.take(text[i : i + size]) for i in range(0, len(text), size)]
        taken[part] = [one["token"] for piece in pieces for one in piece]
    assert taken == {"thoughts": ["ab", "c"], "content": [str(t) for t in SPOKEN[5:8]], "more": ["\n", " end"]}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported, since responses are not stored"),
        ({"conversation": "conv_1"}, "conversation is not supported, since responses are not stored"),
        ({"top_logprobs": 2}, "top_logprobs needs include to hold message.output_text.logprobs"),
        ({"include": LOGPROBS, "top_logprobs": -1}, "logprobs is -1, allowed"),
        ({"include": LOGPROBS, "mode": "diffusion"}, "logprobs"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [named("time")]}},
            "tool_choice allows 'time', which is no tool that is given",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "none", "tools": []}},
            "Input should be 'auto' or 'required'",
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}},
            "tool_choice is 'required', but no tools are given",
        ),
        ({"background": True}, "'background' is not supported"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0 is an item_reference, but items are not stored"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "image 1: the URL is 'x', allowed: data:image/png",
        ),
        ({"tools": [{"type": "computer"}]}, "tools.0.type: Input should be 'function'"),
        ({"tools": [WEATHER, WEATHER]}, "tools holds 'weather' twice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice is 'required', but no tools"),
        ({"tool_choice": "required"}, "tool_choice is 'required', but no tools are given"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format has no schema"),
        (
            {"input": [{"role": "assistant", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input holds an image that neither user nor tool has given",
        ),
        ({"input": 5}, "input: Input should be a valid string"),
        ({"input": [{"type": 5}]}, "input.0.type is 5, allowed: "),
    ],
)
def test_what_is_wrong_is_told(server: Served, fields: dict[str, Any], problem: str) -> None:
    status, _, content = server.send("/v1/responses", {"input": QUESTION, **fields})
    assert status == 400, content
    assert problem in json.loads(content)["error"]["message"]
