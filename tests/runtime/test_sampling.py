"""Sampling: exact distributions, noise that depends on seed, position and token alone, equal tokens in every mode."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import equality
import equality_sampled
import numpy as np
import pytest
from conftest import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import reference_choice

import nemodiff
from nemodiff.runtime.engines.passes import Prediction
from nemodiff.runtime.requests.selection import TokenSelector
from nemodiff.runtime.requests.settings import Settings
from nemodiff.runtime.sampling.noise import Noise, gumbel, philox
from nemodiff.runtime.sampling.sampler import SamplingParams, draw

QUESTIONS = equality.questions(40)
MASK = 6
EOS = 3
END = 5


def test_philox_gives_the_published_words() -> None:
    """The known answers of the Random123 library for philox4x32-10."""
    zeros = philox(0, (np.zeros(1), 0, 0, 0))
    assert [hex(w) for w in zeros[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    word = 0xFFFFFFFF
    ones = philox(2**64 - 1, (np.full(1, word), word, word, word))
    assert [hex(w) for w in ones[0]] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature: float) -> None:
    """Pearson's chi-square over 20000 draws; the bound is the 99.9 % point for 7 degrees of freedom."""
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -np.inf, -0.5, 0.2])
    mask, draws = 6, 20_000
    noise, params = Noise(7, logits.size), SamplingParams(temperature=temperature)
    counts = np.bincount([draw(logits.copy(), params, noise, p) for p in range(draws)], minlength=logits.size)
    assert counts[mask] == 0
    weights = np.exp(np.delete(logits, mask) / temperature)
    expected = draws * weights / weights.sum()
    assert ((np.delete(counts, mask) - expected) ** 2 / expected).sum() < 24.32


@pytest.mark.parametrize("mode", ["ar", "linear_spec"])
def test_first_two_tokens_follow_the_distribution_of_the_model(setup: equality.Setup, mode: str) -> None:
    """Chi-square of what 1500 seeds give after a prompt, against the oracle's distribution of two tokens in a row.

    Pairs expected fewer than 8 times share a bin; the bound is mean plus 4 standard deviations of the distribution.
    """
    prompt = setup.plain.text.encode("Count")
    temperature = 1.0
    draws = 1500
    options = {"mode": mode, "temperature": temperature, "max_new_tokens": 2, "stop_token_ids": ()}
    with nemodiff.Scheduler(setup.plain, rows=8, waiting=draws) as scheduler:
        handles = scheduler.submit_many([(prompt, {**options, "seed": seed}) for seed in range(draws)])
        got = [tuple(handle.result(PATIENCE).token_ids) for handle in handles]

    def chances(ids: list[int]) -> np.ndarray:
        logits = setup.model.logits(ids[:-1], ids[-1:], False)[0].astype(np.float64) / temperature
        logits[setup.model.mask_id] = -np.inf
        weights = np.exp(logits - logits.max())
        return np.asarray(weights / weights.sum())

    first = chances(prompt)
    expected: dict[tuple[int, ...], float] = {}
    for a in np.flatnonzero(first * draws >= 8).tolist():
        if a in setup.model.eos:
            expected[(a,)] = float(first[a]) * draws
            continue
        second = first[a] * chances([*prompt, a]) * draws
        expected |= {(a, b): float(second[b]) for b in np.flatnonzero(second >= 8).tolist()}
    assert len(expected) >= 4
    counts = {pair: got.count(pair) for pair in expected}
    rest, others = draws - sum(expected.values()), draws - sum(counts.values())
    squares = sum((counts[p] - e) ** 2 / e for p, e in expected.items()) + (others - rest) ** 2 / max(rest, 1)
    freedom = len(expected)
    assert squares < freedom + 4 * np.sqrt(2 * freedom)


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    np.testing.assert_array_equal(gumbel(3, 40, 100), gumbel(3, 40, 100))
    np.testing.assert_array_equal(gumbel(3, 40, 100)[:50], gumbel(3, 40, 50))
    assert not np.isin(gumbel(3, 40, 100), gumbel(3, 41, 100)).any()
    assert not np.isin(gumbel(3, 40, 100), gumbel(4, 40, 100)).any()
    assert np.isfinite(gumbel(2**64 - 1, 262143, 131072)).all()


@pytest.mark.parametrize("size", [9, 891, 8192, 8193, 131072])
@pytest.mark.parametrize("count", [1, 5, 8000])
def test_noise_is_the_same_however_it_is_drawn(size: int, count: int) -> None:
    """Runs of positions for a small vocabulary, all of it or single ids for a large one; positions out of order."""
    noise = Noise(11, size)
    ids = np.unique(np.random.default_rng(0).integers(0, size, count))
    for position in (262143, 0, 15, 16, 1000, 17):
        np.testing.assert_allclose(noise.at(position, ids), gumbel(11, position, size)[ids], rtol=1e-14)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One choice to make."""

    logits: np.ndarray
    params: dict[str, Any]
    emitted: list[int]


@st.composite
def choices(draw_: st.DrawFn, size: int) -> Choice:
    """Logits on a coarse grid, so that ties are common, and every processor on or off."""
    rng = np.random.default_rng(draw_(st.integers(0, 2**32)))
    logits = (rng.integers(-12, 13, size) / draw_(st.sampled_from([1, 2, 7]))).astype(np.float32)
    ids = st.integers(0, size - 1)
    params = {
        "temperature": draw_(st.sampled_from([0.0, 0.3, 1.0, 3.0])),
        "top_k": draw_(st.sampled_from([0, 1, 3, 10**6])),
        "top_p": draw_(st.sampled_from([1.0, 0.999, 0.6, 0.01])),
        "min_p": draw_(st.sampled_from([0.0, 0.02, 0.9, 1.0])),
        "repetition_penalty": draw_(st.sampled_from([1.0, 0.5, 1.7])),
        "presence_penalty": draw_(st.sampled_from([0.0, 1.5, -0.75])),
        "frequency_penalty": draw_(st.sampled_from([0.0, 0.5, -2.0])),
        "seed": draw_(st.integers(0, 2**64 - 1)),
        "logit_bias": draw_(st.dictionaries(ids, st.sampled_from([-100.0, -1.0, 2.5]), max_size=3)),
        "bad_words": tuple(draw_(st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=3))),
        "min_tokens": draw_(st.sampled_from([0, 2, 9])),
    }
    return Choice(logits, params, draw_(st.lists(ids, max_size=8)))


def check(choice: Choice, prompt: list[int]) -> None:
    params = {**choice.params, "logit_bias": tuple(choice.params["logit_bias"].items())}
    stops = frozenset([EOS])
    made = Settings("ar", 99, 8, 0.0, params=SamplingParams(**params))
    selector = TokenSelector(made, prompt, MASK, stops, choice.logits.size)
    for token in choice.emitted:
        selector.push([token])
    assert selector.plain == SamplingParams(**params).greedy
    best = np.where(np.arange(choice.logits.size) == MASK, -np.inf, choice.logits).argmax()
    zero = np.zeros(1, np.float32)
    given_logits = None if selector.plain else choice.logits[None]
    got = selector.next(Prediction(np.array([best], np.int32), zero, np.zeros(1, np.int32), given_logits), 0)
    oracle = reference_choice.SamplingParams(tuple(prompt), stops, **choice.params)
    assert got == reference_choice.choose(choice.logits, oracle, choice.emitted, MASK)


@settings(max_examples=600)
@given(choices(40), st.lists(st.integers(0, 39), min_size=1, max_size=6))
def test_choice_equals_the_oracle(choice: Choice, prompt: list[int]) -> None:
    check(choice, prompt)


@settings(max_examples=6)
@given(choices(9000))
def test_choice_over_a_large_vocabulary_equals_the_oracle(choice: Choice) -> None:
    check(choice, [1, 2, 8999])


def test_drafting_leaves_no_trace() -> None:
    """Walking ahead and back restores the history that penalties, bad words and budgets look at."""
    params = SamplingParams(temperature=1.0, frequency_penalty=1.0, bad_words=((1, 2),))
    selector = TokenSelector(
        Settings("ar", 99, 8, 0.0, params=params, thinking_budget=30, end_think=END), [1], MASK, frozenset(), 40
    )
    logits = np.random.default_rng(1).normal(size=(8, 40)).astype(np.float32)
    prediction = Prediction(np.zeros(8, np.int32), np.zeros(8, np.float32), np.zeros(8, np.int32), logits)
    selector.push([7])
    ahead = selector.propose(prediction, [MASK, END, MASK, 1, MASK, MASK], range(1, 7))
    assert ahead == selector.propose(prediction, [MASK, END, MASK, 1, MASK, MASK], range(1, 7))
    fresh = TokenSelector(
        Settings("ar", 99, 8, 0.0, params=params, thinking_budget=30, end_think=END), [1], MASK, frozenset(), 40
    )
    fresh.push([7])
    assert selector.next(prediction, 0) == fresh.next(prediction, 0)
    assert vars(selector)["_counts"] == vars(fresh)["_counts"]


@pytest.mark.parametrize("number", range(5))
def test_sampled_modes_equal_ar_and_ar_its_oracle(setup: equality.Setup, number: int) -> None:
    """A sample of what tests/equality_sampled.py runs over many prompts."""
    names = [*equality_sampled.PARAMS, *equality_sampled.GUIDES][number::5]
    variants = random.Random(number).sample(list(equality_sampled.CAUSAL), 4)
    for params in names:
        done = list(equality_sampled.compare_causal(setup, QUESTIONS[number], params, number, variants))
        assert len(done) == len(variants) + (params in equality_sampled.PARAMS)
        assert [d for _, d in done if d is not None] == []


@pytest.mark.parametrize("params", ["T 1", "presence, frequency", "bad words", "thinking budget"])
def test_drafts_and_passes_equal_the_oracle(setup: equality.Setup, params: str) -> None:
    assert list(equality_sampled.compare_passes(setup, QUESTIONS[7], params, 7)) == []


@pytest.mark.parametrize("number", range(4))
def test_diffusion_equals_the_oracle(setup: equality.Setup, number: int) -> None:
    cases = [*random.Random(number).sample(equality_sampled.diffusion_cases(), 4), (None, "entropy")]
    for name, variant in cases:
        difference = equality_sampled.compare_diffusion(setup, QUESTIONS[10 + number], name, variant, number, 8)
        assert difference is None


@settings(max_examples=12)
@given(
    params=st.sampled_from(list(equality_sampled.PARAMS)),
    question=st.sampled_from(QUESTIONS),
    mode=st.sampled_from(["linear_spec", "quadratic_spec"]),
    block=st.integers(1, 40),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
)
def test_same_seed_gives_the_same_tokens_in_every_mode(
    setup: equality.Setup, params: str, question: str, mode: str, block: int, chunk: int, seed: int
) -> None:
    options = {**equality_sampled.PARAMS[params], "seed": seed, "max_new_tokens": 30}
    expected = nemodiff.generate(setup.plain, question, mode="ar", **options)
    got = nemodiff.generate(setup.plain, question, mode=mode, block_length=block, prefill_chunk=chunk, **options)
    assert (got.token_ids, got.text, got.finish_reason) == (expected.token_ids, expected.text, expected.finish_reason)


@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_same_seed_gives_the_same_text_however_it_is_run(engine: nemodiff.LoadedEngine, mode: str) -> None:
    options = {"mode": mode, "temperature": 1.0, "seed": 11, "max_new_tokens": 40}
    prompts = ["Count from 3 to 9.", "Sort these numbers: 4, 2, 9.", "Show the times table of 3 up to 5."]
    alone = [nemodiff.generate(engine, p, **options).token_ids for p in prompts]
    assert [nemodiff.generate(engine, p, **options, prefill_chunk=5).token_ids for p in prompts] == alone
    assert [a.token_ids for a in nemodiff.generate_many(engine, prompts, rows=3, **options)] == alone
    seeds = [nemodiff.generate(engine, prompts[1], **{**options, "temperature": 3.0, "seed": n}) for n in range(4)]
    assert all(a.token_ids != b.token_ids for i, a in enumerate(seeds) for b in seeds[:i])


def test_low_temperature_is_nearly_greedy(engine: nemodiff.LoadedEngine) -> None:
    for mode in nemodiff.MODES:
        greedy = nemodiff.generate(engine, "Count from 3 to 9.", mode=mode, max_new_tokens=20)
        cold = nemodiff.generate(engine, "Count from 3 to 9.", mode=mode, max_new_tokens=20, temperature=1e-3)
        assert cold.token_ids == greedy.token_ids


def test_shared_noise_is_what_keeps_acceptance_high(setup: equality.Setup) -> None:
    """Were the drafts' noise another, the tokens would be the same and more passes needed."""
    from nemodiff.runtime.generate import decode, prepare

    means, emitted = [], []
    for shared in (True, False):
        lengths, tokens = list[int](), []
        for seed, question in enumerate(QUESTIONS[:12]):
            options = nemodiff.Options(temperature=1.0, seed=seed, max_new_tokens=64)
            sequence = prepare(setup.plain, question, options)
            if not shared:
                propose, own = sequence.selector.propose, vars(sequence.selector)["_noise"]

                def alone(*arguments: Any, propose: Any = propose, own: Any = own, of: Any = sequence) -> Any:
                    of.selector._noise = Noise(99, of.model.vocab_size)
                    proposed = propose(*arguments)
                    of.selector._noise = own
                    return proposed

                sequence.selector.propose = alone  # type: ignore[method-assign]
            for _ in decode(setup.plain.backend, [sequence], 1):
                pass
            lengths += sequence.accepted
            tokens.append(sequence.tokens)
        means.append(sum(lengths) / len(lengths))
        emitted.append(tokens)
    assert emitted[0] == emitted[1]
    assert means[0] > means[1]
