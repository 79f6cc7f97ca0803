"""K and V in 8 bits: every mode gives the tokens of ar whatever shares a pass, and pages behave as others do.

That so kept K and V answer nearly as whole ones do is measured by `python benchmarks/kv_cache.py`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Refused, output_of
from stand_ins.checkpoints import TINY_CHAT, write_adapter, write_checkpoint
from stand_ins.torch_pair import PROMPT, QUESTIONS, without_times

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.cli import main
from nemodiff.contract import MODES, Backend, KvCacheDtype
from nemodiff.engine_info import read_engine
from nemodiff.errors import BuildError
from nemodiff.runtime.engines.passes import causal
from nemodiff.runtime.loading import LoadedEngine

TORCH = pytest.mark.torch
KINDS: list[Any] = [
    pytest.param(("torch", "int8"), id="torch int8", marks=TORCH),
    pytest.param(("torch", "fp8"), id="torch fp8", marks=TORCH),
    pytest.param(("onnxruntime", "int8"), id="onnxruntime int8"),
]
EXACT: list[dict[str, Any]] = [
    {"mode": "linear_spec", "block_length": 5},
    {"mode": "linear_spec", "block_length": 32},
    {"mode": "quadratic_spec", "groups": "all", "block_length": 4},
]


def build(folder: Path, backend: Backend, kind: KvCacheDtype, checkpoint: Path = TINY_CHAT, **options: Any) -> Path:
    return Builder(checkpoint, folder, backend=backend, dtype="f32", kv_cache_dtype=kind, **options).run()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Backend, KvCacheDtype]:
    chosen: tuple[Backend, KvCacheDtype] = request.param
    return chosen


@pytest.fixture(scope="module")
def engine(kind: tuple[Backend, KvCacheDtype], tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    return nemodiff.load(build(tmp_path_factory.mktemp("kv") / "engine", *kind), threads=1, device="cpu")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 20, "seed": 5}], ids=str)
def test_every_exact_mode_gives_the_tokens_of_ar(engine: LoadedEngine, sampling: dict[str, Any]) -> None:
    for prompt in [QUESTIONS[0], PROMPT * 3]:
        options = {"max_new_tokens": 32, **sampling}
        expected = nemodiff.generate(engine, prompt, mode="ar", **options).token_ids
        for way in [{"mode": "ar", "prefill_chunk": 7}, *EXACT]:
            assert nemodiff.generate(engine, prompt, **options, **way).token_ids == expected, way


def test_rows_of_every_mode_share_a_cache(engine: LoadedEngine) -> None:
    """Among them the same text again, which begins with kept K and V."""
    asked: list[tuple[Any, dict[str, Any]]] = [
        (prompt, {"mode": mode, "block_length": 7, "max_new_tokens": 24, "temperature": t, "seed": 3})
        for t, (prompt, mode) in enumerate(zip([QUESTIONS[0], PROMPT, PROMPT * 5, QUESTIONS[1]], MODES, strict=True))
    ]
    asked += [(PROMPT * 5 + [301], {"mode": "linear_spec", "max_new_tokens": 24})]
    with nemodiff.Scheduler(engine, rows=3) as scheduler:
        handles = [scheduler.submit(prompt, **options) for prompt, options in asked * 2]
        got = [handle.result().token_ids for handle in handles]
        assert scheduler.statistics.reused_tokens > 0
    assert got == [nemodiff.generate(engine, prompt, **options).token_ids for prompt, options in asked] * 2


def kept(engine: LoadedEngine, size: int) -> dict[str, np.ndarray]:
    """K and V of a text that was prefilled in passes of `size`."""
    ids = PROMPT * 2
    cache: Any = engine.backend.open(1)
    for start in range(0, len(ids), size):
        cache.forward([causal("prefill", ids[start : start + size], start)])
    held: dict[str, np.ndarray] = cache.read(0, 0, len(ids))
    cache.close()
    return held


def test_a_token_leaves_the_same_numbers_in_every_pass(engine: LoadedEngine) -> None:
    """On torch a product's last bit depends on its size, and the nearest of 8 bits is then another one, seldom."""
    exact = engine.info.manifest.backend == "onnxruntime"
    one = kept(engine, 1)
    for size in (2, 9, len(PROMPT) * 2):
        for name, other in kept(engine, size).items():
            close = 0 if exact else 1e-4 * np.abs(other).max(-1, keepdims=True)
            assert np.mean(np.abs(one[name] - other) > close) <= (0 if exact else 0.002), (name, size)


def test_what_is_kept_is_near_the_whole(engine: LoadedEngine, tmp_path: Path) -> None:
    backend: Any = engine.info.manifest.backend
    whole = nemodiff.load(build(tmp_path / "engine", backend, "auto"), threads=1, device="cpu")
    step = {"int8": 1 / 127, "fp8": 1 / 14}[engine.info.build.kv_cache_dtype]
    for (name, got), expected in zip(kept(engine, 80).items(), kept(whole, 80).values(), strict=True):
        assert got.shape == expected.shape
        most = np.abs(expected).max(-1, keepdims=True)
        first = name.endswith("_0")  # of later layers the inputs differ too
        assert np.mean(np.abs(got - expected) / most) < step * (0.3 if first else 3)
        assert not np.array_equal(got, expected)


def test_a_row_of_zeros_is_no_nan(kind: tuple[Backend, KvCacheDtype], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="f32")
    weights = load_file(checkpoint / "model.safetensors")
    weights["encoder.embed_tokens.weight"][300] = 0
    save_file(weights, checkpoint / "model.safetensors")
    engine = nemodiff.load(build(tmp_path / "engine", *kind, checkpoint), threads=1, device="cpu")
    pass_ = causal("verify", [300, 300, 301], 0, predict_all=True, logits=True)
    (got,) = engine.backend.open(1).forward([pass_])
    assert got.logits is not None
    assert np.isfinite(got.logits).all()


@TORCH
def test_short_memory_changes_no_token(tmp_path: Path) -> None:
    """Kept prefixes are given up, rows are computed again, copies are made at the border of what is shared."""
    from nemodiff.runtime.engines.torch.engine import TorchEngine

    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_key_value_heads": 1, "dtype": "f32"}
    folder = build(tmp_path / "engine", "torch", "int8", write_checkpoint(tmp_path / "checkpoint", seed=7, **sizes))
    roomy = nemodiff.load(folder, threads=1, device="cpu")
    scarce = TorchEngine(folder, roomy.info, "cpu", pages=12)
    prompts = [PROMPT * 3 + [300 + n] * (1 + 9 * n) for n in range(6)]
    options: dict[str, Any] = {"mode": "linear_spec", "max_new_tokens": 90}
    with nemodiff.Scheduler(dataclasses.replace(roomy, backend=scarce), rows=4) as scheduler:
        handles = [scheduler.submit(prompt, **options) for prompt in prompts]
        got = [handle.result().token_ids for handle in handles]
        statistics = scheduler.statistics
    assert got == [nemodiff.generate(roomy, prompt, **options).token_ids for prompt in prompts]
    assert statistics.preempted > 0
    assert statistics.reused_tokens > 0
    assert scarce.pages.free == 12


@TORCH
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU: test_gpu_engine.py runs the kernels"
)
@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_the_kernels_give_the_tokens_of_plain_torch(tmp_path: Path, bits: KvCacheDtype) -> None:
    from nemodiff.runtime.engines.torch.engine import TorchEngine

    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_key_value_heads": 1, "dtype": "f32"}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", seed=5, **sizes)
    write_adapter(checkpoint, rank=8, alpha=32, strength=0.1)
    plain = nemodiff.load(build(tmp_path / "engine", "torch", bits, checkpoint), device="cpu")
    fused = dataclasses.replace(plain, backend=TorchEngine(plain.folder, plain.info, "cpu", kernels=True, pages=16))
    for case in (
        {"mode": "ar", "temperature": 0.9, "seed": 3},
        {"mode": "quadratic_spec", "groups": "all", "block_length": 2},
    ):
        expected, got = (nemodiff.generate(e, PROMPT[:3], max_new_tokens=3, **case) for e in (plain, fused))
        assert without_times(got) == without_times(expected)


@TORCH
def test_graphs_of_8_bits_equal_an_eager_run(tmp_path: Path) -> None:
    from stand_ins.torch_graphs import RecordingDevice

    from nemodiff.runtime.engines.torch.engine import TorchEngine

    checkpoint = write_checkpoint(tmp_path / "checkpoint", seed=7, num_hidden_layers=1, dtype="f32")
    plain = nemodiff.load(build(tmp_path / "engine", "torch", "int8", checkpoint), threads=1, device="cpu")
    graphed = TorchEngine(plain.folder, plain.info, RecordingDevice(), graphs=True, pages=6)
    engine = dataclasses.replace(plain, backend=graphed)
    for way in ({"mode": "ar"}, EXACT[0]):
        expected, got = (nemodiff.generate(e, QUESTIONS[0], max_new_tokens=20, **way) for e in (plain, engine))
        assert got.token_ids == expected.token_ids
    assert graphed.captured > 0


def test_plan_inspect_and_statistics_tell_the_memory(kind: tuple[Backend, KvCacheDtype], tmp_path: Path) -> None:
    backend, cache = kind
    target = str(tmp_path / "engine")
    said = ["--backend", backend, "--dtype", "f32", "--kv-cache-dtype", cache]
    per_token = 2 * 6 * 2 * (64 + 4)
    assert f"{per_token:,} bytes per token" in output_of("build", str(TINY_CHAT), "-o", target, *said, "--dry-run")
    output_of("build", str(TINY_CHAT), "-o", target, *said)
    shown = output_of("inspect", target)
    assert f"{backend}, f32 with {cache} K/V" in shown
    assert f"{per_token:,} bytes per token" in shown
    assert read_engine(Path(target)).build.kv_cache_dtype == cache
    run = CliRunner().invoke(main, ["run", target, "--device", "cpu", "-p", "Hi", "--max-new-tokens", "2", "--stats"])
    assert f"{per_token:,} bytes of K/V per token" in run.stderr


def test_refusals(tmp_path: Path, refused: Refused) -> None:
    command = ["build", str(TINY_CHAT), "-o", str(tmp_path / "engine"), "--kv-cache-dtype"]
    for backend in ("tensorrt-rtx", "tensorrt"):
        refused([*command, "int8", "--backend", backend], f"--kv-cache-dtype int8: not a choice of --backend {backend}")
    refused([*command, "fp8", "--backend", "onnxruntime"], "allowed: torch; leave it out or add --backend torch")
    refused([*command, "int8", "--dtype", "f16"], "--dtype f16", "allowed: f32")
    single = write_checkpoint(tmp_path / "single", num_key_value_heads=4, num_attention_heads=4)
    command[1] = str(single)
    refused([*command, "int8"], "--kv-cache-dtype int8: the model has one query head per key/value head")
    with pytest.raises(BuildError, match="--kv-cache-dtype is 'fp4', allowed: auto, int8, fp8"):
        Builder(TINY_CHAT, tmp_path / "engine", kv_cache_dtype="fp4")  # type: ignore[arg-type]
