"""Each op: its ONNX function body equals its numpy reference on random shapes, in f32 and f16."""

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from stand_ins.function_body import run

from nemodiff.contract import DOMAIN
from nemodiff.plugins.ops import block_attention, confidence_commit, kv_cache

MASK = 5


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 3),
    groups=st.sampled_from([1, 4, 8]),
    kv_heads=st.sampled_from([1, 2, 3]),
    size=st.integers(1, 9),
    slots=st.integers(1, 40),
    width=st.sampled_from([2, 8, 20]),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_block_attention_equals_its_reference(
    data: st.DataObject, rows: int, groups: int, kv_heads: int, size: int, slots: int, width: int, dtype: type
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    q = rng.standard_normal((rows, groups * kv_heads, size, width)).astype(dtype)
    k, v = (rng.standard_normal((rows, kv_heads, slots, width)).astype(dtype) for _ in range(2))
    ends = rng.integers(0, slots + 1, (rows, size, 3))  # empty, full, overlapping and disjoint intervals
    ends[..., 0] = np.maximum(ends[..., 0], (ends[..., 2] <= ends[..., 1]) * 1)  # see at least one slot
    visible = ends.astype(np.int32)
    feeds = {"q": q, "k": k, "v": v, "visible": visible, "slots": np.arange(slots, dtype=np.int32)}
    scale = float(width**-0.5)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    heads = data.draw(st.sampled_from([None, (groups * kv_heads, kv_heads, width)]))
    (y,) = run(block_attention.function(heads=heads), feeds, {"y": kind}, scale=scale)
    expected = block_attention.reference(q, k, v, visible, scale)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        y.astype(np.float32), expected.astype(np.float32), atol=2e-6 if dtype == np.float32 else 1e-2, rtol=0
    )


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.sampled_from([(4, 2), (3, 1), (8, 2)]),
    size=st.integers(1, 9),
    slots=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_block_attention_in_int8_equals_the_reference(
    rows: int, heads: tuple[int, int], size: int, slots: int, seed: int
) -> None:
    """Of the numbers that bytes and scales stand for."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((rows, heads[0], size, 8), np.float32)
    kept = [kv_cache.quantise(rng.standard_normal((rows, heads[1], slots, 8)), "int8") for _ in range(2)]
    ends = rng.integers(0, slots + 1, (rows, size, 3)).astype(np.int32)
    ends[..., 0] = np.maximum(ends[..., 0], 1)
    (k, k_scale), (v, v_scale) = kept
    feeds = {"q": q, "k": k, "k_scale": k_scale[..., None], "v": v, "v_scale": v_scale[..., None], "visible": ends}
    function = block_attention.int8_function((*heads, 8))
    feeds["slots"] = np.arange(slots, dtype=np.int32)
    (y,) = run(function, feeds, {"y": onnx.TensorProto.FLOAT}, scale=0.4)
    numbers = [kv_cache.dequantise(*part) for part in kept]
    np.testing.assert_allclose(y, block_attention.reference(q, *numbers, ends, 0.4), atol=4e-6, rtol=0)


def test_block_attention_hides_what_is_outside_both_intervals() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 1, 1, 4), np.float32)
    k = rng.standard_normal((1, 1, 9, 4), np.float32)
    v = rng.standard_normal((1, 1, 9, 4), np.float32)
    visible = np.array([[[2, 5, 7]]], np.int32)
    seen = [0, 1, 5, 6]
    y = block_attention.reference(q, k, v, visible, 0.5)
    spoiled_k = k.copy()
    spoiled_v = v.copy()
    hidden = [s for s in range(9) if s not in seen]
    spoiled_k[:, :, hidden] += 3
    spoiled_v[:, :, hidden] = 100
    np.testing.assert_array_equal(y, block_attention.reference(q, spoiled_k, spoiled_v, visible, 0.5))
    feeds = {"q": q, "k": spoiled_k, "v": spoiled_v, "visible": visible, "slots": np.arange(9, dtype=np.int32)}
    (got,) = run(block_attention.function(), feeds, {"y": onnx.TensorProto.FLOAT}, scale=0.5)
    np.testing.assert_allclose(got, y, atol=1e-6)


def commit(logits: np.ndarray, ids: np.ndarray, threshold: np.ndarray, vocab: int | None = None) -> list[np.ndarray]:
    kinds = [onnx.TensorProto.INT32, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT32]
    results = dict(zip(["token", "confidence", "next_ids", "masks_left"], kinds, strict=True))
    feeds = {"logits": logits, "ids": ids, "threshold": threshold}
    return list(run(confidence_commit.function(vocab), feeds, results, mask_id=MASK))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 3),
    size=st.integers(1, 12),
    vocab=st.integers(7, 60),
    levels=st.sampled_from([None, 3]),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_confidence_commit_equals_its_reference(
    data: st.DataObject, rows: int, size: int, vocab: int, levels: int | None, dtype: type
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = (rng.standard_normal((rows, size, vocab)) * 4).astype(dtype).astype(np.float32)
    if levels:  # many exact ties, in the argmax and between positions
        logits = np.repeat(rng.integers(0, levels, (rows, 1, vocab)), size, axis=1).astype(np.float32)
    logits[:, :, MASK] = 50  # the mask id would win everywhere
    ids = np.where(rng.random((rows, size)) < 0.6, MASK, 2).astype(np.int32)
    threshold = np.array(
        data.draw(st.lists(st.sampled_from([0, 0.3, 0.9, 2]), min_size=rows, max_size=rows)), np.float32
    )
    got = commit(logits, ids, threshold)
    for least in (confidence_commit.MANY, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(confidence_commit, "MANY", least)
            known = commit(logits, ids, threshold, vocab)
        for mine, other in zip(got, known, strict=True):
            np.testing.assert_array_equal(mine, other)
    expected = confidence_commit.reference(logits, ids, threshold, MASK)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)
    np.testing.assert_array_equal(got[2], expected[2])
    np.testing.assert_array_equal(got[3], expected[3])
    # What the rule promises, checked without the reference.
    masks = (ids == MASK).sum(1)
    assert (got[0] != MASK).all()
    assert (got[2][ids != MASK] == ids[ids != MASK]).all()
    assert (got[3] < masks)[masks > 0].all()
    assert (got[3][threshold == 0] == 0).all()
    assert (masks - got[3] <= 1)[threshold > 1].all()


def test_confidence_commit_leaves_the_caller_s_logits_alone() -> None:
    logits = np.ones((1, 1, 8), np.float32)
    confidence_commit.reference(logits, np.array([[MASK]], np.int32), np.zeros(1, np.float32), MASK)
    assert (logits == 1).all()


@pytest.mark.parametrize("vocab", [None, 12, confidence_commit.MANY])
def test_confidence_commit_makes_progress_where_nothing_is_a_number(vocab: int | None) -> None:
    logits = np.full((1, 3, vocab or 12), np.nan, np.float32)
    *_, left = commit(logits, np.full((1, 3), MASK, np.int32), np.full(1, 0.9, np.float32), vocab)
    assert left[0] == 2


@pytest.mark.parametrize("module", [block_attention, confidence_commit])
def test_functions_declare_their_namespace(module: Any) -> None:
    function = module.function()
    assert function.domain == DOMAIN
    assert "plugin_namespace" in function.attribute
    assert [(o.domain, o.version) for o in function.opset_import] == [("", 24)]
