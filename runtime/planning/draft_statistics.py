"""How drafts have fared: how often their tokens were kept, by position, and what blocks gave and took, by length."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable

from ...contract import MAX_BLOCK

BLOCKS = (2, 4, 8, 12, 16, 24, 32, 64)
_GUESS = 0.8  # chance that a drafted token is kept, before anything is known
_WEIGHT = 4.0  # verifies that a prior is worth
_NEVER = 1e-3  # chance below which a position adds nothing
_FORGET = 256.0  # verifies after which older ones count half
_USUAL = 32.0  # blocks of any length that what was expected of them is worth
_NO_BLOCKS = (0.0, 0.0, 0.0)
_GROUPED = 256.0  # blocks of a length that what those of all lengths did is worth: with few, the texts differ


class PositionStatistics:
    """How often drafted tokens were verified and kept, by their position in the draft.

    These are lists, not arrays: after a pass numpy's code is out of the processor's caches, and a call takes longer
    than a dozen additions.
    """

    def __init__(self) -> None:
        # Verifies by how many drafted tokens they looked at, up to the first wrong one, and by how many they kept.
        self._looked_at = [0.0] * MAX_BLOCK
        self._kept = [0.0] * MAX_BLOCK
        self.verifies = 0.0
        self.later: list[tuple[int, int, Iterable[float]]] = []  # verifies met since `take_in`, as `add` takes them

    def take_in(self) -> None:
        """Learn from what has been met. Not at once, for between two passes this code is out of the caches."""
        later, self.later = self.later, []
        for verify in later:
            self.add(*verify)

    def add(self, size: int, emitted: int, unseen: Iterable[float] = ()) -> None:
        """A verify of a block of `size` tokens, the first of them certain, that emitted this many.

        `unseen` are the confidences of what the draft had beyond the block, if all of that was kept. It is left out for
        being unlikely, so without it a draft would seem better than it is.
        """
        if self.verifies >= _FORGET:
            self._looked_at = [0.5 * count for count in self._looked_at]
            self._kept = [0.5 * count for count in self._kept]
            self.verifies *= 0.5
        self.verifies += 1
        self._looked_at[min(emitted, size - 1)] += 1
        self._kept[emitted - 1] += 1
        chance = 1.0
        for at, confidence in zip(range(emitted - 1, MAX_BLOCK - 1), unseen, strict=False):
            self._looked_at[at] -= chance  # so many look at one more
            self._looked_at[at + 1] += chance
            chance *= confidence
            self._kept[at] -= chance
            self._kept[at + 1] += chance

    def seen(self) -> list[float]:
        """Verifies that looked at each position of a draft, having kept all before it."""
        return _and_more(self._looked_at)

    def kept(self) -> list[float]:
        """Those of them that kept it."""
        return _and_more(self._kept)

    def expected(self, own: PositionStatistics) -> list[float]:
        """Tokens that a verify of a block of 1, 2, .. `MAX_BLOCK` tokens emits on average.

        Of a request with these statistics of its own, for which those of all are the prior: an answer is often over
        after three verifies.
        """
        all_seen, all_kept = self.seen(), self.kept()
        # The chance of any position stands in for those that nobody has looked at.
        guess = _WEIGHT * (sum(all_kept) + _WEIGHT * _GUESS) / (sum(all_seen) + _WEIGHT)
        chance, tokens = 1.0, [1.0]
        for own_seen, own_kept, seen, kept in zip(own.seen(), own.kept(), all_seen, all_kept, strict=True):
            prior = (kept + guess) / (seen + _WEIGHT)  # of this position, if all before it were kept
            chance *= (own_kept + _WEIGHT * prior) / (own_seen + _WEIGHT)
            if chance < _NEVER:
                break
            tokens.append(tokens[-1] + chance)
        return tokens + tokens[-1:] * (MAX_BLOCK - len(tokens))


class ModeStatistics(PositionStatistics):
    """What the drafts of a mode have brought, those of all requests of an engine."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = collections.defaultdict[int, BlockStatistics](BlockStatistics)  # by rows side by side


class BlockStatistics:
    """What blocks gave and took, over what was expected of them by their length.

    That a position of a draft has a chance is not all of the truth. Verify looks at nothing after a drafted end, or
    after what is worth its time. Passes of budgeted quadratic_spec may leave out their groups, and then the next one
    has no draft: how often that is right is known afterwards.
    """

    def __init__(self) -> None:
        # By length: how many, and over those expected, the tokens that they emitted and the seconds that they took.
        self._met = dict.fromkeys(BLOCKS, _NO_BLOCKS)
        # Not yet counted in: length, tokens and rows of the verify's forward, tokens emitted.
        self.later: list[tuple[int, int, int, int]] = []

    def add(self, block: int, tokens: float, seconds: float) -> None:
        """One of this length gave and took these parts of what was expected."""
        met = self._met.get(block, _NO_BLOCKS)
        weight = 0.5 if met[0] >= _FORGET else 1.0
        self._met[block] = (weight * met[0] + 1, weight * met[1] + tokens, weight * met[2] + seconds)

    def factors(self, lengths: Iterable[int] = BLOCKS) -> list[float]:
        """By which to multiply what is expected of blocks of each length in tokens per second.

        A block of which little is known is taken to be as the others were.
        """
        passes, tokens, seconds = map(sum, zip(*self._met.values(), strict=True))
        usual_tokens, usual_seconds = ((met + _USUAL) / (passes + _USUAL) for met in (tokens, seconds))
        return [
            (tokens + _GROUPED * usual_tokens) / (seconds + _GROUPED * usual_seconds)
            for _, tokens, seconds in (self._met.get(length, _NO_BLOCKS) for length in lengths)
        ]


def _and_more(counts: list[float]) -> list[float]:
    """From how many had 0, 1, 2, .. to how many had more than 0, 1, .."""
    return list(itertools.accumulate(reversed(counts[1:])))[::-1]
