"""Both graphs of a model that sees as TensorRT-RTX engines, with profiles by patches. No card has run them yet."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from conftest import output_of
from stand_ins.vision import write_vision_checkpoint

from nemodiff.builder.build import Builder
from nemodiff.builder.compilers.choices import Choices
from nemodiff.builder.compilers.profiles import image_corners, image_profiles
from nemodiff.builder.inspect import describe
from nemodiff.contract import BuildConfig
from nemodiff.engine_info import read_engine
from nemodiff.errors import BuildError
from nemodiff.vision import VisionConfig

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the trt extra"),
]


def small(checkpoint: Path, **changes: object) -> Builder:
    choices = Choices(sm=(89,))
    return Builder(checkpoint, checkpoint.parent / "engine", backend="tensorrt-rtx", choices=choices, **changes)  # type: ignore[arg-type]


def test_both_graphs_are_compiled(tmp_path: Path) -> None:
    checkpoint = write_vision_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    builder = small(checkpoint, max_seq_len=256, max_image_size=160)
    (line,) = [line for line in builder.plan().lines("x", tmp_path) if line.startswith("images")]
    assert line.endswith("compiled for up to 1024 and 1600 patches")
    folder = builder.run()
    info = read_engine(folder)
    about = info.manifest.tensorrt
    assert about is not None
    assert about.vision is not None
    assert info.build.max_image_size == 160
    assert about.vision.patches == (1024, 1600)
    native = {"BlockAttention": 2, "ATTENTION_INPUT": 2, "ROTARY_EMBEDDING": 4}
    assert about.vision.layers == {"plugin": {}, "native": native}
    assert about.vision.engine_bytes == (folder / "vision.engine").stat().st_size > builder.vision.weight_bytes // 2  # type: ignore[union-attr]
    names = {path.name for path in folder.iterdir()}
    assert {"model.onnx", "vision.onnx", "rank0.engine", "vision.engine"} <= names
    assert not [name for name in names if name.endswith(".data")]
    assert {"embedding", "embeddings"} <= set(describe(folder)["graph"]["inputs"])
    assert "vision.engine, " in output_of("inspect", str(folder))


def test_an_image_that_no_tensor_could_hold_is_refused(tmp_path: Path) -> None:
    checkpoint = write_vision_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(BuildError, match="use --max-image-size 856 or less") as caught:
        small(checkpoint, max_image_size=1600)
    assert "160000 patches" in str(caught.value)
    assert small(checkpoint, max_image_size=856).patches == (1024, 214**2)
    assert small(checkpoint, max_image_size=64).patches == (256,)


def test_profiles_are_of_whole_tokens(tmp_path: Path) -> None:
    checkpoint = write_vision_checkpoint(tmp_path / "checkpoint", spatial_merge_size=3)
    assert [small(checkpoint, max_image_size=size).patches for size in (120, 132)] == [(900,), (1017, 1089)]
    vision = VisionConfig(24, 2, 40, 2, 12, 4, 64, "silu", 10000.0, 3)
    wide = dataclasses.replace(vision, merge=33)  # a token has more than the small profile's
    assert image_profiles(wide, BuildConfig("bf16", 256, 1, 32, max_image_size=132)) == (1089,)
    assert image_corners(vision, 900) == ({"N": 9}, {"N": 900}, {"N": 900})
