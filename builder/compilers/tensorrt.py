"""Starts the process that compiles a TensorRT engine, and reads what it answers.

TensorRT ends its process on some errors, so it never runs in the one that owns the stage; the child,
`builder/compilers/compile.py`, ends itself when its parent is gone.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import tempfile
from pathlib import Path
from typing import Any

from ...contract import Backend
from ...errors import BuildError
from ...plugins.tensorrt.api import library_folder
from ...tensorrt_info import Kernel
from .child import RESULT_FILE, child, printed
from .choices import Choices
from .profiles import Corners

CREATORS = "nemodiff.plugins.tensorrt.register:register"  # called with the facade and kernels before plugins are parsed


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything the child needs to know."""

    backend: Backend
    model: str  # path of the ONNX file, its weights beside it
    engine: str  # path to write
    sms: tuple[int, ...]
    profiles: tuple[Corners, ...]
    attentions: int
    caches: int  # that are updated in place
    creators: str
    kernels: tuple[Kernel, ...]
    plugins: bool
    timing_cache: str | None
    workspace: int | None
    opt_level: int | None
    strip_weights: bool
    refit: bool
    version_compatible: bool


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the child says of an engine file."""

    module: str
    version: str
    layers: dict[str, dict[str, int]]
    bytes: int
    sha256: str


def compile_engine(
    backend: Backend,
    choices: Choices,
    *,
    sms: tuple[int, ...],
    profiles: tuple[Corners, ...],
    attentions: int,
    caches: int,
    kernels: tuple[Kernel, ...],
    model: Path,
    engine: Path,
) -> Compiled:
    """Compile `model` into `engine` in a child process; the files of `kernels` lie beside it. Raises BuildError."""
    job = Job(
        backend=backend,
        model=str(model),
        engine=str(engine),
        sms=sms,
        profiles=profiles,
        attentions=attentions,
        caches=caches,
        creators=CREATORS,
        kernels=kernels,
        plugins=choices.plugins,
        timing_cache=str(choices.timing_cache.absolute()) if choices.timing_cache else None,
        workspace=choices.workspace,
        opt_level=choices.opt_level,
        strip_weights=choices.strip_weights,
        refit=choices.refit,
        version_compatible=choices.version_compatible,
    )
    with tempfile.TemporaryDirectory(prefix="nemodiff-compile-") as name:
        return Compiled(**_run(job, Path(name)))


def _run(job: Job, work: Path) -> dict[str, Any]:
    """Run the child with a job and return its result. `work` is an empty folder."""
    libraries = library_folder(work) if job.plugins else {}
    with child("nemodiff.builder.compilers.compile", work, dataclasses.asdict(job), **libraries) as process:
        code = process.wait()
    if code:
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"{code}"
        text = " ".join(printed(work).split())[-300:]
        last = f", having said {text!r}" if text else ""
        raise BuildError(
            f"--backend {job.backend}: the compiling process ended with {ended}{last}; close other programs if memory "
            "was short, else build with --backend alone"
        )
    result: dict[str, Any] = json.loads((work / RESULT_FILE).read_text(encoding="utf-8"))
    if "error" in result:
        raise BuildError(result["error"])
    return result
