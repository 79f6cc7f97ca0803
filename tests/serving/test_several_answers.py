"""Requests for several answers: they are taken all or none, and what can never be taken disturbs nobody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from stand_ins.http_server import Served, serving

CHAT = "/v1/chat/completions"
FILLS = "nemodiff_fills_total"
LONG = {"prompt": "Once upon a time", "max_tokens": 20_000, "min_tokens": 20_000, "mode": "ar", "stream": True}
MESSAGES = [{"role": "user", "content": "Count from 3 to 9."}]


@pytest.fixture(scope="module")
def server(tiny_engine: Path) -> Iterator[Served]:
    with serving(tiny_engine, "--rows", "2", "--max-queue", "3") as served:
        yield served


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        (CHAT, {"messages": MESSAGES, "n": 6}, 6),
        (CHAT, {"messages": MESSAGES, "n": 128, "stream": True}, 128),
        ("/v1/completions", {"prompt": "x", "n": 6}, 6),
        ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2}, 6),
        ("/v1/completions", {"prompt": [[200]] * 70}, 70),
    ],
)
def test_more_than_can_ever_fit_is_a_wrong_request(server: Served, path: str, body: dict[str, Any], count: int) -> None:
    before = server.settled()
    status, headers, content = server.send(path, body)
    assert status == 400, content
    assert "retry-after" not in headers
    message = json.loads(content)["error"]["message"]
    assert message.startswith(f"{count} answers are asked for at once, allowed: 5 (2 that run and 3 that wait); ")
    after = server.metrics()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert grown == {'nemodiff_refused_requests_total{status="400"}': 1}


def test_answers_that_can_never_fit_take_no_memory(server: Served) -> None:
    def most_memory() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10

    server.send("/v1/completions", {"prompt": "x", "n": 6})
    before = most_memory()
    status, _, content = server.send("/v1/completions", {"prompt": ["x"] * 5_000, "n": 128, "temperature": 1.0})
    assert (status, b"640000 answers are asked for at once" in content) == (400, True)
    assert most_memory() - before < 64 << 20


@pytest.mark.parametrize(
    ("path", "body", "same"),
    [
        (CHAT, {"messages": MESSAGES}, [(None, 1), (1, 1), (2, 2), (3, 3)]),
        ("/v1/completions", {"prompt": ["Count", "Sort these"]}, [(None, 1), (2, 2)]),
        ("/v1/completions", {"prompt": "Count", "suffix": "9"}, [(None, 1), (1, 1)]),
        ("/v1/fim/completions", {"prompt": "Count", "suffix": "9"}, [(None, 1)]),
        ("/v1/messages", {"messages": MESSAGES}, [(None, 1)]),
    ],
)
def test_as_many_answers_as_are_given_may_be_chosen_among(
    server: Served, path: str, body: dict[str, Any], same: list[tuple[int | None, int]]
) -> None:
    """Of a `best_of` over n the likeliest answers would have to be found."""
    body = {**body, "max_tokens": 3}
    for n, best_of in same:
        plain, asked = (server.ask(path, {**body, "n": n, **chosen}) for chosen in ({}, {"best_of": best_of}))
        part = "content" if path == "/v1/messages" else "choices"
        assert asked[part] == plain[part]
        for wrong in (best_of + 1, 0, 7.5, "1", {}):
            status, _, content = server.send(path, {**body, "n": n, "best_of": wrong})
            message = f"best_of is {wrong!r}, allowed: as many as n, the answers; leave it out"
            error = json.loads(content)["error"]
            assert (status, error["message"], error["param"]) == (400, message, "best_of")


@pytest.mark.parametrize(
    ("body", "place", "message"),
    [
        ({"prompt": ["a", ""]}, "prompt.1", "prompt.1 is empty; "),
        ({"prompt": ["a", "\ud800"], "n": 2}, "prompt.1", "prompt.1: not UTF-8 text at character 0; "),
        ({"prompt": [[200], [200], [100]]}, "prompt.2", "prompt.2 holds token id 100, the mask, "),
        ({"prompt": [[200], [200] * 40_000]}, "prompt.1", "prompt.1 is too long: 40000 tokens > "),
        ({"prompt": ["a", "b" * 400_000], "max_tokens": 4}, "prompt.1", "prompt.1 is too long: at least "),
        ({"prompt": [[200], [200] * 9], "max_tokens": 32_767}, "prompt.1", "prompt.1 has 9 tokens and max_tokens is "),
        ({"prompt": ["a", 5]}, "prompt.1", "prompt.1: Input should be a valid string, got 5; "),
        ({"prompt": ["a", None]}, "prompt.1", "prompt.1: Input should be a valid string, got None; "),
        ({"prompt": [[200], "a"]}, "prompt.1", "prompt.1: Input should be a valid list, got 'a'; "),
        ({"prompt": [[200], [200, -1]]}, "prompt.1.1", "prompt.1.1: Input should be greater than or equal to 0, "),
        ({"prompt": [200, "a"]}, "prompt.1", "prompt.1: Input should be a valid integer, got 'a'; "),
        ({"prompt": ["a", "b"], "temperature": -1}, "temperature", "temperature is -1.0, allowed: "),
        ({"prompt": [""]}, "prompt.0", "prompt.0 is empty; "),
        ({"prompt": []}, None, "the prompt is empty; "),
    ],
)
def test_of_several_prompts_the_wrong_one_is_named(
    server: Served, body: dict[str, Any], place: str | None, message: str
) -> None:
    status, _, content = server.send("/v1/completions", body)
    error = json.loads(content)["error"]
    assert (status, error["param"]) == (400, place)
    assert error["message"].startswith(message)


def test_what_does_not_fit_now_takes_no_place(server: Served) -> None:
    running = server.connect()
    running.request("POST", "/v1/completions", json.dumps(LONG), {"Content-Type": "application/json"})
    answer = running.getresponse()
    assert answer.read(200)
    status, headers, content = server.send(CHAT, {"messages": MESSAGES, "n": 5})
    assert (status, headers["retry-after"]) == (429, "1")
    assert "1 request running or waiting, and 5 more are asked for" in json.loads(content)["error"]["message"]
    values = server.metrics()
    assert values["nemodiff_requests_running"] + values["nemodiff_requests_waiting"] == 1
    fitting = server.ask(CHAT, {"messages": MESSAGES, "n": 4, "max_tokens": 3})
    assert len(fitting["choices"]) == 4
    running.close()
    answer.close()
    server.settled()


@pytest.mark.parametrize(("path", "mode"), [(CHAT, "linear_spec"), ("/v1/completions", "ar")])
def test_each_chunk_counts_its_answer_so_far(server: Served, path: str, mode: str) -> None:
    asked = {"messages": MESSAGES} if path == CHAT else {"prompt": ["Count from", "Sort these: b, a."]}
    body = {**asked, "mode": mode, "max_tokens": 30, "n": 2, "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = server.stream(path, {**body, "stream_options": options})
    counts = dict[int, list[int]]()
    prompts = dict[int, int]()
    for chunk in chunks:
        (choice,), usage = chunk["choices"], chunk["usage"]
        assert set(usage) == {"prompt_tokens", "completion_tokens", "total_tokens"}
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert prompts.setdefault(choice["index"], usage["prompt_tokens"]) == usage["prompt_tokens"]
        counts.setdefault(choice["index"], []).append(usage["completion_tokens"])
    assert all(sorted(each) == each for each in counts.values())
    assert len({*counts[0]}) > 1
    assert sum(each[-1] for each in counts.values()) == last["usage"]["completion_tokens"]
    assert sum(prompts.values()) == 2 * last["usage"]["prompt_tokens"]
    alone = {"continuous_usage_stats": True}
    assert not any("usage" in chunk for chunk in server.stream(path, {**body, "stream_options": alone}))


def test_a_prompt_is_counted_once_for_all_its_answers(server: Served) -> None:
    one = server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 3})["usage"]
    body = {"messages": MESSAGES, "max_tokens": 3, "n": 3}
    chunks = server.stream(CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    for usage in (server.ask(CHAT, body)["usage"], chunks[-1]["usage"]):
        assert usage["prompt_tokens"] == one["prompt_tokens"]
        assert usage["completion_tokens"] == 3 * one["completion_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    alone = [server.ask("/v1/completions", {"prompt": p, "max_tokens": 2})["usage"] for p in ("Count", "Sort these")]
    both = server.ask("/v1/completions", {"prompt": ["Count", "Sort these"], "n": 2, "max_tokens": 2})["usage"]
    assert both["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in alone)
    assert both["completion_tokens"] == 8


def test_the_seed_after_the_last_one_is_0(server: Served) -> None:
    body = {"prompt": "Count", "temperature": 3.0, "max_tokens": 12}
    both = server.ask("/v1/completions", {**body, "seed": 2**64 - 1, "n": 2})["choices"]
    assert both[1]["text"] == server.ask("/v1/completions", {**body, "seed": 0})["choices"][0]["text"]


def test_a_client_that_leaves_a_hole_leaves_no_trace(tiny_engine: Path) -> None:
    body = json.dumps({"prompt": "def add(a, b):", "suffix": " a + b", "length": 60, "width": 64})
    with serving(tiny_engine, "--max-queue", "3") as served:
        for _ in range(4):
            connection = served.connect()
            connection.request("POST", "/v1/fim/completions", body, {"Content-Type": "application/json"})
            connection.close()
        eventually(lambda: sum(value for name, value in served.metrics().items() if name.startswith(FILLS)) == 4)
        assert served.metrics()[f'{FILLS}{{end="failed"}}'] == 0
        assert served.send("/v1/fim/completions", {"prompt": "a", "suffix": "b", "max_tokens": 1})[0] == 200
        served.process.terminate()
        assert served.process.wait(60) == 0
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""
