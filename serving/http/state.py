"""What a server is doing right now, for whoever has to find out why it is slow or stuck."""

from __future__ import annotations

import dataclasses
import resource
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import Server


def state_of(server: Server) -> dict[str, Any]:
    """The scheduler's statistics, open requests, memory in bytes and where every thread is, as plain values."""
    now = time.perf_counter()
    return {
        "model": server.name,
        "draining": server.draining.is_set(),
        "scheduler": dataclasses.asdict(server.scheduler.statistics),
        "infill": dataclasses.asdict(server.infill_queue.stats),
        "requests": [
            {
                "request_id": record.id,
                "path": record.path,
                "ms": round((now - record.began) * 1e3, 3),
                "answers": [
                    {
                        "state": one.state,
                        "tokens": sum(tokens for _, tokens in one.blocks),
                    }
                    for one in record.answers.values()
                ],
            }
            for record in list(server.app.open)
        ],
        "most_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": _threads(),
    }


def _threads() -> dict[str, list[str]]:
    """The innermost calls of every thread, the last one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): [
            f"{call.filename}:{call.lineno} {call.name}" for call in reversed(traceback.extract_stack(frame)[-8:])
        ]
        for ident, frame in sys._current_frames().items()
    }
