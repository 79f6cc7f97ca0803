"""The vision tower on a GPU: an engine of its own, which sees one image at a time and needs no cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ....contract import vision_inputs, vision_outputs
from ....engine_folder import VISION_ENGINE_FILE
from ....engine_info import EngineInfo
from ....errors import EngineError
from ....plugins.tensorrt.api import TensorRT
from ....plugins.tensorrt.protocols import Context, Engine
from ....tensorrt_info import VisionEngine
from ...images.image import Image
from ..layout import Layout, layout
from .contexts import make_context
from .device import Device, Memory


class Owner(Protocol):
    """What the tower uses of the engine that it belongs to."""

    info: EngineInfo
    folder: Path
    device: Device
    api: TensorRT


def io_bytes(info: EngineInfo, about: VisionEngine) -> int:
    """Bytes on the device, and as many on the host, of the largest image and its embeddings."""
    return sum(one.nbytes for one in _layouts(info, about.patches[-1]))


def _layouts(info: EngineInfo, patches: int) -> tuple[Layout, Layout]:
    vision = info.model.vision
    assert vision is not None
    return (
        layout(vision_inputs(vision), {"N": patches}),
        layout(vision_outputs(info.model), {"M": patches // vision.merge**2}),
    )


class TensorRTVision:
    """Tower and projector; a context for each profile, since an image's size hardly ever comes twice.

    Args:
        owner: the engine it belongs to, whose lock the caller holds.
        engine: the tower, loaded.
        about: what the manifest says of it.
        config: of TensorRT-RTX's contexts.
        scratch: memory for a run, which the decoder's passes use too.
    """

    def __init__(self, owner: Owner, engine: Engine, about: VisionEngine, config: Any, scratch: Memory) -> None:
        self._owner = owner
        self._engine = engine
        self._about = about
        self._config = config
        self._scratch = scratch
        inputs, outputs = _layouts(owner.info, about.patches[-1])
        device = owner.device
        self._host = device.pinned(inputs.nbytes), device.pinned(outputs.nbytes)
        self._device = device.allocate(inputs.nbytes), device.allocate(outputs.nbytes)
        self._contexts: dict[int, Context] = {}

    def see(self, image: Image) -> np.ndarray:
        """The embeddings of an image's tokens, (rows * columns, E) f32."""
        owner, device = self._owner, self._owner.device
        count = len(image.patches)
        number = next((n for n, most in enumerate(self._about.patches) if count <= most), None)
        if number is None:
            raise EngineError(
                f"{owner.folder / VISION_ENGINE_FILE}: an image of {count} patches, allowed: up to "
                f"{self._about.patches[-1]}; build it again with a larger --max-image-size"
            )
        context = self._context(number)
        inputs, outputs = _layouts(owner.info, count)
        given = inputs.views(self._host[0].array)
        given["patches"][:] = image.patches
        given["positions"][:] = image.positions
        given["visible"][:] = (0, 0, count)
        taken = True
        for part, memory in zip((inputs, outputs), self._device, strict=True):
            for name, (at, _, shape) in part.places.items():
                taken &= part is outputs or context.set_input_shape(name, shape)
                taken &= context.set_tensor_address(name, memory.address + at)
        device.upload(self._device[0].address, self._host[0].address, inputs.nbytes)
        if not taken or not context.execute_async_v3(device.stream):
            raise EngineError(
                f"{owner.folder / VISION_ENGINE_FILE}: an image of {count} patches failed ({owner.api.errors()}); load "
                "the engine again, and report it if that does not help"
            )
        device.download(self._host[1].address, self._device[1].address, outputs.nbytes)
        device.wait()
        return np.array(outputs.views(self._host[1].array)["features"])

    def _context(self, number: int) -> Context:
        """A profile's context."""
        if number not in self._contexts:
            owner = self._owner
            self._contexts[number] = make_context(
                owner.folder, owner.api, owner.device, self._engine, self._config, number, self._scratch
            )
        return self._contexts[number]
