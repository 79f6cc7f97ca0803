"""A model that sees on the TensorRT engine, whose driver and TensorRT are played by stand_ins/gpu_driver.py."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from stand_ins import gpu_driver
from stand_ins.messages import asked
from stand_ins.vision import picture, write_vision_checkpoint

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.weights import write_weights
from nemodiff.builder.graph.graph import build_graph
from nemodiff.builder.graph.vision import build_vision_graph
from nemodiff.engine_info import EngineInfo, read_engine
from nemodiff.errors import EngineError
from nemodiff.plugins.tensorrt.api import RTX_SMS, device_sm
from nemodiff.runtime.engines.tensorrt.device import Device
from nemodiff.runtime.engines.tensorrt.engine import TensorRTEngine
from nemodiff.runtime.engines.tensorrt.vision import _layouts
from nemodiff.runtime.images.decode import decode
from nemodiff.runtime.images.image import make_image
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.tensorrt_info import Profile, TensorRTInfo, VisionEngine

PROFILES = (Profile("block", 4, 16, 16), Profile("prefill", 2, 32, 32))


@dataclasses.dataclass
class Setup:
    """The same weights in both engines."""

    folder: Path
    info: EngineInfo
    plain: LoadedEngine

    def load(self) -> tuple[LoadedEngine, TensorRTEngine, gpu_driver.Made, gpu_driver.Driver]:
        driver = gpu_driver.Driver()
        api, made = gpu_driver.make_api(self.folder, self.info, driver)
        backend = TensorRTEngine(self.folder, self.info, Device(0, driver), api=api)
        return dataclasses.replace(self.plain, backend=backend), backend, made, driver


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    checkpoint = write_vision_checkpoint(tmp_path_factory.mktemp("vision") / "checkpoint")
    builder = Builder(checkpoint, checkpoint.parent / "plain", max_seq_len=192, max_batch_size=4)
    folder = Path(shutil.copytree(builder.run(), checkpoint.parent / "compiled"))
    model, adapter = builder.checkpoint.model, builder.checkpoint.adapter
    info = read_engine(folder)
    rank, scale = (adapter.rank, adapter.scale) if adapter else (0, 1.0)
    decoder, tower = build_graph(model, "f32", rank, scale, capacity=256), build_vision_graph(model, "f32", fused=True)
    for graph, name in ((decoder, "model.onnx"), (tower, "vision.onnx")):
        onnx.save(graph.proto, folder / name)
        write_weights(graph, builder.tensors, folder / f"{name}.data", lambda nbytes: None)
    (folder / "rank0.engine").write_bytes(b"played by ONNX Runtime")
    (folder / "vision.engine").write_bytes(b"looked at by ONNX Runtime")
    vision = VisionEngine((16, 256), {}, 25)
    about = TensorRTInfo("tensorrt_rtx", "1.7.1.116", (89,), PROFILES, "native", {}, (), 22, vision=vision)
    manifest = dataclasses.replace(info.manifest, backend="tensorrt-rtx", tensorrt=about)
    return Setup(folder, dataclasses.replace(info, manifest=manifest), nemodiff.load(builder.output, threads=1))


def test_it_sees_what_onnxruntime_does(setup: Setup) -> None:
    _, backend, made, driver = setup.load()
    vision = setup.info.model.vision
    assert vision is not None
    used = driver.used
    for size in ((30, 20), (8, 8), (64, 64), (16, 15)):
        image = make_image(decode(picture(*size)), vision, setup.info.build.max_image_size)
        expected: Any = setup.plain.backend
        np.testing.assert_allclose(backend.see(image), expected.see(image), rtol=2e-4, atol=2e-5)
    assert made.executed == [(1, 48), (0, 4), (1, 256), (0, 16)]
    assert driver.used == used
    with pytest.raises(EngineError, match="an image of 324 patches, allowed: up to 256; build it again"):
        backend.see(make_image(decode(picture(72, 72)), vision, 72))


@pytest.mark.parametrize("refuses", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_an_image_that_the_tower_refuses_is_one_line(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    _, backend, _, _ = setup.load()
    vision = setup.info.model.vision
    assert vision is not None
    monkeypatch.setattr(gpu_driver.Context, refuses, lambda *_: False)
    with pytest.raises(
        EngineError, match=r"vision\.engine: an image of 4 patches failed \(.*\); load the engine again"
    ):
        backend.see(make_image(decode(picture(8, 8)), vision, 64))


def test_an_image_has_an_embedding_for_each_of_its_tokens(setup: Setup) -> None:
    """Nine patches to a token: of four, as elsewhere here, a product is a sum."""
    vision = setup.info.model.vision
    assert vision is not None
    model = dataclasses.replace(setup.info.model, vision=dataclasses.replace(vision, merge=3))
    _, outputs = _layouts(dataclasses.replace(setup.info, model=model), 36)
    assert outputs.places["features"][2] == (4, model.hidden_size)


@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_every_mode_equals_the_onnxruntime_engine(setup: Setup, mode: str) -> None:
    """Also where a prompt is longer than the profiles, and rows with images and without share a forward."""
    engine, backend, _, _ = setup.load()
    prompts: list[Any] = [
        asked(picture(30, 20), picture(9, 40, 1)),
        asked(text="Hello"),
        asked(picture(64, 64, 2)),
        asked(picture(30, 20), text="And this?"),
    ]
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 16, "block_length": 4}
    for rows in (1, 3):
        expected = [one.token_ids for one in nemodiff.generate_many(setup.plain, prompts, rows=rows, **options)]
        got = [one.token_ids for one in nemodiff.generate_many(engine, prompts, rows=rows, **options)]
        assert got == expected
    assert backend.captured


def test_a_tower_that_is_missing_or_another_is_refused(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(setup.folder, tmp_path / "copy"))
    blind = gpu_driver.with_about(setup.info, vision=None)
    dataclasses.replace(blind, build=dataclasses.replace(blind.build, dtype="bf16")).write(folder)
    with pytest.raises(EngineError, match="tensorrt has no engine for the images that the model sees"):
        read_engine(folder)
    spoilt = dataclasses.replace(setup, folder=folder)
    (folder / "vision.engine").write_bytes(b"spoilt")
    with pytest.raises(EngineError, match=r"vision\.engine: tensorrt_rtx 1\.7\.1\.116 cannot load it"):
        spoilt.load()
    real = gpu_driver.Engine.get_tensor_name
    monkeypatch.setattr(gpu_driver.Engine, "get_tensor_name", lambda self, at: real(self, at).replace("patches", "x"))
    with pytest.raises(EngineError, match=r"vision\.engine: its bindings .* \(patches, x\)"):
        setup.load()


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.skipif(device_sm() is None, reason="needs a GPU")
def test_an_engine_that_sees_runs_on_this_gpu(tmp_path: Path) -> None:
    """Not yet run: TensorRT-RTX runs on no card that could be had."""
    if device_sm() not in RTX_SMS:
        pytest.skip(f"TensorRT-RTX runs on SM {', '.join(map(str, RTX_SMS))}")
    checkpoint = write_vision_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    folder = Builder(checkpoint, tmp_path / "engine", backend="tensorrt-rtx", max_seq_len=256).run()
    engine = nemodiff.load(folder)
    plain = nemodiff.load(Builder(checkpoint, tmp_path / "plain").run(), threads=1)
    vision = plain.info.model.vision
    assert vision is not None
    image = make_image(decode(picture(30, 20)), vision, 64)
    seen, expected = (np.asarray(one.backend.see(image)) for one in (engine, plain))  # type: ignore[attr-defined]
    assert np.linalg.norm(seen - expected) < 0.05 * np.linalg.norm(expected)
    answers = [
        nemodiff.generate(engine, asked(picture(30, 20)), mode=mode, max_new_tokens=16).token_ids
        for mode in ("ar", "linear_spec", "quadratic_spec")
    ]
    assert all(len(answer) == 16 for answer in answers)
