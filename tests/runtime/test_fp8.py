"""FP8 weights: the kernel against its reference, what a build stores, and an engine that decodes with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused, output_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from stand_ins.checkpoints import TINY_CHAT, write_adapter, write_checkpoint
from stand_ins.kernel_launch import INTERPRETED, ON_DEVICE, normal, short_shares
from stand_ins.low_bits import WAYS, dequantised

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.engine_info import read_engine
from nemodiff.errors import CheckpointError
from nemodiff.plugins.ops import linear
from nemodiff.runtime.engines.passes import causal
from nemodiff.runtime.engines.torch.engine import TorchEngine

pytestmark = pytest.mark.torch


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(-43, 38))
def test_quantising_is_within_half_a_step(seed: int, exponent: float) -> None:
    """Relative 1/16 in the normal range and 2^-10 of the scale below it, at every magnitude that f32 has."""
    with np.errstate(under="ignore"):
        weight = (normal(seed, 3, 32) / 4 * np.float64(10) ** exponent).astype(np.float32)
    weight[1, 3:] = 0
    stored, scale = linear.quantise(weight)
    assert np.isfinite(stored.astype(np.float32)).all()
    assert (scale > 0).all()
    error = np.abs(stored.astype(np.float64) * scale[:, None] - weight)
    assert (error <= np.maximum(np.abs(weight) / 16, scale[:, None].astype(np.float64) / 1024) * 1.0001).all()


def test_quantising_zeros_and_the_largest() -> None:
    weight = np.zeros((3, 16), np.float32)
    weight[1, 4] = -3e38
    weight[2] = 1e-45
    stored, scale = linear.quantise(weight)
    np.testing.assert_array_equal(stored[0].astype(np.float32), 0)
    assert stored[1, 4] == -448
    assert np.isfinite(scale).all()
    assert stored[1, 4].astype(np.float32) * scale[1] == pytest.approx(-3e38)
    np.testing.assert_array_equal(stored[2].astype(np.float32), 0)  # below what the smallest scale holds


QUESTIONS = ["Sort these numbers: 41, 7, 93."]


def build(checkpoint: Path, folder: Path, **choices: Any) -> Path:
    return Builder(checkpoint, folder, backend="torch", quantization="fp8", **choices).run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-chat in 8 bits, f32 otherwise."""
    return build(TINY_CHAT, tmp_path_factory.mktemp("fp8") / "engine", dtype="f32")


def test_every_mode_equals_onnxruntime_on_the_dequantised_weights(folder: Path, tmp_path: Path) -> None:
    ours = nemodiff.load(folder, device="cpu")
    theirs = nemodiff.load(Builder(dequantised(TINY_CHAT, folder, tmp_path / "wide"), tmp_path / "engine").run())
    for way in WAYS:
        options = {"block_length": 16, "max_new_tokens": 16, **way}  # whose default is onnxruntime's own
        for question in QUESTIONS:
            got, expected = (nemodiff.generate(e, question, **options) for e in (ours, theirs))
            assert (got.token_ids, got.nfe) == (expected.token_ids, expected.nfe)


def test_a_build_stores_what_quantise_makes(checkpoint: Path, tmp_path: Path) -> None:
    """Projections of the layers alone; and in pieces, as a large one is written."""
    stored = load_tensors(build(checkpoint, tmp_path / "engine", dtype="bf16") / "model.safetensors")
    source = load_file(checkpoint / "model.safetensors")
    for name, tensor in source.items():
        short = name.removeprefix("encoder.")
        if not short.endswith("_proj.weight"):
            assert stored[short].dtype == torch.bfloat16
            assert f"{short}_scale" not in stored
            continue
        values, scale = linear.quantise(tensor)
        np.testing.assert_array_equal(stored[short].view(torch.uint8).numpy(), values.view(np.uint8))
        np.testing.assert_array_equal(stored[f"{short}_scale"].numpy(), scale)
    assert sum(name.endswith("_scale") for name in stored) == 2 * 7


def test_a_band_at_a_time_is_the_same_file(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(checkpoint, tmp_path / "whole") / "model.safetensors"
    monkeypatch.setattr("nemodiff.builder.checkpoint.weights.PIECE", 700)
    assert (build(checkpoint, tmp_path / "bands") / "model.safetensors").read_bytes() == whole.read_bytes()


@ON_DEVICE
@pytest.mark.parametrize("short", [False, True], ids=["one share", "several shares"])
def test_the_kernel_gives_the_same_tokens_in_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    """Of a model without a query scale, which the kernels take as 1."""
    if short:
        short_shares(monkeypatch)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 1}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", rope_parameters=rope, dtype="f32", **sizes)
    write_adapter(checkpoint, rank=4, alpha=8, strength=0.1)
    plain = nemodiff.load(build(checkpoint, tmp_path / "engine", dtype="f32"), device="cpu")
    kernels = TorchEngine(plain.folder, plain.info, "cpu" if INTERPRETED else 0, kernels=True)
    engines = (plain, dataclasses.replace(plain, backend=kernels))
    options: dict[str, Any] = {"mode": "linear_spec", "block_length": 3, "max_new_tokens": 4}
    answers = [nemodiff.generate(engine, [130, 137, 144], **options) for engine in engines]
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize(("dtype", "margin"), [("bf16", 1.0), ("f16", 0.125)])
def test_half_precision_agrees_where_it_is_clear(tmp_path: Path, folder: Path, dtype: Any, margin: float) -> None:
    pass_ = causal("verify", [130 + (i * 7) % 200 for i in range(40)], 0, predict_all=True, logits=True)
    predictions = []
    for engine in (build(TINY_CHAT, tmp_path / "engine", dtype=dtype), folder):
        loaded = nemodiff.load(engine, device="cpu")
        predictions += loaded.backend.open(1).forward([pass_])
    logits = predictions[1].logits
    assert logits is not None
    ranked = np.sort(np.delete(logits, loaded.info.model.mask_id, axis=1), axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > margin
    assert clear.sum() > 10
    np.testing.assert_array_equal(predictions[0].token[clear], predictions[1].token[clear])


def test_plan_and_inspect_say_so(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    command = ("build", str(checkpoint), "-o", str(target), "--backend", "torch", "--quantization", "fp8")
    assert "torch, bf16 with fp8 projections" in output_of(*command, "--dry-run")
    plan = json.loads(output_of(*command, "--dry-run", "--json"))
    output_of(*command)
    assert plan["build"]["quantization"] == "fp8"
    assert plan["weight_bytes"] == (target / "model.safetensors").stat().st_size
    assert read_engine(target).build.quantization == "fp8"
    assert "torch, bf16 with fp8 projections" in output_of("inspect", str(target))
    assert json.loads(output_of("inspect", str(target), "--json"))["engine"]["quantization"] == "fp8"
    answer = json.loads(
        output_of("run", str(target), "-p", "Hello", "--max-new-tokens", "4", "--json", "--device", "cpu")
    )
    assert len(answer["token_ids"]) <= 4


def test_eight_bits_take_about_half_of_sixteen() -> None:
    plans = [Builder(TINY_CHAT, "engine", backend="torch", quantization=q).plan() for q in ("fp8", None)]
    model = open_checkpoint(TINY_CHAT).model
    other = 2 * model.vocab_size * model.hidden_size * 2
    assert (plans[0].weight_bytes - other) / (plans[1].weight_bytes - other) == pytest.approx(0.5, abs=0.02)


def test_refusals(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    command = ["build", str(checkpoint), "-o", str(tmp_path / "engine"), "--quantization", "fp8"]
    refused(command, "--quantization fp8: not a choice of --backend onnxruntime, allowed: torch")
    refused([*command[:-1], "int3"], "int3", code=2)
    narrow = write_checkpoint(tmp_path / "narrow", intermediate_size=40)
    command = ["build", str(narrow), "-o", str(tmp_path / "engine"), "--backend", "torch", "--quantization", "fp8"]
    refused(command, "a projection has 40 inputs, allowed: multiples of 16")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(checkpoint: Path, tmp_path: Path, bad: float) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["encoder.layers.1.mlp.up_proj.weight"][3, 7] = bad
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds .* near \[3, 7\], allowed: finite numbers"):
        build(checkpoint, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda w: w.pop("layers.0.mlp.up_proj.weight_scale"), "up_proj.weight_scale"),
        (
            lambda w: w.update({"layers.0.mlp.up_proj.weight": w["layers.0.mlp.up_proj.weight"].float()}),
            "float32",
        ),
    ],
)
def test_weights_of_another_engine(
    checkpoint: Path, tmp_path: Path, change: Callable[[Any], Any], fragment: str, refused: Refused
) -> None:
    from safetensors.torch import save_file as save_tensors

    path = build(checkpoint, tmp_path / "engine") / "model.safetensors"
    weights = load_tensors(path)
    change(weights)
    save_tensors(weights, path)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["bytes"] = path.stat().st_size
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    refused(["run", str(path.parent), "-p", "x", "--device", "cpu"], "not the weights of this engine", fragment)
