"""One checkpoint loaded into the torch engine and into a reference engine, and forwards that must agree on both."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stand_ins.checkpoints import TINY_CHAT, write_adapter, write_checkpoint

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.runtime.batching.batch import Batch
from nemodiff.runtime.engines.passes import Pass, bidirectional, causal
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.runtime.requests.options import Options
from nemodiff.runtime.requests.prepare import prepare
from nemodiff.runtime.requests.sequence import Sequence as Request
from nemodiff.runtime.scheduler.statistics import Statistics

Asked = tuple[list[int], dict[str, Any]]  # a prompt and its options
QUESTIONS = ["Count from 3 to 9.", "Sort these numbers: 41, 7, 93.", "Show the times table of 7 up to 5."]
PROMPT = [130 + (i * 7) % 200 for i in range(40)]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EARLY = {  # every frequency band of YaRN and several steps of the query scale within a short text
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5,
    "attention_factor": 1.3,
}
MODELS: dict[str, Callable[[Path], Path]] = {
    "tiny-chat": lambda folder: TINY_CHAT,
    "tiny-chat with adapter": lambda folder: adapted(shutil.copytree(TINY_CHAT, folder), 0.2),
    "plain rotation": lambda folder: write_checkpoint(folder, seed=1, rope_parameters=ROPE, num_key_value_heads=4),
    "early YaRN": lambda folder: adapted(
        write_checkpoint(folder, seed=2, rope_parameters=EARLY, num_key_value_heads=1, head_dim=48, dtype="f32"), 0.1
    ),
}


def adapted(folder: Path, strength: float) -> Path:
    write_adapter(folder, rank=8, alpha=32, strength=strength)
    return folder


@dataclasses.dataclass(frozen=True)
class Pair:
    """One checkpoint in both engines, in f32."""

    ours: LoadedEngine  # torch
    theirs: LoadedEngine  # the reference

    def with_backend(self, backend: TorchEngine) -> LoadedEngine:
        return dataclasses.replace(self.ours, backend=backend)


def make_pair(folder: Path, checkpoint: Path) -> Pair:
    ours = Builder(checkpoint, folder / "torch", backend="torch", dtype="f32").run()
    theirs = Builder(checkpoint, folder / "onnxruntime").run()
    return Pair(nemodiff.load(ours, device="cpu"), nemodiff.load(theirs))


def torch_backend(engine: LoadedEngine) -> TorchEngine:
    assert isinstance(engine.backend, TorchEngine)
    return engine.backend


def without_times(answer: nemodiff.Generation) -> dict[str, Any]:
    """All of an answer but its times."""
    return {name: value for name, value in answer.as_dict().items() if name != "timings_ms"}


CASES: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "ar", "prefill_chunk": 7},
    {"mode": "diffusion"},
    {"mode": "diffusion", "block_length": 5, "threshold": 0.6},
    {"mode": "linear_spec", "block_length": 32},
    {"mode": "linear_spec", "block_length": 8, "threshold": 0.7},
    {"mode": "quadratic_spec", "groups": "all", "block_length": 6},
]


def two_intervals(mask: int, start: int) -> Pass:
    """Two heads and a group of two masks for each, at `start`."""
    ids = [300, 301, mask, mask, mask, mask]
    pos = [start, start + 1, start + 1, start + 2, start + 2, start + 3]
    groups = [(start + 1 + j, start + 2 + 2 * j, start + 4 + 2 * j) for j in (0, 0, 1, 1)]
    visible = [(start + 1, 0, 0), (start + 2, 0, 0), *groups]
    gate = np.array([0, 0, 1, 1, 0, 1], np.float32)
    return Pass(
        "verify",
        np.array(ids, np.int32),
        np.array(pos, np.int32),
        start,
        np.array(visible, np.int32),
        predicted=np.arange(6, dtype=np.int32),
        threshold=0.3,
        adapter=gate,
        logits=True,
    )


def short_steps(mask: int) -> Iterator[list[Pass]]:
    """Forwards of three rows: of different lengths, causal, bidirectional, two intervals, gated, with logits."""
    yield [causal("prefill", PROMPT[:n], 0) for n in (9, 14, 11)]
    block = bidirectional("denoise", [300, mask, mask, 301, mask], 9, 0.1)
    yield [
        block._replace(logits=True),
        causal("verify", [300, 310, 320], 14, predict_all=True),
        two_intervals(mask, 11),
    ]
    draft = bidirectional("draft", [300] + [mask] * 6, 9, 0.0, adapter=True)
    yield [draft, causal("decode", [305], 14, logits=True), causal("decode", [306], 13)]


def long_steps(mask: int) -> Iterator[list[Pass]]:
    """More forwards of three rows, past the slots that a cache begins with."""
    draft = bidirectional("draft", [300] + [mask] * 6, 9, 0.0, adapter=True)
    yield [causal("prefill", (PROMPT * 8)[:n], 9) for n in (280, 3, 17)]
    yield [two_intervals(mask, 289), draft, causal("verify", [300] * 6, 26, predict_all=True)]


def check_steps(ours: TorchEngine, theirs: LoadedEngine, *, short: bool = False) -> None:
    """Compare every result of the forwards with ONNX Runtime's; then rows are moved, and two of three are used."""
    mask = theirs.info.model.mask_id
    a = ours.open(3)
    b = theirs.backend.open(3)
    for passes in [*short_steps(mask), *([] if short else long_steps(mask))]:
        for got, expected in zip(a.forward(passes), b.forward(passes), strict=True):
            np.testing.assert_array_equal(got.token, expected.token)
            np.testing.assert_array_equal(got.next_ids, expected.next_ids)
            np.testing.assert_allclose(got.confidence, expected.confidence, rtol=2e-4, atol=2e-4)
            assert (got.logits is None) == (expected.logits is None)
            if got.logits is not None and expected.logits is not None:
                np.testing.assert_allclose(got.logits, expected.logits, rtol=2e-4, atol=2e-3)
    for cache in (a, b):
        cache.move(0, 2, 9)
        cache.forward([causal("verify", [301] * 4, 9)], 1)
    last = [causal("decode", [302], 9), causal("decode", [303], 13), causal("decode", [302], 9)]
    for got, expected in zip(a.forward(last), b.forward(last), strict=True):
        np.testing.assert_array_equal(got.token, expected.token)
    a.close()


def crowd(
    engine: LoadedEngine, theirs: LoadedEngine, asked: Sequence[Asked], leaving: dict[str, Any], seconds: float
) -> tuple[list[tuple[nemodiff.Generation, nemodiff.Generation]], Statistics]:
    """Requests over four rows, each answer beside `theirs`, while others with some of the prompts are cancelled.

    Those have the options `leaving`. An answer has so many seconds.
    """
    with nemodiff.Scheduler(engine, rows=4) as scheduler:
        handles, left = [], []
        for number, (prompt, options) in enumerate(asked):
            handles.append(scheduler.submit(prompt, **options))
            if number % 3 == 0:
                left.append(scheduler.submit(prompt, **leaving))
        answers = []
        for number, (handle, (prompt, options)) in enumerate(zip(handles, asked, strict=True)):
            if number % 2 and left:
                left.pop().cancel()
            expected = nemodiff.generate(theirs, prompt, **options)
            answers.append((handle.result(seconds), expected))
        for handle in left:
            handle.cancel()
        return answers, scheduler.statistics


def one_leaves(engine: LoadedEngine, asked: Sequence[Asked], moment: int) -> list[Request]:
    """Three requests over two rows, of which the first leaves after some steps, whatever is under way for it."""
    batch = Batch(engine.backend, 2, kept=1)
    first, second, third = requests = [prepare(engine, prompt, Options(**options)) for prompt, options in asked]
    batch.add(first)
    batch.add(second)
    for _ in range(moment):
        list(batch.step())
    left = len(batch) == 2
    if left:
        batch.remove(first)
    if len(batch) < 2:
        batch.add(third)
    while len(batch):
        told = [result.sequence for result in batch.step()]
        assert not (left and first in told), "a pass is told of that was under way for a row that has left"
    batch.close()
    return requests
