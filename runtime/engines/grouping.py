"""A pass of quadratic_spec: which tokens it has, and how that follows from the pass before it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    """A pass of `heads` tokens and the mask groups `{accepted: size}` in their order."""

    heads: int
    groups: dict[int, int]

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.heads + sum(self.groups.values())

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
        inputs = _inputs(self.heads, tuple(self.groups.items()), mask)
        places = inputs.places + start
        ids = inputs.ids.copy()
        ids[: self.heads] = heads
        return PassInputs(ids, places[:, 0], places[:, 1:], inputs.adapter)


class _Inputs(NamedTuple):
    """A grouping's inputs of a pass at position 0."""

    ids: np.ndarray  # (S,) i32; those of the heads are any
    places: np.ndarray  # (S, 4) i32: `pos` and `visible`, all of which grow with the position
    adapter: np.ndarray  # (S,) f32


@functools.lru_cache(maxsize=1024)
def _inputs(heads: int, groups: tuple[tuple[int, int], ...], mask: int) -> _Inputs:
    """The inputs of a grouping's passes: the same ones come again and again."""
    masks = sum(size for _, size in groups)
    places = np.zeros((heads + masks, 4), np.int32)
    pos, visible = places[:, 0], places[:, 1:]
    pos[:heads] = np.arange(heads)
    visible[:heads, 0] = pos[:heads] + 1
    at = heads
    for accepted, size in groups:
        pos[at : at + size] = np.arange(accepted, accepted + size)
        visible[at : at + size] = (accepted, at, at + size)
        at += size
    ids, adapter = (np.array([0, of_masks], kind) for of_masks, kind in ((mask, np.int32), (1, np.float32)))
    return _Inputs(ids.repeat([heads, masks]), places, adapter.repeat([heads, masks]))


class Arrangement(NamedTuple):
    """How a pass is arranged as soon as the one before it has given its predictions."""

    before: Grouping
    lengths: arrange.Lengths  # of groups
    most: int  # tokens of the pass
    stops: tuple[int, ...]  # ids that end the answer
    mask: int

    def draft(self, token: np.ndarray, accepted: int) -> tuple[list[int], int]:
        """The draft where so many heads were accepted, and where its first token lies among what is predicted."""
        begin, size = self.before.places.get(accepted, (0, 1))
        draft = token[begin + 1 : begin + size].tolist()
        length = next((at for at, drafted in enumerate(draft) if drafted in self.stops), len(draft))
        return draft[:length], begin + 1


class Arranged(NamedTuple):
    """What came of an arrangement."""

    grouping: Grouping
    accepted: int  # of the heads before
    heads: list[int]


def groupings(drafts: Sequence[tuple[Arrangement, Sequence[float]]], budget: int) -> list[Grouping]:
    """What a device makes of drafts with these confidences, which share so many tokens."""
    arrangements, confidences = zip(*drafts, strict=True)
    chances = [arrange.reached(confidence) for confidence in confidences]
    made = arrange.Drafts.of(chances, [each.lengths for each in arrangements], [each.most for each in arrangements])
    layouts = made.layouts(budget)
    groups = ({number: size for number, size in enumerate(row, 1) if size} for row in layouts.masks.tolist())
    return list(map(Grouping, layouts.heads.tolist(), groups))
