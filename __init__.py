"""nemodiff: one engine for tri-mode language models, every decoding mode chosen per request.

import nemodiff
engine = nemodiff.load("engines/tiny-chat")
nemodiff.generate(engine, "Count from 3 to 9.", mode="linear_spec").text
"""

import os

from .contract import MODES
from .errors import BuildError, BusyError, CheckpointError, EngineError, NemodiffError, RequestError
from .runtime.editing.infill import Filled, fill, infill
from .runtime.editing.revise import Revised, revise
from .runtime.events.events import BlockStarted, Committed, Event, Finished, Pieces, Started, Step, Text
from .runtime.generate import events, generate, generate_many, stream
from .runtime.handle import Handle
from .runtime.loading import LoadedEngine, load
from .runtime.requests.generation import Acceptance, Generation
from .runtime.requests.options import Options
from .runtime.scheduler import Scheduler, Statistics

# ONNX Runtime looks at this when it is imported, which nothing above does. With its telemetry on it keeps a device id
# and a database in the user's cache folder and sends events to its vendor; =0 leaves it on.
if not os.environ.get("ORT_DISABLE_TELEMETRY"):
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__all__ = [
    "MODES",
    "Acceptance",
    "BlockStarted",
    "BuildError",
    "BusyError",
    "CheckpointError",
    "Committed",
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
    "Started",
    "Statistics",
    "Step",
    "Text",
    "events",
    "fill",
    "generate",
    "generate_many",
    "infill",
    "load",
    "revise",
    "stream",
]
