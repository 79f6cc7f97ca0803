"""`nemodiff tune`: which way to run an engine's kernels is fastest on this card.

From the default on, every way that differs in one choice is timed beside the best so far, in turns, so that clocks and
temperature fall on all alike; the first time all own products together as well, as each may gain only with the others.
What gains most takes the best one's place, if it gains more than turns differ.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..engine_info import read_engine
from ..errors import EngineError, RequestError
from ..runtime.loading import check_device
from ..tuned import Choice
from .table import aligned

if TYPE_CHECKING:
    from ..runtime.engines.torch.trial import Probes

NEAR_TIE = 0.01  # how far rounding in f32 may take two confidences apart, of the larger one, at most


class Timed(Protocol):
    """Passes as one choice runs them (`runtime/engines/torch/trial.py`)."""

    tokens: list[list[int]]  # of each pass
    confidences: list[list[float]]  # of those

    def seconds(self) -> list[float]:
        """Of each pass, measured once."""
        ...


@dataclasses.dataclass(frozen=True)
class Tried:
    """A choice that was timed beside the best before it."""

    choice: Choice
    seconds: list[float]  # of each pass, the median
    gain: float  # seconds of all passes that it takes less, the median over the turns
    spread: float  # of the gain between turns: its upper quartile less its lower one
    taken: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The choice, and everything that was tried; the first is the default."""

    choice: Choice
    tried: list[Tried]

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """It as JSON, times in microseconds; `names` are those of the passes."""
        return {
            "passes": list(names),
            "tried": [
                {
                    "pdl": one.choice.pdl,
                    "own_products": sorted(one.choice.own_products),
                    "us": [1e6 * seconds for seconds in one.seconds],
                    "gain_us": 1e6 * one.gain,
                    "spread_us": 1e6 * one.spread,
                    "taken": one.taken,
                }
                for one in self.tried
            ],
        }


def open_probes(folder: Path, device: str | None) -> Probes:
    """The passes of an engine on a GPU, its weights loaded once. Raises RequestError where nothing can be chosen."""
    info = read_engine(folder)
    if info.manifest.backend != "torch":
        raise RequestError(
            f"{folder} is built for {info.manifest.backend}, allowed: torch, whose kernels can run in several ways; "
            "use this engine as it is, or build one with --backend torch"
        )
    from ..runtime.engines.torch.device import TorchDevice
    from ..runtime.engines.torch.engine import TorchEngine
    from ..runtime.engines.torch.trial import Probes

    here = TorchDevice(folder, check_device(device, "torch"))
    if not here.is_gpu:
        raise RequestError(
            f"device is {here.name}, allowed: cuda or cuda:N, as a CPU runs no kernels to choose from; run it on the "
            "GPU that will serve"
        )
    return Probes(TorchEngine(folder, info, here, pdl=False, own_products=()))


def tune(
    trial: Callable[[Choice], Timed],
    flips: Sequence[str],
    exact: bool,
    report: Callable[[str], None],
    turns: int,
) -> Outcome:
    """Find the fastest choice.

    Args:
        trial: what runs the passes in one way.
        flips: what may be chosen, "pdl" and own products.
        exact: every choice must give the same tokens but for near ties; else those alone that differ in "pdl", which
            changes no number, so those decide a tie alike.
        report: hears of every choice before it is tried, and why one is left out: a card may refuse its kernels.
        turns: that count, after one that does not.

    Raises:
        EngineError: two choices give different tokens where they must not.
    """
    given: dict[frozenset[str], _Given] = {}  # by own products, the default's first

    def ready(choice: Choice) -> Timed | None:
        report(str(choice))
        try:
            made = trial(choice)
        except EngineError as error:
            if choice == Choice():
                raise
            report(f"goes on without that: {error}")
            return None
        new = _Given(choice, made.tokens, made.confidences)
        other = given.setdefault(choice.own_products, new)
        same = new.tokens == other.tokens
        if same and exact:
            other = given[frozenset()]
            same = _agree(new, other)
        if not same:
            raise EngineError(
                f"({choice}) and ({other.choice}) give different tokens, which is a fault of a kernel; nothing is "
                "chosen, report it with the output of: nemodiff doctor --json"
            )
        return made

    best = Choice()
    trials = _made({best: ready(best)})
    tried: list[Tried] = []
    seen = {best}
    while new := [choice for choice in _others(best, flips) if choice not in seen]:
        seen.update(new)
        trials = {best: trials[best]} | _made({choice: ready(choice) for choice in new})
        if len(trials) == 1:
            break
        times = _in_turns(trials, turns)
        beside = [sum(turn) for turn in times[best]]
        if not tried:
            tried.append(Tried(best, _medians(times[best]), 0.0, 0.0, True))
        compared = [_compared(choice, times[choice], beside) for choice in trials if choice != best]
        most = max(compared, key=lambda one: one.gain - one.spread)
        won = most.gain > most.spread
        tried += [dataclasses.replace(one, taken=won and one is most) for one in compared]
        if not won:
            break
        best = most.choice
    if not tried:  # nothing else can be chosen
        tried.append(Tried(best, _medians(_in_turns(trials, turns)[best]), 0.0, 0.0, True))
    return Outcome(best, tried)


class _Given(NamedTuple):
    """What a choice gives, without its graphs."""

    choice: Choice
    tokens: list[list[int]]
    confidences: list[list[float]]


def _agree(one: _Given, other: _Given) -> bool:
    """Whether tokens are the same but for near ties: two of them, as likely as each other, that share what there is."""
    pairs = zip(
        itertools.chain(*one.tokens),
        itertools.chain(*one.confidences),
        itertools.chain(*other.tokens),
        itertools.chain(*other.confidences),
        strict=True,
    )
    return all(
        a == b or (max(of_a, of_b) <= 0.5 * (1 + NEAR_TIE) and abs(of_a - of_b) <= NEAR_TIE * max(of_a, of_b))
        for a, of_a, b, of_b in pairs
    )


def _made(trials: Mapping[Choice, Timed | None]) -> dict[Choice, Timed]:
    """Those that a card runs."""
    return {choice: trial for choice, trial in trials.items() if trial is not None}


def _others(best: Choice, flips: Sequence[str]) -> list[Choice]:
    """The choices to time beside the best one."""
    products = [name for name in flips if name != "pdl"]
    others = [Choice(not best.pdl, best.own_products)] if "pdl" in flips else []
    others += [Choice(best.pdl, best.own_products ^ {name}) for name in products]
    if best == Choice() and products:
        others += [Choice(pdl, frozenset(products)) for pdl in (False, True)[: 1 + ("pdl" in flips)]]
    return others


def _in_turns(trials: Mapping[Choice, Timed], turns: int) -> dict[Choice, list[list[float]]]:
    """Seconds of each pass in every turn; who comes first in one comes last in the next."""
    times: dict[Choice, list[list[float]]] = {choice: [] for choice in trials}
    for turn in range(1 + turns):
        order: Iterable[Choice] = trials if turn % 2 else reversed(list(trials))
        for choice in order:
            seconds = trials[choice].seconds()
            if turn:
                times[choice].append(seconds)
    return times


def _compared(choice: Choice, times: list[list[float]], beside: list[float]) -> Tried:
    gains = [other - sum(turn) for other, turn in zip(beside, times, strict=True)]
    lower, middle, upper = statistics.quantiles(gains, n=4, method="inclusive")
    return Tried(choice, _medians(times), middle, upper - lower, False)


def _medians(times: list[list[float]]) -> list[float]:
    return [statistics.median(one) for one in zip(*times, strict=True)]


def lines(outcome: Outcome, names: Sequence[str]) -> list[str]:
    """The table for people: device time of each pass, and what a choice gains over the best before it."""
    heads = ("us of a pass, by its tokens and context", *names, "gain (spread)", "")
    rows = [
        (
            str(one.choice),
            *(f"{1e6 * seconds:.1f}" for seconds in one.seconds),
            "-" if not at else f"{1e6 * one.gain:.1f} ({1e6 * one.spread:.1f})",
            "taken" if at and one.taken else "",
        )
        for at, one in enumerate(outcome.tried)
    ]
    return [*aligned([heads, *rows]), f"chosen: {outcome.choice}"]
