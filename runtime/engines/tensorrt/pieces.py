"""Cuts a pass that is longer than an engine's profiles into pieces, and joins their predictions.

So a long prompt needs no loop that knows the engine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ....errors import EngineError
from ..passes import Pass, Prediction, read_only


def split(p: Pass, longest: int, folder: Path) -> list[Pass]:
    """Pieces of at most `longest` tokens; each ends where none of its tokens sees what comes after.

    Raises:
        EngineError: more tokens see each other than fit.
    """
    # (S,) i32: how many tokens of the pass must be written before a token and all before it can run.
    needed = np.maximum.accumulate(np.maximum(p.visible[:, 0], p.visible[:, 2]) - p.write_at)
    ends = np.arange(1, p.ids.size + 1)
    allowed = ends[needed <= ends]
    pieces = list[Pass]()
    start = 0
    while start < p.ids.size:
        fitting = allowed[(allowed > start) & (allowed <= start + longest)]
        if not fitting.size:
            raise EngineError(
                f"{folder}: a {p.kind} pass of {p.ids.size} tokens that see each other exceeds the profile, allowed: "
                f"{longest}; use a shorter block length, or build it again with --max-input-len {p.ids.size}"
            )
        end = int(fitting[-1])
        pieces.append(_piece(p, start, end))
        start = end
    return pieces


def _piece(p: Pass, start: int, end: int) -> Pass:
    predicted = p.predicted[(p.predicted >= start) & (p.predicted < end)] - start
    embedded, embeddings = p.embedded, p.embeddings
    if embedded is not None and embeddings is not None:
        here = (embedded >= start) & (embedded < end)
        embedded, embeddings = (embedded[here] - start, embeddings[here]) if here.any() else (None, None)
    return p._replace(
        ids=p.ids[start:end],
        pos=p.pos[start:end],
        write_at=p.write_at + start,
        visible=p.visible[start:end],
        predicted=predicted.astype(np.int32),
        adapter=p.adapter[start:end] if isinstance(p.adapter, np.ndarray) else p.adapter,
        embedded=embedded,
        embeddings=embeddings,
    )


def copied(p: Prediction) -> Prediction:
    """A prediction that lasts over the next forward."""
    return Prediction(
        read_only(p.token.copy()),
        read_only(p.confidence.copy()),
        read_only(p.next_ids.copy()),
        None if p.logits is None else read_only(p.logits.copy()),
    )


def joined(pieces: list[Prediction]) -> Prediction:
    """The predictions of a pass run in pieces; the commit rule looked at each piece alone."""
    if len(pieces) == 1:
        return pieces[0]
    logits = [p.logits for p in pieces if p.logits is not None]
    return Prediction(
        read_only(np.concatenate([p.token for p in pieces])),
        read_only(np.concatenate([p.confidence for p in pieces])),
        read_only(np.concatenate([p.next_ids for p in pieces])),
        read_only(np.concatenate(logits)) if logits else None,
    )
