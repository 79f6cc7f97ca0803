"""The process behind `nemodiff serve`: from an open port to a clean end.

In: an engine behind HTTP and a bound socket. Out: nothing, until somebody ends it. The first SIGTERM or SIGINT begins
the drain: new requests are refused, `/health/ready` says 503, and what runs or waits may finish; a second signal ends
it at once. The surprising fact: the port stays open while the server drains, or a load balancer could not ask whether
it does.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from ...errors import RequestError
from .app import Server

_KEPT = 75  # seconds of an idle connection; longer than proxies keep theirs, so that none sends into a closed one
_LAST_WORDS = 2  # seconds for what has ended to reach its clients


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything slow is done; port 0 takes a free one. Raises RequestError."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise RequestError(f"--host {host} --port {port}: {error}; give another, or --port 0 for a free one") from None
    return listening


def serve(server: Server, listening: socket.socket, drain: float, announce: Callable[[str], None]) -> None:
    """Serve until a signal. `announce` is told the address, once requests are taken."""
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        server.gate,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=_KEPT,
        timeout_graceful_shutdown=_LAST_WORDS,
    )
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    process = _Process(config, server, drain, lambda: announce(address))
    try:
        process.run([listening])
    finally:
        server.fills.close()


class _Process(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: Server, drain: float, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._server, self._drain, self._announce = server, drain, announce
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._server.gate.draining:
            self.should_exit = self.force_exit = True
            return
        self._server.gate.draining = True
        self._loop.call_soon_threadsafe(self._begin_end)

    def _begin_end(self) -> None:
        self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        """Let requests finish while there is time, then cancel the rest."""
        until = self._loop.time() + self._drain
        while self._server.busy and self._loop.time() < until:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._server.scheduler.close, drain=False)
        self.should_exit = True
