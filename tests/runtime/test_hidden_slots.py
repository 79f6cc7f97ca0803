"""Slots that no pass sees and a row that no request has are poisoned before every pass, and no answer changes.

What lies past a pass's own slots is scratch: a later pass that sees those slots writes them first.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins.checkpoints import TINY_CHAT, write_adapter
from stand_ins.torch_pair import CASES, QUESTIONS, without_times

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.contract import PAGE
from nemodiff.runtime.editing.options import METHODS
from nemodiff.runtime.engines.onnxruntime.cache import OnnxRuntimeCache
from nemodiff.runtime.engines.passes import Pass, Prediction, bidirectional, causal
from nemodiff.runtime.engines.torch.cache import TorchCache
from nemodiff.runtime.loading import LoadedEngine

TORCH = pytest.mark.torch
KINDS: list[Any] = [
    pytest.param(("onnxruntime", "f32"), id="onnxruntime f32"),
    pytest.param(("onnxruntime", "f16"), id="onnxruntime f16"),
    pytest.param(("onnxruntime", "f32", "int8"), id="onnxruntime int8 K/V"),
    pytest.param(("torch", "f32"), id="torch f32", marks=TORCH),
    pytest.param(("torch", "bf16"), id="torch bf16", marks=TORCH),
]


@dataclasses.dataclass
class PoisonedCache:
    """A cache whose scratch is spoilt before every pass; of rows of one length there is one too many."""

    cache: Any
    rows: int
    large: float
    spoilt: int = 0  # slots, over all passes

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        used = [p.write_at + p.ids.size for p in passes]
        if isinstance(self.cache, TorchCache):
            rows = range(first, first + len(passes))
            for row, p, end in zip(rows, passes, used, strict=True):
                assert self.cache.reserve(row, p.write_at, end)
            self.spoil_pages(passes, rows)
        else:
            assert isinstance(self.cache, OnnxRuntimeCache)
            # What it is about to do itself.
            self.cache.memory.use(first, [p.write_at for p in passes], used, max(used) + 64)
            arrays = self.cache.memory.views(0, self.cache.rows)
            for layer, name in enumerate(name for name in arrays if name.startswith("k_cache")):
                names = [name, "v" + name[1:]]
                for row, start in [*enumerate(used, first), (self.rows, 0)]:
                    k, v = (arrays[part][row, :, start:] for part in names)
                    scales = [arrays.get(part.replace("cache", "scale")) for part in names]
                    self.spoil(k, v, layer + start, [None if s is None else s[row, :, start:] for s in scales])
        predictions: list[Prediction] = self.cache.forward(passes, first)
        return predictions

    def launch(self, passes: Sequence[Pass], rows: Sequence[int]) -> Any:
        self.spoil_pages(passes, rows)
        return self.cache.launch(passes, rows)

    def follow(self, *arguments: Any) -> None:
        """No pass runs ahead, so that each is spoilt in its turn."""

    def spoil_pages(self, passes: Sequence[Pass], rows: Sequence[int]) -> None:
        """Spoil the next free pages, the scratch page, and what the passes' rows hold past their end."""
        pages, pool = self.cache._memory.pages, self.cache._memory.pool
        starts = [(page, 0) for page in (0, *pages._free[-3:])]
        for row, p in zip(rows, passes, strict=True):
            end = p.write_at + p.ids.size
            held = pages._rows[self.cache.rows[row]]
            for at in range(end // PAGE, len(held)):
                if pages._holders[held[at]] == 1:
                    starts.append((held[at], max(0, end - at * PAGE)))
        with torch.inference_mode():  # as the torch engine's tensors were made
            for layer, kept in enumerate(pool.layers()):
                for page, start in starts:
                    k, v = (stored.pages[page, :, start:] for stored in kept)
                    scales = [None if s.scales is None else s.scales[page, :, start:] for s in kept]
                    self.spoil(k, v, layer + start, scales)

    def spoil(self, k: Any, v: Any, seed: int, scales: Sequence[Any] = (None, None)) -> None:
        """Where there are scales they are large and the numbers are the largest of 8 bits."""
        large = self.large if scales[0] is None else 127
        sides = np.random.default_rng(seed).choice([-large, large], k.shape)
        k[:] = self.in_type(k, sides)
        v[:] = self.in_type(v, -sides)
        for scale in scales:
            if scale is not None:
                scale[:] = self.large / 127
        self.spoilt += sides.shape[1]

    @staticmethod
    def in_type(like: Any, values: np.ndarray) -> Any:
        return values.astype(like.dtype) if isinstance(like, np.ndarray) else torch.from_numpy(values).to(like.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


@dataclasses.dataclass
class PoisonedEngine:
    """An engine of such caches."""

    engine: Any
    large: float
    caches: list[PoisonedCache] = dataclasses.field(default_factory=list)

    def open(self, rows: int) -> PoisonedCache:
        self.caches.append(PoisonedCache(self.engine.open(rows + 1), rows, self.large))
        return self.caches[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@dataclasses.dataclass(frozen=True)
class Both:
    """One engine twice: as it is, and with spoilt slots."""

    clean: LoadedEngine
    spoilt: LoadedEngine

    def check(self, ask: Callable[[LoadedEngine], Any]) -> None:
        caches = self.spoilt.backend.caches
        caches.clear()
        assert ask(self.spoilt) == ask(self.clean)
        assert sum(cache.spoilt for cache in caches) > 1000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(TINY_CHAT, tmp_path_factory.mktemp("poison") / "checkpoint"))
    write_adapter(folder, rank=8, alpha=32, strength=0.05)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    backend, dtype, *rest = request.param
    kv: Any = {"kv_cache_dtype": rest[0]} if rest else {}
    folder = Builder(checkpoint, tmp_path_factory.mktemp("poison") / "engine", backend=backend, dtype=dtype, **kv).run()
    clean = nemodiff.load(folder, threads=1, device="cpu")
    engine: Any = PoisonedEngine(clean.backend, 4000.0 if dtype == "f16" else 1e4)
    return Both(clean, dataclasses.replace(clean, backend=engine))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_mode(both: Both, case: dict[str, Any]) -> None:
    for question in QUESTIONS[:2]:
        both.check(lambda engine, q=question: without_times(nemodiff.generate(engine, q, max_new_tokens=24, **case)))


def test_rows_of_different_length(both: Both) -> None:
    """Shorter rows are padded, and what pads one lies past its own slots."""
    prompts: list[Any] = [*QUESTIONS, QUESTIONS[0] * 9]
    for mode in ("ar", "diffusion", "linear_spec"):
        both.check(
            lambda engine, mode=mode: [
                answer.token_ids
                for answer in nemodiff.generate_many(engine, prompts, mode=mode, rows=3, max_new_tokens=16)
            ]
        )


def test_filling_in_and_revising(both: Both) -> None:
    for method in METHODS:
        both.check(
            lambda engine, method=method: (
                nemodiff.infill(
                    engine, "def add(", "):\n    return", prompt="Write a function.", method=method, length=3
                ).text
            )
        )
    both.check(lambda engine: nemodiff.revise(engine, "3, 4, 9, 6, 7, 8, 9.", prompt=QUESTIONS[0]).text)


def test_logits_keep_every_bit(both: Both) -> None:
    mask = both.clean.info.model.mask_id

    def logits(engine: LoadedEngine) -> list[list[float]]:
        cache = engine.backend.open(2)
        cache.forward([causal("prefill", [130 + i * 7 for i in range(n)], 0) for n in (20, 33)])
        steps = [
            [bidirectional("denoise", [mask] * 8, 20, 0.9, logits=True), causal("decode", [301], 33, logits=True)],
            [causal("verify", [300, 302, 305], 20, predict_all=True, logits=True)],
        ]
        found = [p.logits.ravel().tolist() for step in steps for p in cache.forward(step) if p.logits is not None]
        cache.close()
        return found

    both.check(logits)
