"""What a query does not see has no influence: hidden slots of K and V are large, and no bit of a result changes.

Hidden are the slots past every interval, those between two, and those that only other queries of the pass see.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from stand_ins.function_body import run
from stand_ins.kernel_launch import INTERPRETED, bf16_products, causal, groups, launch, rounded

from nemodiff.builder.graph.graph import build_graph
from nemodiff.config import ModelConfig
from nemodiff.contract import Dtype
from nemodiff.plugins.ops import block_attention

__all__ = ["bf16_products"]  # a fixture

WIDTH = 16
SCALE = WIDTH**-0.5
on_device = pytest.mark.usefixtures("bf16_products") if INTERPRETED else pytest.mark.gpu
LARGE = {"f32": (1e4, 1e20, 1e30), "f16": (4000.0, 60000.0), "bf16": (1e4, 1e20, 1e30)}
SLOTS = 90
TWO_SPANS = np.array([[[70, 80, 90], [3, 80, 82], [0, 81, 90], [64, 0, 0]]], np.int32)
LAYOUTS = {"one token": causal(66, 1), "chunk": causal(60, 9), "groups": groups(50, 4, 5), "two spans": TWO_SPANS}


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of BlockAttention in f32, of values that the compute type has."""

    q: np.ndarray  # (B, H, S, D)
    k: np.ndarray  # (B, G, T, D)
    v: np.ndarray
    visible: np.ndarray  # (B, S, 3) i32

    def seen_by(self, query: int) -> np.ndarray:
        """The slots that a query sees, (B, T) bool."""
        slots = np.arange(self.k.shape[2])
        prefix_end, begin, end = (self.visible[:, query, i, None] for i in range(3))
        return (slots < prefix_end) | ((slots >= begin) & (slots < end))

    def poisoned(self, query: int, large: float, dtype: str) -> Case:
        """The same, but what this query does not see points along it and against it, and is large in V."""
        hidden = ~self.seen_by(query)[:, None, :, None]
        along = np.sign(self.q[:, : self.k.shape[1], query])[:, :, None]
        sides = np.where(np.arange(self.k.shape[2]) % 2, 1, -1)[None, None, :, None]
        k = rounded(np.where(hidden, along * sides * large, self.k).astype(np.float32), dtype)
        v = rounded(np.where(hidden, -large, self.v).astype(np.float32), dtype)
        return dataclasses.replace(self, k=k, v=v)


def make_case(
    visible: np.ndarray, dtype: str, slots: int = 130, seed: int = 0, heads: tuple[int, int] = (4, 2)
) -> Case:
    rng = np.random.default_rng(seed)
    rows, size = visible.shape[:2]
    shapes = (rows, heads[0], size, WIDTH), (rows, heads[1], slots, WIDTH), (rows, heads[1], slots, WIDTH)
    q, k, v = (rounded(rng.standard_normal(shape, dtype=np.float32), dtype) for shape in shapes)
    return Case(q, k, v, visible)


def by_onnxruntime(case: Case, dtype: str, hidden: float) -> np.ndarray:
    kind = {"f32": np.float32, "f16": np.float16}[dtype]
    feeds = {"q": case.q.astype(kind), "k": case.k.astype(kind), "v": case.v.astype(kind), "visible": case.visible}
    feeds["slots"] = np.arange(case.k.shape[2], dtype=np.int32)
    result = {"y": helper.np_dtype_to_tensor_dtype(np.dtype(kind))}
    heads = (case.q.shape[1], case.k.shape[1], case.q.shape[3])
    (y,) = run(block_attention.function(hidden, heads), feeds, result, scale=SCALE)
    return np.asarray(y)


@st.composite
def intervals(draw: st.DrawFn) -> np.ndarray:
    rows, size = draw(st.integers(1, 2)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    visible = rng.integers(0, SLOTS // 2, (rows, size, 3)).astype(np.int32)
    visible[..., 0] = np.maximum(visible[..., 0], visible[..., 2] <= visible[..., 1])  # see at least one slot
    return visible


@settings(max_examples=30, deadline=None)
@given(data=st.data(), visible=intervals(), dtype=st.sampled_from(["f32", "f16"]))
def test_the_function_body_on_onnxruntime(data: st.DataObject, visible: np.ndarray, dtype: str) -> None:
    """In f16 a product past 65504 is infinite; ONNX Runtime still takes -inf for a score of nothing."""
    case = make_case(visible, dtype, SLOTS, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([(4, 2), (3, 3)])))
    large = data.draw(st.sampled_from(LARGE[dtype]))
    clean = by_onnxruntime(case, dtype, -np.inf)
    for query in range(visible.shape[1]):
        y = by_onnxruntime(case.poisoned(query, large, dtype), dtype, -np.inf)
        np.testing.assert_array_equal(y[:, :, query], clean[:, :, query])


@pytest.mark.parametrize(("dtype", "large"), [("f32", 1e4), ("f32", 1e20), ("f16", 1e4)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_finite_mask_of_tensorrt(name: str, dtype: Dtype, large: float) -> None:
    """Its engines' function body, run by ONNX Runtime; in f16 as far as scores lie below the mask."""
    case = make_case(LAYOUTS[name], dtype)
    hidden = block_attention.FINITE[dtype]
    clean = by_onnxruntime(case, dtype, hidden)
    np.testing.assert_array_equal(clean, by_onnxruntime(case, dtype, -np.inf))
    for query in range(case.visible.shape[1]):
        y = by_onnxruntime(case.poisoned(query, large, dtype), dtype, hidden)
        np.testing.assert_array_equal(y[:, :, query], clean[:, :, query])


@pytest.mark.parametrize("dtype", list(block_attention.FINITE))
def test_the_finite_mask_stays_finite(dtype: Dtype) -> None:
    """As it is, in the compute type, with a score of some thousands, and in base 2."""
    mask = block_attention.FINITE[dtype]
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert torch.tensor(mask - 5000.0).to(kind).isfinite()
    assert np.isfinite(np.float32(mask) * np.float32(1.4427))
    assert mask < -50000


@pytest.mark.parametrize(("capacity", "dtype"), [(None, "f32"), (None, "f16"), (128, "bf16"), (128, "f16")])
def test_engines_get_the_mask_of_their_backend(tiny: ModelConfig, capacity: int | None, dtype: Dtype) -> None:
    """ONNX Runtime's capacity is open, TensorRT's is fixed."""
    proto = build_graph(tiny, dtype, capacity=capacity).proto
    body = next(f for f in proto.functions if f.name == "BlockAttention")
    constant = next(n for n in body.node if n.output[0] == "hidden")
    value = helper.get_attribute_value(constant.attribute[0])
    expected = -np.inf if capacity is None else block_attention.FINITE[dtype]
    assert list(value.float_data) == [np.float32(expected)]


@pytest.mark.parametrize("dtype", list(LARGE))
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_reference(name: str, dtype: str) -> None:
    case = make_case(LAYOUTS[name], dtype)
    clean = block_attention.reference(case.q, case.k, case.v, case.visible, SCALE)
    for query in range(case.visible.shape[1]):
        spoilt = case.poisoned(query, LARGE[dtype][-1], dtype)
        y = block_attention.reference(spoilt.q, spoilt.k, spoilt.v, spoilt.visible, SCALE)
        np.testing.assert_array_equal(y[:, :, query], clean[:, :, query])


def test_the_reference_of_a_query_that_sees_nothing() -> None:
    case = make_case(np.zeros((1, 2, 3), np.int32), "f32")
    assert (block_attention.reference(case.q, case.k, case.v, case.visible, SCALE) == 0).all()
    assert np.isfinite(by_onnxruntime(case, "f32", -np.inf)).all()
    assert np.isfinite(by_onnxruntime(case, "f16", -np.inf)).all()


@on_device
@pytest.mark.parametrize("dtype", list(LARGE))
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_kernels(tiny: ModelConfig, name: str, dtype: str) -> None:
    check_kernels(tiny, make_case(LAYOUTS[name], dtype), dtype, LARGE[dtype][-1])


@on_device
@settings(max_examples=4, deadline=None)
@given(visible=intervals(), dtype=st.sampled_from(list(LARGE)), seed=st.integers(0, 99))
def test_the_kernels_with_random_intervals(tiny: ModelConfig, visible: np.ndarray, dtype: str, seed: int) -> None:
    check_kernels(tiny, make_case(visible, dtype, SLOTS, seed), dtype, LARGE[dtype][0])


def check_kernels(tiny: ModelConfig, case: Case, dtype: str, large: float) -> None:
    model = dataclasses.replace(tiny, num_heads=case.q.shape[1], num_kv_heads=case.k.shape[1], head_dim=WIDTH)

    def attend(case: Case) -> np.ndarray:
        (y,) = launch(block_attention.OP, model, dtype, q=case.q, k=case.k, v=case.v, visible=case.visible)
        return y

    clean = attend(case)
    for query in {0, case.visible.shape[1] - 1}:
        y = attend(case.poisoned(query, large, dtype))
        np.testing.assert_array_equal(y[:, :, query], clean[:, :, query])
