"""The metrics of `nemodiff serve`, rendered by prometheus_client.

A collector of its own reads the table in `serving/metrics.py` at every scrape. The registry holds nothing else: what
prometheus_client measures of the process itself is left out.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ...runtime.events.events import Finished
from ..metrics import INFILL_METRICS, METRICS, Metric, ServerStats, Values
from .middleware import PROTECTED
from .request_log import LEFT, Record

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class Refusals:
    """Requests to protected paths, or refused unread, that were answered with an error; a sink of `RequestLog`."""

    def __init__(self) -> None:
        self.by_status = dict.fromkeys((400, 401, 404, 408, 413, 421, 429, 431, 500, 503, 504), 0)

    def __call__(self, record: Record) -> None:
        """Count a request."""
        answered = record.status >= 400 and record.status != LEFT
        if answered and (not record.path or record.path.startswith(PROTECTED)):
            self.by_status[record.status] = self.by_status.get(record.status, 0) + 1


class ServerMetrics(Collector):
    """All metrics of one server; `stats` gives what counters and gauges are computed from."""

    def __init__(self, stats: Callable[[], ServerStats]) -> None:
        self._stats = stats
        self._lock = threading.Lock()  # of the histograms, to which any thread may add
        self._counts = {m.name: [0] * (len(m.buckets) + 1) for m in METRICS if m.observe is not None}
        self._sums = dict.fromkeys(self._counts, 0.0)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def observe(self, finished: Finished) -> None:
        """Add one finished request to the histograms."""
        with self._lock:
            for metric in METRICS:
                if metric.observe is None:
                    continue
                for value in metric.observe(finished):
                    self._counts[metric.name][bisect.bisect_left(metric.buckets, value)] += 1
                    self._sums[metric.name] += value

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """A scrape in the format that a client's Accept header asks for, and its Content-Type."""
        try:
            encode, content_type = choose_encoder(accept)
        except TypeError:  # the library compares a version that is no number all the same
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Family]:
        """The families of one scrape, as prometheus_client asks for them."""
        stats = self._stats()
        metrics = METRICS if stats.infill is None else (*METRICS, *INFILL_METRICS)
        for metric in metrics:
            if metric.read is None:
                yield self._histogram(metric)
            else:
                yield _family(metric, metric.read(stats))

    def _histogram(self, metric: Metric) -> HistogramMetricFamily:
        """The distribution of one metric, with cumulative counts."""
        with self._lock:
            counts, total = list(self._counts[metric.name]), self._sums[metric.name]
        bounds = [*map(str, metric.buckets), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
        return HistogramMetricFamily(metric.name, metric.help, buckets, total)


def _family(metric: Metric, values: Values) -> CounterMetricFamily | GaugeMetricFamily:
    """A counter or a gauge."""
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=[] if metric.label is None else [metric.label])
    for label_value, value in values.items():
        family.add_metric([] if metric.label is None else [label_value], value)
    return family
