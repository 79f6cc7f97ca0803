"""Products in shares: against their references, that a token's bits are its own, and what adds the shares."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins.kernel_launch import INTERPRETED, bf16_products, launch, normal, of_f32, rounded

from nemodiff.config import ModelConfig
from nemodiff.contract import PAGE
from nemodiff.plugins.op import Op
from nemodiff.plugins.ops import residual_norm, rope_write, split_linear
from nemodiff.plugins.ops.split_linear import BLOCK_K, TILES

__all__ = ["bf16_products"]  # a fixture
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
GATED = 0  # in place of a number of shares


def product(
    model: ModelConfig,
    x: np.ndarray,
    weight: np.ndarray,
    shares: int,
    dtype: str = "f32",
    tile: int | None = None,
    small: bool = False,
) -> np.ndarray:
    """By the kernel, in the least tile that holds the tokens unless one is given: (tokens, ...)."""
    tile = tile or next((t for t in TILES if len(x) <= t), TILES[-1])
    op: Op = split_linear.op(tile, shares) if shares else split_linear.gated(tile)
    (y,) = launch(of_f32(op) if small else op, model, dtype, x=x, weight=weight)
    return y.swapaxes(0, 1) if shares else y


def reference(x: np.ndarray, weight: np.ndarray, shares: int) -> np.ndarray:
    if shares == GATED:
        return split_linear.gated_reference(x, weight)
    return split_linear.reference(x, weight, shares).swapaxes(0, 1)


@settings(max_examples=12)
@given(
    st.integers(1, 70), st.integers(1, 140), st.sampled_from([16, 80, 272, 384]), st.integers(0, 5),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_product_equals_the_reference(
    tiny: ModelConfig, size: int, outputs: int, width: int, shares: int, small: bool, seed: int
) -> None:
    """Small multiples of a power of two, so that every order of summing gives the same; shares of nothing too."""
    rng = np.random.default_rng(seed)
    outputs *= 2 if shares == GATED else 1
    x, weight = ((rng.integers(-8, 9, shape) / 8).astype(np.float32) for shape in ((size, width), (outputs, width)))
    got = product(tiny, x, weight, shares, small=small)
    np.testing.assert_allclose(got, reference(x, weight, shares), rtol=3e-6 if shares == GATED else 0)


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("shares", [GATED, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 4e-3), ("bf16", 4e-2)])
def test_product_in_half_precision(tiny: ModelConfig, dtype: str, tolerance: float, shares: int) -> None:
    rng = np.random.default_rng(1)
    x, weight = (rounded(rng.standard_normal(shape, np.float32), dtype) for shape in ((5, 256), (40, 256)))
    expected = reference(x, weight, shares)
    np.testing.assert_allclose(
        product(tiny, x, weight, shares, dtype), expected, atol=tolerance * np.abs(expected).max()
    )


@settings(max_examples=6)
@given(st.integers(2, 70), st.sampled_from([GATED, 3]), st.integers(0, 99))
def test_a_token_has_the_same_bits_in_every_pass(tiny: ModelConfig, size: int, shares: int, seed: int) -> None:
    """Whatever else is in the pass; on a GPU also at any place and in both tiles, which numpy sums in other ways."""
    rng = np.random.default_rng(seed)
    x, weight = (rng.standard_normal(shape, np.float32) for shape in ((size, 272), (50, 272)))
    last = TILES[-1]
    together = product(tiny, x, weight, shares, tile=last)
    few = int(rng.integers(1, size))
    np.testing.assert_array_equal(product(tiny, x[:few], weight, shares, tile=last), together[:few])
    if not INTERPRETED:
        order = rng.permutation(size)
        np.testing.assert_array_equal(product(tiny, x[order], weight, shares), together[order])
        for tile in TILES:
            np.testing.assert_array_equal(product(tiny, x[few:], weight, shares, tile=tile), together[few:])


@pytest.mark.parametrize("shares", [GATED, 1])
def test_a_nan_stays_in_its_token(tiny: ModelConfig, shares: int) -> None:
    x = np.ones((3, 48), np.float32)
    x[1, 7] = np.nan
    y = product(tiny, x, np.ones((34, 48), np.float32), shares)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_shares_fill_a_card_by_the_projection_alone() -> None:
    """Those of the 8B model, whose norms and rotation are compiled for so many, and of tiny ones."""
    assert [split_linear.shares(*sizes) for sizes in ((6144, 4096), (4096, 4096), (4096, 14336))] == [4, 4, 4]
    assert split_linear.MOST_SHARES == 4
    assert split_linear.shares(28672, 4096) == 1
    assert split_linear.shares(100, 3 * BLOCK_K) == 1
    assert split_linear.shares(100, 9 * BLOCK_K) == 2


def one_order(size: int, *width: int) -> np.ndarray:
    """Four shares whose sum in order is 1; another order loses a 1."""
    part = np.zeros((4, size, *width), np.float32)
    part[:] = np.array([1, 2.0**25, -(2.0**25), 1], np.float32).reshape(4, *[1] * (part.ndim - 1))
    return part


@settings(max_examples=8)
@given(st.integers(1, 20), st.sampled_from([1, 47, 128]), st.integers(1, 5), st.integers(0, 99))
def test_norm_of_shares_is_that_of_their_sum(tiny: ModelConfig, size: int, width: int, shares: int, seed: int) -> None:
    model = dataclasses.replace(tiny, hidden_size=width)
    part, residual, weight = normal(seed, shares, size, width), normal(seed + 1, size, width), normal(2, width)
    whole = part[0]
    for share in part[1:]:
        whole = whole + share
    got = launch(residual_norm.op(shares), model, x=part, residual=residual, weight=weight)
    expected = launch(residual_norm.op(), model, x=whole, residual=residual, weight=weight)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_norm_adds_shares_in_one_order(tiny: ModelConfig) -> None:
    model = dataclasses.replace(tiny, hidden_size=40)
    zeros = np.zeros((3, 40), np.float32)
    weight = np.zeros(40, np.float32)
    _, total = launch(residual_norm.op(4), model, x=one_order(3, 40), residual=zeros, weight=weight)
    np.testing.assert_array_equal(total, np.float32(1))


@pytest.mark.skipif(not INTERPRETED, reason="the pages changed in place are copies on the device")
@pytest.mark.parametrize("bits", [None, "int8"])
def test_rotation_of_shares_is_that_of_their_sum(tiny: ModelConfig, bits: str | None) -> None:
    heads, kv, width, size = 4, 2, 16, 3
    model = dataclasses.replace(tiny, num_heads=heads, num_kv_heads=kv, head_dim=width)
    part = np.concatenate([normal(1, 4, size, (heads + kv) * width), one_order(size, kv * width)], -1)
    whole = ((part[0] + part[1]) + part[2]) + part[3]
    angle = normal(2, size, width // 2) * 50
    given = {
        "cos": np.cos(angle), "sin": np.sin(angle), "scale": np.ones(size, np.float32),
        "slot": np.array([0, 70, 5], np.int32),
    }  # fmt: skip

    def run(shares: int, qkv: np.ndarray) -> list[np.ndarray]:
        pages = {f"{part}_pages": np.zeros((2, kv, PAGE, width), np.int8 if bits else np.float32) for part in "kv"}
        scales = {f"{part}_scales": np.zeros((2, kv, PAGE), np.float32) for part in "kv"} if bits else {}
        op = rope_write.paged("int8" if bits else None, shares)
        return [*launch(op, model, qkv=qkv, **given, **pages, **scales), *pages.values(), *scales.values()]

    for one, other in zip(run(4, part), run(0, whole), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.any()
