"""Bodies of chats and completions as options, and their answers as OpenAI's and vLLM's objects, without a server."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, get_args

import orjson
import pytest
from pydantic import ValidationError
from stand_ins.checkpoints import TINY_CHAT

from nemodiff.errors import RequestError
from nemodiff.runtime.engines.passes import PassKind
from nemodiff.runtime.events.events import Event, Finished, Step, Text
from nemodiff.runtime.requests.generation import Acceptance, Generation
from nemodiff.runtime.requests.token_logprobs import TokenLogprobs
from nemodiff.runtime.text.codec import TextCodec, TokenOffsets
from nemodiff.runtime.tools.answer import Delta, ToolCall
from nemodiff.serving.http.body import Chat, Completion, Decoding
from nemodiff.serving.http.body_parts import StreamOptions
from nemodiff.serving.http.dialects.messages_body import Messages
from nemodiff.serving.http.dialects.responses_body import Responses
from nemodiff.serving.http.handlers import _choices
from nemodiff.serving.http.responses import ResponseBuilder, finish_reason

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
PROMPT = [128, 129]
NFE: dict[PassKind, int] = dict.fromkeys(get_args(PassKind), 0)
TIMES = {"queued": 1.0, "prefill": 2.0, "decode": 3.0, "total": 5.0}


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(TINY_CHAT)


@pytest.fixture
def same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0")


def scored(ids: list[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(-0.5 - n, [(ids[0], -0.25)], 2) for n in range(len(ids))]


def generation(codec: TextCodec, text: str, **values: Any) -> Generation:
    fields = {
        "text": text, "content": text, "token_ids": codec.encode(text), "prompt_tokens": 2, "reused_tokens": 1,
        "finish_reason": "stop", "mode": "ar", "block_length": 32, "threshold": 0.9,
        "nfe": NFE | {"prefill": 1, "verify": 2}, "decode_tpf": None, "e2e_tpf": None, "adapter_tokens": 0,
        "acceptance": Acceptance(2.0, [1, 3], [2, 4]),
        "timings_ms": TIMES | {"load": 9.0},
    }  # fmt: skip
    return Generation(**(fields | values))


def builder(codec: TextCodec, kind: Any, count: int, **fields: Any) -> ResponseBuilder:
    engine: Any = SimpleNamespace(text=codec, info=SimpleNamespace(model=SimpleNamespace(mask_id=100)))
    scores = SimpleNamespace(by_token=[None, *scored(PROMPT)[1:]])
    sequences: Any = [SimpleNamespace(prompt=PROMPT, prompt_scores=scores)] * count
    return ResponseBuilder(engine, kind, "tiny", sequences=sequences, id="1", created=2, **fields)


def head(kind: str, name: str) -> dict[str, Any]:
    return {"id": f"{kind}-1", "object": name, "created": 2, "model": "tiny"}


def used(prompt: int, emitted: int, passes: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": emitted,
        "total_tokens": prompt + emitted,
        "prompt_tokens_details": {"cached_tokens": prompt // 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "mode": "ar",
        "block_length": 32,
        "threshold": 0.9,
        "nfe": NFE | {"prefill": passes, "verify": 2 * passes},
        "acceptance": {"mean": 2.0, "lengths": [1, 3] * passes},
        "decode_tpf": emitted / (2 * passes),
        "e2e_tpf": emitted / (3 * passes),
        "timings_ms": TIMES,
        **more,
    }


def described(codec: TextCodec, token: int, logprob: float) -> dict[str, Any]:
    return {"token": codec.name(token), "logprob": logprob, "bytes": list(codec.token_bytes(token))}


def of_chat(codec: TextCodec, ids: list[int], begin: int, first: int) -> dict[str, Any]:
    """Log-probabilities of tokens of which the first is the answer's number `begin`."""
    content = [
        described(codec, token, -0.5 - n) | {"top_logprobs": [described(codec, first, -0.25)]}
        for n, token in enumerate(ids, begin)
    ]
    return {"content": content, "refusal": None}


def of_prompt(codec: TextCodec) -> list[Any]:
    first, second = ({"logprob": value, "rank": rank, "decoded_token": codec.piece(token)} for value, rank, token in (
        (-0.25, 1, PROMPT[0]), (-1.5, 2, PROMPT[1]),
    ))  # fmt: skip
    return [None, {str(PROMPT[1]): second, str(PROMPT[0]): first}]


def plain(value: Any) -> Any:
    return json.loads(orjson.dumps(value))


@pytest.mark.usefixtures("same_ids")
def test_answers_are_those_of_a_chat(codec: TextCodec) -> None:
    call = ToolCall("f", '{"a": 1}')
    ids = codec.encode("Hi 3")
    said = generation(
        codec, "Hi 3", logprobs=scored(ids), confidences=[0.5] * len(ids), warnings=["w"], reasoning="Hm.",
        reasoning_tokens=3, prompt_logprobs=[None, *scored(PROMPT)[1:]], image_tokens=[4, 5],
    )  # fmt: skip
    called = generation(codec, "", tool_calls=[call], warnings=["w"], timings_ms=TIMES | {"total": 6.0})
    whole = builder(codec, "chat", 2, logprobs=True, prompt_logprobs=True, answers=2).full([said, called])
    function = {"name": "f", "arguments": '{"a": 1}'}
    usage = used(2, len(ids), 2, timings_ms=TIMES | {"total": 6.0})
    usage["prompt_tokens_details"]["image_tokens"] = 9
    usage["completion_tokens_details"]["reasoning_tokens"] = 3
    assert plain(whole) == {
        **head("chatcmpl", "chat.completion"),
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {
                    "role": "assistant", "content": "Hi 3", "refusal": None, "reasoning": "Hm.",
                    "reasoning_content": "Hm.",
                },
                "logprobs": of_chat(codec, ids, 0, ids[0]),
                "confidences": [0.5] * len(ids),
            },
            {
                "index": 1,
                "finish_reason": "tool_calls",
                "message": {
                    "role": "assistant", "content": None, "refusal": None,
                    "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
                },
                "logprobs": None,
            },
        ],
        "usage": usage,
        "prompt_logprobs": of_prompt(codec),
        "warnings": ["w"],
    }  # fmt: skip
    empty = builder(codec, "chat", 1).full([generation(codec, "", acceptance=Acceptance(None, [], []))])
    assert empty["choices"][0]["message"]["content"] == ""
    assert empty["usage"]["acceptance"] == {"mean": None, "lengths": []}
    assert empty.keys() == {"id", "object", "created", "model", "choices", "usage"}


def test_answers_are_those_of_a_completion(codec: TextCodec) -> None:
    ids = codec.encode("Hi 3")
    stopped = codec.encode(" x")  # a stop string, which is no text
    tokens = [*ids, *stopped]
    answer = generation(
        codec, "Hi 3", token_ids=tokens, logprobs=scored(tokens), prompt_logprobs=[None, *scored(PROMPT)[1:]]
    )
    echo = codec.decode(PROMPT)
    made = builder(codec, "completion", 2, logprobs=True, prompt_logprobs=True, echoes=[echo] * 2)
    whole = plain(made.full([answer, answer]))
    assert whole.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert whole["object"] == "text_completion"
    assert whole["usage"] == used(4, 2 * len(tokens), 2)
    name = codec.name
    for index, choice in enumerate(whole["choices"]):
        assert choice == {
            "index": index,
            "finish_reason": "stop",
            "text": echo + "Hi 3",
            "logprobs": {
                "tokens": [name(i) for i in [*PROMPT, *tokens]],
                "token_logprobs": [None, -1.5, *(-0.5 - n for n in range(len(tokens)))],
                "top_logprobs": [
                    None,
                    {name(PROMPT[0]): -0.25, name(PROMPT[1]): -1.5},
                    *({name(tokens[0]): -0.25} | {name(i): -0.5 - n} for n, i in enumerate(tokens)),
                ],
                "text_offset": [min(at, len(echo + "Hi 3")) for at in TokenOffsets(codec).push([*PROMPT, *tokens])],
            },
            "prompt_logprobs": of_prompt(codec),
        }


def chunks(made: ResponseBuilder, happened: list[tuple[int, Event]], count: int, **options: Any) -> list[Any]:
    async def events() -> AsyncIterator[tuple[int, Event]]:
        for one in happened:
            yield one

    async def collected() -> list[Any]:
        asked = StreamOptions(**options) if options else None
        return [plain(chunk) async for chunk in made.chunks(events(), count, asked, diffusing=True)]

    return asyncio.run(collected())


def text(token_ids: list[int], parts: list[Delta], logprobs: list[TokenLogprobs] | None = None) -> Text:
    return Text(0, 0.0, "".join(part.text for part in parts), token_ids, logprobs, None, parts)


@pytest.mark.usefixtures("same_ids")
@pytest.mark.parametrize("continuous", [False, True])
def test_a_chat_is_streamed_in_chunks(codec: TextCodec, continuous: bool) -> None:
    ids = codec.encode("Hi 3 4 5")
    values = scored(ids)
    answer = generation(
        codec, "Hi", token_ids=ids, logprobs=values, tool_calls=[ToolCall("f", "{}")], warnings=["w"],
        prompt_logprobs=[None, *scored(PROMPT)[1:]],
    )  # fmt: skip
    block = Step(0, 0.0, 0.0, 1, "denoise", 7, [100, 100], [ids[0], 100], [0.91239, 0.5], [], 0, None, [], [])
    verified = Step(0, 0.0, 0.0, 1, "verify", 7, [], [], [], [], 0, None, [], [])
    made = builder(codec, "chat", 1, logprobs=True, prompt_logprobs=True)
    told = chunks(
        made,
        [
            (0, text(ids[:1], [Delta("reasoning", "Hm.")], values[:1])),
            (0, block),
            (0, verified),
            (0, text(ids[1:3], [Delta("content", "Hi"), Delta("call", "f"), Delta("arguments", "{}")], values[1:3])),
            (0, Finished(0, 0.0, answer, None, None, None)),
        ],
        1,
        include_usage=True,
        continuous_usage_stats=continuous,
    )

    def chunk(delta: dict[str, Any], so_far: int, begin: int = 0, end: int = 0, **more: Any) -> dict[str, Any]:
        counts = {"prompt_tokens": 2, "completion_tokens": so_far, "total_tokens": 2 + so_far}
        logprobs = of_chat(codec, ids[begin:end], begin, ids[0]) if end else None
        choice = {"index": 0, "finish_reason": None, "delta": delta, "logprobs": logprobs}
        usage = {"usage": counts if continuous else None}
        return {**head("chatcmpl", "chat.completion.chunk"), "choices": [choice | more], **usage}

    call = {"index": 0, "id": "call_0", "type": "function", "function": {"name": "f", "arguments": ""}}
    blocks = {
        "kind": "denoise", "position": 7, "tokens": [ids[0], None], "text": [codec.piece(ids[0]), None],
        "confidence": [0.9124, 0.5],
    }  # fmt: skip
    end = {"prompt_logprobs": of_prompt(codec), "warnings": ["w"]}
    assert told == [
        chunk({"role": "assistant", "content": ""}, 0),
        chunk({"reasoning": "Hm.", "reasoning_content": "Hm."}, 1, 0, 1),
        chunk({}, 1) | {"diffusing": blocks},
        chunk({"content": "Hi"}, 3, 1, 3),
        chunk({"tool_calls": [call]}, 3),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}, 3),
        chunk({}, len(ids), 3, len(ids), finish_reason="tool_calls") | end,
        {**head("chatcmpl", "chat.completion.chunk"), "choices": [], "usage": used(2, len(ids), 1)},
    ]


def test_completions_are_streamed_in_chunks(codec: TextCodec) -> None:
    ids = codec.encode("Hi")
    answer = generation(codec, "Hi", token_ids=ids, prompt_logprobs=[None, *scored(PROMPT)[1:]])
    made = builder(codec, "completion", 2, answers=2, echoes=["P"] * 2, prompt_logprobs=True)
    happened: list[tuple[int, Event]] = []
    for index in (1, 0):
        content = text(ids, [Delta("content", "Hi")])
        happened += [(index, content), (index, Finished(0, 0.0, answer, None, None, None))]
    told = chunks(made, happened, 2)

    def chunk(index: int, said: str, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "finish_reason": reason, "text": said, "logprobs": None}
        more = {"prompt_logprobs": of_prompt(codec)} if reason else {}
        return {**head("cmpl", "text_completion"), "choices": [choice | more]}

    assert told == [chunk(i, *end) for i in (1, 0) for end in (("P",), ("Hi",), ("", "stop"))]


def test_further_answers_have_further_seeds() -> None:
    """Up to the largest, after which comes 0."""
    last = 2**64 - 1
    seeds = [(prompt, options["seed"]) for prompt, options in _choices(["a", "b"], {"seed": last}, 3)]
    assert seeds == [(prompt, seed) for prompt in "ab" for seed in (last, 0, 1)]
    assert _choices(["a"], {"seed": 2**63}, 2)[1] == ("a", {"seed": 2**63 + 1})
    assert _choices(["a"], {}, 2) == [("a", {})] * 2


def test_a_filled_hole_is_a_completion_and_a_message(codec: TextCodec) -> None:
    made = builder(codec, "completion", 0)
    for stream, name in ((False, "message"), (True, "delta")):
        said = {name: {"role": "assistant", "content": "b"}}
        choice = {"index": 0, "text": "b", "finish_reason": "stop", "logprobs": None, **said}
        expected = {**head("cmpl", "text_completion"), "choices": [choice], "usage": {"n": 1}}
        assert made.infill("b", {"n": 1}, [], stream=stream) == expected
        assert made.infill("b", {"n": 1}, ["w"], stream=stream) == expected | {"warnings": ["w"]}


@pytest.mark.parametrize(
    ("arguments", "reason", "stop", "told"),
    [
        (["{}"], "stop", None, "tool_calls"),
        (["{}", '{"a'], "stop", None, "tool_calls"),  # which the model has ended itself
        (["{}", '{"a'], "stop", "x", "stop"),
        (['{"a', "{}"], "stop", "x", "tool_calls"),
        (["{}"], "length", None, "length"),
        ([], "stop", "x", "stop"),
    ],
)
def test_an_answer_ends_for_its_calls(
    codec: TextCodec, arguments: list[str], reason: str, stop: str | None, told: str
) -> None:
    calls = [ToolCall("f", text) for text in arguments]
    assert finish_reason(generation(codec, "", tool_calls=calls, finish_reason=reason, stop_text=stop)) == told


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"max_tokens": 5, "stop": "x", "threshold": 0.5}, {"max_new_tokens": 5, "stop": "x", "threshold": 0.5}),
        ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": -1}, {"max_new_tokens": 5}),
        ({"max_tokens": -1, "max_completion_tokens": 1}, {"max_new_tokens": 1}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"prompt_logprobs": 1, "thinking_budget": 7}, {"prompt_logprobs": 1, "thinking_budget": 7}),
        ({"stop_in_thinking": False, "thinking": True}, {"stop_in_thinking": False, "thinking": True}),
        ({"stream": True, "stream_options": {"include_usage": True}, "diffusing": True}, {}),
        ({"reasoning_effort": "none"}, {"thinking": False, "chat_template_kwargs": {"reasoning_effort": "none"}}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"thinking": True}),
        ({"chat_template_kwargs": {"a": 1}}, {"chat_template_kwargs": {"a": 1}}),
        ({"messages": [{"role": "assistant", "content": "a", "prefix": True}]}, {"continue_final_message": True}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}}, {"json_schema": {"a": 1}}),
        ({"response_format": {"type": "regex", "regex": "a+"}}, {"regex": "a+"}),
        ({"guided_grammar": "start: A"}, {"grammar": "start: A"}),
    ],
)  # fmt: skip
def test_fields_of_a_chat_are_options(fields: dict[str, Any], options: dict[str, Any]) -> None:
    assert Chat.model_validate(ASKED | fields).options() == options


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"logprobs": 2}, {"logprobs": 2}),
        ({"logprobs": 2, "max_tokens": 0}, {"max_new_tokens": 0}),
        ({"logprobs": 2, "max_tokens": 1, "echo": True}, {"max_new_tokens": 1, "logprobs": 2, "prompt_logprobs": 2}),
        ({"max_tokens": 0, "echo": True}, {"max_new_tokens": 0, "prompt_logprobs": 0}),
        ({"max_tokens": 1, "echo": True}, {"max_new_tokens": 1}),
        ({"logprobs": 2, "prompt_logprobs": 1}, {"logprobs": 2, "prompt_logprobs": 1}),
    ],
)
def test_fields_of_a_completion_are_options(fields: dict[str, Any], options: dict[str, Any]) -> None:
    assert Completion.model_validate({"prompt": "a"} | fields).options() == {"chat": False, **options}


@pytest.mark.parametrize(
    ("body", "option", "field"),
    [
        (Chat.model_validate(ASKED), "max_new_tokens", "max_tokens"),
        (Chat.model_validate(ASKED | {"max_completion_tokens": 5}), "max_new_tokens", "max_completion_tokens"),
        (Chat.model_validate(ASKED | {"max_completion_tokens": -1}), "max_new_tokens", "max_tokens"),
        (Chat.model_validate(ASKED | {"logprobs": True, "top_logprobs": 9}), "logprobs", "top_logprobs"),
        (Chat.model_validate(ASKED | {"guided_regex": "a"}), "regex", "guided_regex"),
        (Completion(prompt="a", echo=True, logprobs=1), "prompt_logprobs", "logprobs"),
        (Completion(prompt="a", logprobs=1), "prompt_logprobs", "prompt_logprobs"),
        (Completion(prompt="a", echo=True, prompt_logprobs=1), "prompt_logprobs", "prompt_logprobs"),
        (Responses(input="a"), "max_new_tokens", "max_output_tokens"),
        (Responses(input="a"), "json_schema", "text.format"),
        (Responses(input="a", top_logprobs=9), "logprobs", "top_logprobs"),
        (Messages.model_validate(ASKED | {"max_tokens": 5}), "json_schema", "output_config.format"),
    ],
)
def test_a_refusal_names_the_field_that_was_given(body: Decoding, option: str, field: str) -> None:
    with pytest.raises(RequestError, match=rf"^{field} is 5, allowed"), body.own_words():
        raise RequestError(f"{option} is 5, allowed: 4")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"stream_options": {}}, "stream_options needs stream"),
        ({"diffusing": True}, "diffusing needs stream"),
        ({"top_logprobs": 1}, "top_logprobs needs logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens and max_completion_tokens differ"),
        ({"add_generation_prompt": False}, "add_generation_prompt is false"),
        ({"response_format": {"type": "regex"}}, "response_format has no regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format has no json_schema"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex and guided_choice are both given"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"n": 129}, "less than or equal to 128"),
        ({"guided_choice": []}, "at least 1 item"),
        ({"messages": []}, "at least 1 item"),
        ({"best_of": 2}, "best_of"),
        ({"function_call": {"name": "f"}}, "give tools, tool_choice and tool_calls instead"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises((RequestError, ValidationError), match=problem):
        Chat.model_validate(ASKED | fields).options()
