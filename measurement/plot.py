"""A benchmark's figures as a picture: tokens per second by mode, and what a pass costs by its tokens."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError, install
from ..whole_file import whole
from .bench import Outcome
from .figures import Spread


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn, before anything is measured. Raises RequestError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"--plot needs the package matplotlib; install it with: {install('nemodiff[plot]')}")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if _format(path) not in formats:
        raise RequestError(
            f"--plot {path} is no name of a picture, allowed: one that ends in {', '.join(formats)}; change it"
        )


def draw(path: Path, names: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Write the picture, in the format that its name ends in."""
    from matplotlib.figure import Figure

    groups = _groups(names, outcomes)
    modes = list(dict.fromkeys(mode for _, rates in groups for mode in rates))
    tall = 1.5 + 0.22 * (len(groups) + 1) * len(modes)  # inches: a bar's label is readable, however many there are
    figure = Figure(figsize=(11, max(4.0, tall)), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(3, 2))
    _bars(bars, groups, modes)
    _curves(curves, names, outcomes)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()  # drawing imports much, and an interrupted import would leave what is half-written
    figure.savefig(picture, dpi=150, format=_format(path))
    with whole(path) as stage:
        stage.write_bytes(picture.getvalue())


def _format(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def _groups(names: Sequence[str], outcomes: Sequence[Outcome]) -> list[tuple[str, dict[str, Spread]]]:
    """For each engine at each number of requests: a label, and output tokens per second by mode."""
    groups = []
    for name, outcome in zip(names, outcomes, strict=True):
        rates: dict[int, dict[str, Spread]] = {}
        for one in outcome.figures:
            if not one.test.startswith("pp"):
                rates.setdefault(one.concurrency, {})[one.test] = one.throughput
        groups += [(f"{name}, {concurrency} at a time", by_mode) for concurrency, by_mode in rates.items()]
    return groups


def _bars(axes: Any, groups: Sequence[tuple[str, Mapping[str, Spread]]], modes: Sequence[str]) -> None:
    """Medians, with lines from the least to the most of the rounds."""
    width = 0.8 / len(groups)
    most = max((rate.max for _, rates in groups for rate in rates.values()), default=1.0)
    for number, (label, rates) in enumerate(groups):
        places = [modes.index(mode) + (number - (len(groups) - 1) / 2) * width for mode in rates]
        medians = [rate.median for rate in rates.values()]
        below = [rate.median - rate.min for rate in rates.values()]
        above = [rate.max - rate.median for rate in rates.values()]
        axes.barh(places, medians, width, xerr=[below, above], capsize=2, label=label, error_kw={"alpha": 0.6, "lw": 1})
        for place, rate in zip(places, rates.values(), strict=True):
            axes.text(rate.max + 0.015 * most, place, _rounded(rate.median), va="center", fontsize=8)
    axes.set_yticks(range(len(modes)), modes)
    axes.invert_yaxis()  # the first mode is at the top
    axes.set(xlabel="output tokens/s", title="Modes", xlim=(0, 1.12 * most))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="best")


def _curves(axes: Any, names: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Milliseconds by tokens."""
    for name, outcome in zip(names, outcomes, strict=True):
        axes.plot(outcome.curve.sizes, [1e3 * t for t in outcome.curve.times], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a pass", ylabel="ms", title="Cost of a pass")
    sizes = sorted({size for outcome in outcomes for size in outcome.curve.sizes})
    # Powers of two alone have a number: those between would cover each other's.
    axes.set_xticks(sizes, ["" if size & (size - 1) else str(size) for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()


def _rounded(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
