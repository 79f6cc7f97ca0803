"""One cache row driven by hand, for what is not a continuation: filling in and revising."""

from __future__ import annotations

from types import TracebackType

from ...contract import PREFILL_CHUNK
from ...errors import EngineError
from ..engines.engine import Engine
from ..engines.passes import PASS_KINDS, Pass, PassKind, Prediction, bidirectional, causal


class Row:
    """A row whose first `length` tokens have their K/V in the cache; a context manager, which gives the cache back."""

    def __init__(self, engine: Engine, tokens: list[int]) -> None:
        self.tokens = list(tokens)
        self.length = 0  # tokens whose K/V are in the cache; the slots after them are scratch
        self.mask_id = engine.info.model.mask_id
        self.nfe: dict[PassKind, int] = dict.fromkeys(PASS_KINDS, 0)
        self._cache = engine.open(1)

    def __enter__(self) -> Row:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._cache.close()

    def run(self, pass_: Pass) -> Prediction:
        """Run one pass. The prediction's arrays are overwritten by the next one."""
        self.nfe[pass_.kind] += 1
        return self._cache.forward([pass_])[0]

    def commit(self, end: int) -> None:
        """Write the K/V of the tokens before `end`, causally."""
        while self.length < end:
            part = self.tokens[self.length : min(end, self.length + PREFILL_CHUNK)]
            self.run(causal("prefill", part, self.length))
            self.length += len(part)

    def denoise(self, block: list[int], threshold: float) -> list[int]:
        """The block at `length` with its masks filled in, by bidirectional passes and the commit rule."""
        while left := block.count(self.mask_id):
            block = self.run(bidirectional("denoise", block, self.length, threshold)).next_ids.tolist()
            if block.count(self.mask_id) >= left:
                raise EngineError("the engine committed no token in a pass, so its numbers are broken; build it in f32")
        return block
