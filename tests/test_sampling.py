"""Sampling: an exact law, and noise that depends on seed, position and token alone."""

from pathlib import Path

import numpy as np
import pytest

import nemodiff
from nemodiff.runtime.noise import Noise, gumbel, philox
from nemodiff.runtime.sampling import Law, draw


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> nemodiff.LoadedEngine:
    return nemodiff.load(tiny_engine)


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
    noise, law = Noise(7, logits.size), Law(temperature=temperature)
    counts = np.bincount([draw(logits.copy(), law, noise, p) for p in range(draws)], minlength=logits.size)
    assert counts[mask] == 0
    weights = np.exp(np.delete(logits, mask) / temperature)
    expected = draws * weights / weights.sum()
    assert ((np.delete(counts, mask) - expected) ** 2 / expected).sum() < 24.32


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    np.testing.assert_array_equal(gumbel(3, 40, 100), gumbel(3, 40, 100))
    np.testing.assert_array_equal(gumbel(3, 40, 100)[:50], gumbel(3, 40, 50))
    assert not np.isin(gumbel(3, 40, 100), gumbel(3, 41, 100)).any()
    assert not np.isin(gumbel(3, 40, 100), gumbel(4, 40, 100)).any()
    assert np.isfinite(gumbel(2**64 - 1, 262143, 131072)).all()


def test_same_seed_gives_the_same_text_however_it_is_run(engine: nemodiff.LoadedEngine) -> None:
    options = {"mode": "ar", "temperature": 1.0, "seed": 11, "max_new_tokens": 40}
    prompts = ["Count from 3 to 9.", "Sort these numbers: 4, 2, 9.", "Show the times table of 3 up to 5."]
    alone = [nemodiff.generate(engine, p, **options).token_ids for p in prompts]
    assert [nemodiff.generate(engine, p, **options, prefill_chunk=5).token_ids for p in prompts] == alone
    assert [a.token_ids for a in nemodiff.generate_many(engine, prompts, rows=3, **options)] == alone
    seeds = [nemodiff.generate(engine, prompts[1], **{**options, "seed": n}).token_ids for n in range(4)]
    assert all(a != b for i, a in enumerate(seeds) for b in seeds[:i])


def test_low_temperature_is_nearly_greedy(engine: nemodiff.LoadedEngine) -> None:
    greedy = nemodiff.generate(engine, "Count from 3 to 9.", mode="ar", max_new_tokens=20)
    cold = nemodiff.generate(engine, "Count from 3 to 9.", mode="ar", max_new_tokens=20, temperature=1e-3)
    assert cold.token_ids == greedy.token_ids
