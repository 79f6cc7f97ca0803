"""Compiles the graphs of a folder: the decoder, and the tower of a model that sees images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ...config import ModelConfig
from ...contract import Backend
from ...engine_folder import ENGINE_FILE, MODEL_FILE, VISION_ENGINE_FILE, VISION_MODEL_FILE
from ...tensorrt_info import Kernel, Profile, TensorRTInfo, VisionEngine
from .choices import Choices
from .profiles import corners, image_corners
from .tensorrt import Job, compile_engine


def compile_graphs(
    stage: Path,
    backend: Backend,
    choices: Choices,
    model: ModelConfig,
    *,
    sms: tuple[int, ...],
    profiles: tuple[Profile, ...],
    patches: tuple[int, ...],
    kernels: Callable[[], tuple[Kernel, ...]],
) -> tuple[TensorRTInfo, dict[str, str]]:
    """Compile a stage's graphs beside them; what the manifest says, and each engine file's sha256. Raises BuildError.

    `patches` are of the tower's profiles, none for a model that sees no images.
    """
    decoder = compile_engine(
        Job(
            backend,
            choices,
            stage / MODEL_FILE,
            stage / ENGINE_FILE,
            sms,
            tuple(map(corners, profiles)),
            attentions=model.num_layers,
            caches=2 * model.num_layers,
            kernels=kernels() if choices.plugins else (),
        )
    )
    digests = {ENGINE_FILE: decoder.sha256}
    seeing = None
    if model.vision is not None:
        vision = model.vision
        tower = compile_engine(
            Job(
                backend,
                dataclasses.replace(choices, plugins=False),  # the kernels have the decoder's heads as constants
                stage / VISION_MODEL_FILE,
                stage / VISION_ENGINE_FILE,
                sms,
                tuple(image_corners(vision, most) for most in patches),
                attentions=vision.num_layers,
                caches=0,
                kernels=(),
            )
        )
        digests[VISION_ENGINE_FILE] = tower.sha256
        seeing = VisionEngine(patches, tower.layers, tower.bytes)
    info = TensorRTInfo(
        module=decoder.module,
        version=decoder.version,
        sms=sms,
        profiles=profiles,
        implementation="plugin" if choices.plugins else "native",
        layers=decoder.layers,
        flags=tuple(flag for flag in choices.flags() if flag not in ("--sm", "--plugins")),
        engine_bytes=decoder.bytes,
        kernels=kernels(),
        vision=seeing,
    )
    return info, digests
