"""What a TensorRT build may choose; everything is checked before a weight is written."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ...contract import COMPILED, Backend
from ...errors import BuildError
from ...plugins.tensorrt.api import RTX_SMS, device_sm, load

DEFAULT_SMS = (80, 86, 89, 120)


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

    def flags(self) -> list[str]:
        """The flags that differ from their defaults, as on the command line."""
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return [f"--{name.replace('_', '-')}" for name in changed]

    @property
    def keeps_weights(self) -> bool:
        """Whether the weights file stays in the folder: an engine that is refitted needs it."""
        return self.strip_weights or self.refit


def check_choices(backend: Backend, choices: Choices) -> None:
    """Refuse what the backend cannot do. Raises BuildError."""
    if backend not in COMPILED:
        if flags := choices.flags():
            raise BuildError(
                f"{flags[0]}: not a choice of --backend {backend}, allowed: tensorrt-rtx or tensorrt; leave it out "
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
        return
    if choices.sm is not None:
        raise BuildError(
            "--sm: TensorRT builds for the GPU it runs on, allowed: with --backend tensorrt-rtx; leave it out and "
            "build on such a GPU"
        )
    if choices.timing_cache is not None:
        _check_timing_cache(choices.timing_cache)


def _check_timing_cache(path: Path) -> None:
    """Refuse what could not be written when all is built."""
    place = path.resolve()
    if place.is_dir() or not os.access(place.parent, os.W_OK) or (place.exists() and not os.access(place, os.R_OK)):
        raise BuildError(
            f"--timing-cache is {path}, allowed: a file, there or not, in a folder that can be written; name another"
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


def require(backend: Backend) -> None:
    """Refuse early when the backend's package is missing. Raises BuildError."""
    load(backend, BuildError)
