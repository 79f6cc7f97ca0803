"""OpenTelemetry spans of a request: the request, and of each answer its wait, its prefill and its blocks.

The SDK takes its settings from the environment, as OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_SERVICE_NAME.
"""

from __future__ import annotations

import time
from typing import Any

from ...errors import RequestError, install
from .request_log import LEFT, Answer, Record

_BLOCKS = 256  # spans of blocks of an answer; ar would have one per token


class Spans:
    """Makes spans of finished records, below the trace that a client names in `traceparent`.

    Args:
        provider: of tracers; None makes one that exports over OTLP.

    Raises:
        RequestError: OpenTelemetry is not installed.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import propagate, trace
        except ModuleNotFoundError:
            raise RequestError(f"--trace-spans needs OpenTelemetry; install it: {install('nemodiff[otel]')}") from None
        self._trace = trace
        self._propagate = propagate
        self._provider = _exporting() if provider is None else provider
        self._tracer = self._provider.get_tracer("nemodiff")
        self._zero = time.time_ns() - time.perf_counter_ns()  # of the records' clock

    def __call__(self, record: Record) -> None:
        """Export a record's spans; there are none of a request that was never read."""
        if not record.path:
            return
        fields = record.fields()
        parent = self._propagate.extract(dict(record.headers))
        root = self._tracer.start_span(
            f"{record.method} {record.path}", context=parent, start_time=self._at(record.began), attributes=fields
        )
        if record.failed or record.status in (0, LEFT):
            root.set_status(self._trace.StatusCode.ERROR)
        context = self._trace.set_span_in_context(root)
        for index, answer in record.answers.items():
            self._answer(context, index, answer)
        root.end(self._at(record.ended))

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()

    def _answer(self, context: Any, index: int, answer: Answer) -> None:
        if answer.finished is None:
            return
        generation = answer.finished.generation
        ms = generation.timings_ms
        started = answer.finished.at - ms["total"] / 1e3
        first = started + ms["prefill"] / 1e3
        self._span(context, "queue", started - ms["queued"] / 1e3, started, answer=index)
        self._span(context, "prefill", started, first, answer=index, tokens=generation.prompt_tokens)
        before = first
        for at, tokens in answer.blocks[:_BLOCKS]:
            if at > before:  # the first token comes with the prefill
                self._span(context, "block", before, at, answer=index, tokens=tokens)
            before = max(before, at)

    def _span(self, context: Any, name: str, begin: float, end: float, **attributes: int) -> None:
        span = self._tracer.start_span(name, context=context, start_time=self._at(begin), attributes=attributes)
        span.end(self._at(end))

    def _at(self, seconds: float) -> int:
        """Nanoseconds since the epoch."""
        return self._zero + int(seconds * 1e9)


def _exporting() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": "nemodiff"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
