"""An engine as an ASGI application: scheduler, metrics, routes and middleware put together."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from ...contract import DEFAULT_MAX_LOGPROBS
from ...runtime.loading import LoadedEngine, load
from ...runtime.scheduler.scheduler import QUEUE, Scheduler
from ..metrics import ServerStats
from .handlers import Handlers
from .hosts import AllowedHosts
from .image_urls import THREADS
from .infill_queue import InfillQueue
from .metrics import Refusals, ServerMetrics
from .middleware import AdmissionMiddleware
from .request_log import Format, Record, RequestLog, log_record
from .routes import create_routes
from .spans import Spans

_TOKEN_THREADS = 2  # for all texts that are to become tokens and nothing else, however many are sent


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server allows.

    timeout: seconds of one request. max_request_bytes: of a body. keys: a client must send one of them; without any
    the server is open. waiting: requests that may wait for a row. hosts: that a client may call the server by.
    origins: whose pages may read its answers in a browser, `*` for all. connections: at a time. patience: seconds that
    a client has to send a request, or to read some of an answer.
    image_urls: whether images are fetched that a request names by http URL. logprobs: likeliest tokens that a request
    may ask for.
    """

    timeout: float = 600.0
    max_request_bytes: int = 4 << 20
    keys: tuple[str, ...] = ()
    waiting: int = QUEUE
    hosts: AllowedHosts = dataclasses.field(default_factory=lambda: AllowedHosts("localhost"))
    origins: tuple[str, ...] = ()
    connections: int = 512
    patience: float = 60.0
    image_urls: bool = False
    logprobs: int = DEFAULT_MAX_LOGPROBS


@dataclasses.dataclass(frozen=True)
class Reports:
    """What a server tells of each request. log: the format of a line on standard error. spans: over OpenTelemetry."""

    log: Format | None = None
    spans: bool = False


class Server:
    """One engine behind HTTP; `app` is the ASGI application.

    Args:
        engine: from `load`.
        scheduler: over the engine.
        limits: what is allowed.
        name: of the model, for clients.
        defaults: options that a request does not give.
        reports: what is told of each request.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        scheduler: Scheduler,
        limits: Limits,
        name: str,
        defaults: dict[str, Any],
        reports: Reports = Reports(),
    ) -> None:
        self.name = name
        self.reports = reports
        self.limits = limits
        self.scheduler = scheduler
        self.infill_queue = InfillQueue(engine, limits.waiting)
        self.draining = threading.Event()
        self._image_pool = (
            concurrent.futures.ThreadPoolExecutor(THREADS, "nemodiff-images") if limits.image_urls else None
        )
        self._token_pool = concurrent.futures.ThreadPoolExecutor(_TOKEN_THREADS, "nemodiff-tokens")
        metrics = ServerMetrics(self._stats)
        handlers = Handlers(
            engine,
            scheduler,
            self.infill_queue,
            metrics,
            name,
            defaults,
            limits.timeout,
            self._token_pool,
            self._image_pool,
        )
        routes = create_routes(handlers, self.draining)
        answering: ASGIApp = AdmissionMiddleware(
            routes, limits.hosts, limits.keys, limits.max_request_bytes, self.draining
        )
        if limits.origins:  # before the keys, which a browser's first question has not
            exposed = ["X-Request-Id", "Retry-After"]
            answering = CORSMiddleware(
                answering, limits.origins, ["GET", "POST"], allow_headers=["*"], expose_headers=exposed
            )
        self._spans = Spans() if reports.spans else None
        self._refusals = Refusals()
        sinks: list[Callable[[Record], None]] = [self._refusals]
        if reports.log is not None:
            sinks.append(log_record)
        if self._spans is not None:
            sinks.append(self._spans)
        self.app = RequestLog(answering, sinks)

    def close(self) -> None:
        """Let go of the threads; to be called once, after the last request."""
        self.infill_queue.close()
        for pool in (self._token_pool, self._image_pool):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        if self._spans is not None:
            self._spans.close()

    def _stats(self) -> ServerStats:
        return ServerStats(self.scheduler.statistics, self._refusals.by_status, self.infill_queue.stats)


def open_server(
    folder: Path,
    *,
    limits: Limits,
    name: str | None,
    defaults: dict[str, Any],
    rows: int | None = None,
    prefix_reuse: bool = True,
    reports: Reports = Reports(),
    **loading: Any,
) -> Server:
    """Load an engine, by other arguments of `load`, and put it behind HTTP. Raises NemodiffError."""
    engine = load(folder, **loading, progress=True)
    scheduler = Scheduler(
        engine, rows=rows, waiting=limits.waiting, prefix_reuse=prefix_reuse, max_logprobs=limits.logprobs
    )
    return Server(engine, scheduler, limits, name or folder.resolve().name, defaults, reports)
