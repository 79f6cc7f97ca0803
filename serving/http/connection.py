"""One client's connection, which ends if the client does not do its part, and a limit of all of them.

uvicorn waits for ever for the rest of a request, and for a client that does not read its answer. Here both have limits,
and where there are too many connections, the one that has waited longest for its client makes room.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .error_responses import error_body, error_response
from .request_log import LEFT, RequestLog

_OPEN = (h11.IDLE, h11.SEND_RESPONSE)  # states in which no answer has begun
_UNREADABLE = {  # by h11's status
    400: "what was sent is no HTTP/1.1 request; send one, without TLS",
    431: "the request's target and headers are too long; send fewer or shorter headers",
    501: "the header Transfer-Encoding is not supported, allowed: chunked; leave other codings out",
}


class ConnectionConfig(uvicorn.Config):
    """uvicorn's settings, and what connections are allowed.

    Args:
        app: the ASGI application, which learns of all refusals.
        most: connections at a time.
        patience: seconds that a client has to send a request, or to read some of an answer.
        settings: of uvicorn.
    """

    def __init__(self, app: RequestLog, *, most: int, patience: float, **settings: Any) -> None:
        super().__init__(app, http=Connection, **settings)
        self.log = app
        self.most = most
        self.patience = patience


class Connection(H11Protocol):
    """A connection with a deadline for each request, and one for each part of an answer."""

    _asking_since: float | None = None  # since when a request or the rest of one is to come; None while it is answered
    _unread_since: float | None = None  # since when an answer waits to be read
    _dropped = False  # to make room for another
    _request_timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None

    @property
    def waiting_since(self) -> float | None:
        """Since when the client has to do something; None while the server has, and once it has been dropped."""
        if self._dropped:
            return None
        return self._asking_since if self._unread_since is None else self._unread_since

    @property
    def busy(self) -> bool:
        """Whether a request has begun to come whose answer has not been read in full."""
        return self._unread_since is not None or (self.cycle is not None and not self.cycle.response_complete)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request; another connection makes room if there are too many."""
        super().connection_made(cast(asyncio.Transport, transport))
        self._limits = cast(ConnectionConfig, self.config)
        self.transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of all that is not read
        self._follow()
        if len(self.connections) > self._limits.most and not _close_longest_waiting(self.connections, self):
            message = f"{self._limits.most} connections are open and none is idle; try again later"
            refusal = error_response(503, error_body(503, message), {"Connection": "close"})
            self.app = cast(Any, self._limits.log.around(refusal))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        self._cancel_timers()
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.scope["state"].setdefault("instead", LEFT)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent."""
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        """An answer is complete, and the next request may come."""
        super().on_response_complete()
        self._follow()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read, which uvicorn does while it handles h11's error."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.ProtocolError) else 400
        self._refuse(status, _UNREADABLE.get(status, _UNREADABLE[400]))

    def pause_writing(self) -> None:
        """Something is not sent, because the client does not read."""
        super().pause_writing()
        self._unread_since = self.loop.time()
        self._await_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """All is sent."""
        super().resume_writing()
        self._unread_since = None
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None

    def drop(self) -> None:
        """Close at once, whatever is still to be sent."""
        self._dropped = True
        self.transport.abort()

    def _follow(self) -> None:
        """See who has to do something, the client or the server, and start or stop the request's deadline."""
        if self.transport.is_closing():
            self._cancel_timers(reading=False)
            return
        client = self.conn.their_state
        if client not in (h11.IDLE, h11.SEND_BODY):
            self._asking_since = None
        elif self._asking_since is None:
            self._asking_since = self.loop.time()
        # Between two requests uvicorn has a deadline of its own, but none once a byte of the next one has come.
        between = client is h11.IDLE and self.timeout_keep_alive_task is not None and not self.conn.trailing_data[0]
        if self._asking_since is None or between:
            self._cancel_timers(reading=False)
        elif self._request_timer is None:
            self._request_timer = self.loop.call_later(self._limits.patience, self._give_up)

    def _give_up(self) -> None:
        """The request has not arrived in time."""
        self._request_timer = None
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._refuse(408, f"the request has not arrived in full in {self._limits.patience:g} s; send it again")
        else:  # a browser that has connected for later takes an answer to nothing for one to its next request
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application unless an answer has begun, and close."""
        refusal = error_response(status, error_body(status, message), {"Connection": "close"})
        if self.conn.our_state in _OPEN:
            if self.conn.our_state is h11.IDLE:  # no request has been read
                since = self.loop.time() if self._asking_since is None else self._asking_since
                self._limits.log.tell_unread(status, self.loop.time() - since)
            else:
                self.cycle.disconnected = True  # what the application sends from now on comes too late
                self.cycle.scope["state"]["instead"] = status
            head = h11.Response(status_code=status, headers=refusal.raw_headers)
            for event in (head, h11.Data(data=bytes(refusal.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_reading(self, unsent: int) -> None:
        self._reading_timer = self.loop.call_later(self._limits.patience, self._check_reading, unsent)

    def _check_reading(self, before: int) -> None:
        """Go on waiting if the client has read something meanwhile."""
        unsent = self.transport.get_write_buffer_size()
        if unsent < before:
            self._await_reading(unsent)
        else:
            self.transport.abort()

    def _cancel_timers(self, *, reading: bool = True) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        if reading and self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None


def _close_longest_waiting(connections: set[Any], newest: Connection) -> bool:
    """Close the connection that has waited longest for its client, but for the newest; False if none waits."""
    waiting = [
        (connection.waiting_since, connection)
        for connection in connections
        if connection is not newest and connection.waiting_since is not None
    ]
    if not waiting:
        return False
    min(waiting, key=lambda pair: pair[0])[1].drop()
    return True
