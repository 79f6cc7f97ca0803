"""Scoring over HTTP: echo, prompt_logprobs, log-probabilities in the chunks of their tokens, and tokens of texts."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from stand_ins.chats import chat_ids
from stand_ins.http_server import Served, serving

import nemodiff
from nemodiff.runtime.requests.options import make_options
from nemodiff.runtime.requests.prepare import prepare
from nemodiff.runtime.text.codec import TokenOffsets
from nemodiff.serving.http.responses import ResponseBuilder

QUESTION = "Count from 3 to 9."
CAUSAL = ["ar", "linear_spec", "quadratic_spec", "auto"]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server(tiny_engine: Path) -> Iterator[Served]:
    with serving(tiny_engine, "--served-model-name", "tiny") as running:
        yield running


def flat(chunks: list[Any]) -> dict[str, list[Any]]:
    """The log-probabilities of a streamed completion, joined."""
    joined: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            joined.setdefault(name, []).extend(values)
    return joined


@pytest.mark.parametrize("mode", nemodiff.MODES)
@pytest.mark.parametrize("prompt", ["Count from é€", [130, 131, 11, 140]])
def test_echo_with_logprobs_and_no_new_tokens_scores_a_text(
    server: Served, engine: nemodiff.LoadedEngine, mode: str, prompt: Any
) -> None:
    """As lm-eval asks for log-likelihoods."""
    ids = engine.text.encode(prompt) if isinstance(prompt, str) else prompt
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 0, "mode": mode}
    answer = server.ask(COMPLETIONS, body)
    alone = nemodiff.generate(engine, ids, prompt_logprobs=2, max_new_tokens=0).prompt_logprobs
    assert alone is not None
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (engine.text.decode(ids), "length")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [engine.text.name(token) for token in ids]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    expected = [one.logprob for one in alone if one is not None]
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    for token, one, top in zip(ids[1:], alone[1:], logprobs["top_logprobs"][1:], strict=True):
        assert one is not None
        assert top.keys() == {engine.text.name(likely) for likely in (token, *(likely for likely, _ in one.top))}
    assert max(map(len, logprobs["top_logprobs"][1:])) == 3  # where the token is not among the likeliest
    of_each = zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True)
    assert logprobs["token_logprobs"][1:] == [top[name] for name, top in of_each]
    assert logprobs["text_offset"] == TokenOffsets(engine.text).push(ids)
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert sum(answer["usage"]["nfe"].values()) == 1
    chunks = server.stream(COMPLETIONS, {**body, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert flat(chunks) == logprobs
    bare = server.ask(COMPLETIONS, {"prompt": prompt, "echo": True, "max_tokens": 0})["choices"][0]
    assert (bare["text"], bare["logprobs"], "prompt_logprobs" in bare) == (choice["text"], None, False)


@pytest.mark.parametrize("mode", CAUSAL)
def test_an_echoed_prompt_stands_before_its_completion(
    server: Served, engine: nemodiff.LoadedEngine, mode: str
) -> None:
    body = {"prompt": [QUESTION, "Sort these"], "echo": True, "logprobs": 1, "max_tokens": 9, "mode": mode}
    answer = server.ask(COMPLETIONS, body)
    for prompt, choice in zip(body["prompt"], answer["choices"], strict=True):  # type: ignore[arg-type]
        ids = engine.text.encode(prompt)
        alone = nemodiff.generate(engine, ids, mode=mode, max_new_tokens=9, logprobs=1, prompt_logprobs=1)
        assert choice["text"] == prompt + alone.text
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == [engine.text.name(token) for token in ids + alone.token_ids]
        assert alone.logprobs is not None
        assert logprobs["token_logprobs"][len(ids) :] == pytest.approx(
            [one.logprob for one in alone.logprobs], abs=1e-4
        )
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert choice["text"][offset:].startswith(token) or (token, offset) == ("<|im_end|>", len(choice["text"]))


@pytest.mark.parametrize("mode", CAUSAL)
@pytest.mark.parametrize("fields", [{}, {"stop": ["9"]}, {"temperature": 30.0, "seed": 3}, {"thinking": True}])
def test_chunks_have_the_logprobs_of_the_tokens_whose_text_they_end(
    server: Served, mode: str, fields: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body = {"messages": messages, "logprobs": True, "top_logprobs": 1, "mode": mode, "max_tokens": 60, **fields}
    whole = server.ask(CHAT, body)["choices"][0]
    chunks = server.stream(CHAT, {**body, "stream": True})
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    joined = [one for each in told if each is not None for one in each["content"]]
    assert [one["token"] for one in joined] == [one["token"] for one in whole["logprobs"]["content"]]
    assert [one["logprob"] for one in joined] == pytest.approx(
        [one["logprob"] for one in whole["logprobs"]["content"]], abs=1e-3
    )
    assert sum(each is not None for each in told) > 1
    if "thinking" in fields or "temperature" in fields:  # markers, and bytes that are no text
        return
    # Never more text than tokens, and no token later than the chunk in which its text ends.
    text, tokens = "", b""
    for chunk in chunks:
        choice = chunk["choices"][0]
        text += choice["delta"].get("content", "")
        for one in (choice["logprobs"] or {"content": []})["content"]:
            tokens += bytes(one["bytes"]) if one["token"] != "<|im_end|>" else b""
        if choice["finish_reason"] is None:
            if "stop" in fields and tokens.startswith(text.encode()):  # the stop string itself is no text
                continue
            assert text.encode().startswith(tokens)
            rest = text.encode()[len(tokens) :]
            longest = max(len(one["bytes"]) for one in joined)
            assert len(rest) < longest


@pytest.mark.parametrize("policy", ["threshold", "left_to_right"])
def test_chunks_have_the_confidences_of_diffusion(server: Served, engine: nemodiff.LoadedEngine, policy: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body = {"messages": messages, "mode": "diffusion", "confidences": True, "policy": policy, "max_tokens": 30}
    alone = nemodiff.generate(engine, QUESTION, mode="diffusion", confidences=True, policy=policy, max_new_tokens=30)
    whole = server.ask(CHAT, body)["choices"][0]
    assert whole["confidences"] == pytest.approx(alone.confidences, abs=1e-4)
    chunks = server.stream(CHAT, {**body, "stream": True})
    told = [chunk["choices"][0].get("confidences") for chunk in chunks]
    assert [one for each in told if each for one in each] == pytest.approx(whole["confidences"], abs=1e-4)
    assert sum(each is not None for each in told) > 1


def test_completions_stream_logprobs_with_offsets_too(server: Served) -> None:
    body = {"prompt": "é Count", "logprobs": 1, "max_tokens": 40, "temperature": 30.0, "seed": 5, "mode": "ar"}
    whole = server.ask(COMPLETIONS, body)["choices"][0]
    chunks = server.stream(COMPLETIONS, {**body, "stream": True})
    assert flat(chunks) == whole["logprobs"]
    assert sum(chunk["choices"][0]["logprobs"] is not None for chunk in chunks) > 5
    length = 0
    for chunk in chunks[:-1]:
        choice = chunk["choices"][0]
        length += len(choice["text"])
        assert all(offset < length for offset in (choice["logprobs"] or {"text_offset": []})["text_offset"])


@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_prompt_logprobs_are_vllms(server: Served, engine: nemodiff.LoadedEngine, mode: str) -> None:
    ids = chat_ids(engine.text, [{"role": "user", "content": QUESTION}])
    alone = nemodiff.generate(engine, ids, prompt_logprobs=2, max_new_tokens=0).prompt_logprobs
    assert alone is not None
    body = {"mode": mode, "max_tokens": 4, "prompt_logprobs": 2}
    chat = server.ask(CHAT, {**body, "messages": [{"role": "user", "content": QUESTION}]})
    completion = server.ask(COMPLETIONS, {**body, "prompt": ids})["choices"][0]
    streamed = server.stream(COMPLETIONS, {**body, "prompt": ids, "stream": True})[-1]["choices"][0]
    for told in (chat["prompt_logprobs"], completion["prompt_logprobs"], streamed["prompt_logprobs"]):
        assert told[0] is None
        for token, entry, one in zip(ids[1:], told[1:], alone[1:], strict=True):
            assert one is not None
            assert set(entry) == {str(token), *(str(i) for i, _ in one.top)}
            own = entry[str(token)]
            assert (own["rank"], own["decoded_token"]) == (one.rank, engine.text.piece(token))
            assert own["logprob"] == pytest.approx(one.logprob, abs=1e-4)
            assert sorted(each["rank"] for each in entry.values()) == sorted({1, 2, one.rank})
    assert "prompt_logprobs" not in server.ask(CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})


def test_texts_become_tokens_and_text_again(server: Served, engine: nemodiff.LoadedEngine) -> None:
    text = "Count é<|im_end|>"
    ids = engine.text.encode(text)
    told = server.ask("/tokenize", {"model": "tiny", "prompt": text})
    assert told == {"count": len(ids), "max_model_len": 32768, "tokens": ids, "token_strs": None}
    named = server.ask("/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True})
    assert named["token_strs"] == [engine.text.name(token) for token in ids]
    assert server.ask("/detokenize", {"model": "tiny:ar", "tokens": ids}) == {"prompt": text}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    for thinks in (False, True):
        body = {
            "messages": messages,
            "add_generation_prompt": True,
            "chat_template_kwargs": {"enable_thinking": thinks},
        }
        ids = chat_ids(engine.text, messages, thinks)
        assert server.ask("/tokenize", body)["tokens"] == ids
        assert server.ask("/detokenize", {"tokens": ids})["prompt"] == engine.text.decode_all(ids)
    assert "<|im_start|>user\nCount" in engine.text.decode_all(ids)
    assert server.ask("/detokenize", {"tokens": []}) == {"prompt": ""}
    assert server.send("/tokenize", {"model": "other", "prompt": "x"})[0] == 404


def test_openais_client_reads_an_echo(server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model="tiny", prompt="Count from", echo=True, logprobs=1, max_tokens=0)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "Count from"
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    client.close()


def test_what_is_told_of_a_long_prompt_takes_little_memory_until_it_is_sent(engine: nemodiff.LoadedEngine) -> None:
    ids = [*range(200, 800)]
    options: dict[str, Any] = {"prompt_logprobs": 100, "max_new_tokens": 1}
    builder = ResponseBuilder(engine, "completion", "tiny", prompt_logprobs=True)
    builder.sequences = [prepare(engine, ids, make_options(options))]
    generation = nemodiff.generate(engine, ids, **options)
    tracemalloc.start()
    content = orjson.dumps(builder.full([generation]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    told = json.loads(content)["choices"][0]["prompt_logprobs"]
    assert len(told) == len(ids)
    assert len(told[-1]) >= 100
    assert peak < 4 * len(content)


def test_answers_to_one_prompt_share_what_is_told_of_it(engine: nemodiff.LoadedEngine) -> None:
    options = {"prompt_logprobs": 2, "max_new_tokens": 1}
    prompts = [[*range(200 + at, 240 + at)] for at in range(2)]
    with nemodiff.Scheduler(engine) as scheduler:
        handles = scheduler.submit_many([(prompt, options) for prompt in prompts for _ in range(2)])
        generations = [handle.result() for handle in handles]
    sequences = [handle.sequence for handle in handles]
    builder = ResponseBuilder(engine, "completion", "tiny", prompt_logprobs=True, answers=2, sequences=sequences)
    first, second, third, fourth = (one["prompt_logprobs"] for one in builder.full(generations)["choices"])
    assert first is second
    assert third is fourth
    assert orjson.dumps(first) != orjson.dumps(third)


OF_TEXT = "message.output_text.logprobs"
TOO_MANY = "is 21, allowed: at most 20 on this server; ask for fewer, or raise max_logprobs"


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "prompt_logprobs": 21}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": "x", "prompt_logprobs": 21, "max_tokens": 0}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21, "echo": True, "max_tokens": 0}, "logprobs"),
        ("/events", {"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
        ("/v1/responses", {"input": "x", "include": [OF_TEXT], "top_logprobs": 21}, "top_logprobs"),
    ],
)  # fmt: skip
def test_more_logprobs_than_the_server_allows_are_refused(
    server: Served, path: str, body: dict[str, Any], named: str
) -> None:
    status, _, content = server.send(path, body)
    error = json.loads(content)["error"]
    assert (status, error["message"], error["param"]) == (400, f"{named} {TOO_MANY}", named)
    fewer = {name: 20 if value == 21 else value for name, value in body.items()}
    assert server.send(path, {**fewer, "max_tokens": 1} if path == "/events" else fewer)[0] == 200


def test_the_limit_of_logprobs_is_the_servers(tiny_engine: Path) -> None:
    with serving(tiny_engine, "--max-logprobs", "2") as served:
        status, _, content = served.send(COMPLETIONS, {"prompt": "x", "logprobs": 3})
        assert (status, json.loads(content)["error"]["message"]) == (
            400, "logprobs is 3, allowed: at most 2 on this server; ask for fewer, or raise max_logprobs"
        )  # fmt: skip
        assert served.send(COMPLETIONS, {"prompt": "x", "logprobs": 2, "max_tokens": 1})[0] == 200
