"""Which block length, and which of the exact modes, gives the most tokens per second.

A wrong guess costs time alone: the modes that are chosen among all emit AR's tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable
from typing import Literal, NamedTuple

from ...contract import MAX_BLOCK
from .pass_costs import Load, PassCosts

ExactMode = Literal["ar", "linear_spec", "quadratic_spec"]
BLOCKS = (2, 4, 8, 12, 16, 24, 32, 64)
_GUESS = 0.8  # chance that a drafted token is kept, before anything is known
_WEIGHT = 4.0  # verifies that a prior is worth
_NEVER = 1e-3  # chance below which a position adds nothing
_FORGET = 256.0  # verifies after which older ones count half
_PROBE = 32  # passes of one token after which a short draft looks whether that is still right
_PROBE_BLOCK = 4
_STAY = 16  # blocks of a plan at most before the next is made, and of quadratic_spec always: each of its passes
# verifies the draft that the one before it has made
_DOUBT = 2048  # blocks after which a mode that none of them was of may be worth twice what it seems to be
_TRY = 8  # blocks of it then; so trying what is not the best costs at most 8 / 2048 of the time
_PASSES: dict[ExactMode, int] = {"ar": 1, "linear_spec": 2, "quadratic_spec": 1}  # of a plan that is taken once
_USUAL = 32.0  # blocks of any length that what was expected of them is worth
_GROUPED = 256.0  # blocks of a length that what those of all lengths did is worth: with few, the texts differ


class Plan(NamedTuple):
    """The next pass or two: a mode, and the length of its block."""

    mode: ExactMode
    size: int


@dataclasses.dataclass
class _Standing:
    """A plan with how often it is to be taken: by the request that made it, by the others, and by those that begin."""

    plan: Plan
    most: int  # times that each row takes it, unless it is for what it teaches alone
    left: int
    prices: list[float]  # of a pass by its tokens: the tokens that the best plan promises in its seconds
    worth: float  # tokens that a draft of quadratic_spec is expected to bring
    rows: int  # that decode side by side, as it was made

    def fits(self, rows: int) -> bool:
        """Whether it may be taken once more."""
        return self.left > 0 and self.rows == rows


class PositionStatistics:
    """How often drafted tokens were verified and kept, by their position in the draft.

    These are lists, not arrays: after a pass numpy's code is out of the processor's caches, and a call takes longer
    than a dozen additions.
    """

    def __init__(self) -> None:
        # Verifies by how many drafted tokens they looked at, up to the first wrong one, and by how many they kept.
        self._looked_at = [0.0] * MAX_BLOCK
        self._kept = [0.0] * MAX_BLOCK
        self._verifies = 0.0
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
        if self._verifies >= _FORGET:
            self._looked_at = [0.5 * count for count in self._looked_at]
            self._kept = [0.5 * count for count in self._kept]
            self._verifies *= 0.5
        self._verifies += 1
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


class ModeStatistics(PositionStatistics):
    """What the drafts of a mode have brought, those of all requests of an engine."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = collections.defaultdict[int, BlockStatistics](BlockStatistics)  # by rows side by side

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


class AcceptanceStatistics:
    """What the drafts of all requests of an engine have brought, and by the modes to choose among what was planned."""

    def __init__(self) -> None:
        self.of: dict[ExactMode, ModeStatistics] = {
            "linear_spec": ModeStatistics(),
            "quadratic_spec": ModeStatistics(),
        }
        self.standing: dict[tuple[ExactMode, ...], _Standing] = {}  # the last one made
        self.idle: dict[tuple[ExactMode, ...], dict[ExactMode, int]] = {}  # blocks since the last of each mode


def _and_more(counts: list[float]) -> list[float]:
    """From how many had 0, 1, 2, .. to how many had more than 0, 1, .."""
    return list(itertools.accumulate(reversed(counts[1:])))[::-1]


_NOTHING = PositionStatistics()  # of a request that has met no draft
_ALONE = Load()


class BlockStatistics:
    """What blocks gave and took, over what was expected of them by their length.

    That a position of a draft has a chance is not all of the truth. Verify looks at nothing after a drafted end, or
    after what is worth its time. Passes of budgeted quadratic_spec may leave out their groups, and then the next one
    has no draft: how often that is right is known afterwards.
    """

    def __init__(self) -> None:
        # By length: how many, and over those expected, the tokens that they emitted and the seconds that they took.
        self._met = dict.fromkeys(BLOCKS, (0.0, 0.0, 0.0))
        # Not yet counted in: length, tokens and rows of the verify's forward, tokens emitted.
        self.later: list[tuple[int, int, int, int]] = []

    def count(self, block: int) -> float:
        """Of those of this length, of late."""
        return self._met[block][0]

    def add(self, block: int, tokens: float, seconds: float) -> None:
        """One of this length gave and took these parts of what was expected."""
        met = self._met[block]
        weight = 0.5 if met[0] >= _FORGET else 1.0
        self._met[block] = (weight * met[0] + 1, weight * met[1] + tokens, weight * met[2] + seconds)

    def factors(self) -> list[float]:
        """By which to multiply what is expected of each of `BLOCKS` in tokens per second.

        A block of which little is known is taken to be as the others were.
        """
        passes, tokens, seconds = map(sum, zip(*self._met.values(), strict=True))
        usual_tokens, usual_seconds = ((met + _USUAL) / (passes + _USUAL) for met in (tokens, seconds))
        return [
            (tokens + _GROUPED * usual_tokens) / (seconds + _GROUPED * usual_seconds)
            for _, tokens, seconds in self._met.values()
        ]


class _Met(NamedTuple):
    """What all forwards had cost at a time."""

    passes: int
    spent: float
    at: float


class DraftPlanner:
    """Plans the passes of one request.

    Args:
        costs: seconds of a pass by its tokens, and of what the host does for one.
        engine: the statistics of all requests of the engine, to which what this one meets is added.
        modes: the modes to choose among.
    """

    def __init__(self, costs: PassCosts, engine: AcceptanceStatistics, modes: tuple[ExactMode, ...]) -> None:
        self._costs = costs
        self._engine = engine
        self._own = PositionStatistics()
        self._modes = modes
        self._standing = engine.standing.get(modes)
        self._idle = engine.idle.setdefault(modes, {mode: 0 for mode in modes if mode in engine.of})
        self._load = _ALONE
        self._rows = 1  # that decode side by side, by the last plan
        self._taken = Plan("ar", 1)  # the last one
        self._changed = False  # whether it was another than the one before
        self._met: _Met | None = None  # what passes had cost before the last block of a plan

    def plan(self, load: Load = _ALONE) -> Plan:
        """What gives the most tokens per second, if the draft fares as those before it, and the other rows do the same.

        Many rows take one plan, so that what they cost together is known and, where rows are padded, they are alike.
        Where passes of late do not tell what a block of twice or half the best length costs, it is that at times; and
        where ar is the best, at times a short draft. A mode of drafts that has not been taken for long is tried.
        """
        self._load, self._rows = load, load.rows
        if self._met is not None:
            self._meter(self._met)
        if self._standing is None or not self._standing.fits(self._rows):
            standing = self._engine.standing.get(self._modes)
            if standing is None or not standing.fits(self._rows):
                standing = self._engine.standing[self._modes] = self._make(standing)
            self._standing = standing
        standing, costs = self._standing, self._costs
        standing.left -= 1
        if not standing.left:
            self._met = _Met(costs.passes, costs.spent, costs.clock())
        self._changed = standing.plan != self._taken
        self._taken = standing.plan
        return self._taken

    def _make(self, before: _Standing | None) -> _Standing:
        """A plan, which stands twice as long as the one before it: the first ones know little."""
        self._take_in()
        rates = self._rates()
        best = max(rates, key=rates.__getitem__)
        doubt = _DOUBT * self._rows
        plan = max(rates, key=lambda plan: rates[plan] * (1 + self._idle.get(plan.mode, 0) / doubt))
        most = 1 if before is None else min(2 * before.most, _STAY)
        left = self._rows * (_STAY if plan.mode == "quadratic_spec" else most)
        if plan != best:
            left = self._rows * _TRY
        elif news := self._news(best):
            plan, left = news
        for mode in self._idle:
            self._idle[mode] = 0 if mode == plan.mode else self._idle[mode] + left
        prices = [rates[best] * taken for taken in self._costs.share(self._rows).table[: MAX_BLOCK + 1]]
        worth = 0.0
        if plan.mode == "quadratic_spec":
            worth = self._expected(plan.mode)[plan.size - 1] - 1
        return _Standing(plan, most, left, prices, worth, self._rows)

    def _take_in(self) -> None:
        """Learn from what has been met: first what is to be expected of a block, and by that what each one was."""
        self._own.take_in()
        for mode, met in self._engine.of.items():
            met.take_in()
            blocks = met.blocks[self._rows]
            later, blocks.later = blocks.later, []
            expected = met.expected(_NOTHING) if later else []
            for block, tokens, rows, emitted in later:
                spent = self._seconds(mode, block, self._costs.curve.seconds(tokens) / rows)
                blocks.add(block, emitted / expected[block - 1], spent / self._seconds(mode, block))

    def _meter(self, before: _Met) -> None:
        """Learn what the host took for the last block of a plan, if no other rows' forward came between."""
        costs, mode = self._costs, self._taken.mode
        self._met = None
        if costs.passes - before.passes == _PASSES[mode]:
            seconds = costs.clock() - before.at - (costs.spent - before.spent)
            if seconds > 0:  # else the request has changed threads, and each has a clock of its own
                costs.host.learn(mode, seconds / self._rows, self._rows)

    def _news(self, best: Plan) -> tuple[Plan, int] | None:
        """What to take instead of the best plan for what it teaches, and how often, if anything.

        All rows do, but where ar is the best: a draft that may well be for nothing is one row's, and costs little.
        """
        if best.mode == "ar":
            due = min(self._idle.values()) >= _PROBE * self._rows
            due = due or (self._rows == 1 and self._costs.wants(_PROBE_BLOCK))
            return (Plan("linear_spec", _PROBE_BLOCK), 1) if due else None
        at = BLOCKS.index(best.size)
        for size in (*BLOCKS[at + 1 : at + 2], *BLOCKS[max(at - 1, 0) : at]):
            plan = Plan(best.mode, size)
            if self._is_news(plan):
                return plan, self._rows * (_STAY if plan.mode == "quadratic_spec" else 1)
        return None

    def _is_news(self, plan: Plan) -> bool:
        if plan.mode == "quadratic_spec":  # what its passes cost they ask for themselves
            return self._engine.of["quadratic_spec"].blocks[self._rows].count(plan.size) < _STAY
        return self._costs.wants(self._rows * plan.size)

    def _rates(self) -> dict[Plan, float]:
        """Tokens per second of every plan."""
        rates = {Plan("ar", 1): 1 / self._seconds("ar", 1)} if "ar" in self._modes else {}
        for mode in self._idle:
            expected, factors = self._expected(mode), self._engine.of[mode].blocks[self._rows].factors()
            for size, factor in zip(BLOCKS, factors, strict=True):
                rates[Plan(mode, size)] = expected[size - 1] / self._seconds(mode, size) * factor
        return rates

    def _expected(self, mode: ExactMode) -> list[float]:
        """Tokens of a verify: this request's, or where the plan is for many rows those of all."""
        return self._engine.of[mode].expected(self._own if self._rows == 1 else _NOTHING)

    def _seconds(self, mode: ExactMode, block: int, verify: float | None = None) -> float:
        """Of a block with what the host takes, if its verify takes so long; None: as long as one of the whole block.

        That costs linear_spec two passes of it; quadratic_spec about one of as many heads, and one group.
        """
        seconds = self._costs.share(self._rows).table
        draft = seconds[block] if mode == "linear_spec" else 0.0
        whole = 2 * block if mode == "quadratic_spec" else block
        return draft + (verify or seconds[whole]) + self._costs.host.seconds(mode, self._rows)

    @property
    def worth(self) -> float:
        """Tokens that a draft of the plan is expected to bring, of quadratic_spec."""
        assert self._standing is not None
        return self._standing.worth

    def worth_verifying(self, confidences: list[float]) -> int:
        """How many tokens of a draft linear_spec's verify should look at, by their confidences.

        So many that looking at more would take longer than other passes need for the tokens that it promises.
        """
        assert self._standing is not None
        prices = self._standing.prices
        chance, tokens = 1.0, 1.0
        best, count = tokens - prices[1], 0
        for number, confidence in enumerate(confidences, 1):
            chance *= confidence
            tokens += chance
            if tokens - prices[number + 1] > best:
                best, count = tokens - prices[number + 1], number
        return count

    def learn(self, looked_at: int, emitted: int, *, ended: bool = False, unseen: Iterable[float] = ()) -> None:
        """Take in the verify of a plan's draft that looked at a block of so many tokens, and emitted this many.

        Where the answer has `ended`, what a longer draft would have proposed is as lost as a wrong draft. `unseen` are
        the confidences of what the draft had beyond the block, if all of that was kept.
        """
        mode, block = self._taken
        verify = (max(looked_at, block) if ended else looked_at, emitted, unseen)
        self._own.later.append(verify)
        self._engine.of[mode].later.append(verify)
        if mode == "linear_spec":
            self._learn_block(mode, block, looked_at, emitted)

    def learn_quadratic(self, block: int, tokens: int, emitted: int) -> None:
        """Take in a pass of quadratic_spec of so many tokens, planned with this block, that emitted this many."""
        if self._standing is not None and not self._changed:  # else the draft was still one of the plan before
            self._learn_block("quadratic_spec", block, tokens, emitted)

    def _learn_block(self, mode: ExactMode, block: int, tokens: int, emitted: int) -> None:
        """Take in a block whose verify had so many tokens, which padding and rows of other sizes make dearer."""
        forward = self._load.padded or (tokens * self._rows, self._rows)
        self._engine.of[mode].blocks[self._rows].later.append((block, *forward, emitted))
