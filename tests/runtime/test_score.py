"""Scores are the model's own probabilities: in every mode, batched or not, whatever is reused, wherever chunks end."""

from __future__ import annotations

import dataclasses
from typing import Any

import equality
import numpy as np
import pytest
from oracle import reference
from stand_ins.chats import chat_ids

import nemodiff
from nemodiff.runtime.requests import token_logprobs

QUESTIONS = equality.questions(20)
ANSWERS = ["3, 4, 5, 6, 7, 8, 9.", "3, 4, 5, 6, 7, 9.", "Hello", "é€𝄞"]


def expected(oracle: reference.ReferenceModel, ids: list[int]) -> np.ndarray:
    """Log-probabilities of what follows each token of a text, (n, V) f64, by the independent implementation."""
    logits = oracle.logits([], ids, False).astype(np.float64)
    logits[:, oracle.mask_id] = -np.inf
    return np.asarray(
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


def prompt_of(engine: nemodiff.LoadedEngine, question: str) -> list[int]:
    return chat_ids(engine.text, [{"role": "user", "content": question}])


@pytest.mark.parametrize(("rows", "chat"), [(1, True), (3, False)])
def test_scores_are_the_models_own(
    engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel, rows: int, chat: bool
) -> None:
    question = "Count from 3 to 9."
    prompt = prompt_of(engine, question) if chat else engine.text.encode(question)
    continuations: list[Any] = [*ANSWERS, [11], [150, 11, 2]]
    scores = nemodiff.score(engine, question, continuations, chat=chat, top=3, rows=rows)
    for continuation, score in zip(continuations, scores, strict=True):
        ids = engine.text.encode_plain(continuation) if isinstance(continuation, str) else continuation
        assert score.token_ids == ids
        after = expected(oracle, prompt + ids)[len(prompt) - 1 : -1]
        own = after[np.arange(len(ids)), ids]
        np.testing.assert_allclose([one.logprob for one in score.logprobs], own, atol=1e-3)
        assert score.logprob == pytest.approx(own.sum(), abs=1e-2)
        for one, row, token in zip(score.logprobs, after, ids, strict=True):
            assert one.rank == 1 + int((row > row[token]).sum())
            np.testing.assert_allclose([p for _, p in one.top], np.sort(row)[::-1][:3], atol=1e-3)
        assert score.greedy == bool((after.argmax(1) == ids).all())


def test_what_ar_says_is_greedy_and_nothing_else(engine: nemodiff.LoadedEngine) -> None:
    for question in QUESTIONS[:5]:
        said = nemodiff.generate(engine, question, mode="ar", logprobs=0, max_new_tokens=24)
        assert said.logprobs is not None
        first, *others = nemodiff.score(engine, question, [said.token_ids, [*said.token_ids[:-1], 150], [150]])
        assert first.greedy
        assert [one.logprob for one in first.logprobs] == pytest.approx(
            [one.logprob for one in said.logprobs], abs=1e-3
        )
        assert not any(score.greedy for score in others)


def test_a_prompt_is_forwarded_once_for_all_its_continuations(engine: nemodiff.LoadedEngine) -> None:
    prompt = (prompt_of(engine, QUESTIONS[0]) * 5)[:100]
    tokens: list[int] = []

    class Counting:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def forward(self, passes: Any, first: int = 0) -> Any:
            tokens.extend(p.ids.size for p in passes)
            return self.inner.forward(passes, first)

    class Backend(Counting):
        def open(self, rows: int) -> Any:
            return Counting(self.inner.open(rows))

    counted = dataclasses.replace(engine, backend=Backend(engine.backend))
    assert counted.cost.curve  # measured by forwards, once
    continuations: list[Any] = [[150, 151, 152], [160, 161], [150, 151, 153]]
    alone = [nemodiff.score(engine, prompt, [one])[0] for one in continuations]
    for rows in (1, 3):
        tokens.clear()
        together = nemodiff.score(counted, prompt, continuations, rows=rows)
        # The prompt without its last token, then that and all but the last token of each; one may lend its beginning.
        assert 99 + 3 + 2 + 1 <= sum(tokens) <= 99 + 3 + 2 + 3
        for one, other in zip(together, alone, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert (one.greedy, one.token_ids) == (other.greedy, other.token_ids)


@pytest.mark.parametrize("mode", [*nemodiff.MODES, "auto"])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_prompt_logprobs_in_every_mode_change_no_token(
    engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel, mode: str, chunk: int
) -> None:
    prompt = prompt_of(engine, QUESTIONS[1])
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 20, "prefill_chunk": chunk}
    plain = nemodiff.generate(engine, prompt, **options)
    answer = nemodiff.generate(engine, prompt, prompt_logprobs=2, **options)
    assert answer.token_ids == plain.token_ids
    assert plain.prompt_logprobs is None
    assert "prompt_logprobs" not in plain.as_dict()
    assert answer.prompt_logprobs is not None
    assert answer.prompt_logprobs[0] is None
    own = expected(oracle, prompt)[np.arange(len(prompt) - 1), prompt[1:]]
    got = [one.logprob for one in answer.prompt_logprobs[1:] if one is not None]
    np.testing.assert_allclose(got, own, atol=1e-3)
    assert answer.nfe["prefill"] >= -(-(len(prompt) - 1) // chunk)
    only = nemodiff.generate(engine, prompt, prompt_logprobs=2, **options | {"max_new_tokens": 0})
    assert (only.text, only.token_ids, only.finish_reason) == ("", [], "length")
    assert only.prompt_logprobs == answer.prompt_logprobs
    assert sum(only.nfe.values()) == -(-(len(prompt) - 1) // chunk)


def test_long_texts_are_scored_in_chunks_of_few_logits(
    engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_logprobs, "_LOGITS", 1)  # 16 tokens are the least
    prompt = (prompt_of(engine, QUESTIONS[2]) * 4)[:70]
    only = nemodiff.generate(engine, prompt, prompt_logprobs=0, max_new_tokens=0)
    assert only.nfe["prefill"] == 5
    assert only.prompt_logprobs is not None
    own = expected(oracle, prompt)[np.arange(69), prompt[1:]]
    np.testing.assert_allclose([one.logprob for one in only.prompt_logprobs if one is not None], own, atol=1e-3)


def test_scoring_shares_a_scheduler_with_other_requests(engine: nemodiff.LoadedEngine) -> None:
    prompt = (prompt_of(engine, QUESTIONS[3]) * 3)[:60]
    alone = nemodiff.generate(engine, prompt, prompt_logprobs=1, max_new_tokens=5)
    with nemodiff.Scheduler(engine, rows=3, prefill_tokens=16) as scheduler:
        for _ in range(2):  # the second time the prompt's beginning is kept, and may not be used
            handles = [scheduler.submit(question, max_new_tokens=20) for question in QUESTIONS[:4]]
            scored = scheduler.submit(prompt, prompt_logprobs=1, max_new_tokens=5)
            bare = scheduler.submit(prompt, prompt_logprobs=1, max_new_tokens=0)
            for question, handle in zip(QUESTIONS, handles, strict=False):
                assert handle.result().token_ids == nemodiff.generate(engine, question, max_new_tokens=20).token_ids
            assert scored.result().token_ids == alone.token_ids
            for got in (scored.result(), bare.result()):
                assert got.reused_tokens == 0
                assert alone.prompt_logprobs is not None
                assert got.prompt_logprobs is not None
                for one, other in zip(got.prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True):
                    assert one is not None
                    assert other is not None
                    assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_cancelled_prompt_has_the_logprobs_that_it_got(engine: nemodiff.LoadedEngine) -> None:
    prompt = (prompt_of(engine, QUESTIONS[3]) * 200)[:5000]
    with nemodiff.Scheduler(engine, rows=1, prefill_tokens=16) as scheduler:
        running = scheduler.submit(prompt, steps=True, prompt_logprobs=0, max_new_tokens=1)
        waiting = scheduler.submit(prompt, prompt_logprobs=0, max_new_tokens=1)
        steps = (event for event in running if isinstance(event, nemodiff.Step))
        next(steps)
        next(steps)
        for handle, least in ((waiting, 0), (running, 32)):
            handle.cancel()
            answer = handle.result()
            assert answer.finish_reason == "cancelled"
            assert answer.prompt_logprobs is not None
            assert len(answer.prompt_logprobs) == len(prompt)
            scored = sum(one is not None for one in answer.prompt_logprobs)
            assert least <= scored < len(prompt) - 1
            assert None not in answer.prompt_logprobs[1 : scored + 1]


@pytest.mark.parametrize("rows", [1, 2])  # the second answer comes after the first, or beside it
def test_answers_to_one_prompt_share_its_logprobs(engine: nemodiff.LoadedEngine, rows: int) -> None:
    options = {"prompt_logprobs": 2, "max_new_tokens": 3, "temperature": 1.0}
    prompt = [130 + i % 50 for i in range(90)]
    alone = nemodiff.generate(engine, prompt, **options, prefill_chunk=32)
    with nemodiff.Scheduler(engine, rows=rows) as scheduler:
        requests = [(prompt, {**options, "seed": seed, "prefill_chunk": 32}) for seed in range(3)]
        handles = scheduler.submit_many(requests)
        told = [handle.result().prompt_logprobs or [] for handle in handles]
    assert [[one and one.rank for one in each] for each in told] == [
        [one and one.rank for one in alone.prompt_logprobs or []]
    ] * 3
    assert {tuple(map(id, each)) for each in told} == {tuple(map(id, told[0]))}


def test_a_prompt_of_one_token_has_no_logprobs_but_an_end(engine: nemodiff.LoadedEngine) -> None:
    only = nemodiff.generate(engine, [150], prompt_logprobs=3, max_new_tokens=0)
    assert (only.prompt_logprobs, only.token_ids, only.nfe["prefill"]) == ([None], [], 1)
    assert nemodiff.score(engine, [150], [[151]])[0].token_ids == [151]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("x", "ab"), "continuations is 'ab', allowed: a list"),  # and not one of a letter each
        (("x", [""]), "a continuation is empty"),
        (("x", [[]]), "a continuation is empty"),
        (("x", [[True]]), "continuation is \\[True\\], allowed: text or a list of token ids"),
        (("x", [3]), "continuation is 3"),
        (("x", [[891]]), "token id 891, allowed: 0 to 890"),
        (("x", [[100]]), "token id 100, the mask"),
        (("x", ["\ud800"]), "continuation: not UTF-8"),
        (([], ["x"]), "the prompt is empty"),
        (("x", [[150] * 40000]), "context length is 32768 .max_seq_len"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    engine: nemodiff.LoadedEngine, arguments: tuple[Any, Any], fragment: str
) -> None:
    with pytest.raises(nemodiff.RequestError, match=fragment):
        nemodiff.score(engine, *arguments)


@pytest.mark.parametrize("pair", ["ab", ("x",), ("x", "y", "z"), 5, None])  # and no text is one of a letter each
def test_what_is_no_pair_is_refused(engine: nemodiff.LoadedEngine, pair: Any) -> None:
    scores = nemodiff.score_many(engine, [("x", "y"), pair])
    with pytest.raises(nemodiff.RequestError, match=r"^a pair is .*, allowed: a prompt and a continuation$"):
        list(scores)


def test_a_limit_of_nothing_needs_something_to_score(engine: nemodiff.LoadedEngine) -> None:
    with pytest.raises(nemodiff.RequestError, match="max_new_tokens is 0, allowed: 1 or more, and 0 with"):
        nemodiff.generate(engine, "x", max_new_tokens=0)
    with pytest.raises(nemodiff.RequestError, match="rows is 9, allowed: 1 to 8"):
        nemodiff.score(engine, "x", ["y"], rows=9)
    with pytest.raises(nemodiff.RequestError, match="prompts is 'Hi', allowed: a list of prompts"):
        nemodiff.generate_many(engine, "Hi")
    with pytest.raises(nemodiff.RequestError, match=r"^top is 101, allowed: 0 to 100"):
        nemodiff.score(engine, "x", ["y"], top=101)


@pytest.mark.parametrize("many", [None, 5, b"Hi", "Hi", {"role": "user", "content": "Hi"}])
def test_what_is_no_list_is_refused(engine: nemodiff.LoadedEngine, many: Any) -> None:
    doors = {
        "prompts": lambda: nemodiff.events(engine, many),
        "continuations": lambda: nemodiff.score(engine, "Hi", many),
        "pairs": lambda: list(nemodiff.score_many(engine, many)),
        "requests": lambda: scheduler.submit_many(many),
        "template": lambda: nemodiff.fill(engine, many),
    }
    with nemodiff.Scheduler(engine) as scheduler:
        for name, door in doors.items():
            with pytest.raises(nemodiff.RequestError, match=f"^{name} is .*, allowed: a list of "):
                door()


@pytest.mark.parametrize("top", [None, True, "5", 1.5])
def test_what_is_no_number_of_neighbours_is_refused(engine: nemodiff.LoadedEngine, top: Any) -> None:
    with pytest.raises(nemodiff.RequestError, match=r"^top is .*, allowed: 0 to 100$"):
        nemodiff.score(engine, "x", ["y"], top=top)
