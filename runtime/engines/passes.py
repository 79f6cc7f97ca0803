"""What a decoding loop and an engine say to each other: passes, predictions, and passes begun before those are known.

A loop yields a `Pass` for its row, gets a `Prediction` back, and may say with it what comes next: a `Following`.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from ...contract import MAX_BLOCK
from .grouping import Arranged, Arrangement, groupings

PassKind = Literal["prefill", "decode", "denoise", "draft", "verify", "commit"]
PASS_KINDS: tuple[PassKind, ...] = ("prefill", "decode", "denoise", "draft", "verify", "commit")

ABOVE_ALL = 2.0  # a threshold that no confidence reaches, as every one over 1; engines hold f32


def _causal_visible(pos: np.ndarray) -> np.ndarray:
    """(pos + 1, 0, 0) for each position, (S, 3) i32."""
    return np.stack([pos + 1, np.zeros_like(pos), np.zeros_like(pos)], axis=1)


# Slices of these serve every position below _SHARED without an allocation.
_SHARED = 4096
_RAMP = np.arange(_SHARED, dtype=np.int32)
_CAUSAL = _causal_visible(_RAMP)
_BLOCKS = np.broadcast_to(_CAUSAL[:, None], (_SHARED, MAX_BLOCK, 3))  # a block of tokens that see as much as its last
_RAMP.flags.writeable = False
_CAUSAL.flags.writeable = False


class Pass(NamedTuple):
    """One row's part of a forward; see `contract.inputs` for the meaning of each field."""

    kind: PassKind
    ids: np.ndarray  # (S,) i32
    pos: np.ndarray  # (S,) i32
    write_at: int
    visible: np.ndarray  # (S, 3) i32
    predicted: np.ndarray  # (R,) i32: which of the S tokens get a prediction; the binding is called "rows"
    threshold: float = 0.0
    adapter: bool | np.ndarray = False  # of all tokens, or (S,) f32
    logits: bool = False
    temperature: float = 0.0  # over 0 only for an engine that `samples`: it draws each token by its position's noise
    mask_temperature: float = 0.0  # the same for what is predicted at masks; over 0 with the other alone
    seed: int = 0  # of that noise, under 2**64
    # Only for an engine whose model sees images.
    embedded: np.ndarray | None = None  # (K,) i32: which of the S tokens have an embedding in the place of their id's
    embeddings: np.ndarray | None = None  # (K, E) f32: those embeddings


class Prediction(NamedTuple):
    """One row's results, read-only. The arrays are views that the next forward overwrites; copy what must last."""

    token: np.ndarray  # (R,) i32
    confidence: np.ndarray  # (R,) f32
    next_ids: np.ndarray  # (R,) i32
    logits: np.ndarray | None  # (R, V) f32, if the pass asked for them


# What a pass takes from the one before it in its row. "token": its first id is the last one that is predicted there.
# "next_ids": it begins with those. "accepted": it stands behind what that verify accepts, its last token first.
# An arrangement: it stands there likewise, and all that it has follows from that.
Feed = Literal["token", "next_ids", "accepted"] | Arrangement


class Following(NamedTuple):
    """A pass that is known but for what the one before it in its row gives, which still runs.

    Ids that it will get are any but the mask's. One that is fed by what is accepted stands where that verify stands.
    """

    pass_: Pass
    feed: Feed | None  # None: it is known wholly

    def after(self, prediction: Prediction, arranged: Arranged | None = None) -> Pass:
        """The pass that it is once the one before it has given its prediction; engines do the same on their device.

        `arranged` is what came of its arrangement, if it has one.
        """
        pass_, feed = self
        if isinstance(feed, Arrangement):
            assert arranged is not None
            start = pass_.write_at + arranged.accepted
            inputs = arranged.grouping.inputs(arranged.heads, start, feed.mask)._asdict()
            return pass_._replace(write_at=start, predicted=every_token(arranged.grouping.tokens), **inputs)
        begins, shift = self._begins(prediction)
        pass_ = pass_._replace(ids=np.append(begins, pass_.ids[begins.size :]))
        if not shift:
            return pass_
        return pass_._replace(
            pos=pass_.pos + np.int32(shift),
            write_at=pass_.write_at + shift,
            visible=pass_.visible + np.int32(shift),
        )

    def serves(self, prediction: Prediction, wanted: Pass, arranged: Arranged | None = None) -> bool:
        """Whether that pass gives what a loop wants; of a longer verify the beginning does."""
        pass_, feed = self
        if isinstance(feed, Arrangement):  # its loop wants that grouping, or no verify there
            assert arranged is not None
            grouping, accepted, heads = arranged
            at, size = wanted.write_at, wanted.ids.size
            here = (wanted.kind, at, size) == (pass_.kind, pass_.write_at + accepted, grouping.tokens)
            return here and wanted.ids[: grouping.heads].tolist() == heads
        ids, size = pass_.ids, wanted.ids.size
        if wanted.kind != pass_.kind or size > ids.size:
            return False
        begins, shift = self._begins(prediction)
        if size < ids.size and (
            wanted.kind != "verify" or (pass_.visible[:size] + np.int32(shift)).tobytes() != wanted.visible.tobytes()
        ):
            return False  # its tokens would see what is beyond them
        known = ids[begins.size : size]
        return (
            pass_.write_at + shift == wanted.write_at
            and begins[:size].tobytes() + known.tobytes() == wanted.ids.tobytes()
        )

    def _begins(self, prediction: Prediction) -> tuple[np.ndarray, int]:
        """The ids that the pass is fed to begin with, and how far it moves on; not of one that is arranged."""
        if self.feed == "next_ids":
            return prediction.next_ids, 0
        if self.feed == "token":
            return prediction.token[-1:], 0
        if self.feed == "accepted":  # a verify's next ids are its ids
            kept = agreed(prediction.token.tolist(), prediction.next_ids[1:].tolist())
            return prediction.token[kept : kept + 1], kept + 1
        return self.pass_.ids[:0], 0


def agreed(said: list[int], drafted: list[int]) -> int:
    """How many drafted tokens a verify keeps: those before the first that it does not say itself."""
    return sum(itertools.takewhile(bool, map(operator.eq, said, drafted)))


def arrange(passes: Sequence[Following], predictions: Sequence[Prediction], budget: int) -> list[Arranged | None]:
    """What a device makes of those passes that are arranged, each fed by a prediction, in so many tokens."""
    found = list[tuple[int, list[int]]]()  # heads accepted; the last token and the draft
    drafts = list[tuple[Arrangement, list[float]]]()
    for (_, feed), (token, confidence, next_ids, _) in zip(passes, predictions, strict=True):
        if isinstance(feed, Arrangement):
            heads = feed.before.heads
            accepted = 1 + agreed(token[:heads].tolist(), next_ids[1:heads].tolist())
            draft, begin = feed.draft(token, accepted)
            found.append((accepted, [int(token[accepted - 1]), *draft]))
            drafts.append((feed, confidence[begin : begin + len(draft)].tolist()))
    if not drafts:
        return [None] * len(passes)
    both = zip(groupings(drafts, budget), found, strict=True)
    made = (Arranged(each, accepted, ids[: each.heads]) for each, (accepted, ids) in both)
    return [next(made) if isinstance(following.feed, Arrangement) else None for following in passes]


def most_end(following: Following, before: int) -> int:
    """The slot after the last one that a pass writes to at most, behind one of so many tokens that feeds it."""
    pass_, feed = following
    if isinstance(feed, Arrangement):
        return pass_.write_at + feed.before.heads + feed.most
    return int(pass_.write_at + pass_.ids.size + (before if feed == "accepted" else 0))


def read_only(array: np.ndarray) -> np.ndarray:
    """A view of an array that refuses to be written, for a `Prediction`."""
    view = array.view()
    view.flags.writeable = False
    return view


def causal(kind: PassKind, ids: Sequence[int], start: int, *, predict_all: bool = False, logits: bool = False) -> Pass:
    """A causal pass over `ids` at position `start`, predicting after the last token or after every one."""
    size = len(ids)
    pos, visible = _causal(start, size)
    predicted = every_token(size) if predict_all else _last_token(size)
    return Pass(kind, np.array(ids, np.int32), pos, start, visible, predicted, 0.0, False, logits)


def bidirectional(
    kind: PassKind, ids: Sequence[int], start: int, threshold: float, *, adapter: bool = False, logits: bool = False
) -> Pass:
    """A pass in which every token of the block at `start` sees the cache before it and the whole block."""
    threshold = min(threshold, ABOVE_ALL)
    size = len(ids)
    pos, visible = _causal(start, size)
    last = start + size - 1
    visible = _BLOCKS[last, :size] if last < _SHARED and size <= MAX_BLOCK else visible[-1:].repeat(size, axis=0)
    return Pass(kind, np.array(ids, np.int32), pos, start, visible, every_token(size), threshold, adapter, logits)


def with_masks(pass_: Pass, size: int, mask_id: int, *, adapter: bool = False) -> Pass:
    """A causal pass with a group of masks after it that sees all of it; the last token and the masks are predicted."""
    count = pass_.ids.size
    end = pass_.write_at + count
    visible = np.zeros((size, 3), np.int32)
    visible[:, 0] = end + size
    return pass_._replace(
        ids=np.append(pass_.ids, np.full(size, mask_id, np.int32)),
        pos=np.append(pass_.pos, np.arange(end, end + size, dtype=np.int32)),
        visible=np.concatenate([pass_.visible, visible]),
        predicted=np.arange(count - 1, count + size, dtype=np.int32),
        adapter=np.repeat(np.array([0, adapter], np.float32), [count, size]),
    )


# Cached, so that a backend sees by identity that a row's `predicted` is the same as before.
@functools.lru_cache(maxsize=1024)
def every_token(size: int) -> np.ndarray:
    """The `predicted` of a pass that predicts after every token."""
    return np.arange(size, dtype=np.int32)


@functools.lru_cache(maxsize=1024)
def _last_token(size: int) -> np.ndarray:
    return np.array([size - 1], np.int32)


def _causal(start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`pos` and `visible` of a causal pass; the common short cases come from shared arrays."""
    end = start + size
    if end <= _SHARED:
        return _RAMP[start:end], _CAUSAL[start:end]
    pos = np.arange(start, end, dtype=np.int32)
    return pos, _causal_visible(pos)
