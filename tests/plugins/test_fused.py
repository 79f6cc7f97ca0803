"""The torch engine's fused kernels against their references, and what they compile to.

They run in Triton's interpreter, or with `-m gpu` on a GPU, as in `test_kernels.py`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins.kernel_launch import INTERPRETED, MASK, as_array, launch, launch_head, launch_tensors, normal, released

from nemodiff.builder.compilers.kernels import compile_kernels, stages
from nemodiff.config import ModelConfig
from nemodiff.contract import MAX_BATCH, MAX_BLOCK, PAGE, Dtype
from nemodiff.plugins import FUSED, OPS, SAMPLED
from nemodiff.plugins.op import ceil_div
from nemodiff.plugins.ops import advance, head_commit, residual_norm, swiglu
from nemodiff.runtime.engines.torch import plain
from nemodiff.tensorrt_info import Kernel

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@settings(max_examples=8)
@given(st.integers(1, 150), st.sampled_from([1, 2, 47, 128, 300]), st.integers(0, 99))
def test_norm_of_a_residual_sum(tiny: ModelConfig, size: int, width: int, seed: int) -> None:
    model = dataclasses.replace(tiny, hidden_size=width)
    x = normal(seed, size, width) * 9
    residual = normal(seed + 1, size, width)
    weight = normal(2, width)
    expected = residual_norm.reference(x, residual, weight, model.rms_norm_eps)
    y, total = launch(residual_norm.op(), model, x=x, residual=residual, weight=weight)
    np.testing.assert_allclose(y, expected[0], rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(total, expected[1])


def test_norm_keeps_a_nan_in_its_token(tiny: ModelConfig) -> None:
    model = dataclasses.replace(tiny, hidden_size=40)
    x = np.ones((3, 40), np.float32)
    x[1, 7] = np.nan
    y, _ = launch(residual_norm.op(), model, x=x, residual=np.zeros_like(x), weight=np.ones(40, np.float32))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("width", [1, 47, 300])
def test_norm_of_embeddings(tiny: ModelConfig, width: int) -> None:
    model = dataclasses.replace(tiny, hidden_size=width)
    table, weight = normal(1, 70, width) * 9, normal(2, width)
    ids = np.array([0, 69, 5, 5], np.int32)
    expected = residual_norm.embedding_reference(ids, table, weight, model.rms_norm_eps)
    y, total = launch(residual_norm.EMBEDDING, model, ids=ids, table=table, weight=weight)
    np.testing.assert_allclose(y, expected[0], rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(total, table[ids])


@settings(max_examples=8)
@given(st.integers(1, 150), st.sampled_from([1, 33, 1024, 1500]), st.integers(0, 99))
def test_swiglu_of_a_packed_projection(tiny: ModelConfig, size: int, width: int, seed: int) -> None:
    packed = normal(seed, size, 2 * width) * 5
    packed[0, 0] = -200  # exp overflows on the way
    (y,) = launch(swiglu.op(), dataclasses.replace(tiny, intermediate_size=width), gate_up=packed)
    np.testing.assert_allclose(y, swiglu.reference(packed), rtol=3e-6, atol=1e-6)


def following_tokens(seed: int) -> dict[str, np.ndarray]:
    """Rows of a forward that follows another: decoded tokens, verifies, drafts, rows that are fed by nothing."""
    rng = np.random.default_rng(seed)
    apart = 256  # from a prediction's token to its next id
    results = rng.integers(300, 303, 2 * apart).astype(np.int32)
    table = rng.integers(1, 99, (5, 9)).astype(np.int32)
    columns: dict[str, list[int]] = {name: [] for name in ("ids", "pos", "slot", "row", "source")}
    verified = list[tuple[int, int, int]]()
    begin = 0
    for _ in range(rng.integers(1, 7)):
        kind, row = rng.integers(4), int(rng.integers(5))
        count = 1 if kind == 0 else int(rng.integers(1, MAX_BLOCK + 1))
        if begin + count > apart:
            break
        size = int(rng.integers(1, MAX_BLOCK + 1)) if kind == 2 else count
        agree = int(rng.integers(count))
        results[apart + begin + 1 : apart + begin + 1 + agree] = results[begin : begin + agree]
        start = int(rng.integers(9 * PAGE - size - count))
        source = {0: [begin], 1: [apart + begin + i for i in range(size)], 2: [begin] + [-1] * (size - 1)}
        columns["ids"] += [MASK] * size
        columns["pos"] += range(start, start + size)
        columns["slot"] += (table[row, (at := np.arange(start, start + size)) // PAGE] * PAGE + at % PAGE).tolist()
        columns["row"] += [row] * size
        columns["source"] += source.get(kind, [-1] * size)
        verified += [(begin, apart + begin, count) if kind == 2 else (0, 0, 0)] * size
        begin += count
    arrays = {name: np.array(values, np.int32) for name, values in columns.items()}
    visible = rng.integers(0, 500, (len(verified), 3)).astype(np.int32)
    given = {"verified": np.array(verified, np.int32), "results": results, "page_table": table}
    return {**arrays, "visible": visible, **given}


@settings(max_examples=15)
@given(st.integers(0, 2**32))
def test_passes_advance_as_the_reference_says(tiny: ModelConfig, seed: int) -> None:
    """By the kernel and in plain torch."""
    given = following_tokens(seed)
    expected = advance.reference(**given)
    _, kernel = launch_tensors(advance.OP, tiny, **{name: array.copy() for name, array in given.items()})
    inputs = {name: torch.from_numpy(array) for name, array in given.items()}
    plain.advance(inputs, inputs["results"], inputs["page_table"])
    for name, wanted in zip(("ids", "pos", "slot", "visible"), expected, strict=True):
        np.testing.assert_array_equal(as_array(kernel[name]), wanted, name)
        np.testing.assert_array_equal(inputs[name].numpy(), wanted, name)


def check_head(
    tiny: ModelConfig,
    x: np.ndarray,
    weight: np.ndarray,
    bar: float,
    tile: int,
    *,
    seed: int = 0,
    keep: bool = False,
    small: bool = False,
) -> None:
    """Kernel and reference agree, in integers exactly; x (rows, positions of a row, E).

    Weights and x are small multiples of a power of two, so every order of summing gives the same logits.
    """
    rows, size, width = x.shape
    count = rows * size
    model = dataclasses.replace(tiny, vocab_size=len(weight), hidden_size=width, mask_id=MASK)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(weight), count).astype(np.int32)
    ids[rng.random(count) < 0.7] = MASK
    begin = np.arange(count, dtype=np.int32) // size * size
    index = rng.permutation(count).astype(np.int32)
    rule = {"span": np.stack([begin, begin + size], 1), "threshold": np.full(count, bar, np.float32)}
    case = {"x": x.reshape(count, width), "weight": weight, "ids": ids, "index": index, **rule}
    with np.errstate(invalid="ignore"):
        expected = head_commit.reference(**case, mask_id=MASK)
        logits = case["x"][index] @ weight.T
    kept = np.full((count, len(weight) if keep else 0), 7, np.float32)
    got = launch_head(tile, model, **case, kept=kept, small=small)
    if keep and INTERPRETED:  # elsewhere it is a copy on the device
        np.testing.assert_array_equal(kept, logits)
    np.testing.assert_allclose(got[1], expected[1], rtol=2e-5)
    for result, reference in zip(got, expected, strict=True):
        if reference.dtype == np.int32:
            np.testing.assert_array_equal(result, reference)


def grid(seed: int, *shape: int) -> np.ndarray:
    """Multiples of 1/8 in -1..1."""
    return (np.random.default_rng(seed).integers(-8, 9, shape) / 8).astype(np.float32)


@settings(max_examples=8)
@given(
    st.integers(1, 2), st.integers(1, 64), st.integers(101, 1500), st.sampled_from([16, 40, 130]),
    st.sampled_from(head_commit.TILES), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_head_equals_the_reference(
    tiny: ModelConfig, rows: int, size: int, vocab: int, width: int, tile: int, keep: bool, small: bool, seed: int
) -> None:
    x, weight = grid(seed, rows, size, width), grid(seed + 1, vocab, width)
    check_head(tiny, x, weight, 0.1, tile, seed=seed, keep=keep, small=small)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # a tile's empty rows are 0 * -inf
@pytest.mark.parametrize("tile", head_commit.TILES)
def test_head_of_a_best_mask_ties_minus_infinity_and_nan(tiny: ModelConfig, tile: int) -> None:
    x, weight = np.abs(grid(1, 2, 5, 32)) + 0.125, grid(2, 3000, 32)
    weight[MASK] = 9  # the best of all, never taken
    weight[[7, 900, 2999]] = 2  # equal bests in different tiles and splits
    check_head(tiny, x, weight, 2.0, tile)
    check_head(tiny, x, -np.abs(weight), 0.5, tile)  # everything is below 0, so no 0 may stand behind the last tile
    x[0, 2] = np.nan
    check_head(tiny, x, weight, 0.5, tile, keep=True)
    weight[50] = -np.inf
    check_head(tiny, x[1:], weight, 0.5, tile)


@pytest.mark.parametrize(("rows", "tokens"), [(128, 512), (MAX_BATCH, MAX_BLOCK)])
def test_grids_keep_within_what_cuda_allows(rows: int, tokens: int) -> None:
    """Only the first axis may exceed 65535, at the 8B model's sizes: prefill of many rows, blocks of the most."""
    sizes = {"B": rows, "S": tokens, "R": tokens, "T": 4096, "H": 32, "G": 8, "D": 128, "V": 131072}
    for op in (*OPS, SAMPLED, *FUSED):
        letters = set[str]()
        for arg in op.inputs:
            letters |= {size for size in arg.shape if isinstance(size, str)}
        widths = dict.fromkeys(letters - set(sizes), 28672)  # of projections
        for stage in op.stages:
            _, *others = stage.grid({**sizes, **widths}, ceil_div)
            assert max(others) < 2**16, stage.name


PRODUCT = re.compile(r"Linear\d+$")


@pytest.mark.trt
@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "sms", "some"),
    [
        ("bf16", (90,), ""),
        ("bf16", (80,), r"^PagedAttention(Fp8)?$|^(Fp8Split|Int4)Linear"),
        ("bf16", (100,), r"^PagedAttention$|^FlatHeadScan\d+$|^(Split|Gated)Linear"),
        ("f16", (89,), r"^PagedAttention$|^FlatHeadScan\d+$|^SplitLinear|^Fp8Linear"),
        ("f32", (120,), r"^PagedAttention$|^FlatHeadScan\d+$|^(Int4)?SplitLinear|^Int8SplitLinear64|^Int4Linear"),
        pytest.param("bf16", (80, 89, 100, 120), "", marks=pytest.mark.every_card),
        pytest.param("f16", (89,), "", marks=pytest.mark.every_card),
        pytest.param("f32", (120,), "", marks=pytest.mark.every_card),
    ],
    ids=lambda value: None if isinstance(value, str) else f"sm{value[0]}",
)
def test_fused_kernels_compile_for_every_card(
    tiny: ModelConfig, tmp_path: Path, dtype: Dtype, sms: tuple[int, ...], some: str
) -> None:
    """All for SM 90, in bf16, and for the others in one dtype what stands for the rest; all with `check-triton`.

    SM 86 compiles to what 89 does, SM 80 too but for attention and numbers of e4m3, and what multiplies nothing to the
    same everywhere but for a few registers (benchmarks/results/kernels.json). All registers there are have attention on
    SM 80 and products in f32, of which those of e4m3 and of int8 differ in how a number is read. Elsewhere there is a
    form of each, and with tiles of both sizes, as a token has to be summed alike in both.
    """
    model = dataclasses.replace(released(tiny), hidden_size=4096, intermediate_size=14336)
    ops = [op for op in FUSED if any(re.search(some, stage.name) for stage in op.stages)]
    kernels = compile_kernels(model, dtype, sms, tmp_path, ops)
    assert {(k.stage, k.sm) for k in kernels} == {(stage.name, sm) for _, stage in stages(ops) for sm in sms}
    for kernel in kernels:
        assert kernel.spill_bytes == 0, kernel
        tile_of_sm_90 = kernel.stage == "PagedAttention" and kernel.sm == 90  # two programs of a multiprocessor
        assert kernel.shared_bytes <= (113 if tile_of_sm_90 else 99) * 1024, kernel
    follows = {stage.name for _, stage in stages(FUSED) if stage.follows}
    for kernel in kernels:  # begins while the one before it ends, where a card can do that
        ptx = (tmp_path / kernel.file("ptx")).read_text()
        early = kernel.stage in follows and kernel.sm >= 90
        assert ("griddepcontrol.launch_dependents" in ptx) == early, kernel
        before = ptx.partition("griddepcontrol.wait")[0]
        assert (before != ptx) == early, kernel
        if early:  # and touches no memory before it may, but asks for weights
            asked = "cp.async.bulk.prefetch.L2.global"
            assert (asked in before) == bool(PRODUCT.search(kernel.stage)), kernel
            before = before.replace(asked, "")
            assert not re.search(r"\b(ld|st|atom|red)\.(?!param)[\w.]*global|cp\.async|ld\.acquire", before), kernel
        if kernel.stage.startswith("Fp8"):  # whose subnormal numbers are subnormal in f32 on the way
            assert ".ftz" not in ptx, kernel
            assert ("cvt.rn.f16x2.e4m3x2" in ptx) == (kernel.sm >= 89), kernel  # where a card has that
            assert not re.search(r"cvt\S*\.bf16\.f16\b", ptx), kernel  # number by number
    if dtype != "f32":  # which no tensor core multiplies
        check_products(kernels, tmp_path)


def check_products(kernels: tuple[Kernel, ...], folder: Path) -> None:
    """A token is summed by the same instructions in every tile of a product.

    The tiles differ in tokens alone, and a tensor core's instruction sums each of them by itself.
    """
    taken: dict[tuple[str, int], set[frozenset[str]]] = {}
    for kernel in kernels:
        if PRODUCT.search(kernel.stage) or kernel.stage.startswith("FlatHeadScan"):
            ptx = (folder / kernel.file("ptx")).read_text()
            found = re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)([^\s;]*)", ptx)
            forms = frozenset(name + re.sub(r"m64n\d+", "m64n", form) for name, form in found)
            assert forms, kernel
            # A token's bits are those of one kind of weight, in shares and whole.
            kind = re.sub(r"(Split)?Linear\d+$|\d+$", "", kernel.stage)
            taken.setdefault((kind, kernel.sm), set()).add(forms)
    assert len(taken) >= 2
    assert all(len(forms) == 1 for forms in taken.values()), taken
