"""Every kernel in every dtype against its reference: on a GPU (`-m gpu`) at the 8B model's sizes, else interpreted.

Inputs are rounded to the dtype first and the references compute on those, so what is left is the order of sums and the
last rounding. f32 in the interpreter is in test_kernels.py and test_fused.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.kernel_launch import DEVICE, INTERPRETED, MASK, TYPES, bf16_products, causal, groups

from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.config import ModelConfig
from nemodiff.contract import PAGE
from nemodiff.plugins.op import Arg, Op, run
from nemodiff.plugins.ops import (
    block_attention,
    confidence_commit,
    flat_commit,
    head_commit,
    residual_norm,
    rope_write,
    swiglu,
)

__all__ = ["bf16_products"]  # a fixture
pytestmark = [pytest.mark.usefixtures("bf16_products"), *([] if INTERPRETED else [pytest.mark.gpu])]

NUMPY: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
# Two steps of the last bit, relative and of numbers around 1.
CLOSE = {"f32": 4e-6, "f16": 2e-3, "bf16": 1.6e-2}
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "hidden_size": 96, "intermediate_size": 160}
LARGE = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 14336}
SIZES = {**SMALL, "vocab_size": 600} if INTERPRETED else {**LARGE, "vocab_size": 131072}
TOKENS = (3,) if INTERPRETED else (1, 8, 32, 64)
SLOTS = 150 if INTERPRETED else 4096

each_dtype = pytest.mark.parametrize("dtype", ["f16", "bf16"] if INTERPRETED else list(NUMPY))
each_size = pytest.mark.parametrize("size", TOKENS)


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return dataclasses.replace(open_checkpoint(TINY_CHAT).model, **SIZES, mask_id=MASK)


def normal(seed: int, dtype: str, *shape: int) -> np.ndarray:
    values: np.ndarray = np.random.default_rng(seed).standard_normal(shape, np.float32).astype(NUMPY[dtype])
    return values


def steps(seed: int, dtype: str, *shape: int) -> np.ndarray:
    """Multiples of 1/8 in -1..1, whose products and sums every dtype's kernel has exactly."""
    values: np.ndarray = (np.random.default_rng(seed).integers(-8, 9, shape) / 8).astype(NUMPY[dtype])
    return values


def on_device(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16).to(DEVICE)
    return torch.from_numpy(array.copy()).to(DEVICE)


def wide(tensor: Any) -> np.ndarray:
    """Numbers of any floating dtype as f32, integers as they are; of a tensor or an array."""
    if isinstance(tensor, torch.Tensor):
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    array: np.ndarray = tensor.astype(np.float32) if tensor.dtype.kind != "i" else tensor
    return array


def launch(op: Op, model: ModelConfig, dtype: str, inputs: dict[str, np.ndarray]) -> tuple[list[Any], dict[str, Any]]:
    """An op's outputs, and its inputs as they are afterwards."""

    def new(arg: Arg, shape: tuple[int, ...]) -> torch.Tensor:
        kind = TYPES[{"compute": dtype, "logits": dtype}.get(arg.dtype, arg.dtype)]
        return torch.full(shape, float("nan") if kind.is_floating_point else -7, dtype=kind, device=DEVICE)

    tensors = {name: on_device(array) for name, array in inputs.items()}
    return run(op, model, tensors, new), tensors


def check(got: Any, expected: np.ndarray, dtype: str) -> None:
    np.testing.assert_allclose(wide(got), wide(expected), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@each_dtype
@each_size
def test_attention(model: ModelConfig, dtype: str, size: int) -> None:
    heads, width = (model.num_heads, model.num_kv_heads), model.head_dim
    visible = groups(SLOTS - 70, size, 1) if size > 1 else causal(SLOTS - 1, 1)
    tokens = visible.shape[1]
    q = normal(1, dtype, 1, heads[0], tokens, width)
    k, v = (normal(seed, dtype, 1, heads[1], SLOTS + 64, width) for seed in (2, 3))
    expected = block_attention.reference(q, k, v, visible, width**-0.5)
    (y,), _ = launch(block_attention.OP, model, dtype, {"q": q, "k": k, "v": v, "visible": visible})
    check(y, expected, dtype)


def commits(model: ModelConfig, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(size)
    ids = rng.integers(0, model.vocab_size, (2, size)).astype(np.int32)
    ids[rng.random((2, size)) < 0.7] = MASK
    return {"ids": ids, "threshold": np.array([0.01, 2], np.float32)}


def check_commit(got: list[Any], expected: Any) -> None:
    """Integers exactly, ties to the left; confidence within f32 rounding of a sum over the vocabulary."""
    np.testing.assert_allclose(wide(got[1]), expected[1], rtol=2e-5)
    for result, reference in zip(got, expected, strict=True):
        if reference.dtype == np.int32:
            np.testing.assert_array_equal(wide(result), reference)


@each_dtype
@each_size
def test_commit(model: ModelConfig, dtype: str, size: int) -> None:
    """16 bits make ties in the vocabulary and between positions."""
    case = {"logits": normal(4, dtype, 2, size, model.vocab_size), **commits(model, size)}
    got, _ = launch(confidence_commit.OP, model, dtype, case)
    check_commit(got, confidence_commit.reference(**case, mask_id=MASK))


@each_dtype
@each_size
@pytest.mark.parametrize("tile", head_commit.TILES[: 1 if INTERPRETED else None])
def test_head(model: ModelConfig, dtype: str, size: int, tile: int) -> None:
    case = {
        "x": steps(5, dtype, 2 * size, model.hidden_size),
        "weight": steps(6, dtype, model.vocab_size, model.hidden_size),
    }
    rows = commits(model, size)
    begin = np.repeat(np.array([0, size], np.int32), size)
    index = np.arange(2 * size, dtype=np.int32)[::-1].copy()
    rule = {"ids": rows["ids"].ravel(), "index": index, "span": np.stack([begin, begin + size], 1)}
    case |= {**rule, "threshold": np.repeat(rows["threshold"], size)}
    no_logits = np.zeros((2 * size, 0), np.float32)
    scanned = {name: case[name] for name in ("x", "weight", "index")}
    (part, best), _ = launch(head_commit.flat_op(tile), model, dtype, {**scanned, "kept": no_logits})
    found = {"part": wide(part), "best": wide(best)}
    got, _ = launch(flat_commit.OP, model, dtype, {**rule, "threshold": case["threshold"], **found})
    check_commit(got, head_commit.reference(**case, mask_id=MASK))


@each_dtype
@each_size
def test_norm(model: ModelConfig, dtype: str, size: int) -> None:
    shape = (2 * size, model.hidden_size)
    case = {"x": normal(7, dtype, *shape), "residual": normal(8, dtype, *shape), "weight": normal(9, dtype, shape[1])}
    (y, total), _ = launch(residual_norm.op(), model, dtype, case)
    expected = residual_norm.reference(**case, eps=model.rms_norm_eps)
    check(y, expected[0], dtype)
    if INTERPRETED and dtype == "bf16":  # the interpreter cuts f32 off where a GPU rounds it
        check(total, expected[1], dtype)
    else:
        np.testing.assert_array_equal(wide(total), wide(expected[1]))


@each_dtype
@each_size
def test_swiglu(model: ModelConfig, dtype: str, size: int) -> None:
    case = {"gate_up": normal(10, dtype, 2 * size, 2 * model.intermediate_size)}
    (y,), _ = launch(swiglu.op(), model, dtype, case)
    check(y, swiglu.reference(**case), dtype)


@each_dtype
@each_size
def test_rotation(model: ModelConfig, dtype: str, size: int) -> None:
    """K and V in place, in their slots of the pages and no other."""
    heads, kv, width = model.num_heads, model.num_kv_heads, model.head_dim
    angle = normal(11, "f32", size, width // 2) * 50
    pages = 1 + -(-size // PAGE)
    case = {
        "qkv": normal(12, dtype, size, (heads + 2 * kv) * width),
        "cos": np.cos(angle).astype(NUMPY[dtype]),
        "sin": np.sin(angle).astype(NUMPY[dtype]),
        "scale": (1 + np.abs(normal(13, "f32", size))).astype(NUMPY[dtype]),
        "slot": np.random.default_rng(size).permutation(pages * PAGE)[:size].astype(np.int32),
        "k_pages": normal(14, dtype, pages, kv, PAGE, width),
        "v_pages": normal(15, dtype, pages, kv, PAGE, width),
    }
    (q,), after = launch(rope_write.paged(None), model, dtype, case)
    expected = {name: array.copy() for name, array in case.items()}
    check(q, rope_write.paged_reference(**expected, heads=heads), dtype)
    check(after["k_pages"], expected["k_pages"], dtype)
    np.testing.assert_array_equal(wide(after["v_pages"]), wide(expected["v_pages"]))
