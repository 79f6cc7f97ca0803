"""An engine answers a script, by nothing but the engines' contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from ..contract import PREFILL_CHUNK
from ..errors import EngineError, RequestError, first_line
from ..runtime.engines.engine import Engine, ReadableCache
from ..runtime.engines.passes import Pass, Prediction, causal, every_token
from .hidden_states import named, watched
from .network import Answer
from .rounding import relative_noise
from .script import Block, Script


class Replayed(NamedTuple):
    """What an engine says of each token of a script."""

    token: np.ndarray  # (T,) i64
    confidence: np.ndarray  # (T,) f64
    best: np.ndarray  # (T,) logit of `token`; nan without logits
    logits: np.ndarray  # (T, C) of the wanted ids; (T, 0) without logits
    states: dict[str, np.ndarray]  # (T, width) f32 by name, if wanted: K and V, and the hidden states that can be had


def replay(engine: Engine, script: Script, ids: np.ndarray, *, states: bool = False) -> Replayed:
    """Run a script's passes in a fresh cache: its text, then the blocks from the last prefix to the first.

    A block writes over the text after its prefix, which no later one reads. Raises RequestError where states are wanted
    of a cache that shows none.
    """
    info = engine.info
    cache = cast(ReadableCache, engine.open(1))
    if states and not hasattr(cache, "read"):
        raise RequestError(f"backend {info.manifest.backend} does not show its K and V; leave --layers out")
    result = Replayed(
        np.zeros(script.size, np.int64),
        np.ones(script.size),
        np.full(script.size, np.nan),
        np.zeros((script.size, ids.size if info.build.gather_generation_logits else 0), np.float32),
        {},
    )

    def take(at: int, pass_: Pass) -> None:
        with watched(info, states) as seen:
            (got,) = cache.forward([pass_])
        _put(result, at, got, ids)
        if states:
            count = pass_.ids.size
            held = cache.read(0, pass_.write_at, pass_.write_at + count)
            found = {name: value.transpose(1, 0, 2).reshape(count, -1) for name, value in held.items()}
            for name, value in (found | named(seen, info.model.num_layers, count)).items():
                result.states.setdefault(name, np.zeros((script.size, value.shape[1]), np.float32))
                result.states[name][at : at + count] = value

    logits = info.build.gather_generation_logits
    size = min(PREFILL_CHUNK, info.build.max_input_len)
    for at in range(0, script.tokens.size, size):
        part = causal("prefill", script.tokens[at : at + size].tolist(), at, predict_all=True, logits=logits)
        take(at, part._replace(pos=part.pos + np.int32(script.offset)))
    for at, block in sorted(zip(script.starts(), script.blocks, strict=True), key=lambda pair: -pair[1].prefix):
        take(at, as_pass(block, logits=logits, adapter=info.has_adapter))
    cache.close()
    return result._replace(states=dict(sorted(result.states.items(), key=lambda item: _when(item[0]))))


def _when(name: str) -> tuple[int, int]:
    """When a state is computed: its layer, and its place in it."""
    if name == "embed_tokens":
        return -1, 0
    if name.startswith("layers."):
        _, layer, half, _ = name.split(".")
        return int(layer), 1 if half == "self_attn" else 2
    return int(name.rpartition("_")[2]), 0


def as_pass(block: Block, *, logits: bool, adapter: bool) -> Pass:
    """The pass that asks a block."""
    gate = block.gate if adapter else False
    size = block.ids.size
    return Pass(
        "verify", block.ids, block.pos, block.prefix, block.visible, every_token(size), adapter=gate, logits=logits
    )


def _put(result: Replayed, at: int, got: Prediction, ids: np.ndarray) -> None:
    size = got.token.size
    result.token[at : at + size] = got.token
    result.confidence[at : at + size] = got.confidence
    if got.logits is not None:
        result.best[at : at + size] = got.logits[np.arange(size), got.token]
        result.logits[at : at + size] = got.logits[:, ids]


class EngineReference:
    """An engine that says what is right for another, or for itself: each script anew, in a cache of its own."""

    def __init__(self, engine: Engine, judged: Engine) -> None:
        self._engine = engine
        self._noise = relative_noise(engine.info, judged.info)
        self.precision: str = engine.info.build.dtype

    def answer(self, scripts: Sequence[Script], columns: np.ndarray, *, states: bool = False) -> list[Answer]:
        """See `network.Network.answer`; states are K and V alone. Raises EngineError where the engine fails."""
        try:
            return [self._answer(script, columns, states) for script in scripts]
        except (RequestError, MemoryError):
            raise
        except Exception as error:
            raise EngineError(first_line(error)) from error

    def _answer(self, script: Script, columns: np.ndarray, states: bool) -> Answer:
        ids = np.union1d(columns, sorted(script.wanted)).astype(np.int64)
        got = replay(self._engine, script, ids, states=states)
        spread = got.logits.std(-1) if got.logits.size else np.full(script.size, np.log(self._vocab))
        best = np.where(np.isnan(got.best), 0.0, got.best)
        total = best - np.log(np.maximum(got.confidence, 1e-30))
        noise = {name: self._noise * float(np.abs(value).mean()) for name, value in got.states.items()}
        logits = got.logits if got.logits.size else np.full((script.size, ids.size), np.nan)
        return Answer(got.token, best, total, logits, ids, self._noise * spread, got.states, noise)

    @property
    def _vocab(self) -> int:
        return self._engine.info.model.vocab_size
