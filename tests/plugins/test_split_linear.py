"""The product whose inputs are summed in shares: against its reference, and that a token's bits are its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins.kernel_launch import INTERPRETED, bf16_products, launch, of_f32, rounded

from nemodiff.config import ModelConfig
from nemodiff.plugins.ops import low_bit_linear, split_linear
from nemodiff.plugins.ops.low_bit_linear import BLOCK_K

__all__ = ["bf16_products"]  # a fixture
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def product(
    model: ModelConfig,
    x: np.ndarray,
    weight: np.ndarray,
    shares: int,
    dtype: str = "f32",
    tile: int | None = None,
    small: bool = False,
) -> np.ndarray:
    """By the kernel, in the least tile that holds the tokens unless one is given."""
    tile = tile or next((t for t in split_linear.TILES if len(x) <= t), split_linear.TILES[-1])
    counters = np.zeros((shares, low_bit_linear.counters(*weight.shape)[1]), np.int32)
    op = split_linear.op(tile)
    (y,) = launch(of_f32(op) if small else op, model, dtype, x=x, weight=weight, counters=counters)
    return y


@settings(max_examples=10)
@given(
    st.integers(1, 70), st.integers(1, 140), st.sampled_from([16, 80, 272]), st.integers(1, 4), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_product_equals_the_reference(
    tiny: ModelConfig, size: int, outputs: int, width: int, shares: int, small: bool, seed: int
) -> None:
    """Small multiples of a power of two, so that every order of summing gives the same."""
    rng = np.random.default_rng(seed)
    x, weight = ((rng.integers(-8, 9, shape) / 8).astype(np.float32) for shape in ((size, width), (outputs, width)))
    np.testing.assert_array_equal(product(tiny, x, weight, shares, small=small), split_linear.reference(x, weight))


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 2e-3), ("bf16", 2e-2)])
def test_product_in_half_precision(tiny: ModelConfig, dtype: str, tolerance: float) -> None:
    rng = np.random.default_rng(1)
    x, weight = (rounded(rng.standard_normal(shape, np.float32), dtype) for shape in ((5, 256), (40, 256)))
    expected = split_linear.reference(x, weight)
    got = product(tiny, x, weight, 2, dtype)
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("size", [1, 20, 300])
def test_shares_are_summed_in_one_order(tiny: ModelConfig, size: int) -> None:
    """By a program each, and by one for all of them: a large sum that another order would lose."""
    x = np.zeros((size, 4 * BLOCK_K), np.float32)
    x[:, [0, 70, 140, 200]] = [1.0, 2.0**25, -(2.0**25), 1.0]  # one of each share
    np.testing.assert_array_equal(product(tiny, x, np.ones((3, 4 * BLOCK_K), np.float32), 4), np.float32(1))


@settings(max_examples=6)
@given(st.integers(2, 64), st.integers(0, 99))
def test_a_token_has_the_same_bits_in_every_pass(tiny: ModelConfig, size: int, seed: int) -> None:
    """Whatever else is in the pass; on a GPU also at any place and in both tiles, which numpy sums in other ways."""
    rng = np.random.default_rng(seed)
    x, weight = (rng.standard_normal(shape, np.float32) for shape in ((size, 272), (50, 272)))
    last = split_linear.TILES[-1]
    together = product(tiny, x, weight, 3, tile=last)
    few = int(rng.integers(1, size))
    np.testing.assert_array_equal(product(tiny, x[:few], weight, 3, tile=last), together[:few])
    if not INTERPRETED:
        order = rng.permutation(size)
        np.testing.assert_array_equal(product(tiny, x[order], weight, 3), together[order])
        for tile in split_linear.TILES:
            np.testing.assert_array_equal(product(tiny, x[few:], weight, 3, tile=tile), together[few:])


def test_a_nan_stays_in_its_token(tiny: ModelConfig) -> None:
    x = np.ones((3, 48), np.float32)
    x[1, 7] = np.nan
    y = product(tiny, x, np.ones((33, 48), np.float32), 1)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()
