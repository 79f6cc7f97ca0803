"""Measure a TensorRT engine by passes and modes, where TensorRT-RTX or TensorRT can be loaded."""

from __future__ import annotations

import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import questions

from gpu.plan import Cell, Figures, Lab, RunConfig
from nemodiff.builder.build import Builder
from nemodiff.builder.compilers.choices import Choices
from nemodiff.contract import ITEMSIZE, MODES
from nemodiff.engine_info import read_engine
from nemodiff.errors import EngineError
from nemodiff.plugins.tensorrt.api import MODULES
from nemodiff.runtime.engines.passes import bidirectional, causal
from nemodiff.runtime.engines.tensorrt.device import Device
from nemodiff.runtime.engines.tensorrt.engine import TensorRTEngine
from nemodiff.runtime.generate import generate
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.runtime.text.codec import TextCodec

SIZES = (1, 2, 4, 8, 16, 32, 64)
PREFILLS = (128, 256, 512)
ROWS = (1, 4, 8)
CONTEXTS = (0, 512, 4096, 16384)
ROUNDS, MAX_SEQ_LEN = 30, 17408

Make = Callable[[bool], TensorRTEngine]  # with CUDA graphs or without


def ceiling(device: Device, nbytes: int, repeats: int) -> float:
    """Bytes per second that a copy within the device reads and writes, the best of some repeats."""
    a, b = device.allocate(nbytes), device.allocate(nbytes)
    device.zero(a.address, nbytes)
    device.copy(b.address, a.address, nbytes)
    device.wait()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        device.copy(b.address, a.address, nbytes)
        device.wait()
        best = min(best, time.perf_counter() - started)
    return 2 * nbytes / best


def forward_bytes(engine: TensorRTEngine, rows: int, context: int) -> int:
    """Bytes that a pass must read at least: the weights, and the K/V that its queries see.

    At a few tokens a pass reads little else, so these bytes over its time are the whole verdict.
    """
    about, model = engine.info.manifest.tensorrt, engine.info.model
    assert about is not None
    return about.engine_bytes + rows * context * model.kv_bytes_per_token(ITEMSIZE[engine.info.build.dtype])


def curve(engine: TensorRTEngine, bandwidth: float, rounds: int, shapes: list[tuple[int, int, int]]) -> list[Any]:
    """Median seconds by (rows, context, tokens), with the host's part, and the ratio."""
    mask, vocab = engine.info.model.mask_id, engine.info.model.vocab_size
    longest, results = max(p.max_tokens for p in engine.profiles), []
    for rows, context, size in shapes:
        cache = engine.open(rows)
        for at in range(0, context, longest):
            ids = [(7 * i + 200) % vocab for i in range(at, min(at + longest, context))]
            cache.forward([causal("prefill", ids, at)] * rows)
        pass_ = (
            causal("prefill", [1] * size, context)
            if size > SIZES[-1]
            else bidirectional("denoise", [mask] * size, context, 0.9)
        )
        times = []
        for turn in range(3 + rounds):  # eager, captured, first replay
            started = time.perf_counter()
            cache.forward([pass_] * rows)
            if turn >= 3:
                times.append(time.perf_counter() - started)
        cache.close()
        seconds = statistics.median(times)
        least = forward_bytes(engine, rows, context + size)
        results.append(
            {
                "rows": rows,
                "context": context,
                "tokens": size,
                "us": seconds * 1e6,
                "bytes": least,
                "ratio_to_ceiling": least / seconds / bandwidth,
            }
        )
    return results


def grid(engine: TensorRTEngine) -> list[tuple[int, int, int]]:
    """The shapes that the engine takes."""
    build, longest = engine.info.build, max(p.max_tokens for p in engine.profiles)
    return [
        (rows, context, size)
        for rows in ROWS
        for context in CONTEXTS
        for size in SIZES + PREFILLS
        if rows <= build.max_batch_size and context + size <= build.max_seq_len and size <= longest
    ]


def modes(engine: LoadedEngine, prompts: list[list[int]], new_tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of each mode, and in how many answers it differs from `ar`."""
    results: dict[str, Any] = {}
    expected: list[list[int]] = []
    for mode in MODES:
        rates, answers = [], list[Any]()
        for turn in range(1 + rounds):
            started = time.perf_counter()
            answers = [generate(engine, ids, mode=mode, max_new_tokens=new_tokens) for ids in prompts]
            if turn:
                rates.append(sum(len(a.token_ids) for a in answers) / (time.perf_counter() - started))
        expected = expected or [a.token_ids for a in answers]
        results[mode] = {
            "tokens_per_second": statistics.median(rates),
            "tokens_per_pass": statistics.mean(a.decode_tpf or 0.0 for a in answers),
            "answers_unlike_ar": sum(a.token_ids != e for a, e in zip(answers, expected, strict=True)),
        }
    return results


def measured(make: Make, folder: Path, texts: list[str], rounds: int, copied: int) -> dict[str, Any]:
    """All figures of one engine folder."""
    engine = make(True)
    device = engine.device
    bandwidth = ceiling(device, copied, rounds)
    shapes = grid(engine)
    with_graphs = curve(engine, bandwidth, rounds, shapes)
    free, total = device.memory()  # the engine keeps what it has taken
    codec = TextCodec(folder)
    prompts = [codec.encode_rendered(codec.render_chat([{"role": "user", "content": text}])) for text in texts]
    ends = modes(LoadedEngine(folder, engine, codec, 0.0), prompts, 128, rounds)
    eager_shapes = {str(key): reason for key, reason in engine.eager_shapes.items()}
    captured = engine.captured
    del engine
    eager = curve(make(False), bandwidth, rounds, shapes)
    for figures, other in zip(with_graphs, eager, strict=True):
        figures["eager_us"] = other["us"]
        figures["eager_over_graph"] = other["us"] / figures["us"]
    return {
        "device": {"name": device.name, "sm": device.sm, "memory_bytes": total},
        "copy_ceiling_bytes_per_second": bandwidth,
        "forward": with_graphs,
        "memory_used_bytes": total - free,
        "graphs_captured": captured,
        "shapes_not_captured": eager_shapes,
        "modes": ends,
    }


def cells(config: RunConfig) -> Iterator[Cell]:
    """A cell per module that can build TensorRT engines."""
    for backend, module in MODULES.items():

        def measure(lab: Lab, backend: Any = backend, module: str = module) -> Figures:
            importlib.import_module(module)
            if not lab.card.is_gpu:
                raise EngineError("runs on a GPU alone")
            lab.let_go()
            device = Device()
            sm = (device.sm,) if backend == "tensorrt-rtx" else None
            with tempfile.TemporaryDirectory(prefix="nemodiff-gpu-") as work:
                builder = Builder(
                    config.checkpoint, Path(work) / "engine", backend=backend, dtype="bf16", max_seq_len=MAX_SEQ_LEN,
                    choices=Choices(sm=sm),
                )  # fmt: skip
                folder = builder.run()
                info = read_engine(folder)

                def make(graphs: bool) -> TensorRTEngine:
                    return TensorRTEngine(folder, info, device, graphs=graphs)

                figures = measured(make, folder, [q.text for q in questions.draw(1)], ROUNDS, 2**30)
            return {"backend": backend, **figures}

        yield Cell("tensorrt", config.checkpoint.name, backend, 2**33, 180, measure)
