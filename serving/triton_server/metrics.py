"""The figures of `metrics.py` on a Triton server's metrics port.

In: what counters are read from, and finished requests. Out: Triton's custom metrics. The surprising fact: a Triton
counter can only be increased, so what was told is remembered here; and every call goes to the server's process and
back, so only what has changed is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..metrics import METRICS, Now

if TYPE_CHECKING:
    from ...runtime.events.events import Finished


class TritonMetrics:
    """Registers all figures; `pb` is Triton's module `triton_python_backend_utils`, `labels` are on each of them."""

    def __init__(self, pb: Any, labels: dict[str, str]) -> None:
        kinds = {
            "counter": pb.MetricFamily.COUNTER,
            "gauge": pb.MetricFamily.GAUGE,
            "histogram": pb.MetricFamily.HISTOGRAM,
        }
        self._labels = labels
        self._families = {m.name: pb.MetricFamily(name=m.name, description=m.help, kind=kinds[m.kind]) for m in METRICS}
        self._histograms = {
            m.name: self._families[m.name].Metric(labels=labels, buckets=list(m.buckets)) for m in METRICS if m.observe
        }
        self._told: dict[tuple[str, str], tuple[Any, float]] = {}  # by name and label value: metric and last value

    def update(self, now: Now) -> None:
        """Tell counters and gauges."""
        for metric in METRICS:
            for key, value in metric.read(now).items() if metric.read is not None else ():
                place = (metric.name, key)
                if place not in self._told:
                    own = {metric.label: key} if metric.label is not None else {}
                    self._told[place] = (self._families[metric.name].Metric(labels={**self._labels, **own}), 0.0)
                told, before = self._told[place]
                if value != before:
                    told.set(value) if metric.kind == "gauge" else told.increment(value - before)
                    self._told[place] = (told, value)

    def observe(self, finished: Finished) -> None:
        """Add a finished request to the distributions."""
        for metric in METRICS:
            for value in metric.observe(finished) if metric.observe is not None else ():
                self._histograms[metric.name].observe(value)
