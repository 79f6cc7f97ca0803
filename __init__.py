"""nemodiff: one engine for tri-mode language models, every decoding mode chosen per request.

import nemodiff
engine = nemodiff.load("engines/tiny-chat-2")
nemodiff.generate(engine, "Count from 3 to 9.", mode="linear_spec").text
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .contract import MODES
    from .errors import (
        BuildError,
        BusyError,
        CheckpointError,
        ContextLengthError,
        EngineError,
        NemodiffError,
        RequestError,
    )
    from .runtime.editing.infill import Filled, fill, infill
    from .runtime.editing.revise import Revised, revise
    from .runtime.events.events import BlockStarted, Committed, Event, Finished, Pieces, Started, Step, Text
    from .runtime.generate import events, generate, generate_many, stream
    from .runtime.loading import LoadedEngine, load
    from .runtime.requests.generation import Acceptance, Generation
    from .runtime.requests.generation_config import sampling_defaults
    from .runtime.requests.options import Options
    from .runtime.requests.token_logprobs import TokenLogprobs
    from .runtime.scheduler.handle import Handle
    from .runtime.scheduler.scheduler import Scheduler
    from .runtime.scheduler.statistics import Statistics
    from .runtime.score import Score, score, score_many
    from .runtime.tools.answer import ToolCall
    from .version import __version__

# ONNX Runtime looks at this when it is imported, which nothing above does. With its telemetry on it keeps a device id
# and a database in the user's cache folder and sends events to its vendor; =0 leaves it on.
if not os.environ.get("ORT_DISABLE_TELEMETRY"):
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Modules that are imported when one of their names is first used: a command waits for no more than it needs, and is in
# `__main__`, which knows what to do about Ctrl-C, before anything else.
_LAZY = {
    "contract": ("MODES",),
    "errors": (
        "BuildError",
        "BusyError",
        "CheckpointError",
        "ContextLengthError",
        "EngineError",
        "NemodiffError",
        "RequestError",
    ),
    "runtime.editing.infill": ("Filled", "fill", "infill"),
    "runtime.editing.revise": ("Revised", "revise"),
    "runtime.events.events": ("BlockStarted", "Committed", "Event", "Finished", "Pieces", "Started", "Step", "Text"),
    "runtime.generate": ("events", "generate", "generate_many", "stream"),
    "runtime.loading": ("LoadedEngine", "load"),
    "runtime.requests.generation": ("Acceptance", "Generation"),
    "runtime.requests.generation_config": ("sampling_defaults",),
    "runtime.requests.options": ("Options",),
    "runtime.requests.token_logprobs": ("TokenLogprobs",),
    "runtime.scheduler.handle": ("Handle",),
    "runtime.scheduler.scheduler": ("Scheduler",),
    "runtime.scheduler.statistics": ("Statistics",),
    "runtime.score": ("Score", "score", "score_many"),
    "runtime.tools.answer": ("ToolCall",),
    "version": ("__version__",),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "MODES",
    "Acceptance",
    "BlockStarted",
    "BuildError",
    "BusyError",
    "CheckpointError",
    "Committed",
    "ContextLengthError",
    "EngineError",
    "Event",
    "Filled",
    "Finished",
    "Generation",
    "Handle",
    "LoadedEngine",
    "NemodiffError",
    "Options",
    "Pieces",
    "RequestError",
    "Revised",
    "Scheduler",
    "Score",
    "Started",
    "Statistics",
    "Step",
    "Text",
    "TokenLogprobs",
    "ToolCall",
    "__version__",
    "events",
    "fill",
    "generate",
    "generate_many",
    "infill",
    "load",
    "revise",
    "sampling_defaults",
    "score",
    "score_many",
    "stream",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    value: object = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
