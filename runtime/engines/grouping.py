"""A pass of quadratic_spec: which tokens it has, and how that follows from the pass before it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ...plugins.ops import arrange


class PassInputs(NamedTuple):
    """Fields of `passes.Pass`."""

    ids: np.ndarray
    pos: np.ndarray
    visible: np.ndarray
    adapter: np.ndarray


class Grouping(NamedTuple):
    """A pass of `heads` tokens, the mask groups `{accepted: size}` in their order, and tokens that are left over."""

    heads: int
    groups: dict[int, int]
    left: int = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.heads + sum(self.groups.values()) + self.left

    @property
    def places(self) -> dict[int, tuple[int, int]]:
        """Where each group's masks begin, and how many there are, by the number of heads accepted."""
        at, places = self.heads, dict[int, tuple[int, int]]()
        for number, size in self.groups.items():
            places[number] = at, size
            at += size
        return places

    def inputs(self, heads: Sequence[int], start: int, mask: int) -> PassInputs:
        """What the pass at `start` has: a mask of group j sees the cache, heads 1..j and its own group."""
        inputs = _inputs(self.heads, tuple(self.groups.items()), self.left, mask)
        places = inputs.places + start
        ids = inputs.ids.copy()
        ids[: self.heads] = heads
        if self.left:
            places[-self.left :, 1] = 0
        return PassInputs(ids, places[:, 0], places[:, 1:], inputs.adapter)


class _Inputs(NamedTuple):
    """A grouping's inputs of a pass at position 0."""

    ids: np.ndarray  # (S,) i32; those of the heads are any
    places: np.ndarray  # (S, 4) i32: `pos` and `visible`, all of which grow with the position
    adapter: np.ndarray  # (S,) f32


@functools.lru_cache(maxsize=1024)
def _inputs(heads: int, groups: tuple[tuple[int, int], ...], left: int, mask: int) -> _Inputs:
    """The inputs of a grouping's passes: the same ones come again and again."""
    masks = sum(size for _, size in groups)
    count = heads + masks + left
    places = np.zeros((count, 4), np.int32)
    pos, visible = places[:, 0], places[:, 1:]
    pos[:heads] = np.arange(heads)
    visible[:heads, 0] = pos[:heads] + 1
    at = heads
    for accepted, size in groups:
        pos[at : at + size] = np.arange(accepted, accepted + size)
        visible[at : at + size] = (accepted, at, at + size)
        at += size
    pos[at:] = visible[at:, 1] = np.arange(at, count)
    visible[at:, 2] = pos[at:] + 1
    parts = [heads, masks, left]
    ids = np.repeat(np.array([0, mask, int(mask == 0)], np.int32), parts)
    return _Inputs(ids, places, np.repeat(np.array([0, 1, 0], np.float32), parts))


def arranged(confidence: Iterable[float], size: int, block: int) -> Grouping:
    """The grouping of `size` tokens that a device makes for a draft with these confidences."""
    heads, groups = arrange.layout(arrange.reached(confidence), size, block)
    return Grouping(heads, groups, size - heads - sum(groups.values()))


class Arrangement(NamedTuple):
    """A pass that is arranged as soon as the one before it has given its predictions."""

    before: Grouping
    size: int  # tokens of the pass
    block: int  # masks of a group
    stops: tuple[int, ...]  # ids that end the answer
    mask: int

    def after(self, token: np.ndarray, confidence: np.ndarray, accepted: int, start: int) -> PassInputs:
        """The fields of the pass at `start`, after what the one before has predicted, and had accepted of its heads."""
        begin, size = self.before.places.get(accepted, (0, 1))
        draft = token[begin + 1 : begin + size].tolist()
        length = next((at for at, drafted in enumerate(draft) if drafted in self.stops), len(draft))
        grouping = arranged(confidence[begin + 1 : begin + 1 + length].tolist(), self.size, self.block)
        heads = [int(token[accepted - 1]), *draft][: grouping.heads]
        return grouping.inputs(heads, start, self.mask)
