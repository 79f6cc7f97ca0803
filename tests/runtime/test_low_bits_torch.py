"""int8 and int4 in the torch engine: the numbers of the ONNX Runtime engine, every mode, kernels and ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Refused
from safetensors.numpy import load_file
from stand_ins.checkpoints import TINY_CHAT, write_adapter, write_checkpoint
from stand_ins.kernel_launch import INTERPRETED, ON_DEVICE, normal, short_shares
from stand_ins.low_bits import WAYS, dequantised

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.contract import Quantization
from nemodiff.errors import RequestError
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.projections import Projections

pytestmark = pytest.mark.torch
QUESTION = "Sort these numbers: 41, 7, 93."
WIDE = {"hidden_size": 64, "intermediate_size": 96}  # multiples of 32


@pytest.fixture(scope="module", params=["int8", "int4"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def build(checkpoint: Path, folder: Path, kind: Quantization, **choices: Any) -> Path:
    return Builder(checkpoint, folder, backend="torch", quantization=kind, **choices).run()


@pytest.mark.parametrize(("dtype", "group"), [("f32", None), ("bf16", None), ("f32", 64)])
def test_the_numbers_are_those_of_onnxruntime(
    kind: Quantization, dtype: str, group: int | None, tmp_path: Path
) -> None:
    """The scales too, stored for 32 inputs each."""
    choices = {"quantization": kind, "group_size": group if kind == "int4" else None}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype=dtype, hidden_size=128, intermediate_size=256)
    folder = Builder(checkpoint, tmp_path / "torch", backend="torch", dtype="f32", **choices).run()
    mine = load_file(folder / "model.safetensors")
    model = onnx.load(Builder(checkpoint, tmp_path / "onnx", **choices).run() / "model.onnx")
    theirs = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    names = [name for name in mine if f"{name}_scale" in mine]
    assert len(names) == 2 * 7 + 1
    packed = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
    packed["up_proj"] = packed["gate_proj"]  # one product there
    joined: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: "qkvgateup".find(name.split(".")[-2].removesuffix("_proj"))):
        parts = name.split(".")
        joined.setdefault(".".join([*parts[:-2], packed.get(parts[-2], parts[-2]), parts[-1]]), []).append(name)
    for name, held in joined.items():
        numbers, scale = (np.concatenate([mine[f"{one}{part}"] for one in held]) for part in ("", "_scale"))
        stored = theirs[name].T if theirs[name].dtype == np.int8 else theirs[name].reshape(len(theirs[name]), -1)
        np.testing.assert_array_equal(numbers, stored)
        expected = theirs[f"{name}_scale"]
        if expected.ndim == 2:  # int4's groups
            copies = scale.shape[1] // expected.shape[1]
            assert copies == (group or (128 if ".mlp." in name else 32)) // 32
            expected = expected.repeat(copies, axis=1)
        np.testing.assert_array_equal(scale, expected)


def test_every_mode_gives_the_tokens_of_the_dequantised_weights(kind: Quantization, tmp_path: Path) -> None:
    """And self-speculation those of ar."""
    folder = build(TINY_CHAT, tmp_path / "engine", kind, dtype="f32")
    plain = Builder(dequantised(TINY_CHAT, folder, tmp_path / "wide"), tmp_path / "plain").run()
    ours, theirs = nemodiff.load(folder, device="cpu", threads=1), nemodiff.load(plain, threads=1)
    answers = {}
    for way in WAYS:
        options = {"block_length": 16, "max_new_tokens": 16, **way}
        got, expected = (nemodiff.generate(e, QUESTION, **options) for e in (ours, theirs))
        assert (got.token_ids, got.nfe) == (expected.token_ids, expected.nfe)
        answers[way["mode"]] = got.token_ids
    assert answers["linear_spec"] == answers["quadratic_spec"] == answers["ar"]


@ON_DEVICE
def test_the_kernels_give_the_same_tokens_in_the_engine(
    kind: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of ar; with products of several shares, in 4 bits that of down alone."""
    short_shares(monkeypatch, {"int8": 16, "int4": 64}[kind])
    mode = {"int8": "linear_spec", "int4": "quadratic_spec"}[kind]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 1, **WIDE}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", rope_parameters=rope, dtype="f32", **sizes)
    write_adapter(checkpoint, rank=4, alpha=8, strength=0.1)
    plain = nemodiff.load(build(checkpoint, tmp_path / "engine", kind, dtype="f32"), device="cpu")
    kernels = TorchEngine(plain.folder, plain.info, "cpu" if INTERPRETED else 0, kernels=True)
    ours = dataclasses.replace(plain, backend=kernels)
    options: dict[str, Any] = {"block_length": 3, "max_new_tokens": 4}
    asked = [(plain, mode), (ours, mode), (ours, "ar")]
    answers = [nemodiff.generate(e, [130, 137, 144], mode=m, **options).token_ids for e, m in asked]  # type: ignore[arg-type]
    assert answers[0] == answers[1] == answers[2]


def test_parts_in_different_bits_are_multiplied_apart() -> None:
    """What a checkpoint has left whole stands beside few bits; no kernel takes the two together."""
    x, *parts = (torch.from_numpy(normal(seed, rows, 32)) for seed, rows in enumerate((3, 5, 7)))
    products = Projections(torch.float32, lambda op, *_: pytest.fail(op.name))
    torch.testing.assert_close(products.in_shares("qkv", x, tuple(parts)), x @ torch.cat(parts).t())


def test_ranks_that_would_cut_a_group(tmp_path: Path, refused: Refused) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **{**WIDE, "num_key_value_heads": 4})
    folder = build(checkpoint, tmp_path / "engine", "int4")
    with pytest.raises(RequestError, match=r"--tp-size is 4, allowed: one that splits the 64 inputs of an int4"):
        nemodiff.load(folder, device="cpu", tp_size=4)


def test_weights_of_another_engine(tmp_path: Path, refused: Refused) -> None:
    folder = build(write_checkpoint(tmp_path / "checkpoint", **WIDE), tmp_path / "engine", "int4")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"up_proj.weight_scale", b"up_proj.weight_scald"))
    refused(
        ["run", str(folder), "-p", "x", "--device", "cpu"], "not the weights of this engine", "up_proj.weight_scale"
    )
