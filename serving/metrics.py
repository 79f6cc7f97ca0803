"""The metrics of a server, in one table for Prometheus and for Triton Inference Server.

`METRICS` says of every metric its name, kind and help, and how its value follows from the scheduler's statistics or
from a finished request. Counters and gauges are computed when somebody asks, so they always agree with the scheduler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from ..runtime.engines.passes import PassKind
from ..runtime.events.events import Finished
from ..runtime.scheduler.statistics import Statistics

Kind = Literal["counter", "gauge", "histogram"]
Values = Mapping[str, float] | Mapping[PassKind, int]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_SECONDS_PER_TOKEN = tuple(seconds / 10 for seconds in _SECONDS[:-3])
_TOKENS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)


@dataclasses.dataclass(frozen=True)
class InfillStats:
    """What an infill queue has done so far.

    present: holes that are being filled or wait. ends: ended holes by how they ended. tokens, nfe: tokens and passes of
    the holes that were filled.
    """

    present: int
    ends: dict[str, int]
    tokens: int
    nfe: dict[PassKind, int]


@dataclasses.dataclass(frozen=True)
class ServerStats:
    """What counters and gauges are computed from.

    refused: requests answered with an error, by HTTP status. infill: None where the server fills no holes.
    """

    scheduler: Statistics
    refused: Mapping[int, int]
    infill: InfillStats | None = None


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric.

    read: the values of a counter or gauge by the value of `label`; without a label the only key is empty.
    observe: what a finished request adds to a histogram. buckets: its upper bounds, ascending, without infinity.
    """

    name: str
    kind: Kind
    help: str
    label: str | None = None
    read: Callable[[ServerStats], Values] | None = None
    observe: Callable[[Finished], Iterable[float]] | None = None
    buckets: tuple[float, ...] = ()


def _counter(name: str, help: str, read: Callable[[Statistics], float]) -> Metric:
    return Metric(name, "counter", help, None, lambda stats: {"": read(stats.scheduler)})


def _labelled_counter(name: str, help: str, label: str, read: Callable[[Statistics], Values]) -> Metric:
    return Metric(name, "counter", help, label, lambda stats: read(stats.scheduler))


def _gauge(name: str, help: str, read: Callable[[Statistics], float]) -> Metric:
    return Metric(name, "gauge", help, None, lambda stats: {"": read(stats.scheduler)})


def _histogram(
    name: str, help: str, buckets: tuple[float, ...], observe: Callable[[Finished], Iterable[float | None]]
) -> Metric:
    def observe_known(finished: Finished) -> Iterable[float]:
        return [value for value in observe(finished) if value is not None]

    return Metric(name, "histogram", help, observe=observe_known, buckets=buckets)


def _infill_metric(
    name: str, kind: Kind, help: str, read: Callable[[InfillStats], Values], label: str | None = None
) -> Metric:
    return Metric(name, kind, help, label, lambda stats: {} if stats.infill is None else read(stats.infill))


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


METRICS = (
    _gauge("nemodiff_requests_running", "Requests that have a row", lambda s: s.running),
    _gauge("nemodiff_requests_waiting", "Requests that wait for a row", lambda s: s.waiting),
    _gauge("nemodiff_rows", "Requests that may run at the same time", lambda s: s.rows),
    _gauge(
        "nemodiff_cache_usage_ratio",
        "Share of the cache slots that running requests and kept prefixes use",
        lambda s: (s.slots + s.kept_slots) / s.capacity,
    ),
    _labelled_counter(
        "nemodiff_requests_total",
        "Ended requests by how they ended",
        "end",
        lambda s: {"finished": s.finished, "cancelled": s.cancelled, "failed": s.failed},
    ),
    Metric(
        "nemodiff_refused_requests_total",
        "counter",
        "Requests answered with an error instead of text, by HTTP status",
        "status",
        lambda stats: {str(status): count for status, count in stats.refused.items()},
    ),
    _counter("nemodiff_prompt_tokens_total", "Prompt tokens", lambda s: s.prompt_tokens),
    _counter(
        "nemodiff_reused_tokens_total",
        "Prompt tokens whose keys and values were copied instead of computed",
        lambda s: s.reused_tokens,
    ),
    _counter("nemodiff_generation_tokens_total", "Tokens emitted", lambda s: s.emitted_tokens),
    _labelled_counter("nemodiff_nfe_total", "Passes of ended requests by kind", "kind", lambda s: s.nfe),
    _counter("nemodiff_steps_total", "Steps of the scheduler", lambda s: s.steps),
    _counter(
        "nemodiff_forwards_total", "Forward passes of the engine, each over one or more rows", lambda s: s.forwards
    ),
    _counter(
        "nemodiff_computed_tokens_total",
        "Tokens computed in forward passes, padding left out",
        lambda s: s.computed_tokens,
    ),
    _counter("nemodiff_padding_tokens_total", "Padding tokens computed in forward passes", lambda s: s.padding_tokens),
    _counter(
        "nemodiff_preemptions_total", "Times that a request gave its memory to an older one", lambda s: s.preempted
    ),
    _counter("nemodiff_rebuilt_tokens_total", "Tokens computed again after that", lambda s: s.rebuilt_tokens),
    _histogram(
        "nemodiff_time_to_first_token_seconds",
        "Time from submission to the first token",
        _SECONDS,
        lambda f: [_seconds(f.ttft_ms)],
    ),
    _histogram(
        "nemodiff_inter_token_latency_seconds",
        "Mean time between the tokens of a request",
        _SECONDS_PER_TOKEN,
        lambda f: [_seconds(f.itl_ms)],
    ),
    _histogram(
        "nemodiff_request_queue_time_seconds",
        "Time from submission to a row",
        _SECONDS,
        lambda f: [_seconds(f.generation.timings_ms["queued"])],
    ),
    _histogram(
        "nemodiff_e2e_request_latency_seconds",
        "Time from submission to the end",
        _SECONDS,
        lambda f: [_seconds(f.generation.timings_ms["queued"] + f.generation.timings_ms["total"])],
    ),
    _histogram(
        "nemodiff_accepted_tokens_per_verify",
        "Tokens that a verify pass emitted, the bonus token included",
        _TOKENS,
        lambda f: f.generation.acceptance.lengths,
    ),
    _histogram(
        "nemodiff_tokens_per_forward",
        "Tokens of a request per pass, prefill passes left out",
        _TOKENS,
        lambda f: [f.generation.decode_tpf],
    ),
)

# Holes share the engine with the requests above and are not counted there.
INFILL_METRICS = (
    _infill_metric("nemodiff_fills_present", "gauge", "Holes that are being filled or wait", lambda f: {"": f.present}),
    _infill_metric("nemodiff_fills_total", "counter", "Ended holes by how they ended", lambda f: f.ends, "end"),
    _infill_metric(
        "nemodiff_fill_tokens_total", "counter", "Tokens that holes were filled with", lambda f: {"": f.tokens}
    ),
    _infill_metric("nemodiff_fill_nfe_total", "counter", "Passes of filled holes by kind", lambda f: f.nfe, "kind"),
)
