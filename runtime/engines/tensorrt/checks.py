"""Checks whether a TensorRT engine can run here before anything is allocated, and loads it.

TensorRT itself answers a wrong version or a foreign GPU with None. The errors here say what the engine was built for,
what is here, and the command that fixes it.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import NamedTuple

from ....contract import Binding, cache_names, inputs, outputs, size_text, vision_inputs, vision_outputs
from ....engine_folder import ENGINE_FILE, MODEL_FILE, VISION_ENGINE_FILE, VISION_MODEL_FILE, build_again
from ....engine_info import EngineInfo
from ....errors import EngineError
from ....plugins import OPS
from ....plugins.tensorrt.api import TensorRT
from ....plugins.tensorrt.launch import Kernels
from ....plugins.tensorrt.protocols import Engine
from ....plugins.tensorrt.register import register
from ....tensorrt_info import KERNELS_FOLDER, TensorRTInfo
from .device import Device

MODEL_INPUT = cache_names(1)[0]  # its third axis is the capacity
_PACKAGES = {"tensorrt-rtx": "tensorrt-rtx-cu13", "tensorrt": "tensorrt-cu13"}


def check_here(folder: Path, info: EngineInfo, api: TensorRT, device: Device) -> None:
    """Check version, compute capability and kernel files. Raises EngineError."""
    about = info.manifest.tensorrt
    backend = info.manifest.backend
    assert about is not None
    again = f"{build_again(folder)} --backend"
    if api.version != about.version and not _compatible(about, api.version):
        raise EngineError(
            f"{folder}: built with {about.module} {about.version}, here is {api.version}; install that version: "
            f"pip install {_PACKAGES[backend]}=={about.version}, or {again} {backend}"
        )
    if device.sm not in about.sms:
        target = f"tensorrt-rtx --sm {device.sm}" if device.sm in api.sms() else "tensorrt"
        raise EngineError(
            f"{folder}: built for SM {', '.join(map(str, about.sms))}, device {device.number} ({device.name}) is SM "
            f"{device.sm}; {again} {target}"
        )
    flag = " --plugins" if about.implementation == "plugin" else ""
    for name, entry in info.manifest.files.items():
        if name.startswith(f"{KERNELS_FOLDER}/"):
            with (folder / name).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            wanted = str(entry.get("sha256"))
            if digest != wanted:
                raise EngineError(
                    f"{folder / name}: not the kernel that the engine was built with (sha256 {digest[:12]}, the "
                    f"manifest says {wanted[:12]}); copy it whole or {again} {backend}{flag}"
                )


def _compatible(about: TensorRTInfo, here: str) -> bool:
    """Whether a version-compatible engine runs on this later version of the same major number."""
    if "--version-compatible" not in about.flags:
        return False
    built_major, built_minor = (int(part) for part in about.version.split(".")[:2])
    major, minor = (int(part) for part in here.split(".")[:2])
    return major == built_major and minor >= built_minor


def check_memory(folder: Path, device: Device, parts: dict[str, int]) -> None:
    """Check that the device's free memory holds all parts, bytes by name. Raises EngineError."""
    free, total = device.memory()
    if sum(parts.values()) > free:
        listed = ", ".join(f"{size_text(nbytes)} for {name}" for name, nbytes in parts.items() if nbytes)
        raise EngineError(
            f"{folder}: needs {size_text(sum(parts.values()))} of GPU memory ({listed}), device {device.number} has "
            f"{size_text(free)} free of {size_text(total)}; end what else uses it, ask for fewer rows, or build again "
            "with a smaller --max-seq-len, --max-batch-size or --no-logits"
        )


def deserialize(folder: Path, info: EngineInfo, api: TensorRT, device: Device) -> Engine:
    """Load the engine and check that it is the one described. Raises EngineError."""
    about = info.manifest.tensorrt
    assert about is not None
    if about.implementation == "plugin" and info.manifest.backend == "tensorrt-rtx":
        # Full TensorRT carries the kernels in the engine.
        kernels = Kernels(folder, about.kernels, device.sm, device.driver)
        if not all(kernels.fit(op, info.model, info.build.dtype) for op in OPS):
            raise EngineError(
                f"{folder}: its plugin kernels for SM {device.sm} are not those that this nemodiff launches; "
                f"{build_again(folder)} --backend tensorrt-rtx --plugins"
            )
        register(api, kernels)
    bindings = [
        *inputs(info.model, info.has_adapter),
        *outputs(info.model, info.build.gather_generation_logits),
    ]
    return _deserialize(folder, info, api, device, _Part(ENGINE_FILE, MODEL_FILE, bindings, len(about.profiles)))


def deserialize_vision(folder: Path, info: EngineInfo, api: TensorRT, device: Device) -> Engine:
    """Load the tower of a model that sees images, likewise. Raises EngineError."""
    about, vision = info.manifest.tensorrt, info.model.vision
    assert about is not None
    assert about.vision is not None
    assert vision is not None
    bindings = [*vision_inputs(vision), *vision_outputs(info.model)]
    part = _Part(VISION_ENGINE_FILE, VISION_MODEL_FILE, bindings, len(about.vision.patches))
    return _deserialize(folder, info, api, device, part)


class _Part(NamedTuple):
    """One engine of a folder."""

    file: str
    model: str  # the graph that it was compiled from
    bindings: list[Binding]
    profiles: int


def _deserialize(folder: Path, info: EngineInfo, api: TensorRT, device: Device, part: _Part) -> Engine:
    about = info.manifest.tensorrt
    assert about is not None
    path = folder / part.file
    again = f"{build_again(folder)} --backend {info.manifest.backend}"
    device.use()
    runtime = api.runtime()
    runtime.engine_host_code_allowed = "--version-compatible" in about.flags
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"{path}: {about.module} {api.version} cannot load it ({api.errors()[:300]}); {again}")
    expected = {binding.name for binding in part.bindings}
    bindings = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    if expected != bindings or engine.num_optimization_profiles != part.profiles:
        raise EngineError(
            f"{path}: its bindings or profiles are not those of the engine's description "
            f"({', '.join(sorted(expected ^ bindings)[:3]) or 'profiles'}); {again}"
        )
    if about.stripped:
        _refit(folder / part.model, api, engine)
    return engine


def _refit(model: Path, api: TensorRT, engine: Engine) -> None:
    """Put the weights into an engine that was built without them."""
    refitter = api.module.Refitter(engine, api.logger)
    parser = api.module.OnnxParserRefitter(refitter, api.logger)
    if not parser.refit_from_file(str(model)) or not refitter.refit_cuda_engine():
        raise EngineError(
            f"{model}: its weights cannot be put into the engine ({api.errors()[:300]}); build it "
            "again without --strip-weights"
        )
