"""Stopping, budgets, logprobs, structured output and policies of diffusion, each in every mode that takes it.

That the tokens are right is for tests/runtime/test_sampling.py. A hot temperature makes good tests, since an obedient
model hides faults.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import equality
import equality_sampled
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import reference
from stand_ins.chats import chat_ids

import nemodiff
from nemodiff.runtime.requests.options import OPTIONS, Options, make_options
from nemodiff.runtime.requests.prepare import prepare
from nemodiff.runtime.requests.settings import settle
from nemodiff.runtime.sampling.commit import Policy
from nemodiff.runtime.sampling.softmax import entropies, probability

QUESTIONS = equality.questions(30)
CAUSAL = ("ar", "linear_spec", "quadratic_spec")
SCHEMA, REGEX = equality_sampled.SCHEMA, equality_sampled.REGEX


@pytest.mark.parametrize("mode", nemodiff.MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_id_ends_the_answer_and_is_not_in_its_text(
    engine: nemodiff.LoadedEngine, mode: str, temperature: float
) -> None:
    options = {"mode": mode, "temperature": temperature, "block_length": 8}
    whole = nemodiff.generate(engine, "Count from 3 to 9.", **options)
    stop = whole.token_ids[len(whole.token_ids) // 2]
    answer = nemodiff.generate(engine, "Count from 3 to 9.", stop_token_ids=[stop, 890], **options)
    at = whole.token_ids.index(stop)
    assert answer.token_ids == whole.token_ids[: at + 1]
    assert answer.finish_reason == "stop"
    assert answer.text == engine.text.decode(whole.token_ids[:at])
    events = nemodiff.stream(engine, "Count from 3 to 9.", stop_token_ids=[stop, 890], **options)
    assert "".join(e.text for e in events if isinstance(e, nemodiff.Text)) == answer.text


def test_the_mask_as_a_stop_id_changes_nothing(engine: nemodiff.LoadedEngine) -> None:
    """It is never chosen, but it stands in blocks, where the first stop id closes what comes after it."""
    question, mask = "Sort these numbers: 41, 7, 93.", engine.info.model.mask_id
    plain = nemodiff.generate(engine, question, mode="diffusion")
    answer = nemodiff.generate(engine, question, mode="diffusion", stop_token_ids=[mask])
    assert (answer.token_ids, answer.nfe) == (plain.token_ids, plain.nfe)


@pytest.mark.parametrize("mode", nemodiff.MODES)
@pytest.mark.parametrize("block", [3, 32])
def test_min_tokens_forbids_an_early_end(engine: nemodiff.LoadedEngine, mode: str, block: int) -> None:
    short = nemodiff.generate(engine, "Count from 3 to 5.", mode=mode, block_length=block)
    least = len(short.token_ids) + 7
    options = {"mode": mode, "block_length": block, "min_tokens": least, "max_new_tokens": least + 20}
    answer = nemodiff.generate(engine, "Count from 3 to 5.", **options)
    assert short.finish_reason == "stop"
    assert len(answer.token_ids) > least
    assert not set(answer.token_ids[:least]) & set(engine.info.model.eos_ids)


def test_a_stop_string_ends_an_answer_before_min_tokens(engine: nemodiff.LoadedEngine) -> None:
    answer = nemodiff.generate(engine, "Count from 3 to 9.", stop=[", 5"], min_tokens=30)
    assert (answer.text, answer.finish_reason) == ("3, 4", "stop")
    assert "stop token id" in OPTIONS["min_tokens"].help.text  # what alone is held back


@pytest.mark.parametrize("mode", nemodiff.MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_words_are_never_completed(engine: nemodiff.LoadedEngine, mode: str, temperature: float) -> None:
    options: dict[str, Any] = {"mode": mode, "temperature": temperature}
    if mode == "diffusion":
        options["policy"] = "left_to_right"
    question, words = "Write JSON for Emil, age 31, from Oslo, who owns a yak.", ["Oslo", '"city"']
    spelled = [engine.text.encode_plain(space + word) for word in words for space in ("", " ")]

    def holds(ids: list[int]) -> bool:
        return any(ids[i : i + len(word)] == word for word in spelled for i in range(len(ids)))

    assert holds(nemodiff.generate(engine, question, **options).token_ids)
    assert not holds(nemodiff.generate(engine, question, bad_words=words, **options).token_ids)


@pytest.mark.parametrize("mode", nemodiff.MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("budget", [0, 1, 6, 20])
def test_thinking_ends_with_its_budget(
    engine: nemodiff.LoadedEngine, mode: str, temperature: float, budget: int
) -> None:
    end, question = engine.text.end_think, QUESTIONS[budget]
    options = {"mode": mode, "temperature": temperature, "thinking": True, "max_new_tokens": 40, "block_length": 8}
    answer = nemodiff.generate(engine, question, thinking_budget=budget, **options)
    if len(answer.token_ids) > budget:
        assert end in answer.token_ids[: budget + 1]
        assert "</think>" in answer.text
    if mode != "diffusion":
        free = nemodiff.generate(engine, question, **options)
        assert answer.token_ids[:budget] == free.token_ids[:budget]
    # A budget that is never used up changes nothing.
    unused = nemodiff.generate(engine, question, thinking_budget=1000, **options)
    assert unused.token_ids == nemodiff.generate(engine, question, **options).token_ids


@pytest.mark.parametrize("mode", CAUSAL)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_k": 3, "repetition_penalty": 1.2}])
def test_logprobs_are_the_models_own(
    engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel, mode: str, params: dict[str, Any]
) -> None:
    prompt = chat_ids(engine.text, [{"role": "user", "content": QUESTIONS[3]}])
    answer = nemodiff.generate(engine, prompt, mode=mode, logprobs=4, max_new_tokens=30, **params)
    assert answer.token_ids == nemodiff.generate(engine, prompt, mode=mode, max_new_tokens=30, **params).token_ids
    assert answer.logprobs is not None
    logits = oracle.logits(prompt[:-1], [prompt[-1], *answer.token_ids[:-1]], False).astype(np.float64)
    logits[:, oracle.mask_id] = -np.inf
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for position, token, got in zip(expected, answer.token_ids, answer.logprobs, strict=True):
        assert got.logprob == pytest.approx(position[token], abs=1e-3)
        np.testing.assert_allclose([p for _, p in got.top], np.sort(position)[::-1][:4], atol=1e-3)
        np.testing.assert_allclose([position[i] for i, _ in got.top], [p for _, p in got.top], atol=1e-3)
    assert "logprobs" not in nemodiff.generate(engine, prompt, mode=mode, max_new_tokens=2).as_dict()
    none = nemodiff.generate(engine, prompt, mode=mode, max_new_tokens=2, logprobs=0)
    assert [entry["top"] for entry in none.as_dict()["logprobs"]] == [[], []]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"policy": "topk", "per_step": 2}])
def test_confidences_are_those_of_the_passes(engine: nemodiff.LoadedEngine, params: dict[str, Any]) -> None:
    options = {"mode": "diffusion", "block_length": 8, "max_new_tokens": 30, **params}
    answer = nemodiff.generate(engine, QUESTIONS[4], confidences=True, **options)
    assert answer.confidences is not None
    *events, plain = nemodiff.stream(engine, QUESTIONS[4], steps=True, **options)
    assert isinstance(plain, nemodiff.Generation)
    assert (answer.token_ids, answer.nfe) == (plain.token_ids, plain.nfe)
    assert "confidences" not in plain.as_dict()
    steps = [e for e in events if isinstance(e, nemodiff.Step) and e.kind == "denoise"]
    committed = dict[int, float]()
    for step in steps:
        for i, (before, after, confidence) in enumerate(zip(step.before, step.after, step.confidence, strict=True)):
            if before != after:
                committed[step.start + i] = confidence
    compared = 0
    for i, confidence in enumerate(answer.confidences):
        assert confidence is not None
        assert 0 < confidence < 1.0001
        if i % 8 and params == {}:  # not a seed; sampled, a step tells the best token's confidence where none is needed
            assert confidence == committed[answer.prompt_tokens + i]
            compared += 1
    assert len(answer.confidences) == len(answer.token_ids)
    assert params or compared > 8


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.7}, {"thinking": True, "thinking_budget": 1, "temperature": 0.7}]
)
@pytest.mark.parametrize("merge", [False, True])
def test_events_tell_every_decision_with_its_confidence(
    engine: nemodiff.LoadedEngine, params: dict[str, Any], merge: bool
) -> None:
    """Also where a pass commits one block and begins the next; only a token that no pass chose has no confidence."""
    options = {"mode": "diffusion", "block_length": 4, "max_new_tokens": 40, "merge_commit": merge, **params}
    for question in QUESTIONS[:4]:
        *events, answer = nemodiff.stream(engine, question, steps=True, confidences=True, **options)
        assert isinstance(answer, nemodiff.Generation)
        assert answer.confidences is not None
        known = set[int]()
        for event in events:
            if isinstance(event, nemodiff.Pieces):
                known |= {*event.text, *event.bytes, *event.special}
            elif isinstance(event, nemodiff.Step):
                assert known >= {c.token for c in event.committed}
        decisions = dict[int, tuple[int, float | None]]()
        for event in events:
            if isinstance(event, nemodiff.Step):
                for c in event.committed:
                    decisions[c.position - answer.prompt_tokens] = (c.token, c.confidence)
        chosen = {i: (t, c) for i, (t, c) in enumerate(zip(answer.token_ids, answer.confidences, strict=True)) if c}
        assert {i: decisions.get(i) for i in chosen} == chosen
        assert len(chosen) > 3
        assert all(i >= len(answer.token_ids) for i in decisions.keys() - chosen.keys())
        blocks = [e.start - answer.prompt_tokens for e in events if isinstance(e, nemodiff.BlockStarted)]
        assert blocks == list(range(0, len(answer.token_ids), 4))[: len(blocks)]
        assert 4 * len(blocks) >= len(answer.token_ids) - 4


@pytest.mark.parametrize("mode", CAUSAL)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_verify_keeps_no_more_than_it_emits(engine: nemodiff.LoadedEngine, mode: str, temperature: float) -> None:
    """A stop inside a draft: what was drafted after it is not kept, even if it is right."""
    emitted, kept = 0, 0
    for event in nemodiff.stream(
        engine, "Count from 3 to 9.", steps=True, mode=mode, temperature=temperature, stop="5"
    ):
        if isinstance(event, nemodiff.Step):
            assert event.kept is None or event.kept <= event.emitted - emitted
            emitted, kept = event.emitted, kept + (event.kept or 0)
    assert kept or mode == "ar"


@pytest.mark.parametrize("mode", nemodiff.MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_structured_output_parses(engine: nemodiff.LoadedEngine, mode: str, temperature: float) -> None:
    options = {"mode": mode, "temperature": temperature, "max_new_tokens": 300, "block_length": 16}
    if mode == "diffusion":
        options["policy"] = "left_to_right"
    for seed, question in enumerate(QUESTIONS[2:4], 2):  # the model writes texts without end for others
        answer = nemodiff.generate(engine, question, json_schema=SCHEMA, seed=seed, **options)
        assert answer.finish_reason == "stop"
        value = json.loads(answer.text)
        assert set(value) == {"name", "age", "city"}
        assert isinstance(value["age"], int)
        assert value["city"] in ("Oslo", "Perth", "Lima")
        answer = nemodiff.generate(engine, question, regex=REGEX, seed=seed, **options)
        assert answer.finish_reason == "stop"
        assert re.fullmatch(REGEX, answer.text)


def test_a_schema_leaves_no_room_for_endless_space(engine: nemodiff.LoadedEngine) -> None:
    flag = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1]}}, "required": ["a", "b"]}
    flag["additionalProperties"] = False
    for question in QUESTIONS[:4]:
        answer = nemodiff.generate(engine, question, json_schema=json.dumps(flag), max_new_tokens=60)
        assert answer.text == json.dumps(json.loads(answer.text))
        loose = json.dumps({**flag, "x-guidance": {"whitespace_flexible": True}})
        assert nemodiff.generate(engine, question, json_schema=loose, max_new_tokens=60).token_ids != answer.token_ids


@pytest.mark.parametrize("mode", CAUSAL)
def test_structure_begins_after_thinking(engine: nemodiff.LoadedEngine, mode: str) -> None:
    options = {"mode": mode, "thinking": True, "thinking_budget": 5, "max_new_tokens": 100}
    answer = nemodiff.generate(engine, QUESTIONS[0], regex=REGEX, **options)
    thought, end, answer_text = answer.text.partition("</think>")
    assert end
    assert not re.fullmatch(REGEX, thought)
    assert re.fullmatch(REGEX, answer_text)


@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_thinking_does_not_end_an_answer_that_owes_a_structure(engine: nemodiff.LoadedEngine, mode: str) -> None:
    eos, end = engine.info.model.eos_ids[0], engine.text.end_think
    assert end is not None
    options: dict[str, Any] = {"mode": mode, "thinking": True, "max_new_tokens": 30, "temperature": 1.0}
    options["logit_bias"] = {eos: 30.0, end: 25.0}  # a model that would rather end than think
    if mode == "diffusion":
        options |= {"policy": "left_to_right", "threshold": 0.0}
    for seed, question in enumerate(QUESTIONS[:3]):
        free = nemodiff.generate(engine, question, seed=seed, **options)
        assert (free.finish_reason, end in free.token_ids) == ("stop", False)
        answer = nemodiff.generate(engine, question, regex=REGEX, seed=seed, **options)
        _, closed, answer_text = answer.text.partition("</think>")
        assert closed
        assert answer.finish_reason == "stop"
        assert re.fullmatch(REGEX, answer_text)


def test_a_schema_of_anything_is_one(engine: nemodiff.LoadedEngine) -> None:
    answers = [nemodiff.generate(engine, QUESTIONS[0], json_schema=s, max_new_tokens=30) for s in ("true", {}, True)]
    assert len({a.text for a in answers}) == 1
    assert isinstance(json.loads(answers[0].text), (int, float, str, list, dict))


@pytest.mark.parametrize("control", [{}, {"policy": "topk", "per_step": 1}, {"threshold": 2.0}, {"merge_commit": True}])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_bound_the_passes_of_a_block(engine: nemodiff.LoadedEngine, control: dict[str, Any], steps: int) -> None:
    options = {"mode": "diffusion", "block_length": 8, "max_new_tokens": 40, "temperature": 2.0, **control}
    answer = nemodiff.generate(engine, QUESTIONS[5], block_steps=steps, min_tokens=40, **options)
    assert answer.nfe["commit"] == 4
    assert answer.nfe["denoise"] <= steps * 5


def test_a_moved_end_of_thinking_costs_a_pass_at_most(engine: nemodiff.LoadedEngine) -> None:
    """The model likes `</think>`, so it often emits it before its budget, and the place kept for it opens again."""
    end, passes = engine.text.end_think, list[int]()
    assert end is not None
    options = {"mode": "diffusion", "block_length": 8, "block_steps": 1, "max_new_tokens": 8, "temperature": 1.5}
    for seed in range(20):
        options |= {"thinking": True, "thinking_budget": 6, "logit_bias": {end: 20.0}, "min_tokens": 8, "seed": seed}
        answer = nemodiff.generate(engine, "Count from 3 to 9.", **options)
        assert end in answer.token_ids[:7]
        passes.append(answer.nfe["denoise"])
    assert set(passes) == {1, 2}


def test_merged_commit_saves_a_pass_per_block(engine: nemodiff.LoadedEngine) -> None:
    options = {"mode": "diffusion", "block_length": 4, "max_new_tokens": 32, "block_steps": 1, "min_tokens": 32}
    plain = nemodiff.generate(engine, QUESTIONS[6], **options)
    merged = nemodiff.generate(engine, QUESTIONS[6], merge_commit=True, **options)
    assert (plain.nfe["commit"], plain.nfe["denoise"]) == (7, 8)
    assert (merged.nfe["commit"], merged.nfe["denoise"]) == (7, 1)


def test_no_entropy_at_all_is_a_bound_too(engine: nemodiff.LoadedEngine) -> None:
    options = {"mode": "diffusion", "entropy_bound": 0}
    policy = prepare(engine, "x", make_options({**options, "policy": "entropy"})).settings.policy
    assert (policy.name, policy.entropy_bound) == ("entropy", 0)
    with pytest.raises(nemodiff.RequestError, match="but policy is threshold; give entropy_bound"):
        prepare(engine, "x", make_options(options))


@pytest.mark.parametrize(
    ("model", "built", "backend", "expected"),
    [
        (32, 32, "onnxruntime", {"linear_spec": 16, "quadratic_spec": 16, "diffusion": 32}),
        (128, 64, "onnxruntime", {"linear_spec": 16, "quadratic_spec": 16, "diffusion": 64}),
        (128, 32, "onnxruntime", {"linear_spec": 32, "quadratic_spec": 32, "diffusion": 32}),
        (8, 8, "onnxruntime", {"linear_spec": 8, "quadratic_spec": 8, "diffusion": 8}),
        (32, 32, "torch", {"linear_spec": 32, "quadratic_spec": 32, "diffusion": 32}),
    ],
)
def test_a_block_that_nobody_chose_is_short_where_each_token_is_paid_for(
    engine: nemodiff.LoadedEngine, model: int, built: int, backend: str, expected: dict[str, int]
) -> None:
    info = dataclasses.replace(
        engine.info,
        model=dataclasses.replace(engine.info.model, block_length=model),
        build=dataclasses.replace(engine.info.build, block_length=built),
        manifest=dataclasses.replace(engine.info.manifest, backend=backend),
    )
    for mode, block in expected.items():
        assert settle(info, engine.text, 3, Options(mode=mode)).block_length == block
    every = settle(info, engine.text, 3, Options(mode="quadratic_spec", groups="all"))
    assert every.block_length == min(built, 16)


@settings(max_examples=60)
@given(
    confidence=st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=10),
    policy=st.sampled_from(["threshold", "topk", "entropy", "left_to_right"]),
    per_step=st.integers(1, 12),
    bar=st.sampled_from([0.0, 0.25, 0.5, 2.0]),
    steps=st.sampled_from([None, 1, 3]),
    passes=st.integers(0, 4),
)
def test_commits_begin_at_the_best_and_never_stall(
    confidence: list[float], policy: str, per_step: int, bar: float, steps: int | None, passes: int
) -> None:
    array, entropy = np.array(confidence, np.float32), 1 - np.array(confidence)
    chosen = Policy(policy, bar, per_step, bar, steps).commits(array, entropy, passes).tolist()
    size, sure = len(confidence), [c >= bar for c in confidence]
    best = sorted(range(size), key=lambda i: -confidence[i])
    order, count = {
        "threshold": (best, sum(sure)),
        "topk": (best, per_step),
        "entropy": (best, sum(1 - c <= bar for c in confidence)),
        "left_to_right": ([*range(size)], [*sure, False].index(False)),
    }[policy]
    least = 1 if steps is None else math.ceil(size / max(1, steps - passes))
    assert chosen == order[: max(count, least)]


def test_probability_and_entropy_leave_the_mask_out() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25, 1e9], [1.0, 1.0, 1e-30, 5.0]], np.float32))
    np.testing.assert_allclose(probability(logits, [1, 0], 3), [0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(entropies(logits, 3), [1.5 * np.log(2), np.log(2)], rtol=1e-6)
