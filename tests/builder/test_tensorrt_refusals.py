"""TensorRT builds that are refused before a weight is written: flags, missing packages, and too small a machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import Refused
from stand_ins.checkpoints import TINY_CHAT

from nemodiff import main_memory
from nemodiff.builder import resources
from nemodiff.builder.build import Builder
from nemodiff.builder.compilers import choices
from nemodiff.builder.compilers.choices import Choices
from nemodiff.errors import BuildError
from nemodiff.plugins.tensorrt.api import device_sm

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the trt extra"),
]
NO_DRIVER = pytest.mark.skipif(device_sm() is not None, reason="needs a machine without a GPU")
RTX = ["--backend", "tensorrt-rtx"]


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        pytest.param([*RTX, "--dtype", "f32"], ["--dtype is 'f32', allowed on tensorrt-rtx: bf16, f16"], id="f32"),
        pytest.param(["--dtype", "bf16"], ["--dtype is 'bf16', allowed on onnxruntime: f32, f16"], id="bf16"),
        pytest.param(
            [*RTX, "--sm", "90"], ["--sm is 90, allowed on tensorrt-rtx: 80, 86", "--backend tensorrt"], id="sm"
        ),
        pytest.param(["--sm", "80"], ["--sm: not a choice of --backend onnxruntime"], id="sm on onnxruntime"),
        pytest.param(["--plugins"], ["--plugins: not a choice of --backend onnxruntime"], id="plugins on onnxruntime"),
        pytest.param(["--no-logits"], ["--no-logits: not a choice of --backend onnxruntime"], id="no logits"),
        pytest.param(["--max-input-len", "8"], ["--max-input-len: not a choice"], id="input length on onnxruntime"),
        pytest.param(
            ["--backend", "tensorrt", "--sm", "80"], ["--sm: TensorRT builds for the GPU it runs on"], id="gpu"
        ),
        pytest.param([*RTX, "--timing-cache", "x"], ["--timing-cache: TensorRT-RTX times nothing"], id="timing cache"),
        pytest.param([*RTX, "--version-compatible"], ["--version-compatible: needs a lean runtime"], id="version"),
        pytest.param([*RTX, "--strip-weights"], ["--strip-weights: ", "NVIDIA driver"], id="strip", marks=NO_DRIVER),
        pytest.param([*RTX, "--refit"], ["--refit: ", "NVIDIA driver"], id="refit", marks=NO_DRIVER),
        pytest.param([*RTX, "--refit", "--strip-weights"], ["allowed: one of them"], id="both"),
        pytest.param([*RTX, "--opt-level", "6"], ["--opt-level is 6, allowed: 0 to 5"], id="level"),
        pytest.param([*RTX, "--workspace", "0"], ["--workspace is 0, allowed: 1 MiB"], id="workspace"),
        pytest.param([*RTX, "--max-input-len", "99999999"], ["--max-input-len is 99999999, allowed: 1 to"], id="chunk"),
        pytest.param([*RTX, "--max-input-len", "0"], ["--max-input-len is 0, allowed"], id="no chunk"),
        pytest.param([*RTX, "--max-batch-size", "3000"], ["the K/V cache of that many rows", "use --max-b"], id="rows"),
        pytest.param(
            [*RTX, "--max-seq-len", "262144", "--max-input-len", "262144", "--max-batch-size", "1"],
            ["--max-input-len is 262144", "use --max-input-len 4095 or less"],
            id="tokens of a pass",
        ),
        pytest.param(
            [*RTX, "--workspace", "1"], ["building failed", "OutOfMemory", "larger --workspace"], id="scratch"
        ),
    ],
)
def test_refused(tmp_path: Path, refused: Refused, flags: list[str], fragments: list[str]) -> None:
    refused(["build", str(TINY_CHAT), "-o", str(tmp_path / "engine"), *flags], *fragments)


def test_sm_must_be_numbers(tmp_path: Path, refused: Refused) -> None:
    refused(["build", str(TINY_CHAT), "-o", str(tmp_path / "e"), *RTX, "--sm", "ada"], "--sm is 'ada'", code=2)


@pytest.mark.parametrize(
    ("backend", "module"), [("tensorrt-rtx", "no_such_tensorrt_rtx"), ("tensorrt", "no_such_tensorrt")]
)
def test_missing_package(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, backend: str, module: str
) -> None:
    monkeypatch.setitem(choices.load.__globals__["MODULES"], backend, module)
    arguments = ["build", str(TINY_CHAT), "-o", str(tmp_path / "engine"), "--backend", backend]
    refused(arguments, f"--backend {backend}: the package {module} cannot be imported", "pip install ")


def test_no_room(checkpoint: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["build", str(checkpoint), "-o", str(checkpoint.parent / "engine"), *RTX]
    with monkeypatch.context() as patch:
        patch.setattr(main_memory, "free", lambda: 2**20)
        refused(arguments, "compiling needs about", "of memory, 1.0 MiB are free")
    with monkeypatch.context() as patch:
        patch.setattr(resources, "disk_free", lambda path: 2**20)
        refused(arguments, "of disk, 1.0 MiB are free")


@NO_DRIVER
def test_stripping_without_a_driver_fails_in_the_library_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "device_sm", lambda: 89)
    stripped = Choices(sm=(89,), strip_weights=True)
    builder = Builder(checkpoint, checkpoint.parent / "engine", backend="tensorrt-rtx", choices=stripped)
    with pytest.raises(BuildError, match=r"building failed \(.*CUDA_SUCCESS"):
        builder.run()
