"""`/v1/messages` by Anthropic's own client: text, thoughts, tools, streams, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from stand_ins.http_server import Served, serving

from nemodiff.runtime.tools.answer import ToolCall
from nemodiff.serving.http.dialects.messages_writer import MessagesWriter

if TYPE_CHECKING:
    import anthropic

ASKED: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
}
TOOLS: list[Any] = [
    {"name": "weather", "description": "Tell it.", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
    {"type": "custom", "name": "clock", "input_schema": {"type": "object", "properties": {}}},
]


@pytest.fixture(scope="module")
def server(xml_tool_engine: Path) -> Iterator[Served]:
    with serving(xml_tool_engine, "--served-model-name", "tiny", "--api-key", "key") as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[anthropic.Anthropic]:
    import anthropic  # a second of processor time

    with anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0) as made:
        yield made


def ask(server: Served, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    status, _, content = server.send(path, {"model": "tiny", **body}, x_api_key="key")
    return status, json.loads(content)


def test_text_is_that_of_a_chat(server: Served, client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="tiny", max_tokens=8000, messages=ASKED, system="Be brief.")
    talk = [{"role": "system", "content": "Be brief."}, *ASKED]
    chat = server.ask("/v1/chat/completions", {"messages": talk}, authorization="Bearer key")
    (block,) = message.content
    assert block.type == "text"
    assert block.text == chat["choices"][0]["message"]["content"]
    assert (message.stop_reason, message.role, message.model) == ("end_turn", "assistant", "tiny")
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == chat["usage"]["prompt_tokens"]
    assert usage.output_tokens == chat["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    "written", ['{"city": "\\ud83d"}', '{"days": NaN}', "[1]", '{"a": ' + "[" * 900, '{"city": "Ro']
)
def test_arguments_that_no_client_could_read_are_none(written: str) -> None:
    generation: Any = SimpleNamespace(
        reasoning="", content="", tool_calls=[ToolCall("weather", written)], stop_text=None, finish_reason="stop",
        prompt_tokens=3, reused_tokens=0, token_ids=[1],
    )  # fmt: skip
    (block,) = MessagesWriter("tiny").full(generation)["content"]
    assert (block["name"], block["input"]) == ("weather", {})


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "quadratic_spec"])
def test_a_stream_is_the_whole_answer_in_order(client: anthropic.Anthropic, mode: str) -> None:
    asked: dict[str, Any] = {
        "model": f"tiny:{mode}",
        "max_tokens": 300,
        "messages": ASKED,
        "tools": TOOLS,
        "tool_choice": {"type": "tool", "name": "weather"},
        "thinking": {"type": "enabled", "budget_tokens": 6},
    }
    whole = client.messages.create(**asked)
    assert [block.type for block in whole.content] == ["thinking", "tool_use"]
    assert whole.stop_reason == "tool_use"
    kinds, opened = [], []
    with client.messages.stream(**asked) as stream:
        for event in stream:
            kinds.append(event.type)
            if event.type == "content_block_start":
                opened.append(event.index)
            elif event.type == "content_block_delta":
                assert event.index == opened[-1]
        streamed = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    assert opened == [0, 1]
    for ours, theirs in zip(streamed.content, whole.content, strict=True):
        assert ours.model_dump(exclude={"id"}) == theirs.model_dump(exclude={"id"})
    (_, call) = whole.content
    assert call.type == "tool_use"
    assert isinstance(call.input["days"], int)
    assert streamed.usage.output_tokens == whole.usage.output_tokens


def test_a_conversation_goes_on_after_a_call(server: Served, client: anthropic.Anthropic) -> None:
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    first = client.messages.create(model="tiny", max_tokens=300, messages=ASKED, tools=TOOLS, tool_choice=choice)
    (call,) = first.content
    assert call.type == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    thoughts = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    talk: list[Any] = [
        *ASKED,
        {"role": "assistant", "content": [thoughts, {"type": "text", "text": "I look."}, *first.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}, {"type": "text", "text": "Go on."}]},
    ]
    second = client.messages.create(model="tiny", max_tokens=4, messages=talk, tools=TOOLS)
    counted = client.messages.count_tokens(model="tiny", messages=talk, tools=TOOLS)
    total = second.usage.input_tokens + (second.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens == total
    arguments = {"id": "x", "function": {"name": call.name, "arguments": json.dumps(call.input)}}
    plain = [
        *ASKED,
        {"role": "assistant", "content": "I look.", "tool_calls": [arguments]},
        {"role": "tool", "content": "sunny"},
        {"role": "user", "content": "And?\n\nGo on."},
    ]
    functions = [
        {"type": "function", "function": {"name": t["name"], "parameters": t["input_schema"]}}
        | ({"description": t["description"]} if "description" in t else {})
        for t in TOOLS
    ]
    functions[0]["function"]["description"] = "Tell it."
    chat = server.ask("/tokenize", {"messages": plain, "tools": functions}, authorization="Bearer key")
    assert chat["count"] == total


def test_an_answer_that_has_begun_is_continued(server: Served, client: anthropic.Anthropic) -> None:
    talk: list[Any] = [*ASKED, {"role": "assistant", "content": [{"type": "text", "text": "The weather in"}]}]
    message = client.messages.create(model="tiny", max_tokens=8, messages=talk)
    chat = {"messages": talk, "continue_final_message": True, "max_tokens": 8}
    same = server.ask("/v1/chat/completions", chat, authorization="Bearer key")
    (block,) = message.content
    assert block.type == "text"
    assert block.text == same["choices"][0]["message"]["content"]
    counted = client.messages.count_tokens(model="tiny", messages=talk)
    assert counted.input_tokens == same["usage"]["prompt_tokens"]
    talk[-1]["content"].append({"type": "tool_use", "id": "a", "name": "weather", "input": {}})
    assert client.messages.count_tokens(model="tiny", messages=talk).input_tokens > counted.input_tokens


def test_what_is_too_long_is_counted(client: anthropic.Anthropic) -> None:
    """A client counts to know how much it has to leave out."""
    import anthropic

    talk: list[Any] = [{"role": "user", "content": "9 " * 40_000}]
    counted = client.messages.count_tokens(model="tiny", messages=talk).input_tokens
    with pytest.raises(anthropic.BadRequestError, match=rf"the prompt is too long: {counted} tokens > 32767"):
        client.messages.create(model="tiny", max_tokens=1, messages=talk)


def test_an_error_of_a_tool_is_said(server: Served) -> None:
    def count(**result: Any) -> int:
        content = [{"type": "tool_result", "tool_use_id": "a", "content": "no such city", **result}]
        status, answer = ask(server, "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": content}]})
        assert status == 200, answer
        return int(answer["input_tokens"])

    assert count(is_error=True) > count(is_error=False) == count()


def test_what_claude_code_sends(server: Served) -> None:
    ephemeral = {"cache_control": {"type": "ephemeral"}}
    found = [{"type": "tool_reference", "tool_name": "clock"}]
    body = {
        "max_tokens": 32000,
        "system": [{"type": "text", "text": "You are an agent."}, {"type": "text", "text": "Use tools.", **ephemeral}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
            {"role": "system", "content": "The user opened a file."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "A clock.", "signature": ""},
                    {"type": "tool_use", "id": "toolu_1", "name": "clock", "input": {}, "caller": {"type": "direct"}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": found, **ephemeral}],
            },
        ],
        "tools": [{**TOOLS[0], "eager_input_streaming": True, "defer_loading": False}, TOOLS[1]],
        "metadata": {"user_id": "x"},
        "thinking": {"type": "adaptive", "display": "omitted"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "temperature": 1,
        "stream": True,
    }
    status, _, content = server.send("/v1/messages?beta=true", {"model": "tiny", **body}, x_api_key="key")
    assert status == 200, content
    names = [line for line in content.decode().splitlines() if line.startswith("event: ")]
    assert (names[0], names[-1]) == ("event: message_start", "event: message_stop")


def test_why_an_answer_ends(client: anthropic.Anthropic) -> None:
    cut = client.messages.create(model="tiny", max_tokens=3, messages=ASKED)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
    whole = client.messages.create(model="tiny", max_tokens=100, messages=ASKED).content[0]
    assert whole.type == "text"
    word = whole.text.split()[2]
    stopped = client.messages.create(model="tiny", max_tokens=100, messages=ASKED, stop_sequences=["zebra", word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)


def test_a_schema_is_followed(client: anthropic.Anthropic) -> None:
    form: Any = {"format": {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"enum": [1]}}}}}
    message = client.messages.create(
        model="tiny", max_tokens=50, messages=ASKED, output_config={**form, "effort": "low"}
    )
    assert message.content[0].type == "text"
    assert isinstance(json.loads(message.content[0].text), dict)


def test_models_are_listed_with_their_limits(client: anthropic.Anthropic) -> None:
    models = list(client.models.list())
    assert [model.id for model in models][:2] == ["tiny", "tiny:ar"]
    assert models[0].max_input_tokens == client.models.retrieve("tiny").max_tokens == 32767


def test_an_error_has_the_form_that_the_client_knows(server: Served) -> None:
    import anthropic

    stranger = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError) as refused:
        stranger.messages.create(model="tiny", max_tokens=1, messages=ASKED)
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["type"] == "error"
    assert refused.value.body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages.0.content.0.source.type: Field required",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "Input should be 'user', 'assistant' or 'system'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]},
            "a block tool_use",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type: Input should be 'custom'"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice has no name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "'x', allowed: auto, none, any"),
        ({"tool_choice": {"type": "any"}}, "tool_choice is 'any', but no tools are given"),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]},
            "the last message calls tools; give their results",
        ),
        ({"mcp_servers": [{"url": "x"}]}, "'mcp_servers' is not supported"),
        ({"max_token": 5}, "'max_token' is not supported; is max_tokens meant?"),
        ({"model": "claude"}, "model 'claude' is not here, allowed: tiny"),
    ],
)
def test_what_is_wrong_is_told(server: Served, fields: dict[str, Any], problem: str) -> None:
    status, answer = ask(server, "/v1/messages", {"messages": ASKED, "max_tokens": 8, **fields})
    assert status in (400, 404)
    assert answer["type"] == "error"
    assert problem in answer["error"]["message"]
