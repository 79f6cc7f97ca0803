"""The torch engine on the CPU: ONNX Runtime's tokens in every mode, and the GPU's paths as far as a CPU can show them.

The kernels run in Triton's interpreter over the engine's own tensors, graphs are recorded and replayed by
`stand_ins/torch_graphs.py`. What only a GPU can show is in test_gpu_engine.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import random
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equality_sampled
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import Refused, output_of, resident
from safetensors.numpy import load_file, save_file
from stand_ins.checkpoints import TINY_CHAT, write_checkpoint
from stand_ins.kernel_launch import short_shares
from stand_ins.lagging_device import LaggingDevice
from stand_ins.torch_graphs import Operations, RecordingDevice
from stand_ins.torch_pair import (
    CASES,
    MODELS,
    PROMPT,
    QUESTIONS,
    Asked,
    Pair,
    adapted,
    check_steps,
    crowd,
    make_pair,
    torch_backend,
    without_times,
)
from stand_ins.toy_engine import PagedToyCache, PagedToyEngine, ToyFlight
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.cli import main
from nemodiff.contract import MODES, PAGE, cache_slots
from nemodiff.engine_info import read_engine
from nemodiff.errors import EngineError
from nemodiff.runtime import loading
from nemodiff.runtime.editing.options import METHODS
from nemodiff.runtime.engines.passes import Following, Pass, bidirectional, causal
from nemodiff.runtime.engines.torch import projections
from nemodiff.runtime.engines.torch.cache import MOST_TOKENS
from nemodiff.runtime.engines.torch.device import TorchDevice
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.flat import (
    FREE,
    MOST_CAPTURED,
    FlatShape,
    Source,
    fill,
    flat_layouts,
    flat_shape,
    graph_shapes,
    rounded_shape,
    rounded_tokens,
)
from nemodiff.runtime.engines.torch.head import Head
from nemodiff.runtime.engines.torch.memory import page_bytes, page_count, pass_bytes
from nemodiff.runtime.engines.torch.model import TorchModel
from nemodiff.runtime.engines.torch.plain import Sight, attend
from nemodiff.runtime.engines.torch.projections import Projections
from nemodiff.runtime.engines.torch.step import SharedForward, Step
from nemodiff.runtime.engines.torch.stored import Stored
from nemodiff.runtime.planning.cost import CostCurve, measure

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    return make_pair(folder, MODELS[request.param](folder / "checkpoint"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("tiny")
    return make_pair(folder, MODELS["tiny-chat with adapter"](folder / "checkpoint"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_mode_equals_onnxruntime(pair: Pair, case: dict[str, Any]) -> None:
    """Tokens, text, passes by kind, acceptance: all but times."""
    options = {"block_length": 16, "max_new_tokens": 32, **case}  # whose default is onnxruntime's own
    for prompt in (QUESTIONS[2], PROMPT):
        expected, got = (nemodiff.generate(engine, prompt, **options) for engine in (pair.theirs, pair.ours))
        assert without_times(got) == without_times(expected)


LAWS = {**equality_sampled.PARAMS, **equality_sampled.GUIDES}
WAYS = [*equality_sampled.CAUSAL.values(), {"mode": "ar"}]
CONTROLS = list(equality_sampled.CONTROLS.values())


@pytest.mark.parametrize("params", list(LAWS))
def test_every_law_of_sampling_equals_onnxruntime(tiny: Pair, params: str) -> None:
    """Two of the ways to decode causally and one of diffusion, in turn; logprobs and confidences too."""
    turn = list(LAWS).index(params)
    ways = [WAYS[turn % len(WAYS)], WAYS[(turn + 3) % len(WAYS)]]
    if params in equality_sampled.PARAMS and params not in equality_sampled.LOOKS_BACK:
        ways.append({"mode": "diffusion", **CONTROLS[turn % len(CONTROLS)]})
    for way in ways:
        reported = {"confidences": True} if way["mode"] == "diffusion" else {"logprobs": 2}
        tokens = 32 if "min_tokens" in LAWS[params] else 20
        options = {"block_length": 16, **LAWS[params], **way, **reported, "seed": turn, "max_new_tokens": tokens}
        answers = [nemodiff.generate(engine, QUESTIONS[turn % 3], **options) for engine in (tiny.ours, tiny.theirs)]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].finish_reason == answers[1].finish_reason
        if way.get("groups") != "auto" and way["mode"] != "quadratic_spec":  # a budget depends on measured times
            assert answers[0].nfe == answers[1].nfe
        for ours, theirs in zip(*(a.logprobs or [] for a in answers), strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert answers[0].confidences == pytest.approx(answers[1].confidences, abs=1e-4)


def test_batches_and_the_scheduler_equal_onnxruntime(tiny: Pair) -> None:
    """Of other models `test_passes_equal_onnxruntime` has rows side by side."""
    prompts: list[Any] = [*QUESTIONS, PROMPT, PROMPT * 8, QUESTIONS[0]]
    for mode in MODES:
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": 24}
        expected = [nemodiff.generate(tiny.theirs, prompt, **options).token_ids for prompt in prompts]
        together = nemodiff.generate_many(tiny.ours, prompts, rows=4, **options)
        assert [answer.token_ids for answer in together] == expected
        with nemodiff.Scheduler(tiny.ours, rows=3) as scheduler:
            handles = [scheduler.submit(prompt, **options) for prompt in prompts]
            assert [handle.result().token_ids for handle in handles] == expected


def test_scores_equal_onnxruntime(pair: Pair) -> None:
    pairs: list[Any] = [(prompt, ids) for prompt in [QUESTIONS[0], PROMPT * 8] for ids in ([11], PROMPT)]
    expected, got = (list(nemodiff.score_many(e, pairs, rows=3)) for e in (pair.theirs, pair.ours))
    assert [(one.greedy, one.token_ids) for one in got] == [(one.greedy, one.token_ids) for one in expected]
    assert [one.logprob for one in got] == pytest.approx([one.logprob for one in expected], abs=1e-3)
    options: dict[str, Any] = {"prompt_logprobs": 1, "max_new_tokens": 2}
    for mode in MODES:
        theirs, ours = (nemodiff.generate(e, PROMPT, mode=mode, **options) for e in (pair.theirs, pair.ours))
        assert theirs.token_ids == ours.token_ids
        for one, other in zip(theirs.prompt_logprobs or [], ours.prompt_logprobs or [], strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_filling_in_and_revising_equal_onnxruntime(tiny: Pair) -> None:
    question = "Write a Python function that returns the sum of a and b."
    for method in METHODS:
        infilled = [
            nemodiff.infill(engine, "def add(", "):\n    return", prompt=question, method=method, length=3)
            for engine in (tiny.ours, tiny.theirs)
        ]
        assert infilled[0].text == infilled[1].text
    revised = [nemodiff.revise(e, "3, 4, 9, 6, 7, 8, 9.", prompt=QUESTIONS[0]) for e in (tiny.ours, tiny.theirs)]
    assert revised[0].text == revised[1].text


def test_passes_equal_onnxruntime(pair: Pair) -> None:
    check_steps(torch_backend(pair.ours), pair.theirs)


INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU: test_gpu_engine.py runs them"
)


@INTERPRETED
def test_the_kernels_take_the_engines_tensors(tmp_path: Path) -> None:
    """One key/value head for four, heads of 48, three rows of different length: arguments and layouts."""
    pair = make_pair(tmp_path, MODELS["early YaRN"](tmp_path / "checkpoint"))
    backend = torch_backend(pair.ours)
    kernels = TorchEngine(backend.folder, backend.info, "cpu", kernels=True)
    check_steps(kernels, pair.theirs, short=True)
    assert (kernels.samples, backend.samples) == (True, False)
    for way in ({"mode": "ar"}, {"mode": "diffusion", "block_length": 4, "threshold": 0.3, "confidences": True}):
        options: dict[str, Any] = {"temperature": 1.2, "seed": 2**63 + 7, "max_new_tokens": 6, **way}
        ours, theirs = (nemodiff.generate(e, PROMPT, **options) for e in (pair.with_backend(kernels), pair.theirs))
        assert (ours.token_ids, ours.nfe) == (theirs.token_ids, theirs.nfe)
        assert ours.confidences == pytest.approx(theirs.confidences, abs=1e-4)


@INTERPRETED
@pytest.mark.parametrize("own", [(), projections.OWN], ids=["torch's products", "own products"])
def test_the_kernels_give_the_same_tokens_in_every_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: tuple[str, ...]
) -> None:
    """Greedy, and sampled from the logits that the head's kernel keeps; own products in several shares."""
    short_shares(monkeypatch)
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", seed=5, num_hidden_layers=1, num_key_value_heads=1, dtype="f32"
    )
    pair = make_pair(tmp_path, adapted(checkpoint, 0.1))
    backend = torch_backend(pair.ours)
    fused = pair.with_backend(TorchEngine(backend.folder, backend.info, "cpu", kernels=True, own_products=own))
    spoken = [
        {"mode": "ar", "temperature": 0.9, "seed": 3},
        {"mode": "diffusion", "block_length": 4, "threshold": 0.3},
        {"mode": "linear_spec", "block_length": 3},
        {"mode": "quadratic_spec", "groups": "all", "block_length": 2, "temperature": 0.9, "seed": 3},
    ]
    for case in spoken:
        expected, got = (nemodiff.generate(e, PROMPT[:3], max_new_tokens=4, **case) for e in (pair.ours, fused))
        assert without_times(got) == without_times(expected)


def graphed(pair: Pair, device: RecordingDevice) -> TorchEngine:
    """The engine over graphs, with a pool that plain torch can look at whole."""
    backend = torch_backend(pair.ours)
    return TorchEngine(backend.folder, backend.info, device, graphs=True, pages=32)


def test_a_replay_equals_an_eager_run(tiny: Pair) -> None:
    """Sizes rounded, the pool taken whole, each shape captured when it comes again: the same tokens."""
    device = RecordingDevice()
    backend = graphed(tiny, device)
    for _ in range(3):
        check_steps(backend, tiny.theirs)
    assert backend.captured == len(device.graphs) > 3
    assert all(graph.replays for graph in device.graphs)
    assert backend.eager_shapes == {}
    engine = tiny.with_backend(backend)
    for case in ({"mode": "linear_spec", "block_length": 16}, {"mode": "diffusion", "block_length": 5}):
        for prompt in QUESTIONS:
            expected = nemodiff.generate(tiny.theirs, prompt, max_new_tokens=32, **case)
            got = nemodiff.generate(engine, prompt, max_new_tokens=32, **case)
            assert without_times(got) == without_times(expected)


def test_a_shape_that_cannot_be_captured_runs_eagerly(tiny: Pair) -> None:
    backend = graphed(tiny, RecordingDevice(refuses=2))
    for _ in range(2):
        check_steps(backend, tiny.theirs)
    assert len(backend.eager_shapes) == 2
    assert backend.captured > 0


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_in_a_capture(monkeypatch: pytest.MonkeyPatch, collects: bool) -> None:
    """What is freed there may be an event or a graph, which CUDA does not allow while it captures."""
    device = TorchDevice(Path("engine"), "cpu")
    device.is_gpu, device._stream = True, None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    collected = list[bool]()  # as a capture begins and as it ends

    @contextlib.contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        collected.append(gc.isenabled())
        try:
            yield
        finally:
            collected.append(gc.isenabled())

    monkeypatch.setattr(torch.cuda, "graph", graph)
    freed = list[int]()

    class Event:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            freed.append(1)

    def work() -> None:
        for _ in range(5000):
            Event()
        assert not freed
        raise RuntimeError("operation not permitted when stream is capturing")

    if not collects:
        gc.disable()
    try:
        assert device.capture(work) == "operation not permitted when stream is capturing"
        assert gc.isenabled() == collects
        assert collected == [False, False]
    finally:
        gc.enable()
        gc.collect()


def test_a_rounded_shape_without_a_graph_has_what_fills_it_up(tiny: Pair) -> None:
    """Of a pass with more logits than graphs have: quadratic_spec with 16 heads and a group of 16 for each."""
    engine = tiny.with_backend(graphed(tiny, RecordingDevice()))
    case = {"mode": "quadratic_spec", "groups": "all", "block_length": 16, "logprobs": 0, "max_new_tokens": 30}
    got, expected = (nemodiff.generate(e, QUESTIONS[0], **case) for e in (engine, tiny.theirs))
    assert got.token_ids == expected.token_ids


@pytest.mark.parametrize("mask", [0, 5])
def test_nothing_is_left_of_what_a_buffer_held(tiny: Pair, mask: int) -> None:
    """Shapes share the memory of the host, so it may hold ids that no model has; padding is no mask and sees itself."""
    backend = torch_backend(tiny.ours)
    inputs, _ = flat_layouts(FlatShape(16, 8, sampled=True, embedded=True), backend.info)
    passes = [causal("decode", [7], 0), bidirectional("denoise", [mask] * 3, 1, 0.5)]
    sources = [Source(None, 0, 0, 0)] * len(passes)
    filled = []
    for before in (0, 0x7F):
        arrays = inputs.views(np.full(inputs.nbytes, before, np.uint8))
        fill(arrays, passes, [1, 2], backend.pages, mask, sources)
        # Of these a forward reads what another one says.
        filled.append({n: a.tolist() for n, a in arrays.items() if n not in ("known", "embeddings")})
    assert filled[0] == filled[1]
    padding = range(4, 16)
    assert filled[0]["ids"] == [7, *[mask] * 3, *[int(mask == 0) for _ in padding]]
    assert filled[0]["slot"][4:] == list(padding)
    assert filled[0]["visible"][4:] == [[0, own, own + 1] for own in padding]
    assert filled[0]["index"][4:] == [15] * 4
    assert filled[0]["span"][4:] == [[own, own + 1] for own in range(4, 8)]


def test_sizes_of_graphs() -> None:
    """Padding is free up to 256 tokens and at most a quarter beyond; a prompt's chunk with masks is not doubled."""
    assert [rounded_tokens(n) for n in (1, 2, 3, 31, 33, 256, 257, 544, 577, 1025)] == [
        *(1, 2, 4, 32, 64, 256, 320, 576, 640, 1280)
    ]
    assert all(n <= rounded_tokens(n) < 1.25 * n + 1 for n in range(257, 5000))
    shapes = [rounded_shape(FlatShape(n, r)) for n in (1, 30, 200, 512, 544) for r in (1, 25, n)]
    assert sorted({(s.tokens, s.predicted) for s in shapes}) == [
        *((1, 1), (32, 32), (256, 64), (256, 256), (512, 64), (512, 512), (576, 64), (576, 576))
    ]
    assert rounded_shape(FlatShape(500, 200)).predicted == rounded_shape(FlatShape(900, 3)).predicted == FREE
    alone = graph_shapes(576)
    assert len([s for s in alone if not (s.logits or s.sampled)]) == 26
    assert len(alone) == 52
    assert [s.tokens for s in alone] == sorted((s.tokens for s in alone), reverse=True)
    assert len(graph_shapes(2048 + 576)) < 75  # however many rows
    assert {s.embedded for s in graph_shapes(576, images=True)} == {False, True}
    assert len(graph_shapes(800)) == 64
    assert len(graph_shapes(800, images=True)) == 90
    for shape in graph_shapes(2048 + 576, images=True):
        assert rounded_shape(shape) == shape
        assert shape.sampled or not shape.logits
        assert shape.predicted <= FREE or not shape.logits  # so logits take memory once


def test_rows_of_any_kind_share_a_graph() -> None:
    """Sampled, with logits, with an image or all of it: one graph, unless there are many predictions."""
    kinds = [{"sampled": True}, {"logits": True}, {"sampled": True, "logits": True}]
    for tokens, predicted in ((1, 1), (40, 32), (800, 256), (300, 70)):
        assert len({rounded_shape(FlatShape(tokens, predicted, **kind)) for kind in kinds}) == 1
        seeing = {rounded_shape(FlatShape(tokens, predicted, embedded=True, **kind)) for kind in [{}, *kinds]}
        assert len(seeing) == 1
        assert seeing <= set(graph_shapes(900, images=True))
    assert rounded_shape(FlatShape(512, 512, logits=True)) not in graph_shapes(900)
    assert rounded_shape(FlatShape(512, 512, sampled=True)) in graph_shapes(900)


def test_a_first_answer_needs_the_shapes_of_the_warm_up_alone(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every mode, greedy, sampled by the engine and with logits, after prompts of many lengths."""
    info = small.ours.info
    toy = PagedToyEngine(info, 400, ahead=True)
    monkeypatch.setattr(toy, "samples", True)
    needed = dict[FlatShape, str]()
    launch = PagedToyCache.launch
    asked = ""

    def noted(cache: PagedToyCache, passes: Sequence[Pass], rows: Sequence[int]) -> ToyFlight:
        needed[rounded_shape(flat_shape(passes))] = asked
        return launch(cache, passes, rows)

    monkeypatch.setattr(PagedToyCache, "launch", noted)
    monkeypatch.setattr(PagedToyCache, "most_tokens", MOST_TOKENS)
    engine = dataclasses.replace(small.ours, backend=toy)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.8}, {"repetition_penalty": 1.1}]
    for mode in (*MODES, "auto"):
        for kind in kinds if mode != "diffusion" else kinds[:2]:
            for size in (1, 70, 130, 560):
                asked = f"{mode} {kind} {size}"
                nemodiff.generate(engine, (PROMPT * 14)[:size], mode=mode, max_new_tokens=30, **kind)
    prompts = [(PROMPT * 14)[:size] for size in (560, 3, 70, 559, 130, 20)]
    for turn in range(4):
        asked = f"several, {turn}"
        with nemodiff.Scheduler(engine, rows=6) as scheduler:
            handles = []
            for n, prompt in enumerate(prompts, turn):
                mode = MODES[n % len(MODES)]
                kind = kinds[1 if mode == "diffusion" else n % 3]
                handles.append(scheduler.submit(prompt, mode=mode, max_new_tokens=20, **kind))
            for handle in handles:
                handle.result(60)
    captured = set(TorchEngine(small.ours.folder, info, "cpu", pages=8).steps.shapes)
    assert max(shape.tokens for shape in needed) > FREE
    needed = {shape: asked for shape, asked in needed.items() if shape.tokens <= MOST_CAPTURED}
    assert {shape: asked for shape, asked in needed.items() if shape not in captured} == {}
    assert len(needed) > 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One layer."""
    folder = tmp_path_factory.mktemp("small")
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_key_value_heads": 1, "dtype": "f32"}
    return make_pair(folder, write_checkpoint(folder / "checkpoint", seed=7, **sizes))


def test_nothing_is_captured_after_the_warm_up(small: Pair) -> None:
    """Every mode alone and all of them together, sampled ones and long prompts too."""
    backend = torch_backend(small.ours)
    info = dataclasses.replace(backend.info, build=dataclasses.replace(backend.info.build, max_batch_size=2))
    device = RecordingDevice()
    warm = TorchEngine(backend.folder, info, device, graphs=True, ahead=True, pages=24)
    seen = list[FlatShape]()

    def show(shapes: list[FlatShape]) -> list[FlatShape]:
        seen.extend(shapes)
        return shapes

    warm.warm_up(show)
    graphs = len(device.graphs)
    assert graphs == warm.captured == len(seen) == len(warm.steps.shapes)
    assert max(shape.tokens for shape in seen) == 640  # a chunk of a prompt with masks, and a block of the other row
    engine = small.with_backend(warm)
    assert engine.cost.curve.sizes == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # known by now
    prompts: list[Any] = [QUESTIONS[0], PROMPT * 13]
    for mode in MODES:
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": 12}
        expected = [nemodiff.generate(small.theirs, prompt, **options).token_ids for prompt in prompts]
        got = nemodiff.generate_many(engine, prompts, rows=2, **options)
        assert [answer.token_ids for answer in got] == expected
    mixed: list[dict[str, Any]] = [{"mode": mode, "max_new_tokens": 12} for mode in MODES]
    mixed += [{"mode": "ar", "temperature": 0.8}, {"mode": "linear_spec", "top_k": 3, "temperature": 0.5}]
    penalty: dict[str, Any] = {"mode": "linear_spec", "repetition_penalty": 1.2, "max_new_tokens": 5}
    answers = [nemodiff.generate(e, prompts[1], **penalty).token_ids for e in (engine, small.theirs)]
    assert answers[0] == answers[1]
    with nemodiff.Scheduler(engine) as scheduler:
        handles = [scheduler.submit(QUESTIONS[1], **{"max_new_tokens": 12, **o}) for o in mixed]
        for handle, chosen in zip(handles, mixed, strict=True):
            answer = nemodiff.generate(small.theirs, QUESTIONS[1], **{"max_new_tokens": 12, **chosen})
            assert handle.result().token_ids == answer.token_ids
    assert len(warm.steps) == graphs  # none ran eagerly
    for _ in range(3):  # as a scored prompt does, whose logits take longer to the host than its launches
        scored: dict[str, Any] = {"mode": "ar", "prompt_logprobs": 0, "max_new_tokens": 2}
        answers = [nemodiff.generate(e, prompts[1], **scored).token_ids for e in (engine, small.theirs)]
        assert answers[0] == answers[1]
    eager = len(warm.steps) - graphs
    assert 0 < eager < 4
    assert len(device.graphs) == graphs
    assert warm.pages.free == warm.pages.count


def test_a_pass_is_one_replay_and_one_wait(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside graphs and Advance nothing runs but copies of the page table's rows; nothing is read but the results."""
    backend = torch_backend(small.ours)
    device = RecordingDevice()
    warm = TorchEngine(backend.folder, backend.info, device, graphs=True, ahead=True, pages=24)
    options: dict[str, Any] = {"mode": "ar", "max_new_tokens": 24}
    engine = small.with_backend(warm)
    for _ in range(2):  # the second time each shape is captured
        expected = nemodiff.generate(engine, PROMPT, **options).token_ids
    waits, operations = list[Any](), Operations()
    advance = warm.model.advance

    def unseen(*arguments: Any) -> None:
        with torch._C._DisableTorchDispatch():
            advance(*arguments)

    monkeypatch.setattr(warm.model, "advance", unseen)
    monkeypatch.setattr(device, "wait", waits.append)
    replays = sum(graph.replays for graph in device.graphs)
    with operations:
        assert nemodiff.generate(engine, PROMPT, **options).token_ids == expected
    replays = sum(graph.replays for graph in device.graphs) - replays
    assert len(waits) == replays == 24
    assert operations.names <= {"aten.copy_.default", "aten.select.int", "aten.lift_fresh.default"}


def test_modes_share_a_forward(tiny: Pair) -> None:
    """Rows of every mode and length in one batch, without padding, each as it would be alone."""
    modes = [*MODES, "auto"]
    prompts: list[Any] = [QUESTIONS[0], PROMPT, PROMPT * 5, QUESTIONS[1], QUESTIONS[2]]
    with nemodiff.Scheduler(tiny.ours, rows=5) as scheduler:
        handles = [
            scheduler.submit(p, mode=m, max_new_tokens=40, block_length=None if m == "auto" else 7)
            for p, m in zip(prompts, modes, strict=True)
        ]
        for handle, prompt, mode in zip(handles, prompts, modes, strict=True):
            block = None if mode == "auto" else 7
            alone = nemodiff.generate(tiny.theirs, prompt, mode=mode, max_new_tokens=40, block_length=block)
            assert handle.result().token_ids == alone.token_ids
        statistics = scheduler.statistics
    assert statistics.padding_tokens == 0
    assert statistics.forwards < sum(statistics.nfe.values())


@pytest.mark.parametrize("graphs", [False, True])
def test_ar_runs_a_pass_ahead(small: Pair, monkeypatch: pytest.MonkeyPatch, graphs: bool) -> None:
    """The token stays where the device has it: rows of every length, others among them, EOS, limits, a cancel."""
    backend = torch_backend(small.ours)
    device = RecordingDevice()
    ahead = TorchEngine(backend.folder, backend.info, device, graphs=graphs, ahead=True, pages=40)
    fed = list[tuple[int, int]]()
    run = Step.run

    def seen(step: Step, turn: int, before: Step | None) -> None:
        fed.extend([(step.shape.tokens, turn)] if before is not None else [])
        run(step, turn, before)

    monkeypatch.setattr(Step, "run", seen)
    engine = small.with_backend(ahead)
    asked: list[tuple[Any, dict[str, Any]]] = [
        (prompt, {"mode": "ar", "max_new_tokens": 11 + 8 * n})
        for n, prompt in enumerate([*QUESTIONS, PROMPT, PROMPT * 4])
    ]
    asked += [(QUESTIONS[0], {"mode": "linear_spec", "max_new_tokens": 20}), (PROMPT, {"mode": "ar", "logprobs": 1})]
    asked += [(QUESTIONS[1], {"mode": "ar", "max_new_tokens": 40, "repetition_penalty": 1.2})]
    with nemodiff.Scheduler(engine, rows=3) as scheduler:
        handles = [scheduler.submit(prompt, **{"max_new_tokens": 16, **options}) for prompt, options in asked]
        gone = scheduler.submit(PROMPT, mode="ar", max_new_tokens=500)
        for handle, (prompt, options) in zip(handles, asked, strict=True):
            expected = nemodiff.generate(small.theirs, prompt, **{"max_new_tokens": 16, **options})
            answer = handle.result(60)
            assert (answer.token_ids, answer.nfe) == (expected.token_ids, expected.nfe)
        gone.cancel()
        gone.result(60)
    assert {turn for _, turn in fed} == {0, 1}
    assert {tokens for tokens, _ in fed} >= {1, 2}
    assert ahead.pages.free == 40
    assert ahead.eager_shapes == {}


@pytest.mark.parametrize("haste", [0.0, 0.5])
@pytest.mark.parametrize("pages", [7, 20])
def test_a_card_may_lag_behind(small: Pair, monkeypatch: pytest.MonkeyPatch, haste: float, pages: int) -> None:
    """Two passes under way, shared pages, pages freed under a pass that writes there, rows computed again, cancels."""
    backend = torch_backend(small.ours)
    device = LaggingDevice(monkeypatch, haste)
    lagging = TorchEngine(backend.folder, backend.info, device, kernels=False, pages=pages)
    choose = random.Random(3)
    asked: list[Asked] = []
    for _ in range(24):
        prompt = (PROMPT * 3)[: choose.choice([16, 63, 64, 65, 100])]
        prompt += [300 + choose.randrange(3)] * choose.randint(0, 9)
        mode = choose.choice(["ar", "ar", "diffusion", "linear_spec"])
        asked.append((prompt, {"mode": mode, "max_new_tokens": choose.choice([1, 2, 9, 60])}))
    asked[5][1].update(mode="ar", logprobs=1)
    followed = list[bool]()
    follow = lagging.forwards.follow

    def counted(*arguments: Any) -> Any:
        flight = follow(*arguments)
        followed.append(flight is not None)
        return flight

    lagging.forwards.follow = counted  # type: ignore[method-assign]
    engine = small.with_backend(lagging)
    answers, statistics = crowd(engine, small.theirs, asked, {"mode": "ar", "max_new_tokens": 200}, 60)
    for answer, expected in answers:
        assert answer.token_ids == expected.token_ids
    assert statistics.preempted > 0 if pages == 7 else sum(followed) > 5
    assert statistics.reused_tokens > 0
    assert lagging.pages.free == pages


def test_shapes_share_what_the_host_has_for_a_turn(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as the largest needs; one that comes after smaller ones gets more, and those keep theirs."""
    backend = torch_backend(small.ours)
    lagging = TorchEngine(backend.folder, backend.info, LaggingDevice(monkeypatch), kernels=False, pages=7)
    large, less, larger = (lagging.steps.of(FlatShape(size, size)) for size in (128, 8, 256))
    for turn in (0, 1):
        for use in ("inputs", "outputs"):
            one, other, more = (getattr(step.sides[turn], use).host for step in (large, less, larger))
            assert one.data_ptr() == other.data_ptr() != more.data_ptr()
            assert len(other) < len(one) < len(more)
            others = getattr(large.sides[1 - turn], use).host
            assert others.data_ptr() != one.data_ptr()


def test_caches_take_turns_with_the_buffers_of_a_card(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = torch_backend(small.ours)
    lagging = TorchEngine(backend.folder, backend.info, LaggingDevice(monkeypatch), kernels=False, pages=7)
    prompts = [PROMPT, PROMPT[::-1]]
    caches = [lagging.open(1) for _ in prompts]
    flights = []
    for cache, prompt in zip(caches, prompts, strict=True):
        assert cache.reserve(0, 0, len(prompt))
        flights.append(cache.launch([causal("verify", prompt, 0, predict_all=True)], [0]))
    got = [flight.finish()[0].token.tolist() for flight in flights]
    theirs = small.theirs.backend.open(1)
    for prompt, tokens in zip(prompts, got, strict=True):
        (expected,) = theirs.forward([causal("verify", prompt, 0, predict_all=True)])
        assert tokens == expected.token.tolist()


def test_a_forward_between_two_takes_their_tokens(small: Pair) -> None:
    """So the second of them does not run ahead."""
    backend = torch_backend(small.ours)
    ahead = TorchEngine(backend.folder, backend.info, "cpu", ahead=True, pages=40)
    one, other = ahead.open(1), ahead.open(1)
    for cache in (one, other):
        cache.forward([causal("prefill", PROMPT, 0)])
        assert cache.reserve(0, len(PROMPT), len(PROMPT) + 2)
    first = one.launch([causal("decode", [300], len(PROMPT))], [0])
    behind = [Following(causal("decode", [0], len(PROMPT) + 1), "token")]
    between = other.launch([causal("decode", [301], len(PROMPT))], [0])
    assert one.follow(first, behind, [0], [0]) is None
    followed = other.follow(between, behind, [0], [0])
    assert followed is not None
    (got,) = followed.finish()
    token = int(between.finish()[0].token[0])
    (expected,) = other.forward([causal("decode", [token], len(PROMPT) + 1)])
    np.testing.assert_array_equal(got.confidence, expected.confidence)
    assert not backend.forwards.ahead  # a CPU would only compute in vain


@pytest.mark.parametrize("size", [40, 400, MOST_CAPTURED + 1])
def test_a_forward_of_any_size_feeds_the_next_one(small: Pair, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """And is fed, with a graph and without, in the same buffers."""
    backend = torch_backend(small.ours)
    mask = small.ours.info.model.mask_id
    block = [PROMPT[0], *[mask] * (size - 1)]
    draft, verify = bidirectional("draft", block, 0, 0.0), causal("verify", [0] * size, 0, predict_all=True)
    theirs = small.theirs.backend.open(1)
    (drafted,) = theirs.forward([draft])
    (expected,) = theirs.forward([verify._replace(ids=drafted.next_ids)])
    for make in (RecordingDevice, lambda: LaggingDevice(monkeypatch)):
        device = make()
        ahead = TorchEngine(backend.folder, backend.info, device, kernels=False, graphs=True, ahead=True, pages=40)
        cache = ahead.open(1)
        assert cache.reserve(0, 0, size)
        for _ in range(3):  # eager, captured, replayed
            flight = cache.launch([draft], [0])
            followed = cache.follow(flight, [Following(verify, "next_ids")], [0], [0])
            assert followed is not None
            assert followed.step is flight.step
            np.testing.assert_array_equal(flight.finish()[0].next_ids, drafted.next_ids)
            np.testing.assert_array_equal(followed.finish()[0].token, expected.token)
        assert ahead.steps.captured == (size <= MOST_CAPTURED and device.is_gpu is False)


def test_a_forward_that_fails_is_its_own_caches_affair(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another cache's forward waits for it and hears nothing of it; it fails where its predictions are asked for."""
    backend = torch_backend(small.ours)
    engine = TorchEngine(backend.folder, backend.info, "cpu", pages=40)
    prompt = [causal("prefill", PROMPT, 0)]
    one, other, third = (engine.open(1) for _ in range(3))
    expected = other.forward(prompt)[0].token
    run = Step.run

    def fail(step: Step, *_: Any) -> None:
        monkeypatch.setattr(Step, "run", run)
        raise RuntimeError("gone")

    for waits in (lambda: other.forward(prompt), third.close):
        assert one.reserve(0, 0, len(PROMPT))
        flight = one.launch(prompt, [0])
        monkeypatch.setattr(Step, "run", fail)
        waits()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="gone"):
                flight.finish()
    np.testing.assert_array_equal(one.forward(prompt)[0].token, expected)


def test_a_forward_that_another_thread_was_interrupted_in_says_so(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C, which only the thread that waits hears of."""
    backend = torch_backend(small.ours)
    engine = TorchEngine(backend.folder, backend.info, "cpu", pages=40)
    prompt = [causal("prefill", PROMPT, 0)]
    one, other = engine.open(1), engine.open(1)
    assert one.reserve(0, 0, len(PROMPT))
    flight = one.launch(prompt, [0])
    with monkeypatch.context() as context:
        context.setattr(Step, "run", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            other.forward(prompt)
    for _ in range(2):
        with pytest.raises(EngineError, match="a pass was interrupted; the request may be sent again"):
            flight.finish()
    expected = other.forward(prompt)[0].token
    np.testing.assert_array_equal(one.forward(prompt)[0].token, expected)


def test_short_memory_changes_no_token(small: Pair) -> None:
    """Kept prefixes are given up, rows are computed again, copies are made at the border of what is shared."""
    backend = torch_backend(small.ours)
    scarce = TorchEngine(backend.folder, backend.info, "cpu", pages=12)
    engine = small.with_backend(scarce)
    prompts = [PROMPT * 3 + [300 + n] * (1 + 9 * n) for n in range(6)]
    options: dict[str, Any] = {"mode": "linear_spec", "max_new_tokens": 90}
    with nemodiff.Scheduler(engine, rows=4) as scheduler:
        handles = [scheduler.submit(prompt, **options) for prompt in prompts]
        got = [handle.result().token_ids for handle in handles]
        statistics = scheduler.statistics
    assert got == [nemodiff.generate(small.theirs, prompt, **options).token_ids for prompt in prompts]
    assert statistics.preempted > 0
    assert statistics.reused_tokens > 0
    assert scarce.pages.free == 12


def test_predictions_are_read_only(tiny: Pair) -> None:
    pass_ = causal("verify", PROMPT, 0, predict_all=True, logits=True)
    (prediction,) = tiny.ours.backend.open(1).forward([pass_])
    assert [array.flags.writeable for array in prediction if array is not None] == [False] * 4


def test_a_cache_that_is_forgotten_holds_nothing(tiny: Pair) -> None:
    backend = TorchEngine(tiny.ours.folder, tiny.ours.info, "cpu", pages=20)
    backend.open(2).forward([causal("prefill", PROMPT, 0)])
    assert (backend.pages.free, backend.pages.open_rows) == (20, 0)
    cache = backend.open(1)
    with pytest.raises(EngineError, match="1600 slots of K/V are needed, of 1280 1280 are free; let other requests"):
        cache.forward([causal("prefill", PROMPT * 40, 0)])
    held = backend.open(200)
    with pytest.raises(EngineError, match="200 rows asked for, "):
        backend.open(200)
    assert backend.pages.open_rows == 1 + len(held.rows)


def test_a_cache_may_be_forgotten_while_another_computes(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python looks for garbage whenever it likes, in the midst of a forward too."""
    backend = torch_backend(small.ours)
    engine = TorchEngine(backend.folder, backend.info, "cpu", pages=20)
    one = engine.open(1)
    prompt = [causal("prefill", PROMPT, 0)]
    expected = one.forward(prompt)[0].token
    monkeypatch.setattr(Step, "forget_logits", lambda step: gc.collect())
    gc.disable()
    try:
        knot: list[Any] = [engine.open(1)]
        knot.append(knot)
        del knot
        assert engine.pages.open_rows == 2
        np.testing.assert_array_equal(one.forward(prompt)[0].token, expected)
    finally:
        gc.enable()
    assert engine.pages.open_rows == 1


def test_costs_are_measured_in_the_memory_there_is(small: Pair) -> None:
    """Another request has the rest; passes that need more of it are left out, and the first two are kept."""
    backend = torch_backend(small.ours)
    engine = TorchEngine(backend.folder, backend.info, "cpu", pages=20)
    held = engine.open(1)
    held.forward([causal("prefill", [130] * PAGE * 19, 0)])
    measured = measure(engine, limit=1.0)
    assert measured is not None
    assert measured.sizes[-1] <= PAGE
    assert engine.pages.open_rows == 1
    held.forward([causal("prefill", [130] * PAGE, PAGE * 19)])
    with pytest.raises(EngineError, match="1 slots of K/V are needed, of 1280 0 are free"):
        measure(engine)
    assert engine.pages.open_rows == 1


def test_a_request_goes_on_where_there_is_no_memory_to_measure_costs(
    small: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the last page when it first plans; others end later."""
    backend = torch_backend(small.ours)
    engine = small.with_backend(TorchEngine(backend.folder, backend.info, "cpu", pages=20))
    held = engine.backend.open(1)
    held.forward([causal("prefill", [130] * PAGE * 18, 0)])

    def measured(backend: TorchEngine) -> CostCurve:
        assert backend.pages.free == 0
        try:
            return measure(backend)
        finally:
            held.close()

    monkeypatch.setattr(loading, "measure", measured)
    prompt = (PROMPT * 2)[: PAGE + 1]
    options: dict[str, Any] = {"max_new_tokens": 50, "min_tokens": 50}
    answer = nemodiff.generate(engine, prompt, mode="linear_spec", block_length="auto", **options)
    assert answer.token_ids == nemodiff.generate(small.theirs, prompt, mode="ar", **options).token_ids
    assert engine.cost.passes > 0  # by which it plans from then on


def test_a_short_engine_has_room_for_the_largest_pass(tmp_path: Path) -> None:
    """All groups of a long block, or all fillings side by side, are far more tokens than a row may have."""
    engine, other = (
        nemodiff.load(Builder(TINY_CHAT, tmp_path / b, backend=b, dtype="f32", max_seq_len=70).run(), device="cpu")
        for b in ("torch", "onnxruntime")
    )
    prompt = [150 + i for i in range(60)]
    all_groups: dict[str, Any] = {"mode": "quadratic_spec", "groups": "all", "block_length": 22, "min_tokens": 50}
    answers = [nemodiff.generate(e, prompt[:20], max_new_tokens=50, **all_groups) for e in (engine, other)]
    assert without_times(answers[0]) == without_times(answers[1])
    filled = [nemodiff.fill(e, ["3", 7, "4"], prompt=prompt, width=64) for e in (engine, other)]
    assert filled[0].token_ids == filled[1].token_ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_of_a_token_alone_has_the_bits_of_a_pass_of_many(dtype: torch.dtype) -> None:
    """Else a near tie would be decided by the size of its pass, and self-speculation leave ar's text."""
    count, pages = 40, torch.arange(2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        held = torch.randn(2, 2, 2, PAGE, 64, generator=generator).to(dtype)
        keys, values = (Stored(part, None) for part in held)
        q = torch.randn(count, 4, 64, generator=generator).to(dtype)
        slots, seen = torch.arange(2 * PAGE), torch.arange(60, 60 + count)
        mask = torch.where(slots <= seen[:, None], 0.0, -torch.inf).to(dtype)
        many = attend(q, keys, values, [Sight(0, count, pages, mask)])
        alone = attend(q, keys, values, [Sight(i, i + 1, pages, mask[i : i + 1]) for i in range(count)])
        assert torch.equal(many, alone)


def test_a_gpu_may_lay_attention_out_otherwise(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries before heads, as one of torch's kernels does whose choice is torch's own."""
    usual = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **options: Any) -> torch.Tensor:
        return usual(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    verify = causal("verify", list(range(130, 150)), 0, predict_all=True)
    with contextlib.closing(torch_backend(tiny.ours).open(1)) as cache:
        before = cache.forward([verify])[0].token.copy()
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        after = cache.forward([verify])[0].token
        np.testing.assert_array_equal(after, before)


def test_memory_for_pages(tiny: Pair) -> None:
    """What a share of a GPU leaves beside weights and passes, or half of a CPU's free memory; at most what is used."""
    info = tiny.ours.info
    device = RecordingDevice()
    rows = 2 * info.build.max_batch_size * (cache_slots(info.build) // PAGE)
    least = 1024 // PAGE
    for free, total, is_gpu, expected in (
        (2**40, 2**41, False, rows),
        (1000 * page_bytes(info), 2**35, False, 500),
        (2 * least * page_bytes(info), 2**35, False, least),
        (3 * 2**29, 2**31, True, (2**29 - 2**20) // page_bytes(info)),
        (2**34, 2**34, True, rows),
    ):
        device.memory = lambda free=free, total=total: (free, total)  # type: ignore[method-assign]
        device.is_gpu = is_gpu
        assert page_count(device, Path("engine"), info, 2**20, 0.5) == expected
    device.is_gpu = False
    device.memory = lambda: (2 * least * page_bytes(info) - 2, 2**35)  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"has .* for K/V beside the weights, needs .* for 1024 tokens"):
        page_count(device, Path("engine"), info, 2**20, 0.5)
    device.is_gpu = True
    device.memory = lambda: (2**20, 2**34)  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"cpu has 0 B for K/V beside the weights, needs .* raise --gpu-memory"):
        page_count(device, Path("engine"), info, 2**20, 0.5)


@pytest.mark.parametrize("count", [FREE, FREE + 1, 800])
def test_memory_for_logits(small: Pair, count: int) -> None:
    """Few have a place that stays, more have one of their own beside it."""
    backend = torch_backend(small.ours)
    engine = TorchEngine(backend.folder, backend.info, "cpu", pages=20)
    cache = engine.open(1)
    passes = [causal("prefill", [130] * count, 0, predict_all=True, logits=True)]
    assert cache.reserve(0, 0, count)
    place = engine.steps.place(FlatShape(FREE, FREE, logits=True))
    with engine.device.use(engine.folder):
        engine.memory.show_table()
        step = engine.steps.of(flat_shape(passes))
        step.fill(passes, cache.rows)
        step.run()
    held = {logits.data_ptr(): logits.nbytes for logits in (place, step.logits) if logits is not None}
    assert sum(held.values()) == pass_bytes(backend.info, 0, count)


class Held(TorchDispatchMode):
    """The most bytes that new tensors have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._tensors = list[weakref.ref[torch.Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        old = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        new = [leaf for leaf in tree_leaves(results) if torch.is_tensor(leaf)]
        self._tensors += [weakref.ref(leaf) for leaf in new if leaf.untyped_storage().data_ptr() not in old]
        alive = {leaf.data_ptr(): leaf.nbytes for one in self._tensors if (leaf := one()) is not None}
        self.most = max(self.most, sum(alive.values()))
        return results


@pytest.mark.parametrize("size", [2, 3])
def test_memory_for_logits_of_ranks(small: Pair, size: int) -> None:
    """A rank has its own part of them, and all ranks' parts where they are wanted."""
    info = torch_backend(small.ours).info
    vocab, count = info.model.vocab_size, 300
    own = -(-vocab // size)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocab, info.model.hidden_size, generator=generator)
    x = torch.randn(count, info.model.hidden_size, generator=generator)
    whole = torch.nn.functional.linear(x, weight)
    parts = torch.nn.functional.pad(whole, (0, size * own - vocab)).view(count, size, own).transpose(0, 1)
    ranks: Any = SimpleNamespace(
        size=size, gather=lambda part: parts.clone() if part.shape[-1] == own else torch.stack([part] * size)
    )
    place = torch.zeros(count, vocab)
    inputs = {
        "ids": torch.full((count,), info.model.mask_id, dtype=torch.int32),
        "index": torch.arange(count, dtype=torch.int32),
        "span": torch.zeros(count, 2, dtype=torch.int32),
        "threshold": torch.zeros(count),
    }
    outputs = {"token": torch.zeros(count, dtype=torch.int32), "confidence": torch.zeros(count)}
    outputs["next_ids"] = outputs["token"].clone()
    for first in (0, own, (size - 1) * own):  # the mask's rank copies its logits
        head = Head(weight[first : first + own], info.model, first, Projections(torch.float32, None), None, ranks)
        with Held() as held:
            head.choose(x, inputs, outputs, place)
        torch.testing.assert_close(place, whole)
        planned = pass_bytes(info, 0, count, size) - pass_bytes(info, 0, count)
        assert 0.9 * planned < held.most < 1.05 * planned


def test_another_rank_keeps_no_logits_of_a_long_pass(small: Pair) -> None:
    """Nobody reads them there, and those of a long pass are memory of their own."""
    backend = torch_backend(small.ours)
    engine = TorchEngine(backend.folder, backend.info, "cpu", pages=20)
    cache = engine.open(1)
    passes = [causal("prefill", [130] * (FREE + 1), 0, predict_all=True, logits=True)]
    assert cache.reserve(0, 0, FREE + 1)
    with engine.device.use(engine.folder):
        engine.memory.show_table()
        step = engine.steps.of(flat_shape(passes))
        step.fill(passes, cache.rows)
        side = step.sides[0]
        forward = SharedForward(step.shape, 0, False, 0, side.inputs.host.numpy().tobytes(), side.views, [])
        step.mirror(forward, None)
    assert step.logits is None


def test_memory_is_flat(tiny: Pair) -> None:
    def ask(number: int) -> list[int]:
        mode = MODES[number % 4]
        return nemodiff.generate(tiny.ours, QUESTIONS[number % 3], mode=mode, max_new_tokens=8).token_ids

    expected = [ask(n) for n in range(12)]
    before = resident()
    for number in range(96):
        assert ask(number) == expected[number % 12]
    assert resident() - before < 8 * 2**20


@pytest.mark.parametrize(("dtype", "margin"), [("bf16", 1.0), ("f16", 0.125)])
def test_half_precision_agrees_where_it_is_clear(tiny: Pair, tmp_path: Path, dtype: Any, margin: float) -> None:
    folder = Builder(TINY_CHAT, tmp_path / "engine", backend="torch", dtype=dtype).run()
    ours = nemodiff.load(folder, device="cpu").backend.open(1)
    pass_ = causal("verify", PROMPT, 0, predict_all=True, logits=True)
    (got,), (expected,) = ours.forward([pass_]), tiny.theirs.backend.open(1).forward([pass_])
    assert got.logits is not None
    assert expected.logits is not None
    assert got.logits.dtype == np.float32
    ranked = np.sort(np.delete(expected.logits, tiny.theirs.info.model.mask_id, axis=1), axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > margin
    assert clear.sum() > 10
    np.testing.assert_array_equal(got.token[clear], expected.token[clear])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_build_writes_the_weights_as_they_are(checkpoint: Path, tmp_path: Path, dtype: Any) -> None:
    folder = Builder(checkpoint, tmp_path / "engine", backend="torch", dtype=dtype).run()
    carried = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    names = {path.name for path in folder.iterdir()}
    assert names == carried | {"config.json", "manifest.json", "model.safetensors"}
    info = read_engine(folder)
    weights = load_file(folder / "model.safetensors")
    source = load_file(checkpoint / "model.safetensors")
    assert info.manifest.backend == "torch"
    assert info.build.dtype == dtype
    kind = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]
    for name, tensor in source.items():
        short = name.removeprefix("encoder.")
        assert weights[short].dtype == kind
        np.testing.assert_array_equal(weights[short], tensor.astype(weights[short].dtype))
    side = load_file(checkpoint / "linear_spec_lora" / "adapter_model.safetensors")
    b = side["base_model.model.encoder.layers.1.self_attn.o_proj.lora_B.weight"] * np.float32(2)  # alpha / rank
    stored = weights["layers.1.self_attn.o_proj.lora_B.weight"]
    np.testing.assert_array_equal(stored, b.astype(stored.dtype))


def test_commands_work_on_a_torch_engine(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    build = ("build", str(checkpoint), "-o", str(target), "--backend", "torch")
    plan = json.loads(output_of(*build, "--dry-run", "--json"))
    assert not target.exists()
    output_of(*build)
    assert plan["build"]["dtype"] == "bf16"
    assert plan["weight_bytes"] == plan["disk_needed"] == (target / "model.safetensors").stat().st_size
    output_of(*build)  # an engine of its own kind is replaced
    described = json.loads(output_of("inspect", str(target), "--json"))
    assert described["engine"]["backend"] == "torch"
    assert described["graph"] is None
    assert "engine       torch, bf16" in output_of("inspect", str(target))
    answer = json.loads(
        output_of("run", str(target), "-p", "Hello", "--max-new-tokens", "4", "--json", "--device", "cpu")
    )
    assert len(answer["token_ids"]) <= 4


@pytest.mark.parametrize("command", ["run", "chat"])
def test_the_warm_up_can_be_left_out(tiny: Pair, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Its bar is of as many steps as there are shapes."""
    shown = list[list[int]]()

    def warm_up(engine: TorchEngine, show: Callable[[list[int]], Any] = iter) -> None:
        bar = show([4, 2, 1])
        assert len(bar) == 3
        shown.append(list(bar))

    monkeypatch.setattr(TorchEngine, "warm_up", warm_up)
    for words in ([], ["--no-warmup"]):
        asked = ["-p", "x"] if command == "run" else []
        arguments = [command, str(tiny.ours.folder), "--device", "cpu", "--max-new-tokens", "1", *asked, *words]
        result = CliRunner().invoke(main, arguments, input="/exit\n", catch_exceptions=False)
        assert result.exit_code == 0
        assert shown == [[4, 2, 1]]


def test_no_torch(tiny: Pair, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(["run", str(tiny.ours.folder), "-p", "x"], "needs torch, which is not installed", "nemodiff[torch]")


def test_an_old_torch(tiny: Pair, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.delattr(torch, "OutOfMemoryError")
    refused(["run", str(tiny.ours.folder), "-p", "x"], "needs torch 2.5 or later, here is")


def test_a_gpu_without_memory(tiny: Pair, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(TorchModel, "forward", fail)
    refused(["run", str(tiny.ours.folder), "-p", "x"], "too little memory (Tried to allocate 2.00 GiB); end what else")


def test_what_a_card_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    device = TorchDevice(Path("engine"), "cpu")
    device.is_gpu, device.name = True, "cuda:1"

    def said(name: str, value: Any) -> None:
        monkeypatch.setattr(torch.cuda, name, lambda card: {"cuda:1": value}[card])

    said("memory_reserved", 1000)
    said("memory_allocated", 400)
    said("mem_get_info", (50, 7000))
    assert device.memory() == (650, 7000)
    said("synchronize", None)
    assert device.answers()

    def broken(card: str) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert not device.answers()
    waited, happened = list[Any](), list[str]()
    begin, end = (SimpleNamespace(synchronize=lambda at=at: waited.append(at)) for at in range(2))
    begin.elapsed_time = lambda other: {id(end): 6000.0}[id(other)]
    monkeypatch.setattr(device, "mark", iter([begin, end]).__next__)
    assert device.seconds(lambda: happened.append("work"), 4) == 1.5
    assert (waited, len(happened)) == ([1], 4)
    device.wait(None)


@pytest.mark.parametrize("asked", ["wait", "between"])  # the next forward may break it after the one waited for
@pytest.mark.parametrize("answers", [False, True])
def test_a_gpu_that_has_failed_is_lost(small: Pair, monkeypatch: pytest.MonkeyPatch, answers: bool, asked: str) -> None:
    """After an error that breaks the card for its process nothing will run again, which health checks are told."""
    backend = torch_backend(small.ours)
    device = RecordingDevice()
    engine = small.with_backend(TorchEngine(backend.folder, backend.info, device, pages=24))
    monkeypatch.setattr(device, "answers", lambda: answers)

    def fail(*marks: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")

    monkeypatch.setattr(device, asked, fail)
    expected = (RuntimeError, "CUDA error") if answers else (EngineError, "cpu has failed .*was encountered.; start")
    with pytest.raises(expected[0], match=expected[1]):
        nemodiff.generate(engine, PROMPT)
    assert (engine.lost is None) == answers
    assert engine.lost is None or engine.lost == "cpu has failed (CUDA error: an illegal memory access was encountered)"


def test_building_needs_no_torch(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    Builder(checkpoint, tmp_path / "engine", backend="torch").run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("device", "fragment"),
    [
        ("cuda", "device is cuda:0, allowed: cpu (torch "),
        ("cuda:3", "device is cuda:3, allowed: cpu (torch "),
        ("tpu", "device is 'tpu', allowed on torch: cpu, cuda, cuda:N"),
        ("-1", "device is '-1', allowed on torch"),
    ],
)
def test_devices_that_are_not_there(tiny: Pair, refused: Refused, device: str, fragment: str) -> None:
    refused(["run", str(tiny.ours.folder), "-p", "x", "--device", device], fragment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", [[], ["--device", "cuda:0"]], ids=str)
def test_a_card_that_is_too_old(
    tiny: Pair, refused: Refused, monkeypatch: pytest.MonkeyPatch, device: list[str]
) -> None:
    """Before anything is done on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: (7, 5))
    line = "cuda:0 has compute capability 7.5, allowed: 8.0 or later, for which the kernels can be compiled; run with"
    refused(["run", str(tiny.ours.folder), "-p", "x", *device], line, "--device cpu")


def test_a_gpu_for_onnxruntime(tiny: Pair, refused: Refused) -> None:
    refused(["run", str(tiny.theirs.folder), "-p", "x", "--device", "cuda"], "allowed on onnxruntime: cpu")


def test_flags_of_tensorrt(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    build = ["build", str(checkpoint), "-o", str(tmp_path / "engine"), "--backend", "torch"]
    for flags in (["--plugins"], ["--no-logits"], ["--max-input-len", "8"], ["--sm", "89"]):
        refused([*build, *flags], f"{flags[0]}: not a choice of --backend torch")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda w: w.pop("norm.weight"), "norm"),
        (lambda w: w.update({"norm.weight": w["norm.weight"][:-1]}), "norm is torch.float32 [255], not torch.float32"),
        (lambda w: w.update({"norm.weight": w["norm.weight"].astype(np.float16)}), "norm is torch.float16 [256]"),
    ],
)
def test_weights_of_another_engine(tiny: Pair, tmp_path: Path, change: Callable[[Any], Any], fragment: str) -> None:
    folder = Path(shutil.copytree(tiny.ours.folder, tmp_path / "engine"))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(EngineError, match="not the weights of this engine") as error:
        TorchEngine(folder, tiny.ours.info, "cpu")
    assert fragment in str(error.value)


def test_weights_that_are_no_safetensors(tiny: Pair, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(EngineError, match="not the weights of this engine"):
        TorchEngine(tmp_path, tiny.ours.info, "cpu")
