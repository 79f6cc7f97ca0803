"""What an engine was asked, written so that any reference can answer it without the engine's cache.

A `Script` is a text and blocks over its prefixes. Every pass that a loop has run is one of both: causal passes over the
text's own tokens are part of the text, all others are blocks after the first `prefix` tokens of it. While passes are
added, the script follows what each cache slot holds, so a loop that reads what it should not is found here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..runtime.engines.passes import Pass


@dataclasses.dataclass(frozen=True)
class Block:
    """A pass after the first `prefix` tokens of the text, every one of which each of its tokens sees."""

    prefix: int
    ids: np.ndarray  # (S,) i32
    pos: np.ndarray  # (S,) i32
    visible: np.ndarray  # (S, 3) i32, as in a `Pass` at `prefix`
    gate: np.ndarray  # (S,) f32, 1 where the drafter adapter acts

    @property
    def seen(self) -> np.ndarray:
        """Which tokens of the block each of them sees, (S, S) bool."""
        slots = self.prefix + np.arange(self.ids.size)
        end, first, last = (self.visible[:, i, None] for i in range(3))
        return (slots < end) | ((slots >= first) & (slots < last))

    @property
    def is_causal(self) -> bool:
        """Whether its tokens go on with a text, each seeing itself and those before it."""
        start = self.pos[0] + np.arange(self.ids.size)
        lower = np.tri(self.ids.size, dtype=bool)
        return bool((self.pos == start).all() and (self.seen == lower).all() and not self.gate.any())

    def key(self) -> tuple[object, ...]:
        """Equal for blocks that ask the same."""
        arrays = (self.ids, self.pos, self.visible, self.gate)
        return (self.prefix, *(np.ascontiguousarray(array).tobytes() for array in arrays))


class Script:
    """A text's `tokens` at positions `offset` and on, and blocks; answers count them all in one row, text first."""

    def __init__(self, tokens: Sequence[int], offset: int = 0) -> None:
        self.tokens = np.array(tokens, np.int32)  # (N,)
        self.offset = offset
        self.blocks: list[Block] = []
        self.wanted: set[int] = set()  # tokens whose logits are wanted of every answer
        self.size = self.tokens.size  # tokens of the text and of all blocks
        self._places: dict[tuple[object, ...], int] = {}

    def place(self, block: Block) -> int:
        """Where the answers to a block's tokens begin; the block is added if it is new."""
        end = block.prefix + block.ids.size
        in_place = block.pos[0] == block.prefix + self.offset
        if in_place and np.array_equal(self.tokens[block.prefix : end], block.ids) and block.is_causal:
            return block.prefix
        key = block.key()
        if key not in self._places:
            self._places[key] = self.size
            self.blocks.append(block)
            self.size += block.ids.size
        return self._places[key]

    def shortened(self, blocks: int) -> Script:
        """The text with about so many of the blocks: of each kind (causal, with spans, with the adapter) alike."""
        short = Script(self.tokens.tolist(), self.offset)
        kinds: dict[tuple[bool, ...], list[Block]] = {}
        for block in self.blocks:
            kind = (block.is_causal, bool(block.visible[:, 2].any()), bool(block.gate.any()))
            kinds.setdefault(kind, []).append(block)
        for alike in kinds.values():
            for block in alike[: -(-blocks // len(kinds))]:
                short.place(block)
        return short

    def starts(self) -> list[int]:
        """Where the answers to each block begin."""
        return [self._places[block.key()] for block in self.blocks]


class Slots:
    """What the cache slots of one row hold, as far as its passes say, while they write to the slots of `script`."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._valid: list[bool] = []  # by slot: K/V of the text's own token after the text's own tokens

    def add(self, pass_: Pass) -> tuple[int, str | None]:
        """Take in a pass: where its answers begin, and what is wrong with what it reads, if anything is."""
        size = pass_.ids.size
        gate = np.broadcast_to(np.asarray(pass_.adapter, np.float32), (size,)).copy()
        block = Block(pass_.write_at, pass_.ids.copy(), pass_.pos.copy(), pass_.visible.copy(), gate)
        wrong = self._reads(block) or _sees(block, self._script.offset)
        at = pass_.write_at
        text = self._script.tokens
        seen = block.seen
        own = np.arange(size)
        self._valid += [False] * (at + size - len(self._valid))
        for i in range(size):
            causal = bool((seen[i] == (own <= i)).all()) and not gate[i]
            same = at + i < text.size and text[at + i] == block.ids[i]
            in_place = block.pos[i] == at + i + self._script.offset
            self._valid[at + i] = bool(causal and same and in_place and all(self._valid[at : at + i]) and not wrong)
        return self._script.place(block), wrong

    def _reads(self, block: Block) -> str | None:
        """A slot before the pass that does not hold the text's K/V."""
        if block.prefix > len(self._valid):
            return f"begins at slot {block.prefix}, where slots up to {len(self._valid)} have been written"
        stale = [slot for slot, valid in enumerate(self._valid[: block.prefix]) if not valid]
        return f"reads slot {stale[0]}, which holds K/V of a draft or of another text" if stale else None


def _sees(block: Block, offset: int) -> str | None:
    """What no pass of any mode may see, if a token of the block sees it or lacks what it must see."""
    seen = block.seen
    size = block.ids.size
    for i, (end, first, last) in enumerate(block.visible.tolist()):
        if end < block.prefix and not first <= end <= block.prefix <= last:
            return f"token {i} sees {end} of the {block.prefix} tokens before the pass"
        if max(end, last if last > first else 0) > block.prefix + size:
            return f"token {i} sees slots after the pass"
        if not seen[i, i]:
            return f"token {i} does not see itself"
        positions = sorted(block.pos[seen[i]].tolist())
        if positions != list(range(block.prefix + offset, positions[-1] + 1)):
            return f"token {i} sees positions {positions}, which have a gap or come twice"
        for j in np.flatnonzero(seen[i] & (block.pos > block.pos[i])):
            if not (seen[j] == seen[i]).all():
                return f"tokens {i} and {j} do not see the same, though the first sees the second"
    return None
