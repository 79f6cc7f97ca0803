"""What a manifest says of TensorRT: read back as it was written, and refused where it could not have been."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from nemodiff.tensorrt_info import Kernel, Profile, TensorRTInfo, VisionEngine, logits_bytes, parse_tensorrt

PROFILES = (Profile("block", 4, 64, 64), Profile("prefill", 2, 512, 100))
KERNEL = Kernel("commit.scan", 89, "scan", 4, 0, 32, 0, ("ptr x", "i32 n"), {"TILE": 64, "EPS": 1e-5})
WHOLE = TensorRTInfo(
    "tensorrt_rtx", "1.7", (89, 120), PROFILES, "plugin", {"plugin": {"A": 2}}, ("--plugins",), 9, (KERNEL,),
    VisionEngine((16, 256), {"native": {"B": 1}}, 3),
)  # fmt: skip


def written(info: TensorRTInfo) -> dict[str, Any]:
    return dict(json.loads(json.dumps(dataclasses.asdict(info))))


def test_what_is_written_is_read() -> None:
    plain = dataclasses.replace(WHOLE, kernels=(), vision=None, flags=())
    for info in (WHOLE, plain):
        assert parse_tensorrt(written(info)) == info
    assert parse_tensorrt(None) is None
    old = written(plain)
    del old["kernels"], old["vision"]
    assert parse_tensorrt(old) == plain
    assert logits_bytes(PROFILES, 10) == 4 * 10 * 4 * 64


def test_the_files_that_an_engine_needs() -> None:
    kernel = "kernels/commit.scan.sm89.cubin"
    assert WHOLE.files == ["rank0.engine", "vision.engine", kernel]
    stripped = dataclasses.replace(WHOLE, flags=("--plugins", "--strip-weights"))
    weights = ["model.onnx.data", "vision.onnx.data"]
    assert stripped.files == ["rank0.engine", "vision.engine", *weights, kernel]
    assert dataclasses.replace(stripped, kernels=(), vision=None).files == ["rank0.engine", "model.onnx.data"]


@pytest.mark.parametrize(
    "change",
    [
        {"profiles": []},
        {"profiles": [{"name": "block"}]},
        {"profiles": [dataclasses.asdict(PROFILES[0]) | {"max_rows": True}]},
        {"profiles": [dataclasses.asdict(PROFILES[0]) | {"name": 1}]},
        {"engine_bytes": -1},
        {"engine_bytes": 1.5},
        {"version": 1},
        {"sms": ["x"]},
        {"sms": [-89]},
        {"flags": [1]},
        {"layers": {"native": {"A": "2"}}},
        {"layers": {"native": 2}},
        {"layers": []},
        {"kernels": [dataclasses.asdict(KERNEL) | {"arguments": [1]}]},
        {"kernels": [dataclasses.asdict(KERNEL) | {"registers": -1}]},
        {"vision": {"patches": [], "layers": {}, "engine_bytes": 3}},
        {"vision": {"patches": [-16], "layers": {}, "engine_bytes": 3}},
        {"vision": {"patches": [16], "layers": {}, "engine_bytes": "3"}},
    ],
    ids=str,
)
def test_what_no_build_has_written_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        parse_tensorrt(written(WHOLE) | change)
