"""A benchmark's figures as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from ..contract import counted
from ..runtime.loading import LoadedEngine
from .bench import Outcome, Plan, names
from .figures import Figures, Percentiles, ratios
from .machine import machine

_HEADS = (
    "test",
    "at a time",
    "tokens/s (min..max)",
    "TTFT ms",
    "TPOT ms",
    "ITL ms, p99",
    "tokens/pass",
    "acceptance",
    "rate",
    "peak MiB",
    "unlike ar",
)


def lines(engines: Sequence[LoadedEngine], outcomes: Sequence[Outcome], plan: Plan) -> list[str]:
    """The table of every engine, and for two the ratios of the first over the second."""
    here = machine()
    load = "" if outcomes[0].load is None else f"load {outcomes[0].load:.2f} before"
    text = [
        f"{', '.join(filter(None, (here['cpu'], counted(here['cores'], 'core'), load)))}; "
        f"{counted(len(plan.prompts), 'prompt')}, at "
        f"most {counted(plan.max_new_tokens, 'new token')}; medians of {counted(plan.rounds, 'round')} after "
        f"{plan.warmup} of warm-up"
    ]
    called = names(engines)
    for engine, name, outcome in zip(engines, called, outcomes, strict=True):
        info = engine.info
        threads = "" if engine.threads is None else f", {counted(engine.threads, 'thread')}"
        text += ["", f"{name}: {info.manifest.backend}, {info.build.dtype_text}, on {engine.processor}{threads}"]
        text += aligned([_HEADS, *(_cells(one) for one in outcome.figures)])
        curve = zip(outcome.curve.sizes, outcome.curve.times, strict=True)
        text.append("ms of a pass by its tokens: " + ", ".join(f"{size}: {1e3 * t:.3g}" for size, t in curve))
    if len(outcomes) > 1:
        text += ["", f"tokens/s of {called[0]} over {called[1]}, round by round: median (min..max)"]
        rows = []
        for own, other in zip(outcomes[0].figures, outcomes[1].figures, strict=True):
            ratio = ratios(own, other)
            rows.append((own.test, str(own.concurrency), f"{ratio.median:.2f} ({ratio.min:.2f}..{ratio.max:.2f})"))
        text += aligned([("test", "at a time", "ratio"), *rows])
    return text


def _cells(one: Figures) -> tuple[str, ...]:
    rate = one.throughput
    memory = one.peak_memory_bytes["gpu"] or one.peak_memory_bytes["process"]
    return (
        one.test,
        str(one.concurrency),
        f"{_short(rate.median)} ({_short(rate.min)}..{_short(rate.max)})",
        _median(one.ttft_ms),
        _median(one.tpot_ms),
        "-" if one.itl_ms is None else f"{one.itl_ms.median:.2f}, {one.itl_ms.p99:.2f}",
        _number(one.tokens_per_pass),
        _number(one.acceptance_length),
        "-" if one.acceptance_rate is None else f"{one.acceptance_rate:.0%}",
        "-" if memory is None else f"{memory / 2**20:.0f}",
        "-" if one.different_from_ar is None else str(one.different_from_ar),
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) if not at else cell.rjust(width) for at, (cell, width) in enumerate(cells)).rstrip()
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]


def _median(values: Percentiles | None) -> str:
    return "-" if values is None else f"{values.median:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
