"""The process of `nemodiff serve`, from an open port to a clean end.

The first SIGTERM or SIGINT begins the drain: new requests are refused, `/health/ready` answers 503, and what has begun
may finish, from a body that is still coming to an answer that is still being read. A second signal ends the process at
once. The port stays open while the server drains, because a load balancer could not ask for its health otherwise.
SIGUSR1 writes what the server is doing to standard error, but on Windows, which has no such signal. While the engine is
loaded, SIGTERM ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, cast

import uvicorn

from ...errors import RequestError, system_reason
from .app import Server
from .connection import Connection, ConnectionConfig
from .request_log import set_up_logging
from .state import loading_state, state_of, write_state

# Seconds that an idle connection is kept. Proxies keep theirs for less, so none of them sends into a closed one.
_KEEP_ALIVE = 75
_SHUTDOWN = 2  # seconds for the last responses to reach their clients
# Connections that the system may hold, and the loop may take, before the server sees the first of them.
_BACKLOG = 256
_FILES = 128  # open files of the engine, the page and the process itself
_NEW_OBJECTS = 5_000  # between two looks for garbage in cycles
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOGGER = logging.getLogger("uvicorn.error")
_QUIET = 60.0  # seconds between two lines about that


def bind(host: str, port: int) -> socket.socket:
    """Take an address before anything slow is done; port 0 takes a free one. Raises RequestError."""
    if not host.strip():  # which would be every address of the machine
        raise RequestError("--host is empty; give an address, such as 127.0.0.1, or 0.0.0.0 for all of the machine's")
    # The protocol by its number, else asyncio does not know it and leaves small pieces waiting for acknowledgements.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":  # where it would let two servers have one address
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, TypeError) as error:  # a TypeError where a host's name has letters that no name may have
        listening.close()
        raise RequestError(
            f"--host {host} --port {port}: {system_reason(error)}; give another, or --port 0 for a free one"
        ) from None
    return listening


@contextlib.contextmanager
def signals_heard() -> Iterator[None]:
    """Hear signals before the server does; the first process of a container gets none that it has no handler for."""

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)  # an exception in the midst of importing torch would abort the process

    handlers: dict[int, Callable[[int, FrameType | None], None]] = {signal.SIGTERM: end}
    if sys.platform != "win32":
        handlers[signal.SIGUSR1] = lambda number, frame: write_state(loading_state())
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_connections(most: int) -> None:
    """Make sure that so many connections can be open, with the process's own limit raised if need be.

    Raises:
        RequestError: they cannot.
    """
    if sys.platform != "win32":  # which has no limit
        import resource

        needed = most + _BACKLOG + _FILES
        limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY or limit >= needed:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, highest))
        except (OSError, ValueError):
            fitting = highest - _BACKLOG - _FILES
            fewer = f"give --max-connections {fitting} or less, or " if fitting > 0 else ""
            allowed = f", allowed: {highest}"
            if highest == resource.RLIM_INFINITY:  # macOS, which has another limit
                allowed, fewer = ", which the system refuses", "give fewer, or "
            raise RequestError(
                f"--max-connections {most} needs {needed} open files{allowed}; {fewer}raise the limit: "
                f"ulimit -n {needed}"
            ) from None


def serve(server: Server, listening: socket.socket, drain: float, announce: Callable[[str], None]) -> None:
    """Serve until a signal; `announce` is called with the address once requests are taken."""
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    config = ConnectionConfig(
        server.app,
        most=server.limits.connections,
        patience=server.limits.patience,
        loop="asyncio",
        ws="none",
        log_level="error",  # warnings are about what clients send
        access_log=False,
        lifespan="off",
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_SHUTDOWN,
    )
    if server.reports.log is not None:
        set_up_logging(server.reports.log)
    process = _DrainingServer(config, server, drain, lambda: announce(address))
    _look_seldom_for_cycles()
    try:
        process.run([listening])
    finally:
        server.close()


def _look_seldom_for_cycles() -> None:
    """Let Python's collector leave alone what is loaded, and look at new objects less often.

    It stops every thread, and a long body makes a million objects in a row, none of them garbage.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)


class _DrainingServer(uvicorn.Server):
    """uvicorn's server, which lets requests finish for `drain` seconds after the first signal."""

    def __init__(self, config: uvicorn.Config, server: Server, drain: float, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._server = server
        self._drain = drain
        self._announce = announce
        self._drain_task: asyncio.Task[None] | None = None
        self._quiet_until = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._on_loop_error)
        if sys.platform != "win32":
            self._loop.add_signal_handler(signal.SIGUSR1, lambda: write_state(state_of(self._server)))
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._server.draining.is_set():
            os._exit(128 + sig)  # the engine's threads may be in the middle of a pass, and cannot be waited for
        self._server.draining.set()
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._drain_task = self._loop.create_task(self._finish_requests())

    @property
    def _busy(self) -> list[Connection]:
        """Those whose client has yet to send the rest of a request, to get its answer, or to read it."""
        connections = cast(set[Connection], self.server_state.connections)
        return [connection for connection in connections if connection.busy]

    async def _wait_for_clients(self, seconds: float) -> None:
        deadline = self._loop.time() + seconds
        while self._busy and self._loop.time() < deadline:
            await asyncio.sleep(0.02)

    async def _finish_requests(self) -> None:
        """Let requests finish while there is time, then cancel the rest, and leave clients that do not read."""
        await self._wait_for_clients(self._drain)
        await asyncio.to_thread(self._server.scheduler.close, drain=False)
        await asyncio.to_thread(self._server.infill_queue.close)
        await self._wait_for_clients(_SHUTDOWN)
        for connection in self._busy:  # else uvicorn would tell of each task that waits for one, with a traceback
            connection.drop()
        self.should_exit = True

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Say now and then that no connection can be taken; asyncio says it many times a second, with a traceback."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _EXHAUSTED:
            loop.default_exception_handler(context)
            return
        if loop.time() >= self._quiet_until:
            self._quiet_until = loop.time() + _QUIET
            remedy = "lower --max-connections, or raise the limit of open files: ulimit -n"
            _LOGGER.error("no connection can be taken (%s); %s", error.strerror, remedy)
