"""What works on flat tokens of any rows, over pages, against its references, interpreted or on a GPU.

Pages lie in any order and hold NaN where no token of their row looks; page numbers past a row's end lead nowhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_ins.kernel_launch import (
    DEVICE,
    INTERPRETED,
    MASK,
    SCALES_ROWS,
    TYPES,
    bf16_products,
    causal,
    groups,
    launch,
    launch_head,
    of_f32,
    rounded,
)

from nemodiff.config import ModelConfig
from nemodiff.contract import PAGE, KvBits
from nemodiff.plugins import KV_BITS, SAMPLED
from nemodiff.plugins.op import Arg, ceil_div, run
from nemodiff.plugins.ops import (
    head_commit,
    kv_cache,
    linear,
    paged_attention,
    rope_write,
    rotation,
    token_quantise,
)

__all__ = ["bf16_products"]  # a fixture
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

WIDTH = 16


def flat(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Row and first token of each token, where the rows follow each other, the first of them at the end."""
    counts = [*map(len, rows[1:]), len(rows[0])]
    row = np.repeat([*range(1, len(rows)), 0], counts).astype(np.int32)
    return row, np.repeat(np.cumsum([0, *counts[:-1]]), counts).astype(np.int32)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split as for a small card, since the interpreter takes its time for every program."""
    monkeypatch.setattr(paged_attention, "PROGRAMS", 12)


@dataclasses.dataclass
class Paged:
    """A pass over rows whose tokens see given slots, in pages of a random order; row 0 comes last, as padding does."""

    row: np.ndarray  # (N,) i32
    first: np.ndarray  # (N,) i32
    visible: np.ndarray  # (N, 3) i32
    page_table: np.ndarray  # (B, M) i32
    q: np.ndarray  # (N, H, D) f32
    k_pages: np.ndarray  # (A, G, PAGE, D)
    v_pages: np.ndarray

    @classmethod
    def of(cls, rows: list[np.ndarray], heads: tuple[int, int], width: int, dtype: str, seed: int = 0) -> Paged:
        """`rows` holds a `visible` (S, 3) per row, empty for a row without tokens."""
        rng = np.random.default_rng(seed)
        ends = [int(row[:, ::2].max(initial=0)) for row in rows]
        pages = [-(-end // PAGE) for end in ends]
        table = np.full((len(rows), max(1, *pages)), 2**30, np.int32)
        order = rng.permutation(sum(pages) + 2).astype(np.int32)
        shape = (len(order), heads[1], PAGE, width)
        k, v = (np.full(shape, fill, np.float32) for fill in (np.nan, np.inf))
        used = 0
        for row, (visible, count) in enumerate(zip(rows, pages, strict=True)):
            table[row, :count] = order[used : used + count]
            used += count
            slots = np.arange(count * PAGE)
            seen = (slots < visible[:, :1]) | ((slots >= visible[:, 1:2]) & (slots < visible[:, 2:]))  # (S, T)
            for slot in np.flatnonzero(seen.any(0)):
                for cache in (k, v):
                    values = rng.standard_normal((heads[1], width), np.float32)
                    cache[table[row, slot // PAGE], :, slot % PAGE] = rounded(values, dtype)
        row_of, first = flat(rows)
        q = rounded(rng.standard_normal((len(first), heads[0], width), np.float32), dtype)
        return cls(row_of, first, np.concatenate([*rows[1:], rows[0]]).astype(np.int32), table, q, k, v)


def attend(
    tiny: ModelConfig,
    case: Paged,
    dtype: str = "f32",
    bits: KvBits | None = None,
    programs: int | None = None,
    small: bool = False,
) -> float:
    """The largest difference of kernel and reference; `small` takes the tiles of f32."""
    width = case.q.shape[2]
    model = dataclasses.replace(tiny, num_heads=case.q.shape[1], num_kv_heads=case.k_pages.shape[1], head_dim=width)
    caches = {"k_pages": case.k_pages, "v_pages": case.v_pages}
    with np.errstate(invalid="ignore"):
        pages = [np.nan_to_num(p, posinf=0) for p in caches.values()]
        if bits:
            caches, pages = in_bits(pages, np.isnan(case.k_pages).any(-1), bits)
        expected = paged_attention.reference(case.q, *pages, case.page_table, case.row, case.visible, width**-0.5)
    y = launched(model, case, caches, dtype, bits, programs, small)
    assert np.isfinite(y).all()
    return float(np.abs(y - expected).max(initial=0))


def in_bits(
    pages: list[np.ndarray], hidden: np.ndarray, bits: KvBits
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The arguments of pages in 8 bits, the wildest ones where nobody looks; and the numbers that they stand for."""
    caches, numbers = {}, []
    for part, (values, scales) in zip("kv", (kv_cache.quantise(p, bits) for p in pages), strict=True):
        numbers.append(kv_cache.dequantise(values, scales))
        values[hidden], scales[hidden] = 127, np.nan  # 127 is NaN in e4m3
        caches |= {f"{part}_pages": values, f"{part}_scales": scales}
    return caches, numbers


def launched(
    model: ModelConfig,
    case: Paged,
    caches: dict[str, np.ndarray],
    dtype: str,
    bits: KvBits | None,
    programs: int | None,
    small: bool,
) -> np.ndarray:
    """y, after two layers with one plan."""

    def new(arg: Arg, shape: tuple[int, ...]) -> torch.Tensor:
        kind = TYPES[dtype if arg.dtype == "compute" else arg.dtype]
        return torch.full(shape, float("nan") if kind.is_floating_point else 10**6, dtype=kind, device=DEVICE)

    seen = {"visible": case.visible, "page_table": case.page_table}
    ints = {
        name: torch.from_numpy(array).to(DEVICE)
        for name, array in {**seen, "row": case.row, "first": case.first}.items()
    }
    items, merges = run(paged_attention.plan(programs), model, ints, new)
    op = paged_attention.op(bits, programs)
    op = of_f32(op) if small else op
    given = {
        name: torch.from_numpy(array).to(TYPES[dtype if op.args[name].dtype == "compute" else op.args[name].dtype])
        for name, array in {"q": case.q, **caches}.items()
    }
    layer = {name: tensor.to(DEVICE) for name, tensor in given.items()} | {name: ints[name] for name in seen}
    layer |= {"items": items, "merges": merges}
    results = [run(op, model, layer, new)[0].float().cpu().numpy() for _ in range(2)]
    np.testing.assert_array_equal(results[0], results[1])
    first: np.ndarray = results[0]
    return first


def chunk(start: int, size: int) -> np.ndarray:
    visible: np.ndarray = causal(start, size)[0]
    return visible


def block(start: int, size: int) -> np.ndarray:
    return np.tile(np.array([start + size, 0, 0], np.int32), (size, 1))


def quadratic(start: int, heads: int, size: int) -> np.ndarray:
    visible: np.ndarray = groups(start, heads, size)[0]
    return visible


NOBODY = np.zeros((0, 3), np.int32)
LAYOUTS = {
    "one token": [chunk(0, 1)],
    "a page's end": [NOBODY, chunk(63, 1), chunk(64, 1), chunk(62, 3)],  # nor any padding
    "decode": [chunk(703, 1)],  # its last page is whole, and the last of the table
    "prefill": [chunk(0, 90)],
    "chunk": [chunk(190, 65)],
    "block": [block(90, 32)],
    "quadratic": [quadratic(50, 5, 8)],
    "quadratic over pages": [quadratic(190, 5, 9)],
    "rows of every kind": [chunk(900, 1), NOBODY, block(40, 32), quadratic(100, 3, 4), chunk(5, 20), NOBODY],
    "padding": [chunk(30, 2), np.zeros((5, 3), np.int32)],
    "nobody but padding": [NOBODY, np.zeros((3, 3), np.int32)],
    "spans": [np.array([[70, 40, 90], [0, 40, 90], [90, 0, 40], [3, 400, 490], [1, 5, 4]], np.int32)],
}


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_over_pages_sees_what_it_should(tiny: ModelConfig, name: str) -> None:
    assert attend(tiny, Paged.of(LAYOUTS[name], (4, 2), WIDTH, "f32")) < 2e-6


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("heads", "width"), [((4, 4), 48), ((4, 1), 128), ((6, 2), 16), ((32, 1), 16)])
def test_attention_over_pages_packs_every_group_and_width(
    tiny: ModelConfig, heads: tuple[int, int], width: int
) -> None:
    assert attend(tiny, Paged.of([chunk(300, 7), block(40, 5)], heads, width, "f32")) < 2e-6


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("bits", KV_BITS)
def test_attention_over_pages_in_tiles_of_f32(
    monkeypatch: pytest.MonkeyPatch, tiny: ModelConfig, bits: KvBits | None
) -> None:
    """The head by slices, the last of them not whole, and a large tile in parts."""
    monkeypatch.setattr(paged_attention, "SHORT", 0)
    case = Paged.of([block(45, 24), quadratic(50, 2, 3)], (4, 2), 72, "f32")
    assert attend(tiny, case, bits=bits, small=True) < 2e-6


@pytest.mark.usefixtures("bf16_products", "few_programs")
@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 2e-3), ("bf16", 2e-2)])
def test_attention_over_pages_in_half_precision(
    tiny: ModelConfig, dtype: str, tolerance: float, bits: KvBits | None
) -> None:
    case = Paged.of([quadratic(300, 4, 6), chunk(70, 1)], (8, 2), 64, dtype)
    assert attend(tiny, case, dtype, bits) < tolerance


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("name", "width"), [("a page's end", 48), ("quadratic over pages", 16), ("spans", 16)])
@pytest.mark.parametrize("bits", KV_BITS[1:])
def test_attention_over_pages_of_8_bits_sees_what_it_should(
    tiny: ModelConfig, name: str, width: int, bits: KvBits
) -> None:
    assert attend(tiny, Paged.of(LAYOUTS[name], (4, 2), width, "f32"), bits=bits) < 2e-6


@st.composite
def passes(draw: st.DrawFn) -> list[np.ndarray]:
    """Rows whose tokens see anything, some of them nothing, and begin and end at a page's border or next to it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=3).filter(any))
    rows = []
    for count in counts:
        visible = rng.integers(0, draw(st.sampled_from([50, 300])), (count, 3)).astype(np.int32)
        borders = np.where(
            rng.random((count, 3)) < 0.5, visible, visible // PAGE * PAGE + rng.integers(-1, 2, (count, 3))
        )
        rows.append(np.where(rng.random((count, 1)) < 0.1, 0, borders.clip(0)).astype(np.int32))
    return rows


@pytest.mark.usefixtures("few_programs")
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    passes(),
    st.integers(0, 99),
    st.sampled_from([(4, 2), (6, 2), (5, 1), (24, 1)]),
    st.sampled_from([None, 3, 40]),
    st.sampled_from(KV_BITS),
)
def test_attention_over_pages_of_random_rows(
    tiny: ModelConfig,
    rows: list[np.ndarray],
    seed: int,
    heads: tuple[int, int],
    programs: int | None,
    bits: KvBits | None,
) -> None:
    assert attend(tiny, Paged.of(rows, heads, WIDTH, "f32", seed), bits=bits, programs=programs) < 4e-6


def planned(
    model: ModelConfig, rows: list[np.ndarray], programs: int | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """The items of a pass that have something to do, what its tokens are merged from, and the pass's sizes."""
    row, first = flat(rows)
    visible = np.concatenate([*rows[1:], rows[0]]).astype(np.int32)
    items, merges = launch(
        paged_attention.plan(programs),
        model,
        row=row,
        first=first,
        visible=visible,
        page_table=np.zeros((len(rows), 1000), np.int32),
    )
    dims = {"N": len(visible), "B": len(rows), "H": model.num_heads, "G": model.num_kv_heads}
    assert len(items) == paged_attention.items(dims, ceil_div, programs)
    return items[items[:, 1] != 0], merges, dims


@settings(max_examples=10, deadline=None)
@given(passes(), st.sampled_from([(4, 2), (32, 8), (3, 3), (5, 1), (64, 1)]))
def test_a_plan_has_every_token_and_page_once(
    tiny: ModelConfig, rows: list[np.ndarray], heads: tuple[int, int]
) -> None:
    model = dataclasses.replace(tiny, num_heads=heads[0], num_kv_heads=heads[1])
    items, merges, dims = planned(model, rows)
    tokens = np.zeros(dims["N"], int)
    parts = []
    for first in np.unique(items[:, 0]):
        of_tile = items[items[:, 0] == first]
        count = of_tile[0, 1]
        tokens[first : first + count] += 1
        expected = [[len(of_tile), of_tile[0, 12], number] for number in range(count)]
        assert merges[first : first + count, :3].tolist() == expected
        assert of_tile[:, 10].tolist() == list(range(of_tile[0, 11]))
        assert of_tile[0, 8] == 0
        assert (of_tile[1:, 8] == of_tile[:-1, 9]).all()
        if len(of_tile) > 1:
            assert (of_tile[:, 9] > of_tile[:, 8]).all()
            parts += list(range(of_tile[0, 12], of_tile[0, 12] + len(of_tile)))
    assert (tokens == 1).all()
    assert parts == list(range(len(parts)))
    assert len(parts) <= 2 * paged_attention.PROGRAMS // heads[1]


def test_a_plan_fills_the_card_and_balances_rows(tiny: ModelConfig) -> None:
    """At the 8B model's heads: one long row alone is split to fill a card, beside short ones it is split likewise."""
    model = dataclasses.replace(tiny, num_heads=32, num_kv_heads=8)
    programs = paged_attention.PROGRAMS // 8
    long, _, dims = planned(model, [chunk(32767, 1)])
    assert programs * 0.9 <= len(long) <= programs
    assert (long[:, 9] - long[:, 8]).max() == 16
    mixed, _, dims = planned(model, [chunk(32767, 1), *[chunk(511, 1)] * 15])
    assert len(mixed) <= programs + 16
    most = -(-(512 + 15 * 8) // programs)
    assert (mixed[:, 9] - mixed[:, 8]).max() == most
    assert dims["N"] == 16


@pytest.mark.parametrize("multiprocessors", [34, 108, 148])
def test_a_plan_fills_any_card(tiny: ModelConfig, multiprocessors: int) -> None:
    """Two programs for each of its multiprocessors, and room for the parts that these leave."""
    model = dataclasses.replace(tiny, num_heads=32, num_kv_heads=8)
    share = 2 * multiprocessors // 8
    items, _, dims = planned(model, [chunk(32767, 1)], programs=2 * multiprocessors)
    assert share * 0.85 <= len(items) <= share
    op = paged_attention.op(None, 2 * multiprocessors)
    assert op.args["part"].sizes({**dims, "D": 128}, ceil_div)[0] >= len(items)


def test_attention_over_pages_shared_by_more_programs(tiny: ModelConfig) -> None:
    assert attend(tiny, Paged.of([chunk(700, 1)], (4, 2), WIDTH, "f32"), programs=20) < 2e-6


def test_many_tokens_are_merged_by_fewer_programs(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "FEW", 2)
    assert attend(tiny, Paged.of([chunk(700, 5), chunk(30, 1)], (6, 2), WIDTH, "f32")) < 2e-6


def test_a_pass_that_only_one_program_reads_is_not_split(tiny: ModelConfig) -> None:
    items, _, _ = planned(tiny, [chunk(30, 1), chunk(20, 2)])
    assert items[:, 11].tolist() == [1, 1]


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 9), st.sampled_from([(4, 2), (3, 3), (8, 1)]), st.sampled_from([2, 16, 48]), st.integers(0, 99)
)  # fmt: skip
def test_rotation_writes_into_pages(
    tiny: ModelConfig, tokens: int, heads: tuple[int, int], width: int, seed: int
) -> None:
    """A slot before the first page or past the last is not written."""
    count, kv = heads
    model = dataclasses.replace(tiny, num_heads=count, num_kv_heads=kv, head_dim=width)
    rng = np.random.default_rng(seed)
    pages = 3
    slot = rng.permutation(np.arange(1, pages * PAGE))[:tokens].astype(np.int32)
    slot[0] = rng.choice([-1, 0, pages * PAGE])
    angle = rng.standard_normal((tokens, width // 2), np.float32) * 50
    inputs: dict[str, Any] = {
        "qkv": rng.standard_normal((tokens, (count + 2 * kv) * width), np.float32),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "scale": 1 + rng.random(tokens, np.float32),
        "slot": slot,
        "k_pages": rng.standard_normal((pages, kv, PAGE, width), np.float32),
        "v_pages": rng.standard_normal((pages, kv, PAGE, width), np.float32),
    }
    expected = {name: array.copy() for name, array in inputs.items()}
    q = rope_write.paged_reference(**expected, heads=count)
    if not INTERPRETED:
        pytest.skip("the pages changed in place are copies on the device")
    (got,) = launch(rope_write.paged(None), model, **inputs)
    np.testing.assert_allclose(got, q, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(inputs["k_pages"], expected["k_pages"], rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(inputs["v_pages"], expected["v_pages"])


@pytest.mark.skipif(not INTERPRETED, reason="the pages changed in place are copies on the device")
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 5), st.sampled_from([(4, 2), (3, 3), (8, 1)]), st.sampled_from([2, 16, 48]), st.integers(0, 99))
@pytest.mark.parametrize("bits", KV_BITS[1:])
def test_rotation_writes_into_pages_of_8_bits(
    tiny: ModelConfig, bits: KvBits, tokens: int, heads: tuple[int, int], width: int, seed: int
) -> None:
    """The same tokens give the same bytes in any company; a row of zeros and slots of no page too."""
    count, kv = heads
    model = dataclasses.replace(tiny, num_heads=count, num_kv_heads=kv, head_dim=width)
    rng = np.random.default_rng(seed)
    slot = rng.permutation(np.arange(1, 3 * PAGE))[:tokens].astype(np.int32)
    slot[0] = rng.choice([-1, 0, 3 * PAGE])
    angle = rng.standard_normal((tokens, width // 2), np.float32) * 50
    qkv = rng.standard_normal((tokens, (count + 2 * kv) * width), np.float32) * 10.0 ** rng.integers(-3, 3)
    qkv[-1, -width:] = 0
    flat_inputs = {
        "qkv": qkv,
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "scale": 1 + rng.random(tokens, np.float32),
        "slot": slot,
    }
    filler = np.full((3, kv, PAGE, width), 5, {"int8": np.int8, "fp8": np.uint8}[bits])
    scales = np.full((3, kv, PAGE), 7, np.float32)
    pages = {"k_pages": filler, "v_pages": filler, "k_scales": scales, "v_scales": scales}

    def copies() -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in pages.items()}

    expected, got, alone = copies(), copies(), copies()
    q = rope_write.paged_reference(**flat_inputs, **expected, heads=count, bits=bits)
    (result,) = launch(rope_write.paged(bits), model, **flat_inputs, **got)
    np.testing.assert_allclose(result, q, rtol=2e-6, atol=1e-6 * np.abs(q).max())
    for token in range(tokens):
        launch(rope_write.paged(bits), model, **{k: v[token : token + 1] for k, v in flat_inputs.items()}, **alone)
    for name, array in got.items():
        np.testing.assert_array_equal(array, alone[name])
    for part in "kv":
        np.testing.assert_allclose(got[f"{part}_scales"], expected[f"{part}_scales"], rtol=1e-6)
        one, other = (kv_cache.dequantise(p[f"{part}_pages"], p[f"{part}_scales"]) for p in (got, expected))
        # A number on the border of two may go either way where its rotation's last bit differs.
        step = expected[f"{part}_scales"][..., None] * (1 if bits == "int8" else 32)
        assert (np.abs(one - other) <= 1.001 * step).all()
        assert np.mean(one != other) < 0.01
    np.testing.assert_array_equal(got["v_pages"], expected["v_pages"])


@pytest.mark.parametrize("bits", KV_BITS[1:])
def test_rows_of_8_bits_are_near_what_they_stand_for(bits: KvBits) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((50, 64)) * 10.0 ** rng.integers(-30, 30, (50, 1))).astype(np.float32)
    rows[7] = 0
    values, scale = kv_cache.quantise(rows, bits)
    got = kv_cache.dequantise(values, scale)
    most = np.abs(rows).max(-1, keepdims=True)
    assert (np.abs(got - rows) <= most * {"int8": 0.5001 / 127, "fp8": 0.5001 / 14}[bits]).all()
    np.testing.assert_allclose(np.abs(got).max(-1, keepdims=True), most, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rotation_tables_are_exact_far_out(tiny: ModelConfig, beta: float) -> None:
    rope = dataclasses.replace(tiny.rope, attention_factor=1.2, llama_4_scaling_beta=beta, original_max_position=16384)
    model = dataclasses.replace(tiny, head_dim=48, rope=rope)
    pos = np.array([0, 1, 16383, 16384, 262143], np.int32)
    inv_freq = rope.inv_freq(48)
    got = launch(rotation.OP, model, pos=pos, inv_freq=inv_freq)
    for result, expected in zip(got, rotation.reference(pos, inv_freq, rope), strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("width", [16, 2064])
def test_tokens_are_quantised_to_the_nearest_e4m3(tiny: ModelConfig, width: int) -> None:
    """Every bit, also of ties, subnormal numbers and zeros of both signs."""
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((6, width)) * 2.0 ** rng.integers(-12, 3, (6, width))).astype(np.float32)
    x[1] = 0
    x[2] = rng.integers(-448 * 4, 448 * 4 + 1, width) / 4  # many ties, once the largest is 448
    x[2, 0] = 448
    x[3] = rng.integers(-64, 65, width) / 1024  # around the subnormal numbers
    x[3, :2] = 448, -0.0
    values, scale = launch(token_quantise.OP, tiny, x=x)
    expected = token_quantise.reference(x)
    np.testing.assert_array_equal(scale, expected[1])
    np.testing.assert_array_equal(values, expected[0])


@SCALES_ROWS
def test_the_product_of_8_bits_by_8_bits_is_torch_s(tiny: ModelConfig) -> None:
    """`torch._scaled_mm` takes the values and scales as they are."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 64), (48, 64)))
    values, scale = launch(token_quantise.OP, tiny, x=x)
    stored, weight_scale = linear.quantise(weight)
    a = torch.from_numpy(values).to(DEVICE).view(torch.float8_e4m3fn)
    b = torch.from_numpy(stored.view(np.uint8)).to(DEVICE).view(torch.float8_e4m3fn).t()
    scales = torch.from_numpy(scale)[:, None].to(DEVICE), torch.from_numpy(weight_scale)[None].to(DEVICE)
    y = torch._scaled_mm(a, b, *scales, out_dtype=torch.bfloat16).float().cpu().numpy()
    wide = values.view(ml_dtypes.float8_e4m3fn).astype(np.float32) @ stored.astype(np.float32).T
    np.testing.assert_allclose(y, wide * scale[:, None] * weight_scale, rtol=1e-2, atol=1e-2)


SPANS = [3, 1, 18, 1, 1]  # predictions of each row


def flat_rule(vocab: int) -> dict[str, np.ndarray]:
    """Ids of tokens, and index, span and threshold of predictions of several rows, which are some of the tokens."""
    rng = np.random.default_rng(0)
    total = sum(SPANS)
    ids = rng.integers(0, vocab, total + 5).astype(np.int32)
    ids[rng.random(total + 5) < 0.7] = MASK
    index = rng.permutation(total + 5)[:total].astype(np.int32)
    end = np.repeat(np.cumsum(SPANS), SPANS)
    span = np.stack([end - np.repeat(SPANS, SPANS), end], 1).astype(np.int32)
    threshold = np.repeat(rng.uniform(0, 0.3, len(SPANS)), SPANS).astype(np.float32)
    return {"ids": ids, "index": index, "span": span, "threshold": threshold}


@pytest.mark.parametrize("tile", head_commit.TILES)
def test_head_commits_in_every_span(tiny: ModelConfig, tile: int) -> None:
    rng = np.random.default_rng(3)
    vocab, width = 500, 40
    x, weight = (
        (rng.integers(-8, 9, shape) / 8).astype(np.float32) for shape in ((sum(SPANS) + 5, width), (vocab, width))
    )
    model = dataclasses.replace(tiny, vocab_size=vocab, hidden_size=width, mask_id=MASK)
    rule = flat_rule(vocab)
    logits = x[rule["index"]] @ weight.T
    expected = head_commit.reference(x, weight, **rule, mask_id=MASK)
    kept = np.full((sum(SPANS), vocab), 7, np.float32)
    token, confidence, next_ids = launch_head(tile, model, x=x, weight=weight, **rule, kept=kept)
    np.testing.assert_array_equal(token, expected[0])
    np.testing.assert_allclose(confidence, expected[1], rtol=2e-5)
    np.testing.assert_array_equal(next_ids, expected[2])
    if INTERPRETED:  # elsewhere it is a copy on the device
        np.testing.assert_array_equal(kept, logits)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum of a position of NaN
def test_flat_samples_are_those_of_rows(tiny: ModelConfig) -> None:
    """Every position has a temperature and a seed of its own; the rule chooses by the samples' confidences.

    A position without a temperature is, to the last bit, as if none were sampled, and so is one with a NaN.
    """
    rng = np.random.default_rng(5)
    vocab, width, total = 2100, 40, sum(SPANS)  # two shares
    model = dataclasses.replace(tiny, vocab_size=vocab, hidden_size=width, mask_id=MASK)
    rule = flat_rule(vocab)
    x, weight = ((rng.integers(-8, 9, shape) / 8).astype(np.float32) for shape in ((total + 5, width), (vocab, width)))
    noise = {
        "temperature": np.where(np.arange(total) % 3, 0.8, 0).astype(np.float32),
        "seed": rng.integers(-(2**31), 2**31, (total, 2)).astype(np.int32),
    }
    pos = np.arange(total + 5, dtype=np.int32) * 7
    weight[MASK] = 9  # the best of all, never taken
    x[rule["index"][1]] = np.nan
    with np.errstate(invalid="ignore"):
        logits = x[rule["index"]] @ weight.T
    case = {"x": x, "weight": weight, **rule}
    greedy = launch_head(16, model, **case, kept=np.zeros((total, 0), np.float32))
    kept = np.zeros((total, vocab), np.float32)
    token, confidence, next_ids = launch_head(16, model, **case, **noise, pos=pos, kept=kept)
    as_it_was = (noise["temperature"] == 0) | np.isnan(confidence)
    assert np.isnan(confidence).tolist() == (np.arange(total) == 1).tolist()
    np.testing.assert_array_equal(token[as_it_was], greedy[0][as_it_was])
    np.testing.assert_array_equal(confidence[as_it_was], greedy[1][as_it_was])
    alone = {
        **noise,
        "temperature": noise["temperature"][:, None],
        "logits": logits[:, None],
        "ids": rule["ids"][rule["index"]][:, None],
        "position": (pos + (rule["ids"] != MASK))[rule["index"]][:, None],
        "threshold": rule["threshold"],
    }
    by_rows = launch(SAMPLED, model, **alone)
    assert (token != greedy[0]).any()
    np.testing.assert_array_equal(token, by_rows[0][:, 0])
    np.testing.assert_allclose(confidence, by_rows[1][:, 0], rtol=2e-5)
    confidence[1] = np.inf  # as which a NaN counts
    for begin, end in np.unique(rule["span"], axis=0):
        here = slice(begin, end)
        before = rule["ids"][rule["index"][here]]
        is_open = before == MASK
        rank = np.where(is_open, confidence[here], -1)
        commits = is_open & ((rank >= rule["threshold"][begin]) | (np.arange(end - begin) == rank.argmax()))
        np.testing.assert_array_equal(next_ids[here], np.where(commits, token[here], before))
