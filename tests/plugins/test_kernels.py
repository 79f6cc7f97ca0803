"""The ops' Triton kernels against their references, and what they compile to.

Without a GPU the kernels run in Triton's interpreter, with one (`-m gpu`) on it: the cases are the same. Inputs that a
kernel must not look at are NaN, outputs start as NaN.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins.kernel_launch import DEVICE, INTERPRETED, MASK, bf16_products, causal, groups, launch, released, rounded

from nemodiff.builder.compilers.kernels import PTX_VERSION, SMS, YOUNGER, compile_kernels, ptx_version, stages
from nemodiff.config import ModelConfig
from nemodiff.contract import Dtype
from nemodiff.plugins import OPS, SAMPLED
from nemodiff.plugins.failure import failure
from nemodiff.plugins.kernels import confidence_commit as commit_kernels
from nemodiff.plugins.ops import block_attention, confidence_commit, rotation
from nemodiff.runtime.sampling.noise import Noise, philox
from nemodiff.runtime.sampling.sampler import SamplingParams, draw

__all__ = ["bf16_products"]  # a fixture


@triton.jit
def gumbel_of(words, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    tl.store(out + at, commit_kernels.gumbel(tl.load(words + at).to(tl.uint32, bitcast=True)))


@triton.jit
def philox_of(low, high, position, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    counter = at.to(tl.uint32)
    zero = tl.zeros_like(counter)
    words = commit_kernels.philox(low, high, counter, zero + position.to(tl.uint32), zero, zero)
    for word in tl.static_range(4):
        tl.store(out + 4 * at + word, words[word].to(tl.int32, bitcast=True))


pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def attention_model(tiny: ModelConfig, heads: int, kv_heads: int, width: int) -> ModelConfig:
    return dataclasses.replace(tiny, num_heads=heads, num_kv_heads=kv_heads, head_dim=width)


def attend(
    tiny: ModelConfig, visible: np.ndarray, slots: int, heads: tuple[int, int], width: int, dtype: str, seed: int = 0
) -> float:
    """Largest difference of kernel and reference, where every slot that no query sees holds NaN in K and V."""
    rows, size = visible.shape[:2]
    rng = np.random.default_rng(seed)
    model = attention_model(tiny, *heads, width)
    q = rounded(rng.standard_normal((rows, heads[0], size, width), dtype=np.float32), dtype)
    k = rounded(rng.standard_normal((rows, heads[1], slots, width), dtype=np.float32), dtype)
    v = rounded(rng.standard_normal((rows, heads[1], slots, width), dtype=np.float32), dtype)
    slot = np.arange(slots)
    seen = (slot < visible[:, :, :1]) | ((slot >= visible[:, :, 1:2]) & (slot < visible[:, :, 2:]))  # (B, S, T)
    expected = block_attention.reference(q, k, v, visible, width**-0.5)
    for row in range(rows):
        k[row][:, ~seen[row].any(0)] = np.nan
        v[row][:, ~seen[row].any(0)] = np.inf
    (y,) = launch(block_attention.OP, model, dtype, q=q, k=k, v=v, visible=visible)
    assert np.isfinite(y).all()
    reads = seen.any(2)[:, None, :, None]  # what a query gets that sees nothing is unspecified
    return float(np.abs(np.where(reads, y - expected, 0)).max())


def block(start: int, size: int) -> np.ndarray:
    visible = np.zeros((1, size, 3), np.int32)
    visible[0, :, 0] = start + size
    return visible


LAYOUTS = {
    "one token": (causal(0, 1), 256),
    "decode": (causal(700, 1), 1024),
    "prefill": (causal(0, 37), 256),
    "chunk": (causal(190, 65), 256),
    "block": (block(90, 32), 256),
    "block at the end": (block(224, 32), 256),
    "odd capacity": (block(60, 7), 67),
    "quadratic": (groups(50, 5, 8), 256),
    "nothing": (np.zeros((1, 3, 3), np.int32), 64),
    "everything": (np.full((1, 2, 3), (128, 0, 128), np.int32), 128),
    "spans that overlap": (np.array([[[70, 40, 90], [0, 40, 90], [90, 0, 40]]], np.int32), 128),
    "a span far after the prefix": (np.array([[[3, 900, 990], [0, 0, 0], [1, 5, 4]]], np.int32), 1024),
    "past the capacity": (np.array([[[999, 0, 0], [5, -3, 7], [0, 60, 999]]], np.int32), 70),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_sees_what_it_should(tiny: ModelConfig, name: str) -> None:
    visible, slots = LAYOUTS[name]
    assert attend(tiny, visible, slots, (4, 2), 64, "f32") < 2e-6


@pytest.mark.parametrize(("heads", "width"), [((4, 4), 48), ((4, 1), 128), ((8, 2), 16), ((8, 1), 48), ((16, 2), 16)])
def test_attention_packs_every_group_and_width(tiny: ModelConfig, heads: tuple[int, int], width: int) -> None:
    visible = np.concatenate([block(100, 5), causal(40, 5)])
    assert attend(tiny, visible, 130, heads, width, "f32") < 2e-6


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 2e-3), ("bf16", 2e-2)])
def test_attention_in_half_precision(tiny: ModelConfig, dtype: str, tolerance: float) -> None:
    assert attend(tiny, groups(300, 4, 6), 512, (8, 2), 64, dtype) < tolerance


@settings(max_examples=8)
@given(st.data())
def test_attention_of_random_intervals(tiny: ModelConfig, data: st.DataObject) -> None:
    rows, size, slots = (data.draw(st.integers(1, high)) for high in (2, 20, 600))
    bounds = st.integers(0, slots)
    visible = np.array([[[data.draw(bounds) for _ in range(3)] for _ in range(size)] for _ in range(rows)], np.int32)
    assert attend(tiny, visible, slots, (4, 2), 16, "f32", data.draw(st.integers(0, 99))) < 4e-6


def test_attention_splits_a_long_cache_and_merges_it(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split takes LEAST_TILES tiles or more: here one, several and all splits have work; and three for two rows."""
    least = block_attention.LEAST_TILES * block_attention.BLOCK_N
    for length in (least - 1, 2 * least + 5, block_attention.SPLITS * least + 70):
        assert attend(tiny, causal(length - 1, 1), length, (2, 1), 16, "f32") < 2e-6
    monkeypatch.setattr(block_attention, "PROGRAMS", 5)
    rows = np.concatenate([causal(4 * least - 1, 1), causal(least, 1)])
    assert attend(tiny, rows, 4 * least, (2, 1), 16, "f32") < 2e-6


def test_attention_passes_on_a_visible_nan(tiny: ModelConfig) -> None:
    model = attention_model(tiny, 2, 1, 16)
    q = np.ones((1, 2, 2, 16), np.float32)
    k = np.ones((1, 1, 64, 16), np.float32)
    v = np.ones((1, 1, 64, 16), np.float32)
    k[0, 0, 5] = np.nan
    visible = np.array([[[10, 0, 0], [5, 0, 0]]], np.int32)
    (y,) = launch(block_attention.OP, model, q=q, k=k, v=v, visible=visible)
    assert np.isnan(y[0, :, 0]).all()
    assert (y[0, :, 1] == 1).all()


def commit_case(rows: int, size: int, vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (rows, size)).astype(np.int32)
    ids[rng.random((rows, size)) < 0.7] = MASK
    logits = (rng.standard_normal((rows, size, vocab)) * 3).astype(np.float32)
    return {"logits": logits, "ids": ids, "threshold": rng.uniform(0, 0.3, rows).astype(np.float32)}


def check_commit(tiny: ModelConfig, case: dict[str, np.ndarray]) -> None:
    """Kernel and reference agree: integers exactly, confidence within f32 rounding of a sum over the vocabulary."""
    model = dataclasses.replace(tiny, vocab_size=case["logits"].shape[2], mask_id=MASK)
    with np.errstate(invalid="ignore"):
        expected = confidence_commit.reference(case["logits"].copy(), case["ids"], case["threshold"], MASK)
    got = launch(confidence_commit.OP, model, **case)
    np.testing.assert_allclose(got[1], expected[1], rtol=2e-5)
    for result, reference in zip(got, expected, strict=True):
        if reference.dtype == np.int32:
            np.testing.assert_array_equal(result, reference)


@pytest.mark.parametrize(("rows", "size", "vocab"), [(1, 1, 891), (2, 18, 891), (3, 3, 40000), (1, 1, 131072)])
def test_commit_equals_the_reference(tiny: ModelConfig, rows: int, size: int, vocab: int) -> None:
    check_commit(tiny, commit_case(rows, size, vocab))


@pytest.mark.parametrize("bar", [0.0, 0.5, 1.0, 1.5])
def test_commit_by_threshold(tiny: ModelConfig, bar: float) -> None:
    case = commit_case(3, 6, 300)
    case["logits"][0] *= 10  # confident ones too
    check_commit(tiny, {**case, "threshold": np.full(3, bar, np.float32)})


def test_commit_never_takes_the_mask_and_settles_ties_to_the_left(tiny: ModelConfig) -> None:
    case = commit_case(2, 4, 40000)
    case["logits"][:, :, MASK] = 99
    case["logits"][0, :, [7, 9, 39000]] = 50  # three equal bests in different splits
    case["logits"][1] = 1.25  # every entry, so every position is as confident
    case["ids"][:] = MASK
    check_commit(tiny, {**case, "threshold": np.full(2, 2, np.float32)})


def test_commit_of_infinities_and_nan(tiny: ModelConfig) -> None:
    case = commit_case(3, 5, 3000)
    case["ids"][:] = MASK
    case["logits"][0, 1] = -np.inf
    case["logits"][0, 1, 2222] = 0.5  # the only candidate
    case["logits"][1, 2, [50, 2900]] = np.nan
    case["logits"][1, 4, 2000] = np.nan
    case["logits"][2, :, :2048] = -np.inf  # a whole step of the scan
    check_commit(tiny, {**case, "threshold": np.full(3, 0.9, np.float32)})


def test_commit_of_a_row_without_masks(tiny: ModelConfig) -> None:
    case = commit_case(2, 5, 200)
    case["ids"][:] = 3
    check_commit(tiny, case)


@settings(max_examples=8)
@given(st.integers(1, 2), st.integers(1, 19), st.integers(101, 3000), st.integers(0, 999))
def test_commit_of_random_cases(tiny: ModelConfig, rows: int, size: int, vocab: int, seed: int) -> None:
    check_commit(tiny, commit_case(rows, size, vocab, seed))


def test_sampled_commit_draws_what_the_host_draws(tiny: ModelConfig) -> None:
    """Also where a row or a position is greedy, where seeds have their highest bit set, at temperatures over 1."""
    vocab, size = 4100, 8
    case = commit_case(4, size, vocab)
    words = np.array([[5, 0], [2**31 - 1, -3], [-1, 7], [0, -(2**31)]], np.int32)
    heat = np.array([[0.7, 0.35], [0, 0], [1.3, 0.65], [1.0, 0]], np.float32).repeat(size // 2, 1)  # (B, R)
    position = np.arange(4 * size, dtype=np.int32).reshape(4, size) * 21
    model = dataclasses.replace(tiny, vocab_size=vocab, mask_id=MASK)
    token, confidence, next_ids, left = launch(SAMPLED, model, **case, temperature=heat, seed=words, position=position)
    greedy = confidence_commit.reference(case["logits"].copy(), case["ids"], case["threshold"], MASK)[0]
    for row in range(4):
        seed = int(words[row].view(np.uint64)[0])
        expected = greedy[row].tolist()
        noise = Noise(seed, vocab)
        scores = case["logits"][row].astype(np.float64)  # (R, V)
        scores[:, MASK] = -np.inf
        for at in np.flatnonzero(heat[row]):
            params = SamplingParams(temperature=float(heat[row, at]), seed=seed)
            expected[at] = draw(scores[at].copy(), params, noise, int(position[row, at]))
        assert token[row].tolist() == expected
    logits = case["logits"].astype(np.float64)
    logits[:, :, MASK] = -np.inf
    probability = np.exp(logits - np.logaddexp.reduce(logits, 2, keepdims=True))
    np.testing.assert_allclose(confidence, np.take_along_axis(probability, token[:, :, None], 2)[:, :, 0], rtol=2e-5)
    assert ((next_ids == token) | (next_ids == case["ids"])).all()
    np.testing.assert_array_equal(left, (next_ids == MASK).sum(1))


def test_sampled_commit_finds_the_best_of_several_that_could_be(tiny: ModelConfig) -> None:
    """Three tokens are far above the others, and bounds of their scores in another order than the scores; and a NaN."""
    vocab, size = 4100, 64
    case = commit_case(1, size, vocab)
    case["logits"][0] /= 10
    case["logits"][0, :, [5, 1203, 4097]] = [[20], [20.6], [21.2]]
    case["logits"][0, 7, 3000] = np.nan
    heat = np.full((1, size), 0.8, np.float32)
    position = np.arange(size, dtype=np.int32)[None] * 3
    model = dataclasses.replace(tiny, vocab_size=vocab, mask_id=MASK)
    seed = np.array([[9, 0]], np.int32)
    with np.errstate(invalid="ignore"):
        token, confidence, *_ = launch(SAMPLED, model, **case, temperature=heat, seed=seed, position=position)
    assert token[0, 7] == 3000
    assert np.isnan(confidence[0, 7])
    noise = Noise(9, vocab)
    scores = case["logits"][0].astype(np.float64)  # (R, V)
    scores[:, MASK] = -np.inf
    params = SamplingParams(temperature=float(heat[0, 0]), seed=9)
    expected = [3000 if at == 7 else draw(scores[at].copy(), params, noise, 3 * at) for at in range(size)]
    assert token[0].tolist() == expected


def test_sampled_commit_takes_the_first_of_equal_scores(tiny: ModelConfig) -> None:
    """Also where a later one's noise is higher, but lost in a score as large as a low temperature makes it."""
    vocab, size = 3000, 16
    case = commit_case(1, size, vocab)
    case["logits"][0, :, [5, 1203, 2900]] = 20
    heat = np.full((1, size), 2.0**-20, np.float32)
    position = np.arange(size, dtype=np.int32)[None]
    model = dataclasses.replace(tiny, vocab_size=vocab, mask_id=MASK)
    seed = np.array([[9, 0]], np.int32)
    token, *_ = launch(SAMPLED, model, **case, temperature=heat, seed=seed, position=position)
    scores = case["logits"][0] * np.float32(2**20)
    scores[:, MASK] = -np.inf
    drawn = np.stack([Noise(9, vocab).row(at) for at in range(size)]).astype(np.float32)
    np.testing.assert_array_equal(token[0], (scores + drawn).argmax(1))


@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**63 + 7, 2**64 - 1])
def test_words_are_philoxs(seed: int) -> None:
    low, high = np.array([seed], np.uint64).view(np.int32).tolist()
    out = torch.empty(64, 4, dtype=torch.int32, device=DEVICE)
    philox_of[(1,)](low, high, 2100, out, N=64)
    np.testing.assert_array_equal(out.cpu().numpy().view(np.uint32), philox(seed, (np.arange(64), 2100, 0, 0)))


def test_noise_is_accurate_where_f32_rounds() -> None:
    """Words next to 2^32 give large finite noise, words next to 0 large negative noise."""
    ends = np.array([2**32 - 1 - i for i in (0, 1, 2, 100, 127, 128, 129, 10**6)] + [0, 1, 2, 3], np.uint32)
    words = np.concatenate([ends, philox(3, (np.arange(61), 1, 2, 3)).reshape(-1)])
    out = torch.empty(words.size, dtype=torch.float32, device=DEVICE)
    gumbel_of[(1,)](torch.from_numpy(words.view(np.int32)).to(DEVICE), out, N=words.size)
    exact = -np.log(-np.log1p(-(2**32 - words.astype(np.float64) - 0.5) / 2**32))
    np.testing.assert_allclose(out.cpu().numpy(), exact, atol=2e-6, rtol=2e-6)


@pytest.mark.trt
@pytest.mark.parametrize(("newest", "expected"), [(87, 87), (88, PTX_VERSION), (94, PTX_VERSION)])
def test_ptx_is_of_a_version_that_the_assembler_knows(
    monkeypatch: pytest.MonkeyPatch, newest: int, expected: int
) -> None:
    compiler = importlib.import_module("triton.backends.nvidia.compiler")
    monkeypatch.setattr(compiler, "get_ptx_version_from_options", lambda options, sm: newest)
    assert ptx_version(90) == expected


@pytest.mark.trt
def test_embedded_and_younger_cards_have_kernels(tiny: ModelConfig, tmp_path: Path) -> None:
    """Jetson Orin, GB300, DGX Spark and, where Triton's assembler knows its PTX, Jetson Thor."""
    sms = sorted((87, 103, 121, *(sm for sm, version in YOUNGER.items() if ptx_version(sm) == version)))
    kernels = compile_kernels(tiny, "bf16", tuple(sms), tmp_path, (rotation.OP,))
    for sm, kernel in zip(sms, kernels, strict=True):
        assert re.search(rf"\.target sm_{sm}a?\b", (tmp_path / kernel.file("ptx")).read_text())


def test_a_failure_is_told_in_the_assemblers_own_words() -> None:
    refusal = "ptxas /tmp/x.ptx, line 5; fatal   : Unsupported .version 8.8; current version is '8.7'"
    stderr = f"Traceback (most recent call last):\n`ptxas` stderr:\n{refusal}\nptxas fatal   : Ptx assembly aborted\n"
    assert failure(f"{stderr}\nRepro command: ptxas -lineinfo /tmp/x.ptx\n") == refusal
    assert failure("Traceback\nModuleNotFoundError: No module named 'triton'\n").startswith("ModuleNotFoundError")
    assert failure("") == "the compiler gave no reason"


@pytest.mark.trt
@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "sms"),
    [
        ("bf16", tuple(sm for sm in SMS if sm not in (86, 89))),  # both compile to the same
        ("f16", (89,)),
        pytest.param("bf16", (86, 89), marks=pytest.mark.every_card),
    ],
)
def test_kernels_compile_for_every_card(tiny: ModelConfig, tmp_path: Path, dtype: Dtype, sms: tuple[int, ...]) -> None:
    ops = (*OPS, SAMPLED)
    kernels = compile_kernels(released(tiny), dtype, sms, tmp_path, ops)
    assert {(k.stage, k.sm) for k in kernels} == {(stage.name, sm) for _, stage in stages(ops) for sm in sms}
    for kernel in kernels:
        ptx = (tmp_path / kernel.file("ptx")).read_text()
        version = ptx_version(kernel.sm)
        assert f".version {version // 10}.{version % 10}" in ptx
        assert re.search(rf"\.target sm_{kernel.sm}a?\b", ptx)
        assert f".entry {kernel.entry}(" in ptx
        kinds = re.findall(r"\.param \.(u64|u32)", ptx[ptx.index(".entry") : ptx.index(".reqntid")])
        scratch = ["u64", "u64"]  # Triton's own, null here
        assert kinds == [*("u64" if a[0] == "*" else "u32" for a in kernel.arguments), *scratch], kernel
        assert kernel.spill_bytes == 0, kernel
        assert kernel.shared_bytes <= 99 * 1024  # of SM 86, 89 and 120; the others have more
        assert (tmp_path / kernel.file("cubin")).read_bytes()[:4] == b"\x7fELF"
        if kernel.stage.endswith("Scan"):  # reads 16 bytes at a time, and all of them before it waits for any
            loads = re.findall(r"ld\.global\.v4\.b32", ptx[: ptx.index("shfl")])
            assert len(loads) == confidence_commit.SHARE / (32 * kernel.num_warps) / 4, kernel
            held = 65536 // (kernel.registers * 32 * kernel.num_warps)
            assert held * confidence_commit.SHARE * 4 >= 96 * 1024, kernel  # bytes under way in a multiprocessor
