"""Which block length, and which of the exact modes, gives the most tokens per second.

A wrong guess costs time alone: the modes that are chosen among all emit AR's tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from ...contract import MAX_BLOCK, PREFILL_CHUNK
from ...plugins.ops import arrange
from ..engines.grouping import Grouping
from .draft_statistics import BLOCKS, ModeStatistics, PositionStatistics
from .pass_costs import Load, PassCosts

ExactMode = Literal["ar", "linear_spec", "quadratic_spec"]
Choices = tuple[tuple[ExactMode, ...], tuple[int, ...]]  # the modes and the lengths of blocks to choose among
_PROBE = 32  # passes of one token after which a short draft looks whether that is still right
_PROBE_BLOCK = 4
_STAY = 8  # blocks of a plan at most before the next is made
_MET = 16  # verifies of a mode from which on it is known by its own
_DOUBT = 2048  # blocks after which a mode that none of them was of may be worth twice what it seems to be
_TRY = 8  # blocks of it then; so trying what is not the best costs at most 8 / 2048 of the time
_PASSES: dict[ExactMode, int] = {"ar": 1, "linear_spec": 2, "quadratic_spec": 1}  # of a plan that is taken once


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
    drafts: list[tuple[int, float]]  # of quadratic_spec, by masks: the tokens that one brings, less its verify's price
    rows: int  # that decode side by side, as it was made
    then: _Standing | None = None  # the one after it, once that is asked for

    @functools.cached_property
    def lengths(self) -> arrange.Lengths:
        """The lengths of groups that some price is worth, with what one more token costs there: see `arrange.py`."""
        found, masks, worth = list[tuple[int, int]](), 0, 0.0
        while longer := [(size, more - worth) for size, more in self.drafts if size > masks and more > worth]:
            size, more = max(longer, key=lambda each: each[1] / (each[0] - masks))
            rate = round((size - masks) / more * 2**arrange.RATE_BITS)
            if rate >= arrange.NEVER:
                break
            found.append((size, max(rate, 2**arrange.RATE_BITS)))
            masks, worth = size, worth + more
        return tuple(found)

    def fits(self, rows: int) -> bool:
        """Whether it may be taken once more."""
        return self.left > 0 and self.rows == rows


class AcceptanceStatistics:
    """What the drafts of all requests of an engine have brought, and by the modes to choose among what was planned."""

    def __init__(self) -> None:
        self.of: dict[ExactMode, ModeStatistics] = {"linear_spec": ModeStatistics(), "quadratic_spec": ModeStatistics()}
        self.drafts = PositionStatistics()  # of both modes
        self.standing: dict[Choices, _Standing] = {}  # the last one made
        self.idle: dict[Choices, dict[ExactMode, int]] = {}  # blocks since the last of each mode

    def drafts_of(self, mode: ExactMode) -> PositionStatistics:
        """What is known of a mode's drafts: until it has met some, those of both, which fill the same masks."""
        return self.of[mode] if self.of[mode].verifies >= _MET else self.drafts


_FREE = [0.0] * (PREFILL_CHUNK + 1)  # prices
_NOTHING = PositionStatistics()  # of a request that has met no draft
_ALONE = Load()


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
        blocks: the lengths to choose among, in their order.
    """

    def __init__(
        self,
        costs: PassCosts,
        engine: AcceptanceStatistics,
        modes: tuple[ExactMode, ...],
        blocks: tuple[int, ...] = BLOCKS,
    ) -> None:
        self.costs = costs
        self._engine = engine
        self._own = PositionStatistics()
        self._modes = modes
        self._blocks = blocks
        self._lengths = (*(size for size in BLOCKS if size < blocks[-1]), blocks[-1])  # of groups
        self._choices = modes, blocks
        self._only = Plan(modes[0], blocks[0]) if len(modes) == len(blocks) == 1 else None
        self._standing = engine.standing.get(self._choices)
        self._idle = engine.idle.setdefault(self._choices, {mode: 0 for mode in modes if mode in engine.of})
        self._load = _ALONE
        self._rows = 1  # that decode side by side, by the last plan
        self._taken = Plan("ar", 1)  # the last one
        self._bare = 0  # passes of quadratic_spec since the last one with a group
        self._met: _Met | None = None  # what passes had cost before the last block of a plan

    def plan(self, load: Load = _ALONE) -> Plan:
        """What gives the most tokens per second, if the draft fares as those before it, and the other rows do the same.

        Many rows take one plan, so that what they cost together is known and, where rows are padded, they are alike.
        Where passes of late do not tell what the next longer or shorter block of linear_spec costs, it is that at
        times; where ar is the best, at times a short draft. A mode of drafts that has not been taken for long is tried.
        """
        self._load, self._rows = load, load.rows
        if self._met is not None:
            self._meter(self._met)
        if self._standing is None or not self._standing.fits(self._rows):
            standing = self._engine.standing.get(self._choices)
            if standing is None or not standing.fits(self._rows):
                standing = self._engine.standing[self._choices] = self._after(standing)
            self._standing = standing
        costs, self._taken = self.costs, self._standing.plan
        self._standing.left -= 1
        if self._standing.left == 0:
            self._met = _Met(costs.passes, costs.spent, costs.clock())
        return self._taken

    def next(self, load: Load) -> Plan | None:
        """What this one will be given next, if all rows are given as many blocks, and no others come or go."""
        if self._only is not None:
            return self._only
        standing = self._standing
        if standing is None or standing.rows != load.rows:
            return None
        if standing.left < load.rows:  # so many have a last turn
            standing.then = standing = self._after(standing)
        return standing.plan

    def _after(self, before: _Standing | None) -> _Standing:
        """The plan after another one."""
        if before is not None and before.then is not None and before.then.fits(self._rows):
            return before.then
        return self._make(before)

    def _make(self, before: _Standing | None) -> _Standing:
        """A plan, which stands twice as long as the one before it: the first ones know little."""
        self._take_in()
        rates = self._rates()
        best = max(rates, key=rates.__getitem__)
        plan = max(rates, key=lambda plan: rates[plan] * (1 + self._idle.get(plan.mode, 0) / (_DOUBT * self._rows)))
        most = 1 if before is None else min(2 * before.most, _STAY)
        left = self._rows * most
        if plan != best:
            left = self._rows * _TRY
        elif news := self._news(best):
            plan, left = news
        for mode in self._idle:
            self._idle[mode] = 0 if mode == plan.mode else self._idle[mode] + left
        return _Standing(plan, most, left, *self._prices(plan, rates[best]), self._rows)

    def _prices(self, plan: Plan, rate: float) -> tuple[list[float], list[tuple[int, float]]]:
        """What passes cost by their tokens, and what drafts are worth by their masks, both in tokens; see `_Standing`.

        Passes of quadratic_spec that share a forward differ in size, so each of their tokens has the same price, unless
        they are padded. No draft is worth more than what makes a pass of one token with that draft's masks pay.
        """
        prices = [rate * seconds for seconds in self.costs.share(self._rows).table]
        if plan.mode != "quadratic_spec":
            return prices, []
        if self._rows > 1 and self._load.padded is None:
            each = (prices[2 * plan.size] - prices[1]) / (2 * plan.size - 1)
            prices = [prices[1] + each * (size - 1) for size in range(len(prices))]
        expected = self._expected(plan.mode)
        drafts = [(size, expected[size - 1] - 1 - (prices[size] - prices[1])) for size in self._lengths]
        rest = 1 - rate * self.costs.host.seconds(plan.mode, self._rows)
        part = min([1.0, *(max(prices[size + 1] - rest, 0.0) / worth for size, worth in drafts if worth > 0)])
        return prices, [(size, part * worth) for size, worth in drafts]

    def _take_in(self) -> None:
        """Learn from what has been met: first what is to be expected of a block, and by that what each one was."""
        self._own.take_in()
        self._engine.drafts.take_in()
        for mode, met in self._engine.of.items():
            met.take_in()
            blocks = met.blocks[self._rows]
            later, blocks.later = blocks.later, []
            expected = self._engine.drafts_of(mode).expected(_NOTHING) if later else []
            for block, tokens, rows, emitted in later:
                spent = self._seconds(mode, block, self.costs.curve.seconds(tokens) / rows)
                blocks.add(block, emitted / expected[block - 1], spent / self._seconds(mode, block))

    def _meter(self, before: _Met) -> None:
        """Learn what the host took for the last block of a plan, if no other rows' forward came between."""
        costs, mode = self.costs, self._taken.mode
        self._met = None
        if costs.passes - before.passes == _PASSES[mode]:
            seconds = costs.clock() - before.at
            if seconds > 0:  # else the request has changed threads, and each has a clock of its own
                beside = max(seconds - (costs.spent - before.spent), 0.0)
                costs.host.learn(mode, beside / self._rows, self._rows)

    def _news(self, best: Plan) -> tuple[Plan, int] | None:
        """What to take instead of the best plan for what it teaches, and how often, if anything.

        All rows do, but where ar is the best: a draft that may well be for nothing is one row's, and costs little.
        """
        if best.mode == "ar":
            due = min(self._idle.values()) >= _PROBE * self._rows
            due = due or (self._rows == 1 and self.costs.wants(_PROBE_BLOCK))
            return (Plan("linear_spec", _PROBE_BLOCK), 1) if due else None
        if best.mode == "linear_spec":  # those of quadratic_spec are of many sizes
            at = BLOCKS.index(best.size)
            for size in (*BLOCKS[at + 1 : at + 2], *BLOCKS[max(at - 1, 0) : at]):
                if self.costs.wants(self._rows * size):
                    return Plan(best.mode, size), self._rows
        return None

    def _rates(self) -> dict[Plan, float]:
        """Tokens per second of every plan; the first draft of quadratic_spec's answer is to teach something."""
        rates = {Plan("ar", 1): 1 / self._seconds("ar", 1)} if "ar" in self._modes else {}
        for mode in self._idle:
            expected, factors = self._expected(mode), self._engine.of[mode].blocks[self._rows].factors(self._blocks)
            for size, factor in zip(self._blocks, factors, strict=True):
                if mode == "linear_spec" or size >= min(_PROBE_BLOCK, self._blocks[-1]):
                    rates[Plan(mode, size)] = expected[size - 1] / self._seconds(mode, size) * factor
        return rates

    def _expected(self, mode: ExactMode) -> list[float]:
        """Tokens of a verify: this request's, or where the plan is for many rows those of all."""
        own = self._own if self._rows == 1 else _NOTHING
        return self._engine.drafts_of(mode).expected(own)

    def _seconds(self, mode: ExactMode, block: int, verify: float | None = None) -> float:
        """Of a block with what the host takes, if its verify takes so long; None: as long as one of the whole block.

        That costs linear_spec two passes of it; quadratic_spec about one of as many heads, and one group.
        """
        seconds = self.costs.share(self._rows).table
        draft = seconds[block] if mode == "linear_spec" else 0.0
        whole = 2 * block if mode == "quadratic_spec" else block
        return draft + (verify or seconds[whole]) + self.costs.host.seconds(mode, self._rows)

    @property
    def lengths(self) -> arrange.Lengths:
        """Of groups, each with the tokens that it takes to bring one more than the next shorter: see there."""
        assert self._standing is not None
        return self._standing.lengths

    def worth_verifying(self, confidences: list[float]) -> int:
        """How many tokens of a draft a verify should look at, by their confidences.

        So many that looking at more would take longer than other passes need for the tokens that it promises.
        """
        assert self._standing is not None
        return self._worth_verifying(confidences, self._standing.prices)

    def _worth_verifying(self, confidences: list[float], prices: Sequence[float]) -> int:
        chance, tokens = 1.0, 1.0
        best, count = tokens - prices[1], 0
        for number, confidence in enumerate(confidences, 1):
            chance *= confidence
            tokens += chance
            if tokens - prices[number + 1] > best:
                best, count = tokens - prices[number + 1], number
        return count

    def grouping(self, confidences: list[float], end: float, remaining: int, *, ahead: bool = False) -> Grouping:
        """The heads and the groups of quadratic_spec's pass over a draft.

        A group has the length whose draft is worth the most over the price of its masks, as often as it is the one that
        is needed. `end` is the chance that the answer ends after the draft; `remaining` tokens are still wanted.
        `ahead`: they are a guess. Where nothing is to be chosen, a pass of twice the tokens is taken at times.
        """
        standing = self._standing
        assert standing is not None
        best = self._grouping(confidences, end, remaining, standing.prices, standing.drafts)
        if ahead:
            return best
        self._bare = 0 if best.groups else self._bare + 1
        probe = min(_PROBE_BLOCK, self._lengths[-1])
        if self._bare >= _PROBE and remaining - best.heads >= probe:
            self._bare = 0
            return Grouping(best.heads, {best.heads: probe})
        more = min(max(2 * best.tokens, 1 + self._lengths[-1]), PREFILL_CHUNK)
        if self._only is None or self._rows > 1 or not self.costs.wants(more):
            return best
        return self._grouping(confidences, end, remaining, _FREE, [(size, size) for size in self._lengths], more)

    def _grouping(
        self,
        confidences: list[float],
        end: float,
        remaining: int,
        prices: Sequence[float],
        drafts: Sequence[tuple[int, float]],
        limit: int = PREFILL_CHUNK,
    ) -> Grouping:
        """The grouping by these prices and what drafts are worth, as of `_Standing`, of at most so many tokens."""
        size = heads = 1 + self._worth_verifying(confidences[: min(remaining, limit) - 1], prices)
        reached = [1.0, *itertools.accumulate(confidences, operator.mul)]
        chances = map(operator.sub, reached[:heads], [*reached[1:heads], reached[-1] * end])
        groups = dict[int, int]()
        for chance, accepted in sorted(zip(chances, range(1, heads + 1), strict=True), reverse=True):
            most = min(remaining - accepted, limit - size)
            gain, masks = 0.0, 0
            for group, worth in drafts:
                more = chance * worth - (prices[size + group] - prices[size]) if group <= most else 0.0
                if more > gain:
                    gain, masks = more, group
                elif masks:
                    break
            if masks:
                groups[accepted] = masks
                size += masks
            elif most >= MAX_BLOCK:
                break  # for a group that is needed more rarely is worth less
        return Grouping(heads, dict(sorted(groups.items())))

    def learn(self, looked_at: int, emitted: int, *, ended: bool = False, unseen: Iterable[float] = ()) -> None:
        """Take in the verify of a plan's draft that looked at a block of so many tokens, and emitted this many.

        Where the answer has `ended`, what a longer draft would have proposed is as lost as a wrong draft. `unseen` are
        the confidences of what the draft had beyond the block, if all of that was kept.
        """
        mode, block = self._taken
        verify = (max(looked_at, block) if ended else looked_at, emitted, unseen)
        for statistics in (self._own, self._engine.of[mode], self._engine.drafts):
            statistics.later.append(verify)
        if mode == "linear_spec":
            self._learn_block(mode, block, looked_at, emitted)

    def learn_quadratic(self, block: int, tokens: int, emitted: int) -> None:
        """Take in a pass of quadratic_spec of so many tokens, planned with this block, that emitted this many."""
        self._learn_block("quadratic_spec", block, tokens, emitted)

    def _learn_block(self, mode: ExactMode, block: int, tokens: int, emitted: int) -> None:
        """Take in a block whose verify had so many tokens, which padding and rows of other sizes make dearer."""
        forward = self._load.padded or (tokens * self._rows, self._rows)
        self._engine.of[mode].blocks[self._rows].later.append((block, *forward, emitted))
