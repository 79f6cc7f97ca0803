"""Tools over `/v1/chat/completions`, by OpenAI's own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.http_server import Served
from stand_ins.tool_templates import CLOCK, TOOLS, WEATHER

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.serving.http.dialects.messages_writer import MessagesWriter
from nemodiff.serving.http.responses import finish_reason

CHAT = "/v1/chat/completions"
ASKED: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
MODES = ("ar", "linear_spec", "quadratic_spec", "diffusion")


def options(mode: str) -> dict[str, Any]:
    policy = {"policy": "left_to_right"} if mode == "diffusion" else {}
    return {"seed": 5, "temperature": 1.0, "max_tokens": 300, "extra_body": {"mode": mode, **policy}}


@pytest.mark.parametrize("mode", MODES)
def test_a_streamed_call_is_the_whole_one_in_pieces(client: openai.OpenAI, mode: str) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "tool_choice": choice, **options(mode)}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["days"] in range(1, 10)
    names, ids, arguments, reasons = [], [], "", []
    for chunk in client.chat.completions.create(**asked, stream=True):
        reasons.append(chunk.choices[0].finish_reason)
        for part in chunk.choices[0].delta.tool_calls or ():
            assert part.index == 0
            assert part.function is not None
            names += [part.function.name] if part.function.name else []
            ids += [part.id] if part.id else []
            arguments += part.function.arguments or ""
    assert (names, arguments) == (["weather"], call.function.arguments)
    assert len(ids) == 1
    assert ids[0].startswith("call_")
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


def test_the_client_collects_several_calls(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "tool_choice": "required"}
    counts = set()
    for seed in range(4):
        with client.chat.completions.stream(**asked, seed=seed, temperature=2.0, max_tokens=600) as stream:
            message = stream.get_final_completion().choices[0].message
        calls = message.tool_calls or []
        assert {call.function.name for call in calls} <= {"weather", "clock"}
        assert len({call.id for call in calls}) == len(calls)
        counts.add(len(calls))
    assert max(counts) > 1


def test_a_conversation_goes_on_after_a_call(server: Served, client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, tool_choice="required", seed=1)  # type: ignore[arg-type]
    message = first.choices[0].message
    assert message.tool_calls
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        for call in message.tool_calls
    ]
    talk: list[Any] = [*ASKED, message, *results]
    second = client.chat.completions.create(model="tiny", messages=talk, tools=TOOLS, max_tokens=4)  # type: ignore[arg-type]
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 3
    spelled = [*ASKED, {**message.model_dump(), "content": ""}, *results]
    other = server.ask(CHAT, {"messages": spelled, "tools": TOOLS, "max_tokens": 4})
    assert other["choices"][0]["message"]["content"] == (second.choices[0].message.content or "")


def prompt_tokens(server: Served, messages: list[Any], **fields: Any) -> int:
    body = {"messages": messages, "max_tokens": 1, **fields}
    return int(server.ask(CHAT, body)["usage"]["prompt_tokens"])


def test_thoughts_are_given_back_to_the_template(server: Served) -> None:
    def talk(**thoughts: str) -> list[Any]:
        return [*ASKED, {"role": "assistant", "content": "Yes.", **thoughts}, *ASKED]

    keep = {"chat_template_kwargs": {"truncate_history_thinking": False}}
    plain = prompt_tokens(server, talk(), **keep)
    assert prompt_tokens(server, talk(reasoning_content="I think so."), **keep) > plain
    assert prompt_tokens(server, talk(reasoning="I think so."), **keep) > plain
    assert prompt_tokens(server, talk(reasoning_content="I think so.")) == plain


def test_variables_and_effort_reach_the_template(server: Served) -> None:
    plain = prompt_tokens(server, ASKED)
    assert prompt_tokens(server, ASKED, chat_template_kwargs={"effort": "high"}) > plain
    assert prompt_tokens(server, ASKED, reasoning_effort="none") > plain
    thinks = prompt_tokens(server, ASKED, reasoning_effort="low", chat_template_kwargs={"enable_thinking": True})
    assert thinks > prompt_tokens(server, ASKED, chat_template_kwargs={"enable_thinking": True})


def test_choosing_no_tool_hides_them(server: Served) -> None:
    plain = prompt_tokens(server, ASKED)
    assert prompt_tokens(server, ASKED, tools=TOOLS, tool_choice="none") == plain
    assert prompt_tokens(server, ASKED, tools=[], tool_choice="auto") == plain
    assert prompt_tokens(server, ASKED, tools=TOOLS) > plain


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tool_choice": "required"}, "tool_choice is 'required', but no tools are given"),
        (
            {"tools": [CLOCK], "tool_choice": "weather"},
            "tool_choice: Input should be 'auto', 'none' or 'required'",
        ),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice is 'x', allowed: auto, none, required, or the name of a tool",
        ),
        (
            {"tools": [WEATHER], "tool_choice": "required", "mode": "diffusion"},
            "use policy left_to_right or another mode",
        ),
        ({"tools": [{"type": "web_search"}]}, 'tools holds {"type": "web_search"}, allowed: objects of type function'),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking is 1, allowed: true"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs holds tools, which is given otherwise"),
    ],
)
def test_what_is_wrong_with_tools_is_refused(server: Served, fields: dict[str, Any], problem: str) -> None:
    status, _, content = server.send(CHAT, {"messages": ASKED, **fields})
    assert status == 400, content
    assert problem in json.loads(content)["error"]["message"]


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "function: Field required"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, "Input should be 'function'"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{]"}}]},
            "the arguments of a call of 'f' are '{]', allowed: a JSON object",
        ),
        (
            {"role": "user", "content": "a", "tool_calls": [{"id": "x"}]},
            "'tool_calls' is not supported in a message of",
        ),
        ({"role": "tool"}, "content: Field required"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "\ud800"}}]}, "rendered conversation: not UTF-8"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "\ud800"}}]},
            "the arguments of a call of 'f' are '\\ud800', allowed: a JSON object",
        ),
    ],
)
def test_what_is_wrong_with_a_call_is_refused(server: Served, turn: dict[str, Any], problem: str) -> None:
    status, _, content = server.send(CHAT, {"messages": [*ASKED, turn]})
    assert status == 400, content
    assert problem in json.loads(content)["error"]["message"]


def test_tokenize_counts_tools_too(server: Served) -> None:
    body = {"messages": ASKED, "tools": TOOLS, "reasoning_effort": "low"}
    assert server.ask("/tokenize", body)["count"] == prompt_tokens(server, ASKED, tools=TOOLS, reasoning_effort="low")


def test_a_call_that_a_stop_text_has_cut_is_not_asked_for(tmp_path: Path) -> None:
    checkpoint = TINY_CHAT.with_name("tiny-chat-2")
    engine = nemodiff.load(Builder(checkpoint, tmp_path / "engine").run(), threads=1)
    tools = json.loads((checkpoint / "tools.json").read_text())
    reasons = {}
    for stop in ("<tool_call>", "<parameter=", "Oslo", "</function>", "</tool_call>"):
        answer = nemodiff.generate(engine, "What is the weather in Oslo?", tools=tools, stop=[stop])
        assert answer.stop_text == stop
        reasons[finish_reason(answer)] = answer
    assert [(call.name, call.arguments) for call in reasons["tool_calls"].tool_calls] == [
        ("get_weather", '{"city": "Oslo"}')
    ]
    assert reasons["tool_calls"].stop_text == "</tool_call>"
    assert reasons["stop"].stop_text == "</function>"
    assert reasons.keys() == {"stop", "tool_calls"}
    ends = {reason: MessagesWriter("tiny").full(answer)["stop_reason"] for reason, answer in reasons.items()}
    assert ends == {"stop": "stop_sequence", "tool_calls": "tool_use"}


@pytest.mark.parametrize("name", ["auto", "none", "required"])
def test_a_tool_whose_name_is_a_word_of_the_choice_cannot_be_chosen_by_it(server: Served, name: str) -> None:
    function = {"name": name, "parameters": {"type": "object", "properties": {}}}
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {
            "messages": ASKED,
            "tools": [{"type": "function", "function": function}],
            "tool_choice": {"type": "function", "function": {"name": name}},
        },
        "/v1/responses": {
            "input": "Hello",
            "tools": [{"type": "function", **function}],
            "tool_choice": {"type": "function", "name": name},
        },
        "/v1/messages": {
            "messages": ASKED,
            "max_tokens": 5,
            "tools": [{"name": name, "input_schema": function["parameters"]}],
            "tool_choice": {"type": "tool", "name": name},
        },
    }
    for path, body in bodies.items():
        status, _, answer = server.send(path, body)
        assert status == 400
        refusal = json.loads(answer)["error"]["message"]
        assert (
            refusal == f"tool_choice names the tool {name!r}, a word that means something else there; rename the tool"
        )
