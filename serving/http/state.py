"""What a server is doing right now, for whoever has to find out why it is slow or stuck."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from ... import main_memory
from .request_log import written_time

if TYPE_CHECKING:
    from .app import Server


def write_state(state: dict[str, Any]) -> None:
    """Write a state as one line of JSON to standard error."""
    sys.stderr.write(json.dumps({"time": written_time(time.time()), "state": state}) + "\n")
    sys.stderr.flush()


def loading_state() -> dict[str, Any]:
    """What there is to tell while the engine is loaded."""
    return {"loading": True, "threads": _threads()}


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
        "most_memory_bytes": main_memory.peak(),
        "threads": _threads(),
    }


def _threads() -> dict[str, list[str]]:
    """The calls of every thread, the last one first.

    A thread that runs on unlinks the frames it leaves. So this one first lets the others run, which gives it a whole
    interval of its own, and walks all frames in it before it formats any.
    """
    time.sleep(0)
    stacks = {ident: _calls(frame) for ident, frame in sys._current_frames().items()}
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): [f"{code.co_filename}:{line} {code.co_name}" for code, line in calls]
        for ident, calls in stacks.items()
    }


def _calls(frame: FrameType | None) -> list[tuple[CodeType, int]]:
    calls = []
    while frame is not None:
        calls.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return calls
