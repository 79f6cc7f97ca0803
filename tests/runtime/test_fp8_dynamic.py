"""e4m3 by e4m3: the same bits for a token in every pass, the kernels against plain torch, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import Refused
from stand_ins.checkpoints import write_adapter, write_checkpoint
from stand_ins.kernel_launch import DEVICE, INTERPRETED, ON_DEVICE, SCALES_ROWS

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.errors import EngineError, RequestError
from nemodiff.plugins.ops import token_quantise
from nemodiff.runtime.engines.torch import quantized
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.quantized import CHUNK, Quantized, by_8_bits, check_by_8_bits, quantised

pytestmark = pytest.mark.torch


def build(checkpoint: Path, folder: Path, kind: str = "fp8_dynamic", dtype: str = "f32") -> Path:
    return Builder(checkpoint, folder, backend="torch", quantization=kind, dtype=dtype).run()  # type: ignore[arg-type]


def test_plain_torch_rounds_as_the_kernel_does() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((6, 48)) * 2.0 ** rng.integers(-12, 3, (6, 48))).astype(np.float32)
    x[1] = 0
    values, scale = quantised(torch.from_numpy(x))
    expected = token_quantise.reference(x)
    np.testing.assert_array_equal(values.numpy(), expected[0].view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    np.testing.assert_array_equal(scale.numpy(), expected[1])


@ON_DEVICE
@SCALES_ROWS
def test_a_token_has_the_same_bits_whatever_shares_its_pass() -> None:
    """Every product has CHUNK rows; by itself a library takes another kernel for a product of one row."""
    generator = torch.Generator().manual_seed(0)
    numbers, rows = (torch.randn(n, 256, generator=generator).to(DEVICE) for n in (96, 3 * CHUNK))
    values, scale = quantised(rows)
    weight = Quantized("fp8_dynamic", {"values": numbers.to(torch.float8_e4m3fn), "scale": numbers[:, 0].abs()})
    together = by_8_bits(values.to(torch.float8_e4m3fn), scale, weight, torch.bfloat16)
    for at in (0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 5):
        alone = torch.full((CHUNK, 256), float("nan")).to(DEVICE).to(torch.float8_e4m3fn)  # what is dropped
        alone[0] = values[at].to(torch.float8_e4m3fn)
        got = by_8_bits(alone, scale[at].repeat(CHUNK), weight, torch.bfloat16)[0]
        assert torch.equal(got, together[at])


@ON_DEVICE
@SCALES_ROWS
def test_kernels_and_self_speculation_give_the_tokens_of_plain_ar(tmp_path: Path) -> None:
    dtype = "f32" if INTERPRETED else "bf16"  # all that a card gives of scales by row
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_key_value_heads": 1}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", rope_parameters=rope, dtype="f32", **sizes)
    write_adapter(checkpoint, rank=4, alpha=8, strength=0.1)
    folder = build(checkpoint, tmp_path / "engine", dtype=dtype)
    stored = (folder / "model.safetensors").read_bytes()
    assert stored == (build(checkpoint, tmp_path / "fp8", "fp8", dtype) / "model.safetensors").read_bytes()
    plain = nemodiff.load(folder, device="cpu", threads=1)
    kernels = TorchEngine(plain.folder, plain.info, "cpu" if INTERPRETED else 0, kernels=True)
    ours = dataclasses.replace(plain, backend=kernels)
    options: dict[str, Any] = {"block_length": 3, "max_new_tokens": 4}
    asked = [(ours, "linear_spec"), (ours, "ar")]
    if INTERPRETED:  # else in 16 bits, where a processor may round another near-tie
        asked += [(plain, "ar"), (plain, "linear_spec"), (plain, "quadratic_spec")]
    answers = [nemodiff.generate(e, [130, 137, 144], mode=m, **options).token_ids for e, m in asked]  # type: ignore[arg-type]
    assert all(answer == answers[0] for answer in answers)


def test_refusals(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="f32")
    command = ["build", str(checkpoint), "-o", str(tmp_path / "engine"), "--quantization", "fp8_dynamic"]
    refused(command, "not a choice of --backend onnxruntime, allowed: torch")
    refused([*command, "--backend", "torch", "--dtype", "f16"], "--dtype f16", "allowed: bf16, f32")
    with pytest.raises(RequestError, match="--tp-size is 2, allowed with fp8_dynamic: 1"):
        nemodiff.load(build(checkpoint, tmp_path / "engine"), device="cpu", tp_size=2)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling")

    monkeypatch.setattr(quantized, "by_8_bits", refuse)
    with pytest.raises(EngineError, match=r"CUBLAS_STATUS_NOT_SUPPORTED.*build with --quantization fp8$"):
        check_by_8_bits(tmp_path, "cpu", torch.bfloat16)
