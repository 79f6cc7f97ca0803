"""Requests as clients send them: captured from the clients, or after their sources where these are no Python packages.

Captured with openai 3.57, litellm 1.110, langchain-openai 1.7 and lm-eval 0.4.13; aider sends through litellm. Those of
Anthropic's client are in test_messages.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_ins.http_server import Served, serving

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    f"/v1/{name}" for name in ("chat/completions", "completions", "responses", "messages")
)
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "type": "object",
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
FORM = {
    "name": "P",
    "strict": True,
    "schema": {
        "title": "P",
        "type": "object",
        "properties": {"x": {"title": "X", "type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    },
}

REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("litellm", CHAT, {"messages": HI, "temperature": 0.2, "max_tokens": 5}),
    ("litellm", CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "required", "max_tokens": 9}),
    ("litellm", CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": NAMED, "max_tokens": 9, **USAGE}),
    ("litellm", CHAT, {"messages": HI, "max_tokens": 9, "reasoning_effort": "low"}),
    (
        "litellm",
        CHAT,
        {
            "messages": [
                *HI,
                {
                    "role": "assistant",
                    "tool_calls": [CALL],
                    "function_call": None,
                    "provider_specific_fields": {"refusal": None},
                },
                {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "sun"},
            ],
            "tools": [TOOL],
            "max_tokens": 5,
        },
    ),
    (
        "litellm",
        CHAT,
        {"messages": HI, "max_tokens": 9, "response_format": {"type": "json_schema", "json_schema": FORM}},
    ),
    (
        "litellm",
        MESSAGES,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "max_tokens": 9,
            "tools": [{"name": "weather", "description": "Tell it.", "input_schema": SCHEMA, "type": "custom"}],
            "tool_choice": {"type": "any"},
        },
    ),
    ("litellm", RESPONSES, {"input": "Hi", "max_output_tokens": 16}),
    (
        "aider",
        CHAT,
        {
            "messages": [{"role": "system", "content": "Act as a programmer."}, *HI],
            "temperature": 0,
            "stream": True,
            "max_tokens": 5,
        },
    ),
    (
        "aider",
        CHAT,
        {
            "messages": [
                {
                    "role": "system",
                    "content": [{"type": "text", "text": "Act.", "cache_control": {"type": "ephemeral"}}],
                },
                *HI,
                {"role": "assistant", "content": "Ok."},
                *HI,
            ],
            "reasoning_effort": "high",
            "stream": True,
            "max_tokens": 5,
        },
    ),
    (
        "langchain",
        CHAT,
        {"stream": False, "messages": HI, "max_completion_tokens": 9, "tool_choice": "required", "tools": [TOOL]},
    ),
    (
        "langchain",
        CHAT,
        {
            "stream": False,
            "messages": HI,
            "max_completion_tokens": 9,
            "parallel_tool_calls": False,
            "temperature": 1.0,
            "tool_choice": NAMED,
            "tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}],  # type: ignore[dict-item]
        },
    ),
    (
        "langchain",
        CHAT,
        {
            "messages": [
                {"content": "Hi", "role": "user"},
                {"content": None, "role": "assistant", "tool_calls": [CALL]},
                {"content": "sunny", "role": "tool", "tool_call_id": "call_1"},
            ],
            "stream": False,
            "max_completion_tokens": 5,
            "tools": [TOOL],
        },
    ),
    ("langchain", CHAT, {"messages": HI, "max_completion_tokens": 9, "response_format": {"type": "json_object"}}),
    (
        "langchain",
        CHAT,
        {"stream": False, "messages": HI, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 5},
    ),
    (
        "langchain",
        RESPONSES,
        {
            "stream": False,
            "input": [{"content": "Hi", "role": "user", "type": "message"}],
            "max_output_tokens": 9,
            "tool_choice": "required",
            "tools": [{"type": "function", "name": "weather", "description": "Tell it.", "parameters": SCHEMA}],
        },
    ),
    (
        "langchain",
        RESPONSES,
        {
            "stream": True,
            "input": [{"content": "Hi", "role": "user", "type": "message"}],
            "max_output_tokens": 9,
            "reasoning": {"effort": "low", "summary": "auto"},
        },
    ),
    (
        "langchain",
        COMPLETIONS,
        {
            "prompt": ["Hi"],
            "frequency_penalty": 0,
            "logprobs": None,
            "max_tokens": 5,
            "n": 1,
            "presence_penalty": 0,
            "seed": None,
            "temperature": 0.7,
            "top_p": 1,
        },
    ),
    ("lm-eval", CHAT, {"messages": HI, "max_tokens": 8, "temperature": 0, "stop": ["\n"], "seed": 1234}),
    (
        "lm-eval",
        COMPLETIONS,
        {"prompt": [[52, 301, 77, 12]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True},
    ),
    (
        "lm-eval",
        COMPLETIONS,
        {"prompt": [[52, 301, 77]], "max_tokens": 8, "temperature": 0, "stop": ["\n", "<|im_end|>"], "seed": 1234},
    ),
    (
        "open-webui",
        CHAT,
        {
            "stream": True,
            "messages": [
                *HI,
                {"role": "assistant", "content": "", "tool_calls": [{"index": 0, **CALL}]},
                {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
            ],
            "tools": [TOOL],
            "stream_options": {"include_usage": True},
            "max_tokens": 5,
        },
    ),
    (
        "open-webui",
        CHAT,
        {
            "messages": HI,
            "stream": False,
            "max_completion_tokens": 9,
            "temperature": 0.1,
            "top_p": 0.9,
            "frequency_penalty": 0,
            "seed": 1,
            "stop": ["###"],
        },
    ),
    (
        "continue",
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "<important_rules>"},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": " ", "tool_calls": [CALL]},
                {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
            ],
            "max_tokens": 5,
            "tools": [{**TOOL, "wouldLikeTo": "look"}],
            "parallel_tool_calls": False,
            **USAGE,
        },
    ),
    (
        "codex",
        RESPONSES,
        {
            "instructions": "You are an agent.",
            "input": [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: none."}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "x"},
                {"type": "function_call", "name": "weather", "arguments": "{}", "call_id": "call_1"},
                {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
            ],
            "tools": [
                {"type": "function", "name": "weather", "description": "", "strict": False, "parameters": SCHEMA}
            ],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": True,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "x",
            "max_output_tokens": 5,
        },
    ),
]


@pytest.fixture(scope="module")
def server(xml_tool_engine: Path) -> Iterator[Served]:
    with serving(xml_tool_engine, "--served-model-name", "tiny") as served:
        yield served


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=[f"{r[0]}-{n}" for n, r in enumerate(REQUESTS)])
def test_a_client_is_understood(server: Served, number: int) -> None:
    _, path, body = REQUESTS[number]
    status, headers, content = server.send(path, {"model": "tiny", **body})
    assert status == 200, content
    if body.get("stream"):
        assert headers["content-type"].startswith("text/event-stream")
        assert b'"error": {' not in content
        return
    answer = json.loads(content)
    assert answer["usage"]
    if path == CHAT:
        assert answer["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")
