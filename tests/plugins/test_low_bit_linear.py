"""Products with weights of 8 and 4 bits: kernels against their references, and that a token's bits are its own."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins.kernel_launch import DEVICE, INTERPRETED, bf16_products, launch, launch_head, normal, of_f32, rounded

from nemodiff.builder.checkpoint.low_bits import quantise_int4, quantise_rows
from nemodiff.config import ModelConfig
from nemodiff.contract import Quantization
from nemodiff.plugins.kernels.widened import from_e4m3, shifted_e4m3
from nemodiff.plugins.op import ceil_div
from nemodiff.plugins.ops import head_commit, low_bit_linear
from nemodiff.plugins.ops.low_bit_linear import GROUP
from nemodiff.runtime.engines.torch.quantized import unpacked

__all__ = ["bf16_products"]  # a fixture
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
EIGHT: tuple[Quantization, ...] = ("fp8", "int8")
FINITE = np.setdiff1d(np.arange(256), (0x7F, 0xFF)).astype(np.uint8)  # e4m3
pytestmark = [pytest.mark.torch] if INTERPRETED else [pytest.mark.torch, pytest.mark.gpu]


@triton.jit
def e4m3_of(bits, out, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 256)
    byte = tl.load(bits + at)
    tl.store(out + at, shifted_e4m3(byte) if SHIFTED else from_e4m3(byte))


def product(
    model: ModelConfig,
    kind: Quantization,
    x: np.ndarray,
    *weights: np.ndarray,
    parts: int = 1,
    dtype: str = "f32",
    small: bool = False,
) -> np.ndarray:
    """By the kernel, in the tile that the engine would take; weights by the op's inputs, summed in so many shares.

    `small` takes the tiles of f32.
    """
    tile = low_bit_linear.TILES[len(x) > low_bit_linear.TILES[0]]
    op = low_bit_linear.op(kind, tile)
    outputs = weights[0].shape[-2]
    named = dict(zip([arg.name for arg in op.inputs[1:-1]], weights, strict=True))
    counters = np.zeros((parts, low_bit_linear.counters(outputs, x.shape[1])[1]), np.int32)
    (y,) = launch(of_f32(op) if small else op, model, x=x, **named, counters=counters, dtype=dtype)
    assert not counters.any()
    return y


def in_8_bits(kind: Quantization, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stored, scale = low_bit_linear.quantise(weight) if kind == "fp8" else quantise_rows(weight)
    return stored.view(np.uint8), scale


def laid_out(numbers: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> list[np.ndarray]:
    return [t.numpy() for t in low_bit_linear.arranged(*map(torch.from_numpy, (numbers, scale, zero)))]


@pytest.mark.parametrize("kind", EIGHT)
@settings(max_examples=6)
@given(
    size=st.integers(1, 70), outputs=st.integers(1, 150), width=st.sampled_from([16, 48, 128, 272]),
    parts=st.integers(1, 3), small=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_8_bits_equal_the_reference(
    tiny: ModelConfig, kind: Quantization, size: int, outputs: int, width: int, parts: int, small: bool, seed: int
) -> None:
    """Also where the last tile of tokens, outputs or width is not full, and where a share has no inputs."""
    spread = np.exp(normal(seed, outputs, 1) * 3)  # every output has a scale of its own
    weight, scale = in_8_bits(kind, normal(seed + 1, outputs, width) * spread)
    x = normal(seed + 2, size, width)
    expected = low_bit_linear.reference(x, weight, scale, kind)
    got = product(tiny, kind, x, weight, scale, parts=parts, small=small)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@settings(max_examples=10)
@given(
    st.integers(1, 70), st.integers(1, 150), st.sampled_from([32, 64, 96, 288]), st.integers(1, 3), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_4_bits_equal_the_reference(
    tiny: ModelConfig, size: int, outputs: int, width: int, parts: int, zeros: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 16, (outputs, width)).astype(np.uint8)
    scale = (rng.standard_normal((outputs, width // GROUP)) / 8).astype(np.float32)
    zero = rng.integers(0, 16, (outputs, width // GROUP if zeros else 0)).astype(np.uint8)
    x = normal(seed + 2, size, width)
    expected = low_bit_linear.reference_int4(x, numbers, scale, zero)
    got = product(tiny, "int4", x, *laid_out(numbers, scale, zero), parts=parts)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", EIGHT)
def test_every_byte_is_rebuilt(tiny: ModelConfig, kind: Quantization) -> None:
    """All finite values, one per output, each alone: exact."""
    bits = FINITE if kind == "fp8" else np.arange(256).astype(np.uint8)
    weight = np.zeros((len(bits), 16), np.uint8)
    weight[:, 5] = bits
    x = np.zeros((1, 16), np.float32)
    x[0, 5] = 1.0
    got = product(tiny, kind, x, weight, np.full(len(bits), 0.5, np.float32))[0]
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
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 2e-3), ("bf16", 1e-2)])
@pytest.mark.parametrize("kind", low_bit_linear.KINDS)
def test_product_in_half_precision(tiny: ModelConfig, kind: Quantization, dtype: str, tolerance: float) -> None:
    """The largest weights and sums of hundreds do not overflow f16 on the way."""
    values = np.sign(normal(1, 40, 256)) * 0.01
    x = rounded(normal(2, 5, 256) * 50, dtype)
    if kind == "int4":
        packed, scale = quantise_int4(values)
        numbers = unpacked(torch.from_numpy(packed.reshape(40, -1))).numpy()
        zero = np.zeros((40, 0), np.uint8)
        expected = low_bit_linear.reference_int4(x, numbers, scale, zero)
        got = product(tiny, kind, x, *laid_out(numbers, scale, zero), parts=2, dtype=dtype)
    else:
        weight, scale = in_8_bits(kind, values)
        expected = low_bit_linear.reference(x, weight, scale, kind)
        got = product(tiny, kind, x, weight, scale, parts=2, dtype=dtype)
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("kind", EIGHT)
def test_a_nan_stays_in_its_token(tiny: ModelConfig, kind: Quantization) -> None:
    weight, scale = in_8_bits(kind, normal(1, 33, 48))
    x = np.ones((3, 48), np.float32)
    x[1, 7] = np.nan
    y = product(tiny, kind, x, weight, scale)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("size", [1, 20, 300])
def test_shares_are_summed_in_one_order(tiny: ModelConfig, size: int) -> None:
    """By a program each, by the last of them, and by one program for all: a large sum that another order would lose."""
    width = 4 * low_bit_linear.BLOCK_K
    x = np.zeros((size, width), np.float32)
    x[:, [0, 70, 140, 200]] = [1.0, 2.0**25, -(2.0**25), 1.0]  # one of each share
    weight = np.ones((3, width), np.int8).view(np.uint8)
    y = product(tiny, "int8", x, weight, np.ones(3, np.float32), parts=4)
    np.testing.assert_array_equal(y, np.float32(1))  # ((1 + 2^25) - 2^25) + 1


def test_shares_come_from_the_shape_of_a_projection() -> None:
    """Those of the 8B model fill a card; no share is shorter than a few steps."""
    for outputs, inputs in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (40, 64)):
        count = low_bit_linear.shares(outputs, inputs)
        assert 1 <= count <= low_bit_linear.MOST_SHARES
        programs = count * ceil_div(outputs, low_bit_linear.BLOCK_F)
        assert programs >= 200 or outputs == 40
        assert count == 1 or ceil_div(inputs, count) >= low_bit_linear.LEAST_STEPS * low_bit_linear.BLOCK_K


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
