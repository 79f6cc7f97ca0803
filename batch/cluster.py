"""Ray: connected to a cluster or begun on this machine, silent but for what is asked of it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import RequestError, install, system_reason

_PATIENCE = 10.0  # seconds


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The module ray, connected. Raises RequestError where it is missing or no cluster answers."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of its native code, which else writes into ours
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # the same for its usage reports as for ONNX Runtime's
    try:
        import ray
        from ray.data import DataContext
    except ModuleNotFoundError as error:
        raise RequestError(f"{error.name} is missing; install it: {install('nemodiff[ray]')}") from None
    begun = not ray.is_initialized()
    if begun:
        address = address or os.environ.get("RAY_ADDRESS")
        try:
            if address is not None and ":" in address:  # Ray itself tries for minutes
                host, _, port = address.removeprefix("ray://").rpartition(":")
                if not port.isdecimal():
                    raise ValueError("its port is no number")
                socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
            with _silence():
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except SystemExit as error:  # by Ray's handler of SIGTERM, which takes its number for an exit code
            sys.exit(128 + signal.SIGTERM if error.code == signal.SIGTERM else error.code)
        except Exception as error:  # of any kind, and of none where Ray's own processes begin too slowly
            raise RequestError(
                f"{address or 'Ray'}: no cluster answers ({reason(error)}); give "
                "--address HOST:PORT of its head, or none for this machine"
            ) from None
    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with _ended_by_sigterm():
            yield ray
    finally:
        if begun:
            ray.shutdown()


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what is done here as Ctrl-C does; Ray's handler aborts with a trace of its native code."""
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard error, where Ray's native code says that it was told to be silent."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def reason(error: BaseException) -> str:
    """The last line of what a worker raised, without Ray's own words around it."""
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, BaseException):
        return reason(cause)
    lines = [line for line in system_reason(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
