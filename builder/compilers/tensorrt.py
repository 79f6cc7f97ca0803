"""What a TensorRT build may choose, and the child process that compiles.

In: the model, the build's choices, and a stage that holds the graph and its weights. Out: `rank0.engine` in the stage
and the facts for the manifest. Everything is checked here before a weight is written; `builder/compilers/compile.py`
is the child. The surprising fact: TensorRT ends the process on some errors, so it never runs in the one that owns the
stage, and the child ends itself when that one is gone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...config import ModelConfig
from ...contract import COMPILED, MAX_BLOCK, Backend
from ...engine_folder import BuildConfig, Kernel, Profile, TensorRTInfo, cache_slots
from ...errors import BuildError
from ...plugins.tensorrt.api import device_sm, library_folder, load

RTX_SMS = (80, 86, 89, 120, 121)  # that TensorRT-RTX 1.7 compiles bf16 for; it knows no 90 and no 100
DEFAULT_SMS = (80, 86, 89, 120)
# Elements. TensorRT names this limit; TensorRT-RTX 1.7 builds past it without a word (2026-11-24), and nothing has run.
LARGEST_TENSOR = 2**31 - 1
PREFILL_LOGITS = 2**30  # bytes of f32; a prefill pass has as many rows as keep its logits below
MEMORY = (1.6, 2**29)  # factor on the weights' bytes and bytes on top; benchmarks/build_tensorrt.py
CREATORS = "nemodiff.plugins.tensorrt.register:register"  # called with the facade and kernels before plugins are parsed


@dataclasses.dataclass(frozen=True)
class Choices:
    """Flags of `nemodiff build` that only a TensorRT backend has; the defaults are those of the flags left out."""

    sm: tuple[int, ...] | None = None
    plugins: bool = False
    timing_cache: Path | None = None
    workspace: int | None = None  # MiB
    opt_level: int | None = None
    strip_weights: bool = False
    refit: bool = False
    version_compatible: bool = False

    def given(self) -> list[str]:
        """The flags that were given, as on the command line."""
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return [f"--{name.replace('_', '-')}" for name in changed]

    @property
    def keeps_weights(self) -> bool:
        """Whether the weights file stays in the folder: an engine that is refitted needs it."""
        return self.strip_weights or self.refit


def check(backend: Backend, choices: Choices) -> None:
    """Refuse what the backend cannot do. Raises BuildError."""
    given = choices.given()
    if backend not in COMPILED:
        if given:
            raise BuildError(
                f"{given[0]}: not a choice of --backend {backend}, allowed: tensorrt-rtx or tensorrt; leave it out "
                "or add --backend tensorrt-rtx"
            )
        return
    if choices.opt_level is not None and not 0 <= choices.opt_level <= 5:
        raise BuildError(f"--opt-level is {choices.opt_level}, allowed: 0 to 5; choose a level in that range")
    if choices.workspace is not None and choices.workspace < 1:
        raise BuildError(f"--workspace is {choices.workspace}, allowed: 1 MiB or more; leave it out for no limit")
    if choices.strip_weights and choices.refit:
        raise BuildError("--strip-weights: implies --refit, allowed: one of them; leave out --refit")
    if backend == "tensorrt-rtx":
        _check_rtx(choices)
    elif choices.sm is not None:
        raise BuildError(
            "--sm: TensorRT builds for the GPU it runs on, allowed: with --backend tensorrt-rtx; leave it out and "
            "build on such a GPU"
        )


def _check_rtx(choices: Choices) -> None:
    known = ", ".join(map(str, RTX_SMS))
    for sm in choices.sm or ():
        if sm not in RTX_SMS:
            raise BuildError(
                f"--sm is {sm}, allowed on tensorrt-rtx: {known}; choose among them, or build with --backend tensorrt "
                "on the GPU itself"
            )
    if choices.timing_cache is not None:
        raise BuildError(
            "--timing-cache: TensorRT-RTX times nothing while it builds, allowed: with --backend tensorrt; leave it out"
        )
    if choices.version_compatible:
        raise BuildError(
            "--version-compatible: needs a lean runtime that TensorRT-RTX does not ship, allowed: with --backend "
            "tensorrt; leave it out and build again after an update"
        )
    if choices.keeps_weights and device_sm() is None:
        flag = "--strip-weights" if choices.strip_weights else "--refit"
        raise BuildError(
            f"{flag}: TensorRT-RTX does it only with an NVIDIA driver, and none is here; build on a machine with a GPU "
            "or leave it out"
        )


def targets(backend: Backend, choices: Choices) -> tuple[int, ...]:
    """Compute capabilities to build for. Raises BuildError."""
    if backend == "tensorrt-rtx":
        return tuple(sorted(set(choices.sm))) if choices.sm else DEFAULT_SMS
    sm = device_sm()
    if sm is None:
        raise BuildError(
            "--backend tensorrt: needs a GPU and its driver to build, and none is here; build on that machine, or "
            "with --backend tensorrt-rtx, which needs none"
        )
    return (sm,)


def profiles(model: ModelConfig, build: BuildConfig) -> tuple[Profile, ...]:
    """The optimization profiles. Raises BuildError.

    `block` is for decoding, `prefill` for longer passes: chunks of a prompt, and quadratic self-speculation, which
    wants a prediction of every token. With `max_input_len` no longer than a block there is only the first.
    """
    length, slots = min(max(MAX_BLOCK, build.block_length), build.max_seq_len), cache_slots(build)
    rows = build.max_batch_size
    widest = {
        "the K/V cache": model.num_kv_heads * slots * model.head_dim,
        "the attention mask": length * slots,
        "the logits": length * model.vocab_size,
    }
    name, most = max(widest.items(), key=lambda pair: pair[1])
    if rows * most > LARGEST_TENSOR:
        raise BuildError(
            f"--max-batch-size is {rows}: {name} of that many rows of {build.max_seq_len} tokens would be a tensor of "
            f"{rows * most:,} elements, allowed: {LARGEST_TENSOR:,}; use --max-batch-size {LARGEST_TENSOR // most} or "
            "a smaller --max-seq-len"
        )
    block = Profile("block", rows, length, length)
    chunk = build.max_input_len
    if chunk <= length:
        return (block,)
    per_row = max(4 * chunk * model.vocab_size / PREFILL_LOGITS, chunk * slots / LARGEST_TENSOR)
    if per_row > 1:
        raise BuildError(
            f"--max-input-len is {chunk}: the logits of one such pass would take {4 * chunk * model.vocab_size:,} "
            f"bytes, allowed: {PREFILL_LOGITS:,}; use --max-input-len {int(chunk / per_row)} or less"
        )
    return (block, Profile("prefill", min(rows, int(1 / per_row)), chunk, chunk))


def memory_needed(weight_bytes: int) -> int:
    """Anonymous bytes that compiling takes, estimated."""
    return int(MEMORY[0] * weight_bytes) + MEMORY[1]


def memory_free() -> int | None:
    """Bytes that the system could give, page cache included; None where it does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = [line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything the child is told."""

    backend: Backend
    model: str  # path of the ONNX file, its weights beside it
    engine: str  # path to write
    sms: tuple[int, ...]
    profiles: tuple[Profile, ...]
    layers: int  # decoder layers: that many attentions, and twice as many cache updates
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
    """What the manifest says about the engine, and the engine file's sha256."""

    info: TensorRTInfo
    sha256: str


def compile_engine(
    backend: Backend,
    choices: Choices,
    sms: tuple[int, ...],
    found: tuple[Profile, ...],
    layers: int,
    kernels: tuple[Kernel, ...],
    model: Path,
    engine: Path,
) -> Compiled:
    """Compile `model` into `engine` in a child process; the files of `kernels` lie beside it. Raises BuildError."""
    job = Job(
        backend,
        str(model),
        str(engine),
        sms,
        found,
        layers,
        CREATORS,
        kernels,
        choices.plugins,
        str(choices.timing_cache.absolute()) if choices.timing_cache else None,
        choices.workspace,
        choices.opt_level,
        choices.strip_weights,
        choices.refit,
        choices.version_compatible,
    )
    with tempfile.TemporaryDirectory(prefix="nemodiff-compile-") as name:
        result = _run(job, Path(name))
    flags = [flag for flag in choices.given() if flag not in ("--sm", "--plugins")]
    info = TensorRTInfo(
        module=result["module"],
        version=result["version"],
        sms=sms,
        profiles=found,
        implementation="plugin" if choices.plugins else "native",
        layers=result["layers"],
        flags=tuple(flags),
        engine_bytes=result["bytes"],
        kernels=kernels,
    )
    return Compiled(info, result["sha256"])


def _run(job: Job, work: Path) -> dict[str, Any]:
    """Run the child with a job and return its result. `work` is an empty folder."""
    # The child imports what this process would, and nothing from the folder it happens to stand in.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    if job.plugins:
        environment |= library_folder(work)
    (work / "job.json").write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    output = work / "output"
    command = [sys.executable, "-P", "-m", "nemodiff.builder.compilers.compile", str(work)]
    with output.open("wb") as stream:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=environment)
        try:
            child.wait()
        finally:  # an interrupt of this process ends the child too
            child.kill()
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
    said = " ".join(output.read_text(encoding="utf-8", errors="replace").split())[-300:]
    if child.returncode:
        ended = f"signal {signal.Signals(-child.returncode).name}" if child.returncode < 0 else f"{child.returncode}"
        raise BuildError(
            f"--backend {job.backend}: the compiling process ended with {ended}"
            + (f", having said {said!r}" if said else "")
            + "; close other programs if memory was short, else build with --backend alone"
        )
    result: dict[str, Any] = json.loads((work / "result.json").read_text(encoding="utf-8"))
    if "error" in result:
        raise BuildError(result["error"])
    return result


def require(backend: Backend) -> None:
    """Refuse early when the backend's package is missing. Raises BuildError."""
    load(backend, BuildError)
