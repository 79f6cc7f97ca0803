"""The metrics of `serving/metrics.py` as custom metrics of Triton Inference Server."""

from __future__ import annotations

import math
from typing import Any

from ...runtime.events.events import Finished
from ..metrics import METRICS, ServerStats


class TritonMetrics:
    """Registers all metrics and keeps them up to date.

    Every change is a call to the server's process and back, so only what has changed is sent.

    Args:
        pb: the server's module `triton_python_backend_utils`.
        labels: on every metric.
    """

    def __init__(self, pb: Any, labels: dict[str, str]) -> None:
        kinds = {
            "counter": pb.MetricFamily.COUNTER,
            "gauge": pb.MetricFamily.GAUGE,
            "histogram": pb.MetricFamily.HISTOGRAM,
        }
        self._labels = labels
        self._families: dict[str, Any] = {}
        self._histograms: dict[str, Any] = {}
        for metric in METRICS:
            family = pb.MetricFamily(name=metric.name, description=metric.help, kind=kinds[metric.kind])
            self._families[metric.name] = family
            if metric.observe is not None:
                self._histograms[metric.name] = family.Metric(labels=labels, buckets=list(metric.buckets))
        # Counters and gauges by name and label value. Their last values are kept because the server's counters can
        # only be incremented. A gauge may have one from an earlier process, which has been killed.
        self._series: dict[tuple[str, str], Any] = {}
        self._last: dict[tuple[str, str], float] = {}

    def update(self, stats: ServerStats) -> None:
        """Bring counters and gauges up to date."""
        for metric in METRICS:
            if metric.read is None:
                continue
            for label_value, value in metric.read(stats).items():
                key = (metric.name, label_value)
                if key not in self._series:
                    label = {} if metric.label is None else {metric.label: label_value}
                    self._series[key] = self._families[metric.name].Metric(labels={**self._labels, **label})
                    self._last[key] = 0.0 if metric.kind == "counter" else math.nan
                last = self._last[key]
                if value == last:
                    continue
                if metric.kind == "gauge":
                    self._series[key].set(value)
                else:
                    self._series[key].increment(value - last)
                self._last[key] = value

    def close(self) -> None:
        """Take all metrics off the server's port, while it can still be told to: later that is a segmentation fault."""
        for owned in (self._histograms, self._series, self._families):  # a family after its metrics
            owned.clear()

    def observe(self, finished: Finished) -> None:
        """Add a finished request to the histograms."""
        for metric in METRICS:
            if metric.observe is None:
                continue
            for value in metric.observe(finished):
                self._histograms[metric.name].observe(value)
