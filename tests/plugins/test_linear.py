"""Products with weights of 16, 8 and 4 bits: against their references, that a token's bits are its own, and what adds
their shares."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins.kernel_launch import DEVICE, INTERPRETED, bf16_products, launch, launch_head, normal, of_f32, rounded

from nemodiff.config import ModelConfig
from nemodiff.contract import PAGE, Quantization
from nemodiff.plugins.kernels.widened import from_e4m3, shifted_e4m3
from nemodiff.plugins.op import Op, ceil_div
from nemodiff.plugins.ops import head_commit, linear, residual_norm, rope_write, swiglu
from nemodiff.plugins.ops.linear import GROUP, TILES

__all__ = ["bf16_products"]  # a fixture
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
EIGHT: tuple[Quantization, ...] = ("fp8", "int8")
FINITE = np.setdiff1d(np.arange(256), (0x7F, 0xFF)).astype(np.uint8)  # e4m3
GATED = 0  # in place of a number of shares
pytestmark = [pytest.mark.torch] if INTERPRETED else [pytest.mark.torch, pytest.mark.gpu]


@triton.jit
def e4m3_of(bits, out, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 256)
    byte = tl.load(bits + at)
    tl.store(out + at, shifted_e4m3(byte) if SHIFTED else from_e4m3(byte))


class Weight(NamedTuple):
    """A projection in the bits of a kind: by its numbers, scales and zeros, and as the kernels take it."""

    kind: Quantization | None
    stored: tuple[np.ndarray, ...]
    taken: dict[str, np.ndarray]

    def reference(self, x: np.ndarray, shares: int) -> np.ndarray:
        """The product in shares, (shares, N, F)."""
        if self.kind == "int4":
            return linear.reference_int4(x, *self.stored, shares)
        return linear.reference(x, self.taken["weight"], self.taken["scale"], shares, self.kind)


def in_8_bits(kind: Quantization, numbers: np.ndarray, scale: np.ndarray) -> Weight:
    taken = {"weight": numbers.view(np.uint8), "scale": scale, "zero": np.zeros(0, np.uint8)}
    return Weight(kind, (numbers, scale), taken)


def weight_of(kind: Quantization | None, values: np.ndarray, zeros: bool = False) -> Weight:
    """Random numbers of a kind, or in 16 bits the values (F, K) themselves; scales are powers of two."""
    rng = np.random.default_rng(len(values))
    outputs, width = values.shape
    if kind is None:
        none = {"scale": np.zeros(0, np.float32), "zero": np.zeros(0, np.uint8)}
        return Weight(None, (values,), {"weight": values, **none})
    if kind != "int4":
        numbers = rng.choice(FINITE if kind == "fp8" else 256, values.shape).astype(np.uint8)
        return in_8_bits(kind, numbers, np.exp2(rng.integers(-9, -4, outputs)).astype(np.float32))
    numbers = rng.integers(0, 16, values.shape).astype(np.uint8)
    scale = np.exp2(rng.integers(-6, 0, (outputs, width // GROUP))).astype(np.float32)
    zero = rng.integers(0, 16, (outputs, width // GROUP if zeros else 0)).astype(np.uint8)
    laid_out = [t.numpy() for t in linear.arranged(*map(torch.from_numpy, (numbers, scale, zero)))]
    return Weight(kind, (numbers, scale, zero), dict(zip(("weight", "scale", "zero"), laid_out, strict=True)))


def product(
    model: ModelConfig,
    x: np.ndarray,
    weight: Weight,
    shares: int,
    dtype: str = "f32",
    tile: int | None = None,
    small: bool = False,
) -> np.ndarray:
    """By the kernel, in the tile that the engine would take unless one is given: (shares, N, F), or GATED (N, F / 2).

    `small` takes the tiles of f32.
    """
    tile = tile or TILES[len(x) > TILES[0]]
    op: Op = linear.gated(weight.kind, tile) if shares == GATED else linear.split(weight.kind, tile, shares)
    (y,) = launch(of_f32(op) if small else op, model, dtype, x=x, **weight.taken)
    return y


def expected_of(x: np.ndarray, weight: Weight, shares: int) -> np.ndarray:
    if shares == GATED:
        return linear.gated_reference(weight.reference(x, 1), np.dtype(np.float32))
    return weight.reference(x, shares)


def grid(seed: int, *shape: int) -> np.ndarray:
    """Small multiples of a power of two, so that with weights of few bits every order of summing gives the same."""
    return (np.random.default_rng(seed).integers(-8, 9, shape) / 8).astype(np.float32)


@pytest.mark.parametrize("kind", linear.KINDS)
@settings(max_examples=6)
@given(
    size=st.integers(1, 70), outputs=st.integers(1, 150), groups=st.sampled_from([1, 2, 3, 9]),
    shares=st.integers(0, 4), zeros=st.booleans(), small=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_product_equals_the_reference(
    tiny: ModelConfig, kind: Quantization | None, size: int, outputs: int, groups: int, shares: int, zeros: bool,
    small: bool, seed: int,
) -> None:  # fmt: skip
    """Also where the last tile of tokens, outputs or inputs is not full, and where a share has no inputs."""
    outputs *= 2 if shares == GATED else 1
    width = groups * GROUP - (0 if kind == "int4" else seed % 2 * 16)
    x, weight = grid(seed, size, width), weight_of(kind, grid(seed + 1, outputs, width), zeros)
    got, expected = product(tiny, x, weight, shares, small=small and kind != "int4"), expected_of(x, weight, shares)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", EIGHT)
def test_every_byte_is_rebuilt(tiny: ModelConfig, kind: Quantization) -> None:
    """All finite values, one per output, each alone: exact."""
    bits = FINITE if kind == "fp8" else np.arange(256).astype(np.uint8)
    weight = np.zeros((len(bits), 16), np.uint8)
    weight[:, 5] = bits
    x = np.zeros((1, 16), np.float32)
    x[0, 5] = 1.0
    got = product(tiny, x, in_8_bits(kind, weight, np.full(len(bits), 0.5, np.float32)), 1)[0, 0]
    np.testing.assert_array_equal(got, bits.view(E4M3 if kind == "fp8" else np.int8).astype(np.float32) / 2)


@pytest.mark.parametrize("shifted", [False, True])
def test_e4m3_has_its_bits_on_every_card(shifted: bool) -> None:
    """By conversion and by shifts, zeros with their signs too."""
    out = torch.empty(256, device=DEVICE)
    e4m3_of[(1,)](torch.arange(256, dtype=torch.uint8, device=DEVICE), out, SHIFTED=shifted)
    expected = FINITE.view(E4M3).astype(np.float32)
    np.testing.assert_array_equal(out.cpu().numpy()[FINITE].view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bits_hold_every_e4m3(dtype: type) -> None:
    """So it does not matter to a product by which of them a weight comes."""
    values = FINITE.view(E4M3).astype(np.float32)
    np.testing.assert_array_equal(values.astype(dtype).astype(np.float32), values)


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("shares", [GATED, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 4e-3), ("bf16", 4e-2)])
@pytest.mark.parametrize("kind", linear.KINDS)
def test_product_in_half_precision(
    tiny: ModelConfig, kind: Quantization | None, dtype: str, tolerance: float, shares: int
) -> None:
    """The largest weights and sums of hundreds do not overflow f16 on the way."""
    x, weight = rounded(normal(2, 5, 256), dtype), weight_of(kind, rounded(normal(3, 40, 256), dtype))
    expected = expected_of(x, weight, shares)
    got = product(tiny, x, weight, shares, dtype)
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("kind", [None, *EIGHT])
@pytest.mark.parametrize("shares", [GATED, 1])
def test_a_nan_stays_in_its_token(tiny: ModelConfig, kind: Quantization | None, shares: int) -> None:
    x = np.ones((3, 48), np.float32)
    x[1, 7] = np.nan
    y = product(tiny, x, weight_of(kind, np.ones((34, 48), np.float32)), shares).reshape(3, -1)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("kind", linear.KINDS)
@settings(max_examples=3)
@given(size=st.integers(2, 100), shares=st.sampled_from([GATED, 3]), seed=st.integers(0, 99))
def test_a_token_has_the_same_bits_in_every_pass(
    tiny: ModelConfig, kind: Quantization | None, size: int, shares: int, seed: int
) -> None:
    """Whatever else is in the pass; on a GPU also at any place and in both tiles, which numpy sums in other ways."""
    x, weight = normal(seed, size, 288), weight_of(kind, normal(seed + 1, 50, 288))
    axis = 0 if shares == GATED else 1

    def bits(x: np.ndarray, tile: int | None = TILES[-1]) -> np.ndarray:
        return product(tiny, x, weight, shares, tile=tile).swapaxes(0, axis)

    together = bits(x)
    few = 1 + seed % (size - 1)
    np.testing.assert_array_equal(bits(x[:1]), together[:1])
    np.testing.assert_array_equal(bits(x[:few]), together[:few])
    if not INTERPRETED:
        order = np.random.default_rng(seed).permutation(size)
        np.testing.assert_array_equal(bits(x[order], None), together[order])
        for tile in TILES:
            np.testing.assert_array_equal(bits(x[few:], tile), together[few:])


@pytest.mark.parametrize("kind", [kind for kind in linear.KINDS if kind])
@settings(max_examples=3)
@given(size=st.integers(1, 100), shares=st.integers(1, 4), seed=st.integers(0, 99))
def test_all_shares_in_a_program_have_the_bits_of_shares_added(
    tiny: ModelConfig, kind: Quantization, size: int, shares: int, seed: int
) -> None:
    """As a pass of many tokens, and one of few, multiply."""
    x, weight = normal(seed, size, 544), weight_of(kind, normal(seed + 1, 50, 544))
    part = product(tiny, x, weight, shares, tile=TILES[-1])
    (added,) = launch(linear.share_sum(shares), tiny, part=part)
    (whole,) = launch(linear.whole(kind, shares), tiny, x=x, **weight.taken)
    np.testing.assert_array_equal(added, linear.sum_reference(part, np.dtype(np.float32)))
    np.testing.assert_array_equal(whole, added)


def test_a_program_adds_shares_in_their_order(tiny: ModelConfig) -> None:
    """A large sum that another order would lose."""
    width = 4 * linear.BLOCK_K
    x = np.zeros((3, width), np.float32)
    x[:, [0, 150, 300, 511]] = [1.0, 2.0**25, -(2.0**25), 1.0]  # one of each share
    weight = in_8_bits("int8", np.ones((3, width), np.int8), np.ones(3, np.float32))
    (whole,) = launch(linear.whole("int8", 4), tiny, x=x, **weight.taken)
    np.testing.assert_array_equal(whole, np.float32(1))  # ((1 + 2^25) - 2^25) + 1


def test_shares_fill_a_card_by_the_projection_alone() -> None:
    """Those of the 8B model, whose norms and rotation are compiled for so many, and of tiny ones."""
    assert [linear.shares(*sizes) for sizes in ((6144, 4096), (4096, 4096), (4096, 14336))] == [4, 4, 4]
    assert linear.MOST_SHARES == 4
    assert linear.shares(28672, 4096) == 1
    assert linear.shares(14336, 4096) == 2  # of two ranks
    assert linear.shares(100, 3 * linear.BLOCK_K) == 1
    assert linear.shares(100, 5 * linear.BLOCK_K) == 2


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tile", TILES)
def test_a_card_has_enough_bytes_on_their_way(bits: int, tile: int) -> None:
    """4.2 TB/s for a microsecond, of the narrowest projections; of 4 bits what instructions allow (docs/log.md)."""
    steps = linear.STEPS[bits][tile]
    assert linear.BLOCK_K % steps.inputs == 0
    programs = linear.MOST_SHARES * ceil_div(4096, linear.BLOCK_F)
    least = {16: 4.2e6, 8: 4.2e6, 4: 1.4e6}[bits]
    assert programs * (steps.stages - 1) * linear.BLOCK_F * steps.inputs * bits // 8 >= least


@pytest.mark.parametrize("tile", head_commit.TILES)
def test_a_head_in_8_bits_equals_that_of_its_values(tiny: ModelConfig, tile: int) -> None:
    """Numbers and x are small multiples of powers of two, so every order of summing gives the same logits."""
    rng = np.random.default_rng(tile)
    numbers = rng.integers(-128, 128, (1500, 40)).astype(np.int8)
    scale = np.exp2(rng.integers(-9, -4, 1500)).astype(np.float32)
    x = (rng.integers(-8, 9, (17, 40)) / 8).astype(np.float32)
    model = dataclasses.replace(tiny, vocab_size=1500, hidden_size=40, mask_id=100)
    span = np.tile(np.array([[0, 17]], np.int32), (17, 1))
    rule = {"index": np.arange(17, dtype=np.int32), "span": span, "threshold": np.full(17, 0.3, np.float32)}
    case = {"x": x, "ids": np.full(17, 100, np.int32), **rule}
    kept = np.zeros((17, 1500), np.float32)
    of_numbers = {"weight": numbers.view(np.uint8), "scale": scale}
    narrow = launch_head(tile, model, int8=True, **case, **of_numbers, kept=kept)
    if INTERPRETED:  # elsewhere it is a copy on the device
        np.testing.assert_array_equal(kept, x @ numbers.T.astype(np.float32) * scale)
    wide = launch_head(tile, model, **case, weight=numbers * scale[:, None], kept=kept)
    for one, other in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(one, other)


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


@settings(max_examples=8)
@given(st.integers(1, 20), st.sampled_from([1, 47, 1500]), st.integers(1, 5), st.integers(0, 99))
def test_swiglu_of_shares_is_that_of_their_sum(
    tiny: ModelConfig, size: int, width: int, shares: int, seed: int
) -> None:
    model = dataclasses.replace(tiny, intermediate_size=width)
    part = normal(seed, shares, size, 2 * width)
    got = launch(swiglu.op(shares), model, gate_up=part)
    whole = linear.sum_reference(part, np.dtype(np.float32))
    np.testing.assert_array_equal(got, launch(swiglu.op(), model, gate_up=whole))


@pytest.mark.parametrize("op", ["norm", "swiglu", "sum"])
def test_shares_are_added_in_one_order(tiny: ModelConfig, op: str) -> None:
    model = dataclasses.replace(tiny, hidden_size=40, intermediate_size=20)
    zeros = np.zeros((3, 40), np.float32)
    if op == "norm":
        given = {"x": one_order(3, 40), "residual": zeros, "weight": np.zeros(40, np.float32)}
        np.testing.assert_array_equal(launch(residual_norm.op(4), model, **given)[1], np.float32(1))
    elif op == "swiglu":
        expected = launch(swiglu.op(), model, gate_up=zeros + 1)
        np.testing.assert_array_equal(launch(swiglu.op(4), model, gate_up=one_order(3, 40)), expected)
    else:
        np.testing.assert_array_equal(launch(linear.share_sum(4), model, part=one_order(3, 40))[0], np.float32(1))


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
