"""What a server tells of itself in numbers: one list, for Prometheus and for Triton alike.

In: a scheduler's `Statistics`, what a server counts beside it, and each `Finished` event. Out: `METRICS`, which says of
every figure its name, kind, help and how it is computed; `Metrics`, which keeps the distributions; `render`, the text
that Prometheus reads. The surprising fact: counters and gauges are only read, from what the scheduler counts anyway, so
they add up with its statistics at any moment; only distributions are kept here.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from ..runtime.engines.engine import PassKind
from ..runtime.events.events import Finished
from ..runtime.scheduler import Statistics

Kind = Literal["counter", "gauge", "histogram"]
Values = Mapping[str, float] | Mapping[PassKind, int]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_PER_TOKEN = tuple(s / 10 for s in _SECONDS[:-3])
_TOKENS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)


@dataclasses.dataclass(frozen=True)
class FillCounts:
    """Holes that are filled or wait, holes by their end, and of the filled ones tokens and passes by kind."""

    present: int
    ends: dict[str, int]
    tokens: int
    nfe: dict[PassKind, int]


@dataclasses.dataclass(frozen=True)
class Now:
    """What counters and gauges are read from.

    refused: requests answered with an error, by HTTP status. fills: holes filled beside the scheduler, None where that
    is not offered.
    """

    scheduler: Statistics
    refused: Mapping[int, int]
    fills: FillCounts | None = None


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure.

    read: of a counter or gauge, its values by the value of `label` (without a label the one key is empty).
    observe: of a histogram, what a finished request adds. buckets: its upper bounds, ascending, infinity left out.
    """

    name: str
    kind: Kind
    help: str
    label: str | None = None
    read: Callable[[Now], Values] | None = None
    observe: Callable[[Finished], Iterable[float]] | None = None
    buckets: tuple[float, ...] = ()


def _counter(name: str, help: str, read: Callable[[Statistics], Values], label: str) -> Metric:
    return Metric(name, "counter", help, label, lambda n: read(n.scheduler))


def _count(name: str, help: str, read: Callable[[Statistics], float]) -> Metric:
    return Metric(name, "counter", help, None, lambda n: {"": read(n.scheduler)})


def _gauge(name: str, help: str, read: Callable[[Statistics], float]) -> Metric:
    return Metric(name, "gauge", help, None, lambda n: {"": read(n.scheduler)})


def _histogram(
    name: str, help: str, buckets: tuple[float, ...], observe: Callable[[Finished], Iterable[float | None]]
) -> Metric:
    def known(finished: Finished) -> Iterable[float]:
        return [value for value in observe(finished) if value is not None]

    return Metric(name, "histogram", help, observe=known, buckets=buckets)


def _fills(name: str, kind: Kind, help: str, read: Callable[[FillCounts], Values], label: str | None = None) -> Metric:
    return Metric(name, kind, help, label, lambda n: {} if n.fills is None else read(n.fills))


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


METRICS = (
    _gauge("nemodiff_requests_running", "Requests that have a row", lambda s: s.running),
    _gauge("nemodiff_requests_waiting", "Requests that wait for a row", lambda s: s.waiting),
    _gauge("nemodiff_rows", "Requests that may run at a time", lambda s: s.rows),
    _gauge(
        "nemodiff_cache_usage_ratio",
        "Cache slots in use by running requests and kept prefixes, of all",
        lambda s: (s.slots + s.kept_slots) / s.capacity,
    ),
    _counter(
        "nemodiff_requests_total",
        "Requests by their end",
        lambda s: {"finished": s.finished, "cancelled": s.cancelled, "failed": s.failed},
        "end",
    ),
    Metric(
        "nemodiff_refused_requests_total",
        "counter",
        "Requests answered with an error instead of text, by HTTP status",
        "status",
        lambda n: {str(status): count for status, count in n.refused.items()},
    ),
    _count("nemodiff_prompt_tokens_total", "Tokens of prompts", lambda s: s.prompt_tokens),
    _count("nemodiff_reused_tokens_total", "Tokens of prompts whose K/V were copied", lambda s: s.reused_tokens),
    _count("nemodiff_generation_tokens_total", "Tokens emitted", lambda s: s.emitted_tokens),
    _counter("nemodiff_nfe_total", "Passes of ended requests by kind", lambda s: s.nfe, "kind"),
    _count("nemodiff_steps_total", "Steps of the scheduler", lambda s: s.steps),
    _count("nemodiff_forwards_total", "Forwards of the engine, each over one or more rows", lambda s: s.forwards),
    _count("nemodiff_computed_tokens_total", "Tokens computed in forwards", lambda s: s.computed_tokens),
    _count("nemodiff_padding_tokens_total", "Tokens computed for nobody", lambda s: s.padding_tokens),
    _histogram(
        "nemodiff_time_to_first_token_seconds",
        "From submission to the first token",
        _SECONDS,
        lambda f: [_seconds(f.ttft_ms)],
    ),
    _histogram(
        "nemodiff_inter_token_latency_seconds",
        "Mean time between the tokens of a request",
        _PER_TOKEN,
        lambda f: [_seconds(f.itl_ms)],
    ),
    _histogram(
        "nemodiff_request_queue_time_seconds",
        "From submission to a row",
        _SECONDS,
        lambda f: [_seconds(f.generation.timings_ms["queued"])],
    ),
    _histogram(
        "nemodiff_e2e_request_latency_seconds",
        "From submission to the end",
        _SECONDS,
        lambda f: [_seconds(f.generation.timings_ms["queued"] + f.generation.timings_ms["total"])],
    ),
    _histogram(
        "nemodiff_accepted_tokens_per_verify",
        "Tokens that a verify pass emitted, bonus included",
        _TOKENS,
        lambda f: f.generation.acceptance.lengths,
    ),
    _histogram(
        "nemodiff_tokens_per_forward",
        "Tokens of a request per pass, prefill aside",
        _TOKENS,
        lambda f: [f.generation.decode_tpf],
    ),
)

# Of a server that fills holes; they share the engine with the requests above and are not counted there.
FILLS = (
    _fills("nemodiff_fills_present", "gauge", "Holes that are filled or wait", lambda f: {"": f.present}),
    _fills("nemodiff_fills_total", "counter", "Holes by their end", lambda f: f.ends, "end"),
    _fills("nemodiff_fill_tokens_total", "counter", "Tokens that holes were filled with", lambda f: {"": f.tokens}),
    _fills("nemodiff_fill_nfe_total", "counter", "Passes of filled holes by kind", lambda f: f.nfe, "kind"),
)


class Metrics:
    """The distributions over finished requests; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {m.name: [0] * (len(m.buckets) + 1) for m in METRICS if m.observe is not None}
        self._sums = dict.fromkeys(self._counts, 0.0)

    def observe(self, finished: Finished) -> None:
        """Add one finished request."""
        with self._lock:
            for metric in METRICS:
                for value in metric.observe(finished) if metric.observe is not None else ():
                    self._counts[metric.name][bisect.bisect_left(metric.buckets, value)] += 1
                    self._sums[metric.name] += value

    def render(self, now: Now) -> str:
        """All figures in Prometheus' text format, version 0.0.4."""
        lines = list[str]()
        for metric in (*METRICS, *(FILLS if now.fills is not None else ())):
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
            if metric.read is None:
                lines += self._distribution(metric)
                continue
            for key, value in metric.read(now).items():
                label = f'{{{metric.label}="{key}"}}' if metric.label is not None else ""
                lines.append(f"{metric.name}{label} {value}")
        return "\n".join(lines) + "\n"

    def _distribution(self, metric: Metric) -> list[str]:
        with self._lock:
            counts, total = list(self._counts[metric.name]), self._sums[metric.name]
        up_to = list(itertools.accumulate(counts))
        bounds = [*map(str, metric.buckets), "+Inf"]
        lines = [f'{metric.name}_bucket{{le="{b}"}} {n}' for b, n in zip(bounds, up_to, strict=True)]
        return [*lines, f"{metric.name}_sum {total}", f"{metric.name}_count {up_to[-1]}"]
