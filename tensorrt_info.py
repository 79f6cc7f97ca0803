"""What an engine's manifest says of TensorRT: the profiles, layers and compiled kernels of its engines."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Any, Literal

from .engine_folder import ENGINE_FILE, VISION_ENGINE_FILE, VISION_WEIGHTS_FILE, WEIGHTS_FILE

KERNELS_FOLDER = "kernels"  # compiled plugin kernels, one folder in the engine folder


@dataclasses.dataclass(frozen=True)
class Profile:
    """One optimization profile of a TensorRT engine: a pass fits if its B, S and R are at most these."""

    name: str  # block or prefill
    max_batch_size: int  # B
    max_tokens: int  # S
    max_rows: int  # R


def logits_bytes(profiles: Sequence[Profile], vocab_size: int) -> int:
    """GPU memory for the logits of the largest pass, in f32."""
    return 4 * vocab_size * max(profile.max_batch_size * profile.max_rows for profile in profiles)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel of an engine: a stage of an op (`plugins/op.py`) for one compute capability.

    `arguments` are its parameters in order, as `TYPE NAME`; two null pointers follow, for scratch that Triton kernels
    may ask for and these do not. `registers` and `spill_bytes` (stored to memory for want of registers) are per thread,
    `shared_bytes` per block.
    """

    stage: str
    sm: int
    entry: str
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    arguments: tuple[str, ...]
    constants: dict[str, int | float] = dataclasses.field(default_factory=dict)  # compiled in; none before schema 9

    def file(self, suffix: Literal["ptx", "cubin"]) -> str:
        """Its file, relative to the engine folder."""
        return f"{KERNELS_FOLDER}/{self.stage}.sm{self.sm}.{suffix}"


@dataclasses.dataclass(frozen=True)
class VisionEngine:
    """The second engine of a model that sees images: `patches` are the most that each of its profiles takes."""

    patches: tuple[int, ...]  # least first
    layers: dict[str, dict[str, int]]
    engine_bytes: int


@dataclasses.dataclass(frozen=True)
class TensorRTInfo:
    """What a TensorRT engine is and what must be here to run it.

    `profiles` are in the engine's order. `layers` counts the layers after parsing, by `native` or `plugin` and the op's
    name.
    """

    module: str  # Python module that built it: tensorrt_rtx or tensorrt
    version: str  # of that module
    sms: tuple[int, ...]  # compute capabilities: 89 is 8.9
    profiles: tuple[Profile, ...]
    implementation: Literal["native", "plugin"]
    layers: dict[str, dict[str, int]]
    flags: tuple[str, ...]
    engine_bytes: int
    kernels: tuple[Kernel, ...] = ()
    vision: VisionEngine | None = None

    @property
    def files(self) -> list[str]:
        """What of the engine folder it takes to run: engines, kernels, and weights that are not in the engines."""
        engines = [ENGINE_FILE, *([VISION_ENGINE_FILE] if self.vision else [])]
        return [*engines, *self.stripped, *(kernel.file("cubin") for kernel in self.kernels)]

    @property
    def stripped(self) -> list[str]:
        """Files of the weights that are put into engines built without them."""
        if "--strip-weights" not in self.flags:
            return []
        return [WEIGHTS_FILE, *([VISION_WEIGHTS_FILE] if self.vision else [])]


def parse_tensorrt(values: Any) -> TensorRTInfo | None:
    """The manifest's object as dataclasses. Raises KeyError, TypeError, ValueError."""
    if values is None:
        return None
    vision = values.get("vision")
    info: TensorRTInfo = _typed(
        TensorRTInfo,
        {
            **values,
            "sms": tuple(map(int, values["sms"])),
            "profiles": tuple(_typed(Profile, profile) for profile in values["profiles"]),
            "flags": tuple(values["flags"]),
            "kernels": tuple(parse_kernel(kernel) for kernel in values.get("kernels", ())),
            "vision": vision and _typed(VisionEngine, {**vision, "patches": tuple(map(int, vision["patches"]))}),
        },
    )
    if not info.profiles or (info.vision and not info.vision.patches):
        raise ValueError("there are no profiles")
    return info


def parse_kernel(values: dict[str, Any]) -> Kernel:
    """A kernel's record out of JSON. Raises KeyError, TypeError, ValueError."""
    kernel: Kernel = _typed(Kernel, {**values, "arguments": tuple(values["arguments"])})
    return kernel


def _typed(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass of some values. Raises TypeError, ValueError for one of another type or below 0."""
    one = kind(**values)
    for name, hint in _hints(kind).items():
        _check(name, getattr(one, name), hint)
    return one


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields; an engine has hundreds of kernels of one."""
    return typing.get_type_hints(kind)


def _check(name: str, value: Any, kind: Any) -> None:
    """Refuse a value that is not of a type that a field may have."""
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise TypeError(f"{name} is {value!r:.100}")
        for one in value.values():
            _check(name, one, kinds[1])
    elif typing.get_origin(kind) is tuple:
        for one in value:
            _check(name, one, kinds[0])
    elif kind in (int, str) and type(value) is not kind:
        raise TypeError(f"{name} is {value!r:.100}")
    elif kind is int and value < 0:
        raise ValueError(f"{name} is {value}")
