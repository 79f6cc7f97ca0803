"""`nemodiff serve` over the wire: OpenAI's own client, malformed requests, limits, clients that leave, and its end.

What a request gives is compared with what the runtime gives alone. Nothing is timed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import random
import re
import signal
import socket
import string
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import openai
import pytest
import schemathesis
from conftest import eventually
from hypothesis import strategies as st
from schemathesis.specs.openapi import checks as openapi_checks
from stand_ins.http_server import Served, serving

import nemodiff
from nemodiff.runtime.scheduler.scheduler import Scheduler
from nemodiff.runtime.text.codec import TokenOffsets
from nemodiff.runtime.text.reasoning import ReasoningParser
from nemodiff.runtime.text.thoughts import TAGS
from nemodiff.serving.http.infill_queue import InfillQueue
from nemodiff.serving.http.request_group import RequestGroup

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
PRESENT = ("nemodiff_requests_running", "nemodiff_requests_waiting", "nemodiff_fills_present")
HUGE = int("9" * 4300)  # the longest that JSON is read with
STREAMS = (CHAT, "/v1/completions", "/events")
QUESTION = "Count from 3 to 9."
LONG = {"prompt": "Once upon a time", "max_tokens": 20_000, "min_tokens": 20_000, "mode": "ar"}
SET = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 2, "maxItems": 2}
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/N"}, "value": {"type": "integer"}}}
ENDLESS = {"$defs": {"N": {**NODE, "required": ["next", "value"]}}, "$ref": "#/$defs/N"}
CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(tiny_engine: Path) -> Iterator[Served]:
    with serving(tiny_engine, "--max-queue", "256", "--served-model-name", "tiny") as served:
        yield served


@pytest.fixture(scope="module")
def guarded(tiny_engine: Path) -> Iterator[Served]:
    options = ["--rows", "1", "--max-queue", "1", "--max-request-bytes", "2000", "--timeout", "0.5", "--api-key", "a b"]
    with serving(tiny_engine, *options, environment={"NEMODIFF_API_KEY": "unused"}) as served:
        yield served


def chat(content: str = QUESTION, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def nested(levels: int) -> dict[str, Any]:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return {"a": value}


def with_schema(schema: Any, strict: bool | None = None, **fields: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
    return chat(response_format=form, **fields)


# --- OpenAI's client ---


@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_a_chat_is_what_the_runtime_gives(client: openai.OpenAI, engine: nemodiff.LoadedEngine, mode: str) -> None:
    alone = nemodiff.generate(engine, QUESTION, mode=mode, max_new_tokens=30, block_length=8)
    request: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 30}
    extra = {"mode": mode, "block_length": 8}
    answer = client.chat.completions.create(**request, extra_body=extra)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].finish_reason == alone.finish_reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (alone.prompt_tokens, len(alone.token_ids))
    usage = answer.usage.model_dump()
    assert {**usage["nfe"], "prefill": 0} == {**alone.nfe, "prefill": 0} or mode == "quadratic_spec"
    assert usage["mode"] == mode
    stream = client.chat.completions.create(
        **request, extra_body=extra, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == alone.finish_reason
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(alone.token_ids)


def test_completions_lists_of_prompts_and_several_answers(client: openai.OpenAI, engine: nemodiff.LoadedEngine) -> None:
    ids = engine.text.encode("Sort these")
    answer = client.completions.create(model="tiny", prompt=["Count from", "Sort these"], max_tokens=9)
    expected = [nemodiff.generate(engine, p, chat=False, max_new_tokens=9).text for p in ("Count from", "Sort these")]
    assert [choice.text for choice in answer.choices] == expected
    one = client.completions.create(model="tiny:ar", prompt=ids, max_tokens=9, n=3, temperature=1.5, seed=4)
    alone = [
        nemodiff.generate(engine, ids, mode="ar", max_new_tokens=9, temperature=1.5, seed=4 + i).text for i in range(3)
    ]
    assert [choice.text for choice in one.choices] == alone
    assert len(set(alone)) > 1
    chunks = client.completions.create(
        model="tiny:ar", prompt=ids, max_tokens=9, n=3, temperature=1.5, seed=4, stream=True
    )
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone


def test_logprobs_of_parts_of_characters_have_their_bytes(client: openai.OpenAI, engine: nemodiff.LoadedEngine) -> None:
    """A grammar makes the model say them, and a stop string ends after the text."""
    said = "a漢é🦜b"
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 30, "extra_body": {"structured_outputs": {"regex": said}}}
    told = client.chat.completions.create(**chat(logprobs=True, **asked)).choices[0]
    assert told.message.content == said
    assert told.logprobs is not None
    assert told.logprobs.content is not None
    assert bytes(b for one in told.logprobs.content for b in one.bytes or []).decode() == f"{said}<|im_end|>"
    flat = client.completions.create(prompt="x", logprobs=2, **asked).choices[0]
    assert flat.text == said
    assert flat.logprobs is not None
    assert flat.logprobs.tokens is not None
    assert flat.logprobs.text_offset is not None
    for token, offset in zip(flat.logprobs.tokens, flat.logprobs.text_offset, strict=True):
        rest = said[offset:]
        assert rest.startswith(token) or token.startswith("bytes:") or (token, rest) == ("<|im_end|>", "")
    assert flat.logprobs.text_offset == TokenOffsets(engine.text).push([*engine.text.encode(said), 11])


@pytest.mark.parametrize("mode", ["ar", "linear_spec"])
def test_an_answer_is_one_of_the_choices(client: openai.OpenAI, mode: str) -> None:
    """What a pattern would take for its own signs stands for itself; each choice has to be an answer."""
    said = [*string.punctuation, " ", "\n", "a.b|c", "\\d+ (x)", "漢", ""]
    for choice in ([one] for one in said):
        extra = {"structured_outputs": {"choice": choice}}
        told = client.chat.completions.create(**chat(max_tokens=30), model=f"tiny:{mode}", extra_body=extra)
        assert [told.choices[0].message.content] == choice
    extra = {"structured_outputs": {"choice": said}}
    drawn = client.completions.create(
        model=f"tiny:{mode}", prompt="x", max_tokens=30, n=8, temperature=2, seed=1, extra_body=extra
    )
    assert {one.text for one in drawn.choices} <= {*said}
    assert {one.finish_reason for one in drawn.choices} == {"stop"}


def test_an_iterator_that_ends_too_early_hangs_no_request(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No future takes a StopIteration, so nobody would ever answer."""

    def ends(*_: Any, **__: Any) -> None:
        next(iter(()))

    async def submit() -> None:
        group = RequestGroup(Scheduler(loaded), lambda *_: None, 5)
        await asyncio.wait_for(group.submit(lambda: [("x", {})]), 5)

    async def fill() -> None:
        queue = InfillQueue(loaded, 1)
        try:
            await asyncio.wait_for(asyncio.wrap_future(queue.submit("x", "y", threading.Event())), 5)
        finally:
            queue.close()

    loaded = nemodiff.load(tiny_engine, threads=1)
    monkeypatch.setattr(Scheduler, "submit_many", ends)
    monkeypatch.setattr("nemodiff.serving.http.infill_queue.infill", ends)
    for ask in (submit, fill):
        with pytest.raises(RuntimeError, match="an iterator ended too early"):
            asyncio.run(ask())


def test_a_message_of_every_private_character_is_answered(server: Served) -> None:
    content = "".join(map(chr, range(0xE000, 0xF900)))
    status, _, answer = server.send(CHAT, chat(content, max_tokens=10**6))  # a refusal is quicker than 19,000 tokens
    assert status == 400
    assert b"the prompt has 19" in answer


def test_logprobs_structure_and_model_list(client: openai.OpenAI, engine: nemodiff.LoadedEngine) -> None:
    answer = client.chat.completions.create(**chat(model="tiny", max_tokens=5, logprobs=True, top_logprobs=2))
    alone = nemodiff.generate(engine, QUESTION, max_new_tokens=5, logprobs=2).logprobs
    assert alone is not None
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [one.logprob for one in logprobs.content] == pytest.approx([one.logprob for one in alone], abs=1e-4)
    assert [len(one.top_logprobs) for one in logprobs.content] == [2] * 5
    assert "".join(one.token for one in logprobs.content) == answer.choices[0].message.content
    completion = client.completions.create(model="tiny", prompt="x", max_tokens=5, logprobs=1).choices[0].logprobs
    assert completion is not None
    assert completion.text_offset is not None
    assert len(completion.text_offset) == 5
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [12, 345]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = client.chat.completions.create(**chat(model="tiny", max_tokens=60, response_format=response_format))
    assert json.loads(answer.choices[0].message.content or "")["a"] in (12, 345)
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", *(f"tiny:{mode}" for mode in (*nemodiff.MODES, "auto"))]
    answer = client.chat.completions.create(**chat(model="tiny:auto"))
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["mode"] == "auto"


@pytest.mark.parametrize("asks", ["vllm", "mistral"])
def test_the_last_message_is_continued(client: openai.OpenAI, engine: nemodiff.LoadedEngine, asks: str) -> None:
    talk: list[Any] = [{"role": "user", "content": "Count from 3 to 9."}, {"role": "assistant", "content": "3, 4, 5,"}]
    whole = nemodiff.generate(engine, talk, continue_final_message=True)
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    if asks == "mistral":
        fields = {}
        talk[-1]["prefix"] = True
    answer = client.chat.completions.create(model="tiny", messages=talk, extra_body=fields)
    assert answer.choices[0].message.content == whole.text
    stream = client.chat.completions.create(model="tiny", messages=talk, extra_body=fields, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.text


def test_errors_are_the_classes_of_the_client(client: openai.OpenAI, guarded: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="is mode meant") as error:
        client.chat.completions.create(**chat(model="tiny"), extra_body={"moed": "ar"})
    assert error.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="allowed: tiny"):
        client.chat.completions.create(**chat(model="gpt"))
    with openai.OpenAI(base_url=guarded.url + "/v1", api_key="wrong", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
        assert other.with_options(api_key="a b").models.list().data


# --- text ---


def test_streamed_text_is_whole_characters_and_never_taken_back(server: Served) -> None:
    for seed in range(6):
        body = {"prompt": "é", "max_tokens": 60, "mode": "ar", "temperature": 30.0, "seed": seed}
        whole = server.ask("/v1/completions", body)["choices"][0]["text"]
        chunks = server.stream("/v1/completions", {**body, "stream": True})
        pieces = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(pieces) == whole
        assert any(not piece.isascii() for piece in pieces)


def test_provisional_frames_stay_outside_of_the_text(server: Served, engine: nemodiff.LoadedEngine) -> None:
    alone = nemodiff.generate(engine, QUESTION, mode="diffusion", max_new_tokens=12)
    chunks = server.stream(CHAT, chat(mode="diffusion", max_tokens=12, stream=True, diffusing=True))
    frames = [chunk for chunk in chunks if "diffusing" in chunk]
    assert len(frames) == alone.nfe["denoise"]
    for frame in frames:
        assert frame["choices"][0]["delta"] == {}
        block = frame["diffusing"]
        assert len(block["tokens"]) == len(block["text"]) == len(block["confidence"]) == alone.block_length
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == alone.text


def test_thinking_is_told_apart(server: Served, engine: nemodiff.LoadedEngine) -> None:
    alone = nemodiff.generate(engine, QUESTION, thinking=True, thinking_budget=4, max_new_tokens=20)
    reasoning, marker, content = alone.text.partition("</think>")
    assert marker
    body = chat(thinking=True, thinking_budget=4, max_tokens=20)
    answer = server.ask(CHAT, body)
    message = answer["choices"][0]["message"]
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": alone.reasoning_tokens}
    assert 0 < alone.reasoning_tokens < answer["usage"]["completion_tokens"]
    assert message["reasoning"].strip() == reasoning.strip()
    assert message["reasoning_content"] == message["reasoning"]
    assert message["content"].strip() == content.strip()
    deltas = [chunk["choices"][0]["delta"] for chunk in server.stream(CHAT, {**body, "stream": True})]
    for name in ("reasoning", "reasoning_content", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message[name]


@hypothesis.given(st.lists(st.sampled_from(["<think>", "</think>", "<", "</thi", "nk>", "a", "\n"])), st.data())
def test_any_cut_of_a_text_is_split_alike(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    thinking = data.draw(st.booleans())
    whole = ReasoningParser(TAGS, thinking).push(text, final=True)
    parser = ReasoningParser(TAGS, thinking)
    split = ["", ""]
    at = 0
    while at < len(text):
        size = data.draw(st.integers(1, 9))
        for i, new in enumerate(parser.push(text[at : at + size])):
            split[i] += new
        at += size
    for i, new in enumerate(parser.push("", final=True)):
        split[i] += new
    assert tuple(split) == whole
    if not thinking and not text.lstrip("\n").startswith("<think>"):
        assert whole == ("", text)
    if thinking and "</think>" not in text:
        assert whole == (text.lstrip("\n"), "")


def test_a_think_block_stands_at_the_beginning() -> None:
    assert ReasoningParser(TAGS, True).push("a\n</think>\n\nb <think>c</think>", final=True) == (
        "a\n",
        "b <think>c</think>",
    )
    assert ReasoningParser(TAGS, False).push("\n<think>\na</think>b", final=True) == ("a", "b")
    assert ReasoningParser(TAGS, False).push("b <think>c</think>", final=True) == ("", "b <think>c</think>")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/events"])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"json_object": True, "disable_fallback": True}}, r"\{.*"),
        ({"structured_outputs": {"json_object": False, "regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"grammar": 'root ::= ("a" | "b") "c"'}}, "[ab]c"),
        ({"guided_grammar": 'start: ("a" | "b") "c"'}, "[ab]c"),
        ({"guided_json": {"enum": [1, 2]}, "guided_decoding_backend": "xgrammar"}, "[12]"),
        ({"guided_json": '{"enum": [1, 2]}', "guided_regex": None}, "[12]"),
        ({"guided_regex": "[ab]{3}", "response_format": {"type": "text"}}, "[ab]{3}"),
        ({"guided_choice": ["a.", "b|"]}, r"a\.|b\|"),
    ],
)
def test_answers_follow_what_vllms_fields_say(server: Served, path: str, fields: dict[str, Any], pattern: str) -> None:
    body = {**(chat() if path == CHAT else {"prompt": QUESTION}), "max_tokens": 20, **fields}
    if path == "/events":
        text = server.stream(path, body)[-1]["generation"]["text"]
    else:
        choice = server.ask(path, body)["choices"][0]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
    assert re.fullmatch(pattern, text, re.DOTALL)


# --- malformed requests ---


@pytest.mark.parametrize(
    ("path", "body", "fragment"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "'system', 'developer', 'user'"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        (CHAT, chat(tools=[{"type": "function"}]), 'tools holds the name null, allowed'),
        (CHAT, chat(temperature="1"), "temperature"),
        (CHAT, chat(temperature=-1), "temperature is -1.0, allowed"),
        (CHAT, chat(max_tokens=0), "allowed: 1 or more"),
        (CHAT, chat(max_tokens=-1, ignore_eos=True), "give max_tokens"),
        (CHAT, chat(max_tokens=10**9), "max_seq_len"),
        (CHAT, chat(max_tokens=1, max_completion_tokens=2), "give one of them"),
        (CHAT, chat(max_tokens=True), "max_tokens"),
        (CHAT, chat(include_reasoning=False, thinking=True), "'include_reasoning' is not supported"),
        ("/v1/completions", {"prompt": "x", "add_special_tokens": False}, "add_special_tokens: Input should be True"),
        (CHAT, chat(n=0), "n:"),
        (CHAT, chat(stop=[""]), "a stop string is empty"),
        (CHAT, chat(stop=[None]), "stop.0: Input should be a valid string, got None"),
        (CHAT, chat(stop=["a", 5]), "stop.1: Input should be a valid string, got 5"),
        (CHAT, chat(bad_words=7), "bad_words: Input should be a valid string, got 7"),
        (CHAT, chat(messages=[{"role": "user", "content": 5}]), "messages.0.content: Input should be a valid string"),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages.0.content.0.text: "),
        (
            CHAT,
            chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
            "a part of type 'input_audio' is not supported, allowed: text, refusal, image_url, thinking",
        ),
        (CHAT, chat(tool_choice={"type": "function", "function": {}}), "tool_choice.function.name: Field required"),
        (CHAT, chat(structured_outputs={"choice": []}), "structured_outputs.choice: "),
        (CHAT, chat(structured_outputs={"choice": ["a", 5]}), "structured_outputs.choice.1: Input should be a valid s"),
        (CHAT, chat(structured_outputs={"choice": ["\ud800"]}), "structured_outputs.choice: not UTF-8"),
        (
            CHAT,
            chat(structured_outputs={"choice": ["a"], "regex": "a"}),
            "structured_outputs.regex and structured_outputs.choice are both given; use one of them",
        ),
        (CHAT, chat(structured_outputs={"json_object": True, "json": {}}), "structured_outputs.json_object are both"),
        (CHAT, chat(guided_json={}, guided_grammar="x"), "guided_json and guided_grammar are both given"),
        (CHAT, chat(guided_choice=["a"], guided_regex="a"), "guided_regex and guided_choice are both given"),
        (CHAT, chat(guided_regex="a", response_format={"type": "json_object"}), "response_format and guided_regex are"),
        (CHAT, chat(guided_regex="a", structured_outputs={"regex": "a"}), "regex and guided_regex are both given"),
        (CHAT, chat(structured_outputs={"structural_tag": "{}"}), "'structural_tag' is not supported"),
        (CHAT, chat(structured_outputs={"whitespace_pattern": " "}), "'whitespace_pattern' is not supported"),
        (CHAT, chat(guided_choice=[]), "guided_choice: "),
        (CHAT, chat(guided_json=5), "guided_json"),
        (CHAT, chat(stop=["x"] * 1025), "stop has 1025 values, allowed: at most 1024 with 16384 characters"),
        ("/v1/completions", {"prompt": "x", "bad_words": ["x" * 16385]}, "bad_words has 16385 characters"),
        (CHAT, chat(max_tokens=HUGE), "max_tokens is 999"),
        (CHAT, chat(min_tokens=HUGE), "min_tokens is 999"),
        (CHAT, chat(block_steps=2**64), "block_steps is 18446744073709551616, allowed: numbers of 64 bits"),
        (CHAT, chat(stop_token_ids=[HUGE]), "stop_token_ids is [999"),
        (CHAT, chat(logit_bias={str(HUGE): 1}), "logit_bias holds token id 999"),
        (CHAT, chat(logit_bias={"9" * 5000: 1}), "logit_bias is {'999"),
        ("/v1/completions", {"prompt": [5, HUGE]}, "prompt holds token id 999"),
        ("/v1/fim/completions", {"prompt": "a", "suffix": "b", "max_tokens": -HUGE}, "max_tokens is -999"),
        ("/detokenize", {"tokens": [HUGE]}, "tokens holds token id 999"),
        (CHAT, chat(seed=-(2**63) - 1), "seed is -9223372036854775809"),
        (CHAT, chat(logit_bias={"x": 1}), "token ids"),
        (CHAT, chat(top_logprobs=2), "logprobs"),
        (CHAT, chat(mode="fast"), "mode"),
        (CHAT, chat(block_length=65), "allowed: 1 to 64"),
        (CHAT, chat(mode="ar", policy="topk"), "policy"),
        (CHAT, chat(response_format={"type": "json_schema"}), "json_schema"),
        (CHAT, chat(response_format={"type": "xml"}), "response_format"),
        (CHAT, chat(response_format={"type": "regex", "regex": "("}), "not understood"),
        (CHAT, chat(response_format={"type": "regex", "regex": r"[^\s\S]"}, stream=True), "regex allows no answer"),
        (CHAT, with_schema({"$ref": "#"}, stream=True), "json_schema allows no answer"),
        (CHAT, with_schema({"type": "array", "items": {"const": 0}, "minItems": 10716}), "json_schema is too complex"),
        (CHAT, with_schema(ENDLESS, stream=True), "json_schema allows no answer (every value"),
        (CHAT, with_schema(SET, strict_schema=True), "leave strict_schema out"),
        (CHAT, with_schema({"enum": ["x" * 300_000]}), "allowed: at most 262144"),
        (CHAT, chat(ignore_eos=True), "give max_tokens"),
        (CHAT, chat("\ud800"), "messages.0.content: not UTF-8 text at character 0"),
        (RESPONSES, {"instructions": "x", "input": "\ud800"}, "a message: not UTF-8 text at character 0"),
        (CHAT, chat(stop="\udc00"), "not UTF-8"),
        ("/v1/completions", {"prompt": ""}, "the prompt is empty"),
        ("/v1/completions", {"prompt": [10**9]}, "token id 1000000000"),
        ("/v1/completions", {"prompt": [[5], [5, 100]]}, "token id 100, the mask"),
        (CHAT, chat(echo=True), "'echo' is not supported"),
        (CHAT, chat(diffusing=True), "diffusing needs stream; set stream to true"),
        (CHAT, chat(stream_options={"include_usage": True}), "stream_options needs stream; set stream to true"),
        (CHAT, chat(stream=False, stream_options={}), "stream_options needs stream; set stream to true"),
        ("/v1/completions", {"prompt": "x", "stream_options": {}}, "stream_options needs stream"),
        ("/v1/completions", {"prompt": "x", "suffix": "y", "stream_options": {}}, "stream_options needs stream"),
        ("/v1/fim/completions", {"prompt": "x", "stream_options": {}}, "stream_options needs stream"),
        ("/events", chat(stream_options={}), "stream_options is for chunks of text"),
        (CHAT, chat(skip_special_tokens=False), "'skip_special_tokens' is not supported; leave it out"),
        (CHAT, chat(add_generation_prompt=False), "allowed with continue_final_message: true; give both"),
        (CHAT, chat(continue_final_message=True, add_generation_prompt=True), "both true; give one of them"),
        (CHAT, chat(continue_final_message=True), "the last message is the user's"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, "max_tokens is 0"),
        (
            "/v1/completions",
            {"prompt": "x", "echo": True, "logprobs": 1, "prompt_logprobs": 2},
            "logprobs and prompt_logprobs differ",
        ),
        ("/tokenize", {}, "messages or prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt: not UTF-8"),
        ("/detokenize", {"tokens": [5, 891]}, "token id 891, allowed: 0 to 890"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/v1/fim/completions", {"prompt": "x", "method": "block"}, "length"),
        ("/v1/fim/completions", {"prompt": "x", "suffix": "y", "length": 99}, "allowed: 1 to 64"),
        ("/v1/fim/completions", {"prompt": "x", "suffix": "y", "max_tokens": 0}, "max_tokens is 0, allowed: 1 or more"),
        ("/v1/completions", {"prompt": "x", "suffix": "y", "logprobs": 1}, "logprobs is not for a hole"),
        ("/v1/completions", {"prompt": "x", "suffix": "y", "n": 2}, "n is not for a hole"),
        ("/v1/completions", {"prompt": ["x"], "suffix": "y"}, "prompt is a list, allowed with a suffix: text"),
        ("/v1/fim/completions", {"prompt": "x", "suffix": "y", "method": "guess"}, "method"),
        ("/events", {}, "messages or prompt"),
        ("/events", {**chat(), "prompt": "x"}, "messages or prompt"),
        ("/events", chat(n=2), "several requests"),
        ("/events", chat(stream=False), "stream is false, allowed: true; events come as a stream alone"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content: Field required"),
        (CHAT, b"", "the body is missing; send an object"),
        (CHAT, b"{", "not JSON"),
        (CHAT, b"[]", "the body is [], allowed: a JSON object; send an object"),
        (CHAT, b'{"messages": \xff}', "body"),
        (CHAT, b"[" * 100_000, "send a JSON object in UTF-8, nested less deeply, with shorter numbers"),
        (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}", "body"),
        (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
        (RESPONSES, b'{"input": "x", "metadata": {"a": NaN}}', "metadata holds nan, which is no number of JSON"),
        (RESPONSES, {"input": "x", "metadata": {"\ud800": "b"}}, "metadata: not UTF-8"),
        (RESPONSES, {"input": [{"type": "shell_call"}]}, "input.0.type is 'shell_call', allowed: 'message', "),
        (RESPONSES, {"input": [{"type": 5}]}, "input.0.type is 5, allowed: 'message', "),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "items are not stored; send the item itself"),
        (RESPONSES, {"input": [{"role": "user", "content": [{}]}]}, "input.0.content.0.type: Field required"),
        (CHAT, {"messages": ["x"]}, "messages.0: Input should be an object, got 'x'"),
        (RESPONSES, {"input": "x", "metadata": {"a": [{"b": "\ud800"}]}, "stream": True}, "metadata: not UTF-8"),
        (RESPONSES, {"input": "x", "metadata": nested(120), "stream": True}, "metadata is nested too deeply"),
        (CHAT, chat() | {"chat_template_kwargs": nested(850)}, "chat_template_kwargs is nested too deeply"),
        (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_one_sentence(server: Served, path: str, body: Any, fragment: str) -> None:
    status, headers, content = server.send(path, body)
    assert (status, headers["content-type"]) == (400, "application/json"), content
    error = json.loads(content)["error"]
    assert fragment in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1000


UNHELD = {"type": "string", "not": {"const": "a"}}


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": UNHELD}}},
            "response_format.json_schema",
        ),
        (CHAT, {"response_format": {"type": "json_object"}, "mode": "diffusion"}, "response_format"),
        (CHAT, {"response_format": {"type": "regex", "regex": "("}}, "response_format.regex"),
        (CHAT, {"structured_outputs": {"json": UNHELD}}, "structured_outputs.json"),
        (CHAT, {"structured_outputs": {"json": "{}", "regex": "a"}}, "structured_outputs.json"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        (CHAT, {"structured_outputs": {"choice": ["a" * (300 << 10)]}}, "structured_outputs.choice"),
        (CHAT, {"structured_outputs": {"choice": ["a"]}, "mode": "diffusion"}, "structured_outputs.choice"),
        (CHAT, {"structured_outputs": {"json_object": True}, "mode": "diffusion"}, "structured_outputs.json_object"),
        (CHAT, {"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs.grammar"),
        (CHAT, {"guided_json": UNHELD}, "guided_json"),
        (CHAT, {"guided_json": "{"}, "guided_json"),
        ("/v1/completions", {"prompt": "a", "guided_regex": "("}, "guided_regex"),
        (CHAT, {"guided_choice": ["a"], "mode": "diffusion"}, "guided_choice"),
        ("/events", {"guided_grammar": "start: other"}, "guided_grammar"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (
            "/v1/responses",
            {"input": "a", "text": {"format": {"type": "json_schema", "name": "x", "schema": UNHELD}}},
            "text.format",
        ),
        (
            "/v1/messages",
            {"max_tokens": 5, "output_config": {"format": {"type": "json_schema", "schema": UNHELD}}},
            "output_config.format",
        ),
        (
            "/v1/messages",
            {"max_tokens": 5, "output_format": {"type": "json_schema", "schema": UNHELD}},
            "output_format",
        ),
    ],
)
def test_a_refusal_names_what_the_client_sent(server: Served, path: str, fields: dict[str, Any], field: str) -> None:
    asked = {} if "input" in fields or "prompt" in fields else {"messages": chat()["messages"]}
    status, _, content = server.send(path, {**asked, **fields})
    error = json.loads(content)["error"]
    assert (status, error["param"]) == (400, field)
    assert error["message"].startswith(f"{field} ")
    assert "max_new_tokens" not in error["message"]


@pytest.mark.parametrize("path", STREAMS)
def test_a_grammar_that_fails_on_the_way_ends_its_request_with_the_reason(server: Served, path: str) -> None:
    """The library can only give up on this one when the answer has come to its second property."""
    endless = {"type": "array", "items": {"const": 0}, "minItems": 10716}
    properties = {"first": {"enum": [7, 8]}, "second": endless}
    schema = {"type": "object", "properties": properties, "required": ["first", "second"]}
    form = {"type": "json_schema", "json_schema": {"schema": schema | {"additionalProperties": False}}}
    body = {"prompt": QUESTION} if path != CHAT else chat()
    told = server.stream(path, {**body, "response_format": form, **({} if path == "/events" else {"stream": True})})
    assert "response_format.json_schema is too complex" in told[-1]["error"]["message"]
    assert not any(one.get("choices", [{}])[0].get("finish_reason") for one in told)
    if path != "/events":
        status, _, content = server.send(path, {**body, "response_format": form})
        assert status == 400
        assert json.loads(content)["error"]["param"] == "response_format.json_schema"
    assert server.ask(CHAT, chat(max_tokens=4))["choices"]


@pytest.mark.parametrize("strict", [True, False, None])
def test_what_of_a_schema_is_ignored_stands_in_the_answer(server: Served, strict: bool | None) -> None:
    body = with_schema(SET, strict=strict, n=2)
    warnings = ["json_schema: uniqueItems is ignored, so items may repeat"]
    assert server.ask(CHAT, body)["warnings"] == warnings
    chunks = server.stream(CHAT, {**body, "stream": True})
    assert [chunk.get("warnings") for chunk in chunks if chunk["choices"][0]["finish_reason"]] == [warnings] * 2
    assert "warnings" not in server.ask(CHAT, chat(max_tokens=4))


def test_what_changes_nothing_is_accepted(server: Served) -> None:
    plain = server.ask(CHAT, chat(max_tokens=4))["choices"]
    extra = {
        "user": "me",
        "metadata": {"a": "b"},
        "tools": [],
        "tool_choice": "none",
        "stop": None,
        "top_k": -1,
        "n": 1,
        "include_reasoning": True,
    }
    parts = [{"type": "text", "text": "Count from "}, {"type": "text", "text": "3 to 9."}]
    request = {"messages": [{"role": "user", "content": parts, "name": "x"}], "max_completion_tokens": 4, **extra}
    assert server.ask(CHAT, request)["choices"] == plain
    completion = {"prompt": "Count from", "max_tokens": 4}
    asked = server.ask("/v1/completions", {**completion, "add_special_tokens": True, "best_of": 1})
    assert asked["choices"] == server.ask("/v1/completions", completion)["choices"]


def test_the_commands_of_the_readme(server: Served) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = re.findall(r"```bash\n(nemodiff serve .*?)```", text, re.DOTALL)
    command, curl = block.split("\n", 1)
    assert command == "nemodiff serve engines/tiny-chat-2"  # as the server of these tests, but for model and port
    assert "localhost:8000/" in curl
    words = ["bash", "-euc", curl.replace("localhost:8000", f"{server.host}:{server.port}")]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert json.loads(answer)["usage"]["mode"] == "diffusion"


def test_other_paths_and_methods_are_refused_as_json(server: Served) -> None:
    wrong = [
        ("/docs", "GET", 404),
        ("/redoc", "GET", 404),
        ("/v1/nothing", "GET", 404),
        (f"{CHAT}/", "POST", 404),
        (CHAT, "GET", 405),
        ("/metrics", "DELETE", 405),
    ]
    for path, method, status in wrong:
        got, _, content = server.send(path, method=method)
        assert got == status
        assert json.loads(content)["error"]["message"].startswith(f"{method} {path}: ")


def test_small_routes(server: Served) -> None:
    assert server.ask("/health") == {"status": "ok"}
    for path in ("/health", "/health/ready", "/v1/models", "/metrics", "/"):  # as balancers and curl -I ask
        plain, asked = server.send(path), server.send(path, method="HEAD")
        assert (asked[0], asked[1]["content-type"], asked[2]) == (200, plain[1]["content-type"], b"")
    assert server.send(CHAT, method="HEAD")[0] == 405
    assert server.ask("/health/ready") == {"status": "ready"}
    assert server.ask("/version")["backend"] == "onnxruntime"
    status, headers, content = server.send("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert content.startswith(b"<!doctype html>")


def test_the_description_says_what_the_routes_do(server: Served) -> None:
    """Requests made from /openapi.json, right and wrong ones: no route fails, or answers what is not described."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        if operation.method == "post":
            cases |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @hypothesis.settings(
            max_examples=12, suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate]
        )
        @hypothesis.given(case=cases)
        def check(case: schemathesis.Case) -> None:
            nonlocal tried
            if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens", 0), int | None):
                case.body["max_tokens"] = min(8, case.body.get("max_tokens") or 8)
            case.call_and_validate(checks=CHECKS)
            tried += 1

        check()
    assert tried >= 60


# --- filling in and watching ---


def test_a_hole_is_filled_as_the_runtime_does(server: Served, engine: nemodiff.LoadedEngine) -> None:
    body = {"prompt": "def add(a, b):", "suffix": " a + b", "length": 3}
    alone = nemodiff.infill(engine, body["prompt"], body["suffix"], length=3)
    answer = server.ask("/v1/fim/completions", body)
    assert answer["choices"][0]["text"] == alone.holes[0]
    assert answer["usage"]["nfe"] == alone.nfe
    assert answer["choices"][0]["message"]["content"] == alone.holes[0]
    (chunk,) = server.stream("/v1/fim/completions", {**body, "stream": True})
    assert chunk["choices"][0]["text"] == chunk["choices"][0]["delta"]["content"] == alone.holes[0]
    with_usage = {**body, "stream": True, "stream_options": {"include_usage": True}}
    chunk, last = server.stream("/v1/fim/completions", with_usage)
    assert (chunk["choices"][0]["text"], chunk["usage"]) == (alone.holes[0], None)
    assert (last["choices"], last["usage"]) == ([], answer["usage"])
    assert server.ask("/v1/fim/completions", {**body, "method": "block"})["usage"]["completion_tokens"] == 3


def test_a_limit_bounds_a_hole_and_a_stop_text_cuts_it(server: Served, engine: nemodiff.LoadedEngine) -> None:
    body: dict[str, Any] = {"prompt": "Count from ", "suffix": " to 9.", "width": 4}
    free = nemodiff.infill(engine, body["prompt"], body["suffix"], width=4, longest=2)
    for path in ("/v1/fim/completions", "/v1/completions"):
        asked = {**body, "max_tokens": 2} | ({"width": None} if path == "/v1/completions" else {})
        answer = server.ask(path, asked)
        assert answer["usage"]["completion_tokens"] <= 2
        assert "warnings" not in answer
    assert server.ask("/v1/fim/completions", {**body, "max_tokens": 2})["choices"][0]["text"] == free.holes[0]
    cut = server.ask("/v1/fim/completions", {**body, "max_tokens": 2, "stop": ["zebra", free.holes[0][-1]]})
    assert cut["choices"][0]["text"] == free.holes[0].partition(free.holes[0][-1])[0]
    assert server.ask("/v1/fim/completions", {"prompt": "Count", "max_tokens": 3})["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("path", ["/v1/fim/completions", "/v1/completions"])
def test_what_editors_send_with_a_hole(server: Served, path: str) -> None:
    body = {"prompt": "Count from ", "suffix": " to 9.", "max_tokens": 256, "stop": ["\n\n"], "stream": True}
    drawn = {"temperature": 0.01, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0}
    (plain,), (chunk,) = (server.stream(path, {**body, **more}) for more in ({}, drawn))
    assert chunk["choices"] == plain["choices"]
    (warning,) = chunk["warnings"]
    assert (
        warning == "without effect, as a filling is not drawn: temperature, top_p, presence_penalty, frequency_penalty"
    )


@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_events_are_those_of_the_runtime(server: Served, engine: nemodiff.LoadedEngine, mode: str) -> None:
    options = {"mode": mode, "max_new_tokens": 12, "block_length": 4, "groups": "all"}
    alone = list(nemodiff.events(engine, [QUESTION], steps=True, **options))
    lines = server.stream(
        "/events", {"prompt": QUESTION, "max_tokens": 12, "mode": mode, "block_length": 4, "groups": "all"}
    )
    assert lines[0]["event"] == "trace"
    changing = {"at", "request", "seconds", "confidence", "committed", "reused_tokens", "timings_ms", "nfe", "e2e_tpf"}
    changing |= {"ttft_ms", "itl_ms", "longest_gap_ms", "rows"}

    def kept(value: dict[str, Any]) -> dict[str, Any]:
        return {k: kept(v) if isinstance(v, dict) else v for k, v in value.items() if k not in changing | {"pieces"}}

    from nemodiff.runtime.events.events import as_dict

    def decoding(values: list[dict[str, Any]]) -> list[dict[str, Any]]:  # what is reused need not be prefilled
        return [kept(value) for value in values if value.get("kind") != "prefill"]

    assert decoding(lines[1:]) == json.loads(json.dumps(decoding(list(map(as_dict, alone)))))


def test_fillings_and_refusals_are_counted(server: Served, guarded: Served) -> None:
    body = {"prompt": "def add(a, b):", "suffix": " a + b", "length": 2}
    before = server.metrics()
    nfe = server.ask("/v1/fim/completions", body)["usage"]["nfe"]
    for wrong in ({**body, "length": 99}, {**body, "mode": 5}):
        assert server.send("/v1/fim/completions", wrong)[0] == 400
    assert server.send(CHAT, chat(model="gpt"))[0] == 404
    assert server.send("/nothing")[0] == 404
    after = server.metrics()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    passes = {f'nemodiff_fill_nfe_total{{kind="{kind}"}}': count for kind, count in nfe.items() if count}
    refused = "nemodiff_refused_requests_total"
    counted = {'nemodiff_fills_total{end="finished"}': 1, "nemodiff_fill_tokens_total": 2, **passes}
    assert grown == counted | {f'{refused}{{status="400"}}': 2, f'{refused}{{status="404"}}': 1}
    then = guarded.metrics()
    assert guarded.send(CHAT, chat())[0] == 401
    assert guarded.send(CHAT, chat("x" * 3000), Authorization="Bearer a b")[0] == 413
    for status in (401, 413):
        name = f'{refused}{{status="{status}"}}'
        assert guarded.metrics()[name] == then[name] + 1


# --- many, and those who leave ---


def test_many_at_once_lose_nothing_and_add_up(server: Served, engine: nemodiff.LoadedEngine) -> None:
    questions = [QUESTION, "Sort these numbers: 41, 7, 93.", "Reverse the list: river glass tiger"]
    requests = [
        chat(questions[i % 3], mode=nemodiff.MODES[i % 4], max_tokens=8 + i % 5, stream=i % 2 == 0) for i in range(120)
    ]
    expected = [
        nemodiff.generate(engine, b["messages"][0]["content"], mode=b["mode"], max_new_tokens=b["max_tokens"]).text
        for b in requests
    ]
    before = server.settled()

    def get(body: dict[str, Any]) -> str:
        if body["stream"]:
            return "".join(c["choices"][0]["delta"].get("content", "") for c in server.stream(CHAT, body))
        return str(server.ask(CHAT, body)["choices"][0]["message"]["content"])

    with concurrent.futures.ThreadPoolExecutor(120) as pool:
        assert list(pool.map(get, requests)) == expected
    after = server.settled()
    grown = {name: after[name] - before[name] for name in after}
    assert grown['nemodiff_requests_total{end="finished"}'] == 120
    assert grown["nemodiff_time_to_first_token_seconds_count"] == 120
    verifies = grown["nemodiff_accepted_tokens_per_verify_count"]
    assert verifies == grown['nemodiff_nfe_total{kind="verify"}'] > 0


def leave(server: Served, path: str, body: dict[str, Any], read: int) -> None:
    """Send a request, read some of the answer and hang up."""
    connection = server.connect()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    if read:
        connection.getresponse().read(read)
    connection.close()


# Clients that may leave before they are queued come last, because their end may be counted at any later time.
@pytest.mark.parametrize(("stream", "path"), [*((True, p) for p in STREAMS), *((False, p) for p in STREAMS[:2])])
def test_a_client_that_leaves_frees_its_row(server: Served, path: str, stream: bool) -> None:
    before = server.settled()['nemodiff_requests_total{end="cancelled"}']
    body = {**LONG, "stream": stream}
    if path == CHAT:
        body["messages"] = chat(body.pop("prompt"))["messages"]
    leave(server, path, body, read=200 if stream else 0)
    if not stream:  # it may leave before the request is queued, and then there is nothing to cancel
        server.settled()
        return
    assert server.settled()['nemodiff_requests_total{end="cancelled"}'] == before + 1


def test_a_soak_of_random_leavers_leaves_nothing_behind(server: Served) -> None:
    rng = random.Random(5)

    def memory() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def one() -> tuple[dict[str, Any], int]:
        body = chat(mode=rng.choice(nemodiff.MODES), max_tokens=300, min_tokens=300, stream=True)
        return body, rng.choice([0, 1, 300, 3000])

    def round_of(count: int) -> None:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            for job in [pool.submit(leave, server, CHAT, *one()) for _ in range(count)]:
                job.result()
        server.settled()

    round_of(60)
    memory_before = memory()
    before = server.settled()
    round_of(120)
    assert memory() - memory_before < 60e6
    after = server.settled()
    ends = [sum(v for n, v in f.items() if n.startswith("nemodiff_requests_total")) for f in (before, after)]
    assert ends[1] - ends[0] <= 120
    failed = 'nemodiff_requests_total{end="failed"}'
    assert after[failed] == before[failed]
    assert server.ask(CHAT, chat(max_tokens=4))["usage"]["completion_tokens"] == 4


# --- limits ---


def test_keys_size_time_and_queue_are_limited(guarded: Served) -> None:
    key = {"Authorization": "Bearer a b"}
    for headers in ({}, {"Authorization": "Bearer unused"}, {"Authorization": "a b"}):
        status, got, content = guarded.send("/v1/models", **headers)
        assert (status, got["www-authenticate"]) == (401, "Bearer")
        assert json.loads(content)["error"]["code"] == "invalid_api_key"
    assert guarded.send("/health")[0] == guarded.send("/metrics")[0] == 200
    assert guarded.ask("/v1/models", **key)["data"]
    large = chat("x" * 3000)
    assert guarded.send(CHAT, large, **key)[0] == 413
    chunked = guarded.connect()
    chunked.request("POST", CHAT, iter([b"{" * 1500] * 3), {"Content-Type": "application/json", **key})
    assert chunked.getresponse().status == 413
    chunked.close()
    status, _, content = guarded.send("/v1/completions", LONG, **key)
    assert (status, json.loads(content)["error"]["code"]) == (504, "timeout")
    last = guarded.send("/v1/completions", {**LONG, "stream": True}, **key)[2].split(b"\n\n")[-2]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
    counts = {429: 0, 504: 1}
    while not counts[429]:  # which takes three within the half second that a request has
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: guarded.send("/v1/completions", LONG, **key), range(6)))
        for status, headers, _ in answers:
            counts[status] += 1
            assert status == 504 or headers["retry-after"] == "1"
    values = guarded.metrics()
    assert {status: values[f'nemodiff_refused_requests_total{{status="{status}"}}'] for status in counts} == counts


@pytest.mark.parametrize("patience", ["60", "0.3"])
def test_sigterm_drains(tiny_engine: Path, engine: nemodiff.LoadedEngine, patience: str) -> None:
    count = 300 if patience == "60" else 20_000
    body = {"prompt": "Once upon", "max_tokens": count, "min_tokens": count, "mode": "ar", "stream": True}
    with serving(tiny_engine, "--drain", patience) as served:
        running = served.connect()
        running.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = running.getresponse()
        begun = answer.read(300)
        with contextlib.closing(served.connect()) as other:  # keeps the server while it is asked
            other.request("POST", "/v1/completions", json.dumps({**body, **LONG}), {"Content-Type": "application/json"})
            assert other.getresponse().read(10)
            served.process.send_signal(signal.SIGTERM)
            if patience == "60":
                eventually(lambda: served.send("/health/ready")[0] == 503)
                status, headers, _ = served.send("/v1/completions", body)
                assert (status, headers["retry-after"]) == (503, "1")
        content = begun + answer.read()
        running.close()
        assert served.process.wait(60) == 0
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""
    *chunks, end, nothing = content.decode().split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    assert choices[-1]["finish_reason"] == ("length" if patience == "60" else "cancelled")
    whole = nemodiff.generate(engine, "Once upon", chat=False, mode="ar", max_new_tokens=300, min_tokens=300).text
    got = "".join(choice["text"] for choice in choices)
    assert got == whole if patience == "60" else got.startswith(whole[:5])


def test_what_cannot_be_answered_before_the_end_is_refused(tiny_engine: Path) -> None:
    long = {"max_tokens": 20_000, "min_tokens": 20_000, "mode": "ar"}
    words = " ".join(map(str, range(400)))
    hole = {"prompt": words, "suffix": words, "length": 60, "width": 64}
    bodies = [
        ("/v1/completions", {"prompt": "Once upon", **long}),  # has one row
        ("/v1/messages", {**chat(), **long, "stream": True}),  # and this one the other
        ("/v1/completions", {"prompt": "Once upon", **long}),  # waits, and so do all below
        (CHAT, chat(**long, n=2)),
        (CHAT, chat(**long, stream=True)),
        ("/v1/messages", {**chat(), **long}),
        ("/v1/responses", {"input": "hi", "mode": "ar", "min_tokens": 500}),
        ("/v1/fim/completions", hole),
        ("/v1/fim/completions", {**hole, "stream": True}),
    ]
    with serving(tiny_engine, "--rows", "2", "--drain", "0.3") as served, contextlib.ExitStack() as open_ones:
        asked = []
        for path, body in bodies:
            asked.append(open_ones.enter_context(contextlib.closing(served.connect())))
            asked[-1].request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            count = len(asked) + (len(asked) > 3)  # a chat has two answers
            eventually(lambda count=count: sum(served.metrics()[name] for name in PRESENT) == count)
        eventually(lambda: served.metrics()["nemodiff_generation_tokens_total"] > 20)
        served.process.send_signal(signal.SIGTERM)
        told = [(answer.status, answer.read().decode()) for answer in (one.getresponse() for one in asked)]
        assert served.process.wait(60) == 0
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""
    assert [status for status, _ in told] == [200, 200, 503, 503, 200, 503, 503, 503, 503]
    assert json.loads(told[0][1])["choices"][0]["finish_reason"] == "cancelled"
    for _, text in told[1:]:
        end = json.loads(text.rstrip("\n").rpartition("data: ")[2])
        assert "about to stop" in end["error"]["message"]


def test_what_the_command_refuses(tiny_engine: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused(["serve", str(tiny_engine), "--port", port], f"--port {port}: Address already in use; give another")
    refused(["serve", str(tiny_engine), "--rows", "0"], "rows is 0")
    refused(["serve", str(tiny_engine), "--served-model-name", " "], "--served-model-name is empty; give", code=2)
    refused(["serve", str(tiny_engine), "--host", "", "--port", "0"], "--host is empty; give an address")
    refused(["serve", str(tiny_engine), "--host", "ü" * 100], "--port 8000: encoding of hostname failed; give another")
    for key in ("", " ", "a "):  # an empty one would let in whoever sends none
        refused(["serve", str(tiny_engine), "--api-key", "x", "--api-key", key], "--api-key", "give another", code=2)
    for name in ("", "a b", "http://a", "a/b", "*a", "a.*"):
        words = ["serve", str(tiny_engine), "--allowed-host", "b", "--allowed-host", name]
        refused(words, "--allowed-host", f"{name!r} is no name of a host, allowed: NAME, *.NAME or *", code=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    refused(["serve", str(tiny_engine)], "torchrun has started 2 ranks", "start one server with --tp-size 2")
    monkeypatch.undo()
    refused(["serve", str(tiny_engine / "none")], "none")
