"""What real clients send beside what matters: it is accepted, or refused with what to do."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from stand_ins.http_server import Served, serving

CHAT = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "Count from 3 to 9."}
TURNS = [QUESTION, {"role": "assistant", "content": "3, 4"}, {"role": "user", "content": "Go on."}]


@pytest.fixture(scope="module")
def server(tiny_engine: Path) -> Iterator[Served]:
    with serving(tiny_engine, "--served-model-name", "some/tiny") as served:
        yield served


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"]},
        {"tools": [], "tool_choice": "auto"},
        {"tools": None, "tool_choice": "none", "function_call": "auto", "functions": []},
        {"skip_special_tokens": True, "spaces_between_special_tokens": True, "add_generation_prompt": True},
        {"detokenize": True},
        {"prediction": {"type": "content", "content": "3, 4"}, "prompt_cache_options": {"mode": "implicit"}},
        {"best_of": 1, "length_penalty": 1.0, "echo": False, "suffix": ""},
    ],
)
def test_fields_that_ask_for_what_is_done_anyway(server: Served, fields: dict[str, Any]) -> None:
    plain = server.ask(CHAT, {"messages": [QUESTION], "max_tokens": 4})["choices"]
    assert server.ask(CHAT, {"messages": [QUESTION], "max_tokens": 4, **fields})["choices"] == plain


def test_a_trace_begins_with_the_id_that_was_chosen(server: Served) -> None:
    body = {"messages": [QUESTION], "max_tokens": 2}
    plain, named = server.stream("/events", body)[0], server.stream("/events", {**body, "request_id": "order-7"})[0]
    assert named == {**plain, "at": named["at"], "unix": named["unix"], "request_id": "order-7"}
    assert "request_id" not in plain
    assert server.send("/events", {**body, "request_id": "a\nb"})[0] == 400


@pytest.mark.parametrize(
    ("path", "prefix", "fields"),
    [
        (CHAT, "chatcmpl", {"messages": [QUESTION]}),
        ("/v1/completions", "cmpl", {"prompt": "Count"}),
        ("/v1/completions", "cmpl", {"prompt": "Count", "suffix": "9"}),
        ("/v1/fim/completions", "cmpl", {"prompt": "Count", "suffix": "9"}),
    ],
)
def test_the_id_of_an_answer_may_be_chosen(server: Served, path: str, prefix: str, fields: dict[str, Any]) -> None:
    body = {**fields, "max_tokens": 2, "request_id": "order-7"}
    assert server.ask(path, body)["id"] == f"{prefix}-order-7"
    assert {chunk["id"] for chunk in server.stream(path, {**body, "stream": True})} == {f"{prefix}-order-7"}
    for wrong in ("", "x" * 129, "\ud800", "a\nb", 7):
        status, _, content = server.send(path, {**body, "request_id": wrong})
        assert status == 400
        assert json.loads(content)["error"]["message"].startswith("request_id: ")


@pytest.mark.parametrize("fields", [{"modalities": ["audio"]}, {"modalities": ["text", "audio"]}, {"functions": [{}]}])
def test_fields_that_ask_for_more_are_refused(server: Served, fields: dict[str, Any]) -> None:
    (name,) = fields
    status, _, content = server.send(CHAT, {"messages": [QUESTION], **fields})
    assert status == 400
    assert f"'{name}' is not supported" in json.loads(content)["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": -1, "seed": -1},
        {"max_completion_tokens": -1},
        {"max_tokens": -1, "max_completion_tokens": -1},
    ],
)
def test_minus_one_leaves_a_limit_and_a_seed_open(server: Served, fields: dict[str, Any]) -> None:
    plain = server.ask(CHAT, {"messages": [QUESTION]})["choices"]
    assert server.ask(CHAT, {"messages": [QUESTION], **fields})["choices"] == plain


def test_one_limit_may_be_open_and_the_other_given(server: Served) -> None:
    for limits in ({"max_tokens": -1, "max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": -1}):
        assert server.ask(CHAT, {"messages": [QUESTION], **limits})["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_a_prompt_that_is_too_long_has_the_words_that_clients_look_for(server: Served, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "9 " * 40000}], "max_tokens": 5}
    status, _, content = server.send(path, body)
    error = json.loads(content)["error"]
    assert (status, error["code"], error["type"]) == (400, "context_length_exceeded", "invalid_request_error")
    assert re.search(r"prompt is too long[^0-9]*\d+\s*tokens?\s*>\s*\d+", error["message"])  # Claude Code's own
    assert "this model's maximum context length is 32768" in error["message"]  # litellm's, which aider uses


def test_an_answer_that_is_too_long_is_a_matter_of_length_too(server: Served) -> None:
    status, _, content = server.send(CHAT, {"messages": [QUESTION], "max_tokens": 40000})
    error = json.loads(content)["error"]
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "this model's maximum context length is 32768" in error["message"]
    assert "ask for at most 327" in error["message"]


def test_a_seed_of_minus_one_is_drawn_each_time(server: Served) -> None:
    body = {"prompt": "Count", "seed": -1, "temperature": 5.0, "max_tokens": 12}
    assert len({server.ask("/v1/completions", body)["choices"][0]["text"] for _ in range(3)}) > 1


def test_a_hole_of_minus_one_tokens_has_a_length_that_fits(server: Served) -> None:
    body = {"prompt": "Count from ", "suffix": " to 9.", "width": 2}
    plain, open_one = (server.ask("/v1/fim/completions", body | more) for more in ({}, {"max_tokens": -1}))
    assert open_one["choices"] == plain["choices"]


def test_what_clients_note_in_messages_is_ignored(server: Served) -> None:
    notes: dict[str, Any] = {
        "id": "a1",
        "opts": {"x": [1]},
        "name": "me",
        "created_at": 5,
        "tool_calls": [],
        "audio": None,
    }
    thoughts = {
        "reasoning": "hm",
        "reasoning_content": "hm",
        "reasoning_details": [{}],
        "refusal": None,
        "annotations": [],
    }
    noted = [{**TURNS[0], **notes}, {**TURNS[1], **notes, **thoughts}, {**TURNS[2], **notes}]
    parts = [{"type": "text", "text": "Go on.", "cache_control": {"type": "ephemeral"}, "id": 3}]
    plain = server.ask(CHAT, {"messages": TURNS, "max_tokens": 4})
    for messages in (noted, [*noted[:2], {**TURNS[2], "content": parts}]):
        answer = server.ask(CHAT, {"messages": messages, "max_tokens": 4})
        assert answer["choices"] == plain["choices"]
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


@pytest.mark.parametrize("name", ["tool_calls", "function_call", "images", "audio"])
def test_what_a_message_says_otherwise_is_not_ignored(server: Served, name: str) -> None:
    status, _, content = server.send(CHAT, {"messages": [{**QUESTION, name: [{"id": "x"}]}]})
    assert status == 400
    assert f"{name!r} is not supported" in json.loads(content)["error"]["message"]


def test_tools_that_the_template_does_not_show_are_refused(server: Served) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    status, _, answer = server.send(CHAT, {"messages": [QUESTION], "tools": [tool]})
    assert status == 400
    error = json.loads(answer)["error"]
    assert error["message"].startswith("tools are not for this engine: its chat template does not show them")
    assert error["param"] == "tools"


def test_a_refusal_is_what_the_assistant_said(server: Served) -> None:
    said = [QUESTION, {"role": "assistant", "content": "I can't."}, TURNS[2]]
    plain = server.ask(CHAT, {"messages": said, "max_tokens": 4})
    part = {"type": "refusal", "refusal": "I can't.", "cache_control": {"type": "ephemeral"}}
    for turn in ({"content": [part]}, {"content": None, "refusal": "I can't."}):
        answer = server.ask(CHAT, {"messages": [QUESTION, {"role": "assistant", **turn}, TURNS[2]], "max_tokens": 4})
        assert answer["choices"] == plain["choices"]
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "image 1: the URL is 'x', allowed: data:image"),
        ({"type": "input_audio"}, "type 'input_audio' is not supported, allowed: text, refusal, image_url, thinking"),
        ({"type": "text"}, "text: Field required"),
        ({"type": "text", "text": 5}, "text: Input should be a valid string, got 5"),
        ({"type": "refusal"}, "text: Field required"),
        ({"type": "text", "text": "x", "images": ["y"]}, "'images' is not supported; leave it out"),
    ],
)
def test_a_wrong_part_is_named(server: Served, part: dict[str, Any], problem: str) -> None:
    status, _, answer = server.send(CHAT, {"messages": [{"role": "user", "content": [part]}]})
    assert status == 400
    assert problem in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(("path", "asked"), [(CHAT, {"messages": [QUESTION]}), ("/v1/completions", {"prompt": "x"})])
def test_usage_is_null_until_it_is_known(server: Served, path: str, asked: dict[str, Any]) -> None:
    body = {**asked, "max_tokens": 5, "stream": True, "mode": "diffusion", "diffusing": True}
    *before, last = server.stream(path, body | {"stream_options": {"include_usage": True}})
    assert before
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in before)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0
    assert not any("usage" in chunk for chunk in server.stream(path, body))


def test_a_model_is_described_by_each_of_its_names(server: Served) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:
        for model in client.models.list():
            assert client.models.retrieve(model.id) == model
        with pytest.raises(openai.NotFoundError, match="allowed: some/tiny"):
            client.models.retrieve("gpt")
    assert server.ask("/v1/models/some/tiny:ar")["id"] == "some/tiny:ar"
    assert server.send("/v1/models/some/tiny:fast")[0] == 404
    assert server.send("/v1/models/tiny")[0] == 404


@pytest.mark.parametrize(
    ("flags", "got"),
    [
        ([], "is 'application/x-www-form-urlencoded'"),
        (["-H", "Content-Type: text/plain"], "is 'text/plain'"),
        (["-H", "Content-Type:"], "is missing"),
    ],
)
def test_curl_without_a_content_type_is_told_the_header(server: Served, flags: list[str], got: str) -> None:
    body = json.dumps({"messages": [QUESTION], "max_tokens": 4})
    command = ["curl", "-s", "-w", "%{stderr}%{http_code}", server.url + CHAT, "-d", body]
    refused = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
    assert refused.stderr == "400"
    message = json.loads(refused.stdout)["error"]["message"]
    assert message.startswith(f"the header Content-Type {got}, allowed: application/json; ")
    remedy = message.partition("with curl: -H ")[2].strip("'")
    answer = subprocess.run([*command, "-H", remedy], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer)["choices"]


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        (CHAT, {"max_tokens": -5}, "max_tokens", "max_tokens is -5, "),
        (CHAT, {"max_completion_tokens": -5}, "max_completion_tokens", "max_completion_tokens is -5, "),
        (CHAT, {"max_completion_tokens": 40000}, None, "max_completion_tokens is 40000, together "),
        (CHAT, {"max_completion_tokens": 3, "min_tokens": 4}, "min_tokens", "0 to max_completion_tokens, which is 3"),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": -1, "min_tokens": 4}, "min_tokens", "max_tokens, which is 3"),
        (CHAT, {"min_tokens": 513}, "min_tokens", "allowed: 0 to max_tokens, which is 512"),
        (CHAT, {"logprobs": True, "top_logprobs": 101}, "top_logprobs", "top_logprobs is 101, "),
        ("/events", {"max_tokens": -5}, "max_tokens", "max_tokens is -5, "),
        ("/v1/messages", {"max_tokens": 3, "min_tokens": 4}, "min_tokens", "allowed: 0 to max_tokens, which is 3"),
        (
            "/v1/messages",
            {"max_tokens": 3, "thinking": {"type": "enabled", "budget_tokens": -1}},
            "thinking.budget_tokens",
            "thinking.budget_tokens is -1, ",
        ),
        (
            "/v1/messages/count_tokens",
            {"thinking": {"type": "enabled", "budget_tokens": -1}},
            "thinking.budget_tokens",
            "thinking.budget_tokens is -1, ",
        ),
        ("/v1/responses", {"max_output_tokens": 3, "min_tokens": 4}, "min_tokens", "max_output_tokens, which is 3"),
        (
            "/v1/responses",
            {"include": ["message.output_text.logprobs"], "top_logprobs": 101},
            "top_logprobs",
            "top_logprobs is 101, ",
        ),
    ],
)
def test_a_refusal_names_the_field_that_was_sent(
    server: Served, path: str, fields: dict[str, Any], param: str | None, message: str
) -> None:
    said = {"input": "Count"} if path == "/v1/responses" else {"messages": [QUESTION]}
    status, _, content = server.send(path, {**said, **fields})
    error = json.loads(content)["error"]
    assert (status, error["param"]) == (400, param), error
    assert message in error["message"]


def test_a_compressed_body_is_told_what_to_leave_out(server: Served) -> None:
    body = json.dumps({"messages": [QUESTION], "max_tokens": 4}).encode()
    for coding, sent in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body)), ("br", body)):
        status, _, content = server.send(CHAT, sent, content_encoding=coding)
        assert status == 400
        message = f"the header Content-Encoding is '{coding}', allowed: identity; send the body uncompressed"
        assert json.loads(content)["error"]["message"] == message
    for coding in ("identity", ""):
        assert server.send(CHAT, body, content_encoding=coding)[0] == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"])
def test_values_at_the_edge_of_what_apis_allow(server: Served, path: str) -> None:
    """OpenAI allows a top_p of 0 and negative seeds, and vLLM's clients send a top_k of -1 whatever the route."""

    def said(**fields: Any) -> str:
        limit = {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 12}
        prompt = {"messages": [QUESTION]} | ({"prompt": "Count"} if path == "/v1/completions" else {})
        body = {"input": "Count"} if path == "/v1/responses" else prompt
        if path == "/v1/completions":
            del body["messages"]
        answer = server.ask(path, {**body, **limit, **fields})
        kept = {name: answer[name] for name in ("choices", "content") if name in answer}
        return json.dumps(kept or [part["text"] for item in answer["output"] for part in item["content"]])

    hot = {"temperature": 5.0}
    assert said(**hot, top_p=0) == said(**hot, top_p=0.0, seed=3) == said()
    assert said(**hot, seed=-5) == said(**hot, seed=2**64 - 5) != said(**hot, seed=5)
    assert said(**hot, seed=4, top_k=-1) == said(**hot, seed=4)
    assert len({said(**hot, seed=-1) for _ in range(3)}) > 1


@pytest.mark.parametrize("fields", [{"top_logprobs": 0}, {"logprobs": False, "top_logprobs": 0}])
def test_no_likeliest_tokens_need_no_logprobs(server: Served, fields: dict[str, Any]) -> None:
    answer = server.ask(CHAT, {"messages": [QUESTION], "max_tokens": 4, **fields})
    assert answer["choices"][0]["logprobs"] is None
