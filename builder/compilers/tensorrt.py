"""Starts the process that compiles a TensorRT engine, and reads what it answers.

TensorRT ends its process on some errors, so it never runs in the one that owns the stage; the child,
`builder/compilers/compile.py`, ends itself when its parent is gone.
"""

from __future__ import annotations

import dataclasses
import signal
import tempfile
from pathlib import Path

from ...contract import Backend
from ...errors import BuildError
from ...plugins.tensorrt.api import library_folder
from ...tensorrt_info import Kernel
from .child import child, printed, read_result
from .choices import Choices
from .profiles import Corners

CREATORS = "nemodiff.plugins.tensorrt.register:register"  # called with the facade and kernels before plugins are parsed


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything the child needs to know; the files of `kernels` lie beside `engine`."""

    backend: Backend
    choices: Choices
    model: Path  # the ONNX file, its weights beside it
    engine: Path  # to write
    sms: tuple[int, ...]
    profiles: tuple[Corners, ...]
    attentions: int
    caches: int  # that are updated in place
    kernels: tuple[Kernel, ...]
    creators: str = dataclasses.field(default_factory=lambda: CREATORS)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the child says of an engine file."""

    module: str
    version: str
    layers: dict[str, dict[str, int]]
    bytes: int
    sha256: str


def compile_engine(job: Job) -> Compiled:
    """Do a job in a child process. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="nemodiff-compile-") as name:
        work = Path(name)
        libraries = library_folder(work) if job.choices.plugins else {}
        with child("nemodiff.builder.compilers.compile", work, job, **libraries) as process:
            code = process.wait()
        if code:
            ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"{code}"
            text = " ".join(printed(work).split())[-300:]
            last = f", having said {text!r}" if text else ""
            raise BuildError(
                f"--backend {job.backend}: the compiling process ended with {ended}{last}; close other programs if "
                "memory was short, else build with --backend alone"
            )
        result: Compiled | BuildError = read_result(work)
    if isinstance(result, BuildError):
        raise result
    return result
