"""The scales of int4: fitted to the numbers, so no group is farther off than where its largest weight is -8."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from stand_ins.low_bits import nibbles

from nemodiff.builder.checkpoint import low_bits

GROUPS = (32, 64, 128)


def weights(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    made = {"normal": rng.standard_normal, "heavy": lambda shape: rng.standard_t(3, shape), "even": rng.random}
    return made[kind]((96, 256)).astype(np.float32)


def numbers_of(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The stored numbers (groups, inputs) and their scales (groups, 1), both in f64."""
    stored, scale = low_bits.quantise_int4(weight, group)
    assert (stored.shape, scale.shape) == ((*scale.shape, group // 2), (len(weight), weight.shape[1] // group))
    return nibbles(stored.reshape(-1, group // 2)).astype(float) - 8, scale.reshape(-1, 1).astype(float)


def plainly(values: np.ndarray) -> np.ndarray:
    """The values (groups, inputs) where the largest of each group is -8 and no scale is fitted."""
    scale = np.take_along_axis(values, np.abs(values).argmax(-1)[:, None], -1) / -8
    return np.clip(np.rint(values / scale), -8, 7) * scale


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "even"])
def test_no_group_is_farther_off_than_plainly(kind: str, group: int) -> None:
    weight = weights(kind)
    numbers, scale = numbers_of(weight, group)
    values = weight.reshape(-1, group).astype(float)
    plain, fitted = (((made - values) ** 2).sum(-1) for made in (plainly(values), numbers * scale))
    assert (fitted <= plain * (1 + 1e-5)).all()
    assert fitted.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("group", GROUPS)
def test_a_scale_is_the_best_of_its_numbers(group: int) -> None:
    """What is left of a group has no part along its numbers, and the numbers are the nearest but for the last fit."""
    weight = weights("normal")
    numbers, scale = numbers_of(weight, group)
    values = weight.reshape(-1, group)
    np.testing.assert_allclose((numbers * values).sum(-1) / (numbers**2).sum(-1), scale[:, 0], rtol=1e-5)
    assert np.mean(numbers == np.clip(np.rint(values / scale), -8, 7)) > 0.98


def test_weights_on_a_grid_are_kept() -> None:
    numbers = np.random.default_rng(0).integers(-8, 8, (40, 64)).astype(np.float32)
    numbers[:, [5, 40]] = -8
    weight = numbers * np.float32(0.25) * np.where(np.arange(40) % 2, 1, -1).astype(np.float32)[:, None]
    got, scale = numbers_of(weight, 32)
    np.testing.assert_array_equal((got * scale).reshape(40, 64), weight)


def test_extremes_are_finite() -> None:
    weight = weights("normal")
    weight[0], weight[1] = 0, 1e-42
    weight[2:4] *= np.float32(3e38) / np.abs(weight[2:4]).max()
    numbers, scale = numbers_of(weight, 32)
    assert np.isfinite(scale).all()
    assert not numbers[:16].any()  # zeros, and what is less than half of the smallest step
    np.testing.assert_allclose(numbers[16:32] * scale[16:32], weight[2:4].reshape(16, 32), atol=3e37)


def test_steps_leave_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights("heavy")
    whole = low_bits.quantise_int4(weight, 64)
    monkeypatch.setattr(low_bits, "_TILE", 5 * 64)
    for one, other in zip(whole, low_bits.quantise_int4(weight, 64), strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_is_that_of_the_numbers() -> None:
    weight = np.ones((2048, 1024), np.float32)
    tracemalloc.start()
    low_bits.quantise_int4(weight)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.25 * weight.nbytes
