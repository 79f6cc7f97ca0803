"""A benchmark's figures as a picture: tokens per second by test, and what a pass costs by its tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .bench import Outcome


def check_plot() -> None:
    """Refuse a picture that could not be drawn, before anything is measured. Raises RequestError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--plot needs the package matplotlib; install it with: pip install 'nemodiff[plot]'")


def draw(path: Path, names: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Write the picture, in the format that its name ends in."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(3, 2))
    _bars(bars, names, outcomes)
    for name, outcome in zip(names, outcomes, strict=True):
        curves.plot(outcome.curve.sizes, [1e3 * t for t in outcome.curve.times], "o-", label=name)
    curves.set(xscale="log", yscale="log", xlabel="tokens of a pass", ylabel="ms", title="Cost of a pass")
    curves.grid(alpha=0.3)
    curves.legend()
    figure.savefig(path, dpi=150, format=path.suffix[1:] or "png")


def _bars(axes: Any, names: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Median output tokens per second, with lines from the least to the most of the rounds."""
    width = 0.8 / len(names)
    for number, (name, outcome) in enumerate(zip(names, outcomes, strict=True)):
        tested = [one for one in outcome.figures if not one.test.startswith("pp")]
        rates = [one.throughput for one in tested]
        spread = [[r.median - r.min for r in rates], [r.max - r.median for r in rates]]
        places = [at + (number - (len(names) - 1) / 2) * width for at in range(len(tested))]
        axes.bar(places, [r.median for r in rates], width, yerr=spread, capsize=3, label=name)
        axes.set_xticks(range(len(tested)), [f"{one.test}\n{one.concurrency} at a time" for one in tested])
    axes.set(ylabel="output tokens/s", title="Modes")
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
