"""The TensorRT engine's logic without a GPU: the driver and TensorRT are played by stand_ins/gpu_driver.py.

The stand-in runs the engine folder's own graph with ONNX Runtime over the very addresses that the engine class hands
to TensorRT, so every mode must equal the ONNX Runtime engine token for token. Its docstring says what it cannot show.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Refused
from stand_ins import gpu_driver
from stand_ins.checkpoints import TINY_CHAT, write_adapter

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.builder.checkpoint.weights import write_weights
from nemodiff.builder.compilers.kernels import stages
from nemodiff.builder.compilers.profiles import profiles
from nemodiff.builder.graph import projection
from nemodiff.builder.graph.graph import build_graph
from nemodiff.contract import BACKEND_DTYPES, PAGE, BuildConfig, cache_slots, size_text
from nemodiff.engine_info import EngineInfo, read_engine
from nemodiff.errors import EngineError, RequestError
from nemodiff.plugins import OPS, SAMPLED
from nemodiff.plugins.op import Op
from nemodiff.plugins.tensorrt.api import device_sm
from nemodiff.runtime.engines.layout import PassShape
from nemodiff.runtime.engines.passes import Pass, Prediction, bidirectional, causal
from nemodiff.runtime.engines.tensorrt import cache as tensorrt_cache
from nemodiff.runtime.engines.tensorrt import engine as tensorrt_engine
from nemodiff.runtime.engines.tensorrt.device import Device
from nemodiff.runtime.engines.tensorrt.engine import TensorRTEngine
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.tensorrt_info import Kernel, Profile, TensorRTInfo

CAPACITY, LENGTH = 320, 256  # less scratch than in an engine, so passes take less time
QUESTIONS = ["Count from 3 to 9.", "Sort these numbers: 4, 2, 9.", "Show the times table of 3 up to 5."]
PROMPT = [130 + (i * 7) % 200 for i in range(20)]
PROFILES = (Profile("block", 4, 32, 32), Profile("prefill", 2, 64, 64))


@dataclasses.dataclass
class Setup:
    """The same weights in both engines."""

    folder: Path  # as if compiled: model.onnx of static T, its weights, a rank0.engine that is none
    info: EngineInfo
    plain: LoadedEngine

    def load(self, driver: Any = None, **changes: Any) -> tuple[LoadedEngine, TensorRTEngine, Any, Any]:
        driver = driver or gpu_driver.Driver()
        api, made = gpu_driver.make_api(self.folder, self.info, driver)
        api = dataclasses.replace(api, **{k: v for k, v in changes.items() if k == "version"})
        graphs = changes.get("graphs", True)
        backend = TensorRTEngine(self.folder, changes.get("info", self.info), Device(0, driver), api=api, graphs=graphs)
        return dataclasses.replace(self.plain, backend=backend), backend, driver, made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-chat with an adapter."""
    folder = Path(shutil.copytree(TINY_CHAT, tmp_path_factory.mktemp("adapted") / "checkpoint"))
    write_adapter(folder, rank=8, alpha=32, strength=0.05)
    return folder


def make_setup(checkpoint: Path, work: Path, max_seq_len: int, some: tuple[Profile, ...], capacity: int) -> Setup:
    """Engines of a checkpoint in f32, so that equality is exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "CONVOLVED_BYTES", (0, 0))  # products as in the other graph
        plain = Builder(checkpoint, work / "plain", max_seq_len=max_seq_len, max_batch_size=4).run()
    folder = Path(shutil.copytree(plain, work / "compiled"))
    builder = Builder(checkpoint, work / "plain")
    adapter = builder.checkpoint.adapter
    assert adapter is not None
    graph = build_graph(builder.checkpoint.model, "f32", adapter.rank, adapter.scale, capacity=capacity)
    info = read_engine(folder)  # before its graph becomes another
    onnx.save(graph.proto, folder / "model.onnx")
    write_weights(graph, builder.tensors, folder / "model.onnx.data", lambda nbytes: None)
    (folder / "rank0.engine").write_bytes(b"played by ONNX Runtime")
    about = TensorRTInfo("tensorrt_rtx", "1.7.1.116", (86, 89), some, "native", {}, (), 22)
    info = dataclasses.replace(
        info, manifest=dataclasses.replace(info.manifest, backend="tensorrt-rtx", tensorrt=about)
    )
    return Setup(folder, info, nemodiff.load(plain, threads=1))


@pytest.fixture(scope="module")
def setup(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(checkpoint, tmp_path_factory.mktemp("stand-in"), LENGTH, PROFILES, CAPACITY)


def test_requests_that_fill_a_short_engine_have_room_for_scratch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block, all groups of masks, the fillings of a hole and padding reach far past max_seq_len.

    A search of 64 fillings of 8 tokens goes farthest, and at this length into a page of its own by one slot. A block is
    longer than such an engine.
    """
    length = 10
    build = BuildConfig("f32", length, 4, 32, length)
    some = profiles(open_checkpoint(checkpoint).model, build)
    setup = make_setup(checkpoint, tmp_path, length, some, cache_slots(build))
    engine, _, _, _ = setup.load()
    ends = list[int]()
    forward = tensorrt_cache.TensorRTCache.forward

    def watched(cache: tensorrt_cache.TensorRTCache, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        ends.extend(p.write_at + p.ids.size for p in passes)
        return forward(cache, passes, first)

    monkeypatch.setattr(tensorrt_cache.TensorRTCache, "forward", watched)
    ways: list[dict[str, Any]] = [{"mode": mode, "block_length": 64} for mode in ("ar", "linear_spec")]
    ways += [{"mode": "diffusion", "block_length": 64, "merge_commit": True}]
    ways += [{"mode": "quadratic_spec", "groups": groups, "block_length": 22} for groups in ("auto", "all")]
    prompts: list[Any] = [PROMPT[: length - count] for count in (3, 9)]
    for way in ways:
        options: dict[str, Any] = {**way, "max_new_tokens": 9, "fit": True, "logit_bias": {11: -100.0}, "rows": 2}
        expected, got = (list(nemodiff.generate_many(e, prompts, **options)) for e in (setup.plain, engine))
        assert [g.token_ids for g in got] == [e.token_ids for e in expected]
        assert [len(g.token_ids) for g in got] == [3, 9]
    filled = [nemodiff.fill(e, [8], prompt=PROMPT[: length - 8], width=64) for e in (setup.plain, engine)]
    assert filled[0].token_ids == filled[1].token_ids
    assert max(ends) == cache_slots(build) - PAGE + 1


def test_scores_equal_the_onnxruntime_engine(setup: Setup) -> None:
    """Also where a text is longer than the profiles, and rows are more than one of them takes."""
    engine, _, _, _ = setup.load()
    prompts: list[Any] = [*QUESTIONS, PROMPT * 8]
    pairs: list[Any] = [(prompt, ids) for prompt in prompts for ids in ([11], PROMPT, [150, 151])]
    expected, got = (list(nemodiff.score_many(e, pairs, top=2, rows=3)) for e in (setup.plain, engine))
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.token_ids, ours.greedy) == (theirs.token_ids, theirs.greedy)
        assert [one.rank for one in ours.logprobs] == [one.rank for one in theirs.logprobs]
        assert [[i for i, _ in one.top] for one in ours.logprobs] == [
            [i for i, _ in one.top] for one in theirs.logprobs
        ]
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    for mode in nemodiff.MODES:
        options: dict[str, Any] = {"mode": mode, "prompt_logprobs": 1, "max_new_tokens": 4}
        ours, theirs = (nemodiff.generate(e, PROMPT * 8, **options) for e in (engine, setup.plain))
        assert ours.token_ids == theirs.token_ids
        told, known = (
            [one.logprob for one in (g.prompt_logprobs or [])[1:] if one is not None] for g in (ours, theirs)
        )
        assert len(told) == len(PROMPT) * 8 - 1
        assert told == pytest.approx(known, abs=1e-3)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_every_mode_equals_the_onnxruntime_engine(setup: Setup, mode: str, graphs: bool) -> None:
    engine, backend, driver, _ = setup.load(graphs=graphs)
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 40, "block_length": 32}
    if mode == "quadratic_spec":
        options |= {"groups": "all", "block_length": 6}
    for question in QUESTIONS:
        expected, got = (nemodiff.generate(e, question, **options) for e in (setup.plain, engine))
        assert (got.token_ids, got.nfe, got.acceptance) == (expected.token_ids, expected.nfe, expected.acceptance)
    assert ("launch" in driver.calls, backend.captured > 0) == (graphs, graphs)
    assert backend.eager_shapes == {}


def test_sampling_reads_the_rows_of_logits_it_asks_for(setup: Setup) -> None:
    engine, _, driver, _ = setup.load()
    for seed in (1, 2):
        options: dict[str, Any] = {"mode": "ar", "temperature": 0.8, "seed": seed, "max_new_tokens": 20}
        expected, got = (nemodiff.generate(e, QUESTIONS[0], **options).token_ids for e in (setup.plain, engine))
        assert got == expected
    one = causal("decode", [300], 0, logits=True)
    quiet = causal("decode", [301], 0)
    many = causal("verify", PROMPT, 0, predict_all=True, logits=True)
    cache = engine.backend.open(3)
    plain = setup.plain.backend.open(3)
    for got_row, row in zip(cache.forward([one, quiet, many]), plain.forward([one, quiet, many]), strict=True):
        assert (got_row.logits is None) == (row.logits is None)
        if row.logits is not None and got_row.logits is not None:
            np.testing.assert_array_equal(got_row.logits, row.logits)
    assert driver.calls.count("download") >= 3


def kernels_of(ops: Sequence[Op], info: EngineInfo, folder: Path) -> tuple[Kernel, ...]:
    """Records of an engine's kernels for SM 89, and files that the driver's stand-in takes for them."""
    (folder / "kernels").mkdir()
    kernels = []
    for _, stage in stages(ops):
        pointers = [f"*fp32 {name}" for name in stage.inputs]
        arguments = (*pointers, *(f"i32 {name}" for name in stage.scalars), *(f"*fp32 {a.name}" for a in stage.outputs))
        constants = dict(stage.constants_for(info.model, info.build.dtype))
        kernels.append(Kernel(stage.name, 89, stage.entry, stage.num_warps, 0, 32, 0, arguments, constants))
        (folder / kernels[-1].file("cubin")).write_text(stage.name)
    return tuple(kernels)


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="there is a GPU: test_gpu_engine.py samples on it")
def test_tokens_are_drawn_on_the_device(setup: Setup, tmp_path: Path) -> None:
    """The host's tokens in every mode, for rows of different laws in one forward, without a logit on the host."""
    folder = Path(shutil.copytree(setup.folder, tmp_path / "engine"))
    driver = gpu_driver.Driver()
    driver.model = setup.info.model
    kernels = kernels_of([SAMPLED], setup.info, folder)
    made = dataclasses.replace(setup, folder=folder)
    engine, backend, driver, _ = made.load(driver, info=gpu_driver.with_about(setup.info, kernels=kernels))
    assert backend.samples
    ways: list[dict[str, Any]] = [
        {"mode": "ar", "seed": 2**64 - 5},
        {"mode": "diffusion", "block_length": 4, "threshold": 0.4, "confidences": True},
        {"mode": "linear_spec", "block_length": 4},
        {"mode": "quadratic_spec", "block_length": 3, "groups": "all"},
    ]
    for way in ways:
        options = {"temperature": 0.9, "seed": 3, "max_new_tokens": 7, **way}
        expected, got = (nemodiff.generate(e, QUESTIONS[0], **options) for e in (setup.plain, engine))
        assert (got.token_ids, got.nfe) == (expected.token_ids, expected.nfe)
        assert got.confidences == pytest.approx(expected.confidences, abs=1e-5)
    cache = backend.open(2)
    del driver.calls[:]
    drawn = causal("decode", [300], 0)._replace(temperature=1.5, seed=9)
    first, second = cache.forward([drawn, causal("decode", [300], 0)])
    assert driver.calls == ["upload", "execute", "kernel", "kernel", "download"]
    assert first.token[0] != second.token[0]
    _, unable, *_ = setup.load()
    assert not unable.samples  # without kernels the host draws, from logits
    older = tuple(dataclasses.replace(kernel, entry=f"earlier_{kernel.entry}") for kernel in kernels)
    _, unable, *_ = made.load(gpu_driver.Driver(), info=gpu_driver.with_about(setup.info, kernels=older))
    assert not unable.samples  # nor with kernels that take other arguments


def test_batches_with_padding_and_row_moves(setup: Setup) -> None:
    """Prompts of different lengths, more than rows; the prefill profile takes fewer rows than the batch has."""
    engine, _, driver, made = setup.load()
    prompts: list[Any] = [*QUESTIONS, PROMPT * 4, PROMPT[:3], QUESTIONS[0], PROMPT * 7]
    for mode in nemodiff.MODES:
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": 24, "rows": 4, "block_length": 8}
        options |= {"groups": "all", "block_length": 5} if mode == "quadratic_spec" else {}
        expected, got = (list(nemodiff.generate_many(e, prompts, **options)) for e in (setup.plain, engine))
        assert [(g.token_ids, g.nfe) for g in got] == [(e.token_ids, e.nfe) for e in expected]
    assert "copy" in driver.calls
    assert {profile for profile, *_ in made.executed} == {0, 1}
    assert max(rows for profile, rows, *_ in made.executed if profile == 0) == 4


def test_closed_caches_make_room_for_a_larger_one(setup: Setup) -> None:
    _, backend, driver, _ = setup.load()
    backend.open(2).close()
    driver.total = driver.used + backend.cache_bytes(2)  # three rows fit only without the closed cache
    backend.open(3).close()


def test_a_row_near_its_end_runs_beside_one_with_a_longer_pass(setup: Setup) -> None:
    _, backend, _, made = setup.load()
    passes = [causal("decode", PROMPT[:2], CAPACITY - 3), causal("prefill", PROMPT, 0), causal("decode", [150], 0)]
    got, plain = backend.open(3).forward(passes), setup.plain.backend.open(3).forward(passes)
    assert [p.token.tolist() for p in got] == [p.token.tolist() for p in plain]
    assert [run[1:3] for run in made.executed] == [(1, 2), (1, 32), (1, 1)]


def test_a_forward_of_more_rows_than_its_profile_takes_runs_in_parts(setup: Setup) -> None:
    _, backend, _, made = setup.load()
    passes = [causal("prefill", (PROMPT * 3)[: 40 + row], 0) for row in range(3)]
    got, plain = backend.open(3).forward(passes), setup.plain.backend.open(3).forward(passes)
    assert [p.token.tolist() for p in got] == [p.token.tolist() for p in plain]
    assert [(profile, rows) for profile, rows, *_ in made.executed] == [(1, 2), (1, 1)]


def test_a_step_is_one_upload_one_run_one_download(setup: Setup) -> None:
    _, backend, driver, made = setup.load()
    cache = backend.open(1)
    steps = []
    for _ in range(3):
        del driver.calls[:]
        cache.forward([causal("decode", [300], 0)])
        steps.append(driver.calls.copy())
    assert steps == [["upload", "execute", "download"], ["launch"], ["launch"]]
    assert made.executed == [(0, 1, 1, 1)] * 3
    assert backend.logits is not None


def test_a_replay_equals_an_eager_run(setup: Setup) -> None:
    _, graphs, *_ = setup.load()
    _, eager, *_ = setup.load(graphs=False)
    a = graphs.open(2)
    b = eager.open(2)
    rng = np.random.default_rng(0)
    for step in range(12):
        block = [int(i) for i in rng.integers(130, 400, 7 + step % 2)]
        passes = [
            causal("verify", block, 5 * step, predict_all=True),
            bidirectional("denoise", block[:3], step, 0.5),
        ]
        for x, y in zip(a.forward(passes), b.forward(passes), strict=True):
            np.testing.assert_array_equal(x.token, y.token)
            np.testing.assert_array_equal(x.confidence, y.confidence)
    assert (graphs.captured, eager.captured) == (1, 0)


def test_shapes_are_rounded_and_graphs_are_kept_by_shape(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    _, backend, driver, made = setup.load()
    cache = backend.open(2)
    for size in (3, 4, 3, 4):
        cache.forward([causal("decode", PROMPT[:size], 0)])
    assert made.executed == [(0, 1, 4, 1)] * 4
    assert (len(made.contexts), driver.graphs) == (1, 1)
    for size in (33, 40):
        cache.forward([causal("prefill", (PROMPT * 4)[:size], 0)])
    assert made.executed[-2:] == [(1, 1, 64, 1)] * 2
    monkeypatch.setattr(tensorrt_cache, "_KEPT_FORWARDS", 2)
    for size in (1, 2, 4, 1, 1):
        cache.forward([causal("decode", PROMPT[:size], 0)])
    gc.collect()
    assert len(cache._forwards) == 2
    assert driver.graphs == 1  # of S = 1, made anew; those dropped were destroyed
    assert list(cache._forwards)[-1] == PassShape(first=0, rows=1, tokens=1, predicted=1)


def test_a_refused_capture_runs_eagerly_and_is_seen(setup: Setup) -> None:
    engine, backend, driver, _ = setup.load(gpu_driver.Driver(capturable=False))
    expected, got = (nemodiff.generate(e, QUESTIONS[0], max_new_tokens=20).token_ids for e in (setup.plain, engine))
    assert got == expected
    assert "launch" not in driver.calls
    assert backend.captured == 0
    assert set(backend.eager_shapes.values()) == {"901"}


def test_long_passes_run_in_pieces(setup: Setup) -> None:
    """A causal pass is cut anywhere, groups of masks only between them, a block not at all."""
    _, backend, _, made = setup.load()
    mask = setup.info.model.mask_id
    ids = (PROMPT * 8)[:150]
    group = np.tile([150, 150, 210], (60, 1)).astype(np.int32)
    pass_ = causal("prefill", ids, 0)
    pass_ = Pass(
        "prefill",
        np.array([*ids, *[mask] * 60], np.int32),
        np.arange(210, dtype=np.int32),
        0,
        np.concatenate([pass_.visible, group]),
        np.arange(149, 210, dtype=np.int32),
        adapter=np.repeat(np.array([0, 1], np.float32), [150, 60]),
    )
    expected, got = (e.open(1).forward([pass_])[0] for e in (setup.plain.backend, backend))
    assert got.token.tolist() == expected.token.tolist()
    np.testing.assert_allclose(got.confidence, expected.confidence, atol=1e-5)
    assert [size for _, _, size, _ in made.executed] == [64, 64, 32, 64]
    with pytest.raises(EngineError, match=r"a denoise pass of 65 tokens .* allowed: 64; .*--max-input-len 65"):
        backend.open(1).forward([bidirectional("denoise", [mask] * 65, 0, 0.5)])
    with pytest.raises(EngineError, match=r"at slot 300 exceeds the cache, allowed: 320 slots"):
        backend.open(1).forward([causal("verify", [*PROMPT, 300], 300)])


def test_predictions_are_read_only(setup: Setup) -> None:
    """Views, copies of a forward that runs in parts, and the joined pieces of a long pass."""
    _, backend, _, _ = setup.load()
    cache = backend.open(3)
    one = causal("verify", PROMPT, 0, predict_all=True, logits=True)
    long = causal("prefill", PROMPT * 8, 0, logits=True)
    for passes in ([one], [one] * 3, [long]):
        for prediction in cache.forward(passes):
            assert [array.flags.writeable for array in prediction if array is not None] == [False] * 4


def test_rows_may_start_anywhere_and_moves_copy_what_was_written(setup: Setup) -> None:
    _, backend, _, _ = setup.load()
    cache = backend.open(4)
    alone = backend.open(1)
    cache.forward([causal("prefill", PROMPT, 0)], first=2)
    cache.move(2, 0)
    cache.forward([causal("prefill", PROMPT * 9, 0)], first=3)
    cache.move(3, 1)  # more than half of the row, which goes in one piece
    alone.forward([causal("prefill", PROMPT, 0)])
    expected = [_as_lists(alone.forward([causal("decode", [300], 20)])[0])]
    alone.forward([causal("prefill", PROMPT * 9, 0)])
    expected.append(_as_lists(alone.forward([causal("decode", [300], 180)])[0]))
    got = cache.forward([causal("decode", [300], 20), causal("decode", [300], 180)])
    assert [p.token.tolist() for p in got] == [token for token, _ in expected]
    confidences = [p.confidence.tolist() for p in got]
    np.testing.assert_allclose(confidences, [confidence for _, confidence in expected], atol=1e-5)


def _as_lists(p: Prediction) -> tuple[list[int], list[float]]:
    return p.token.tolist(), p.confidence.tolist()


def test_memory_is_flat_over_many_requests_and_given_back(setup: Setup) -> None:
    driver = gpu_driver.Driver()

    def serve() -> list[Any]:
        engine, _, _, made = setup.load(driver)

        def ask(number: int) -> list[int]:
            mode = ("ar", "diffusion", "linear_spec")[number % 3]
            return nemodiff.generate(engine, PROMPT[: 3 + number % 5], mode=mode, max_new_tokens=2).token_ids

        expected = [ask(n) for n in range(15)]
        assert [ask(n) for n in range(15)] == expected  # by now every shape has been captured

        def held() -> list[int]:
            return [driver.used, len(driver.device), len(driver.host), len(made.contexts), driver.graphs]

        before = held()
        for number in range(60):
            assert ask(number) == expected[number % 15]
        assert held() == before
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, range(60))) == expected * 4
        return before

    assert min(serve()) > 0
    gc.collect()
    assert (driver.used, driver.host, driver.graphs) == (0, {}, 0)


def refuse(setup: Setup, message: str, driver: Any = None, **changes: Any) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        setup.load(driver, **changes)
    assert "\n" not in str(caught.value)


def test_refusals_name_what_is_here_and_what_to_do(setup: Setup, tmp_path: Path) -> None:
    driver = gpu_driver.Driver
    refuse(setup, r"built for SM 86, 89, device 0 \(Host memory\) is SM 90; .*--backend tensorrt$", driver(sm=90))
    refuse(setup, r"built with tensorrt_rtx 1.7.1.116, here is 1.8.0.1; .*tensorrt-rtx-cu13==1.7", version="1.8.0.1")
    refuse(setup, r"needs .* of GPU memory \(22 B for weights, .* for logits, .* for one row\)", driver(total=2**20))
    outside = size_text(22 + setup.info.manifest.files["model.onnx.data"]["bytes"])
    stripped = gpu_driver.with_about(setup.info, flags=("--strip-weights",))
    refuse(setup, rf"\({re.escape(outside)} for weights, ", driver(total=2**20), info=stripped)
    refuse(setup, "profiles are not those", info=gpu_driver.with_about(setup.info, profiles=PROFILES[:1]))
    refuse(setup, "the driver finds none; run the engine on a machine", driver(count=0))
    later = gpu_driver.with_about(setup.info, flags=("--version-compatible",))
    setup.load(info=later, version="1.8.0.1")
    refuse(setup, "here is 1.6", info=later, version="1.6.0.1")
    with pytest.raises(RequestError, match="device is 1, allowed: 0 to 0"):
        Device(1, driver())
    _, backend, device, _ = setup.load()
    device.total = device.used + backend.cache_bytes(1) + 2**20
    backend.open(1).close()
    with pytest.raises(EngineError, match=r"for K/V of 4 rows\), device 0 has .* ask for fewer rows"):
        backend.open(4)
    other = dataclasses.replace(setup, folder=Path(shutil.copytree(setup.folder, tmp_path / "other")))
    (other.folder / "rank0.engine").write_bytes(b"torn")
    refuse(other, r"1.7.1.116 cannot load it \(it is not the right magic\); build it again")


def test_a_gpu_that_has_failed_is_lost(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server then says so to who asks for its health; a pass that was refused alone changes nothing."""
    engine, backend, driver, _ = setup.load()
    cache = backend.open(2)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_driver.Context, "execute_async_v3", lambda self, stream: False)
        with pytest.raises(EngineError, match=r"a pass failed .* load the engine again"):
            cache.forward([causal("decode", [300], 0)])
    assert engine.lost is None
    cache.forward([causal("decode", [300], 0)])
    driver.failure = gpu_driver.LAUNCH_FAILED
    reason = r"Host memory has failed \(device 0: cuStreamSynchronize failed with 719\)"
    for ask in (lambda: cache.forward([causal("decode", [300], 0)]), lambda: cache.move(0, 1)):
        with pytest.raises(EngineError, match=rf": {reason}; start the process again$"):
            ask()
    assert re.fullmatch(reason, engine.lost or "")


def test_kernels_must_be_those_of_the_manifest(setup: Setup, tmp_path: Path) -> None:
    other = dataclasses.replace(setup, folder=Path(shutil.copytree(setup.folder, tmp_path / "other")))
    (other.folder / "kernels").mkdir()
    (other.folder / "kernels" / "a.cubin").write_bytes(b"changed")
    files = other.info.manifest.files | {"kernels/a.cubin": {"bytes": 7, "sha256": "0" * 64}}
    info = dataclasses.replace(other.info, manifest=dataclasses.replace(other.info.manifest, files=files))
    refuse(other, "a.cubin: not the kernel that the engine was built with", info=info)


@pytest.mark.parametrize(
    "change",
    [{"constants": {}}, {"constants": {"BLOCK": 7}}, {"arguments": ("*fp32 logits",)}, {"sm": 86}, {"stage": "Other"}],
    ids=lambda change: next(iter(change)),
)
def test_kernels_of_another_nemodiff_are_not_launched(setup: Setup, tmp_path: Path, change: dict[str, Any]) -> None:
    """They would be given other sizes and pointers than they were compiled for: the host draws, plugins are refused."""
    ops = [*OPS, SAMPLED]
    kernels = kernels_of(ops, setup.info, tmp_path)
    others = tuple(dataclasses.replace(kernel, **change) for kernel in kernels)
    _, backend, _, _ = setup.load(info=gpu_driver.with_about(setup.info, kernels=others))
    assert not backend.samples
    info = gpu_driver.with_about(setup.info, kernels=others, implementation="plugin")
    refuse(setup, "its plugin kernels for SM 89 are not those .* --backend tensorrt-rtx --plugins$", info=info)


def test_an_engine_without_logits_cannot_sample(setup: Setup) -> None:
    _, bare, _, _ = setup.load()
    bare.logits = None
    with pytest.raises(RequestError, match="built with --no-logits; decode greedily without them"):
        bare.open(1).forward([causal("decode", [300], 0, logits=True)])
    engine, backend, _, _ = setup.load()
    build = dataclasses.replace(setup.info.build, gather_generation_logits=False)
    backend.info = dataclasses.replace(setup.info, build=build)
    # Refused before they have a row: in a forward they would end the requests beside them.
    expected = nemodiff.generate(setup.plain, QUESTIONS[0], max_new_tokens=40).token_ids
    with nemodiff.Scheduler(engine) as scheduler:
        greedy = scheduler.submit(QUESTIONS[0], max_new_tokens=40)
        wishes: list[dict[str, Any]] = [
            {"temperature": 0.8},
            {"logprobs": 1},
            {"prompt_logprobs": 0},
            {"regex": "[a-z]+"},
            {"logit_bias": {11: -1.0}},
            {"mode": "diffusion", "policy": "entropy", "entropy_bound": 0.1},
        ]
        for wish in wishes:
            with pytest.raises(RequestError, match="built with --no-logits"):
                scheduler.submit(QUESTIONS[1], **wish)
        assert greedy.result().token_ids == expected
    with pytest.raises(RequestError, match="built with --no-logits"):
        nemodiff.score(engine, QUESTIONS[0], ["Yes"])


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="needs the trt extra")
def test_the_driver_has_what_the_device_calls() -> None:
    """Every function the stand-in plays is in the real package, with parameters of the same names."""
    driver = pytest.importorskip("cuda.bindings.driver")
    names = [n for n in vars(gpu_driver.Driver) if n.startswith("cu")]
    assert len(names) == 28
    for name in names:
        ours = [p for p in inspect.signature(getattr(gpu_driver.Driver, name)).parameters if p != "self"]
        assert ours == list(inspect.signature(getattr(driver, name)).parameters), name
    assert driver.CUstream_flags.CU_STREAM_NON_BLOCKING == 1
    assert driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES is not None
    assert driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL is not None
    for part in ("MAJOR", "MINOR"):
        assert hasattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}")


def test_load_takes_the_backend_of_the_manifest(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    folder = Path(shutil.copytree(setup.folder, tmp_path / "engine"))
    setup.info.write(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("model.onnx", "rank0.engine"):
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setitem(BACKEND_DTYPES, "tensorrt-rtx", ("f32",))
    driver = gpu_driver.Driver()
    api, _ = gpu_driver.make_api(folder, setup.info, driver)
    monkeypatch.setattr(tensorrt_engine, "load", lambda backend, error: api)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.driver", driver)
        with pytest.raises(RequestError, match="device is 3, allowed: 0 to 0"):
            nemodiff.load(folder, device=3)
        loaded = nemodiff.load(folder)
        assert nemodiff.generate(loaded, QUESTIONS[0]).text == nemodiff.generate(setup.plain, QUESTIONS[0]).text
        refused(["run", str(folder), "-p", "Hello", "--device", "2"], "device is 2, allowed: 0 to 0")
    if device_sm() is None:
        refused(["run", str(folder), "-p", "Hello"], "needs an NVIDIA driver", "--backend onnxruntime")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    refused(["run", str(folder), "-p", "Hello"], "needs the package cuda-bindings", 'pip install "nemodiff[trt]"')


def test_the_gpu_benchmark_reports_consistently(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logic over the stand-in at tiny sizes; its times mean nothing here."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    gpu = importlib.import_module("gpu.tensorrt")
    for name, values in {"SIZES": (1, 4), "PREFILLS": (64, 512), "ROWS": (1, 3, 8), "CONTEXTS": (0, 100, 999)}.items():
        monkeypatch.setattr(gpu, name, values)
    driver = gpu_driver.Driver()
    made: list[TensorRTEngine] = []

    def make(graphs: bool) -> TensorRTEngine:
        made.append(setup.load(driver, graphs=graphs)[1])
        return made[-1]

    report = gpu.measured(make, setup.folder, QUESTIONS[:1], 2, 2**16)
    shapes = [(rows, context, size) for rows in (1, 3) for context in (0, 100) for size in (1, 4, 64)]
    assert [(f["rows"], f["context"], f["tokens"]) for f in report["forward"]] == shapes
    per_token = setup.info.model.kv_bytes_per_token(4)
    for f in report["forward"]:
        assert f["bytes"] == 22 + f["rows"] * (f["context"] + f["tokens"]) * per_token
        rate = f["bytes"] / f["us"] * 1e6
        assert f["ratio_to_ceiling"] == pytest.approx(rate / report["copy_ceiling_bytes_per_second"])
        assert f["eager_over_graph"] == pytest.approx(f["eager_us"] / f["us"])
    assert [engine.graphs for engine in made] == [True, False]
    assert report["graphs_captured"] == made[0].captured > 0 == made[1].captured
    assert report["shapes_not_captured"] == {}
    assert 0 < report["memory_used_bytes"] < report["device"]["memory_bytes"]
    for mode in ("ar", "linear_spec", "quadratic_spec"):
        assert report["modes"][mode]["answers_unlike_ar"] == 0


@pytest.mark.trt
def test_tensorrt_rtx_has_what_the_engine_calls() -> None:
    """Names only: none of it can run without a GPU."""
    trt: Any = pytest.importorskip("tensorrt_rtx")
    used = {
        "IRuntimeConfig": "dynamic_shapes_kernel_specialization_strategy set_execution_context_allocation_strategy "
        "create_runtime_cache set_runtime_cache",
        "IExecutionContext": "set_optimization_profile_async set_device_memory set_input_shape set_tensor_address "
        "infer_shapes execute_async_v3 is_stream_capturable",
        "ICudaEngine": "create_execution_context create_runtime_config get_device_memory_size_for_profile_v2 "
        "get_tensor_name get_tensor_shape num_io_tensors num_optimization_profiles",
        "Runtime": "deserialize_cuda_engine engine_host_code_allowed",
        "OnnxParserRefitter": "refit_from_file",
        "Refitter": "refit_cuda_engine",
        "DynamicShapesKernelSpecializationStrategy": "EAGER",
        "ExecutionContextAllocationStrategy": "USER_MANAGED",
    }
    for kind, names in used.items():
        assert [name for name in names.split() if not hasattr(getattr(trt, kind), name)] == []
