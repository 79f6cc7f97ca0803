"""nemodiff: one engine for tri-mode language models, every decoding mode chosen per request.

import nemodiff
engine = nemodiff.load("engines/tiny-chat")
nemodiff.generate(engine, "Count from 3 to 9.", mode="linear_spec").text
"""

from .contract import MODES
from .errors import BuildError, CheckpointError, EngineError, NemodiffError, RequestError
from .runtime.generate import (
    Acceptance,
    Generation,
    LoadedEngine,
    Step,
    Text,
    generate,
    generate_many,
    load,
    stream,
)
from .runtime.options import Options

__all__ = [
    "MODES",
    "Acceptance",
    "BuildError",
    "CheckpointError",
    "EngineError",
    "Generation",
    "LoadedEngine",
    "NemodiffError",
    "Options",
    "RequestError",
    "Step",
    "Text",
    "generate",
    "generate_many",
    "load",
    "stream",
]
