"""int8 and int4 on the CPU: what is stored, and that a token's numbers do not depend on what else is in its pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import Refused, output_of
from safetensors.numpy import load_file, save_file
from stand_ins.checkpoints import TINY_CHAT, write_checkpoint
from stand_ins.low_bits import assert_rows_are_alone, assert_speculation_is_ar, causal_bits, nibbles, stored
from stand_ins.packed import packed

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint import weights as weights_module
from nemodiff.errors import CheckpointError
from nemodiff.runtime.engines.onnxruntime import engine as engine_module
from nemodiff.runtime.engines.passes import causal
from nemodiff.runtime.loading import LoadedEngine

KINDS = ("int8", "int4")
WIDE = {"hidden_size": 64, "intermediate_size": 96}  # multiples of 32


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(kind: str, tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    folder = Builder(TINY_CHAT, tmp_path_factory.mktemp(kind) / "engine", quantization=kind).run()  # type: ignore[arg-type]
    return nemodiff.load(folder, threads=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_stored_weights_are_the_nearest(kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype=dtype, **WIDE)
    whole = Builder(checkpoint, tmp_path / "whole", quantization=kind).run()  # type: ignore[arg-type]
    monkeypatch.setattr(weights_module, "PIECE", 4096)  # bytes: bands of a few rows
    engine = Builder(checkpoint, tmp_path / "engine", quantization=kind).run()  # type: ignore[arg-type]
    assert (whole / "model.onnx.data").read_bytes() == (engine / "model.onnx.data").read_bytes()
    arrays = stored(engine)
    for mine, weight in packed(load_file(checkpoint / "model.safetensors")).items():
        if not (mine.endswith("_proj.weight") or mine == "diffusion_head.weight"):
            continue
        exact, scale, got = weight.astype(np.float32), arrays[f"{mine}_scale"], arrays[mine]
        if got.dtype == np.int8:
            values = got.T * scale[:, None]
            step = scale[:, None]
        else:
            step = scale.repeat(32, axis=1)
            values = (nibbles(got) - 8) * step
        over = np.abs(values - exact) / np.abs(step)
        assert over.max() <= (0.5001 if got.dtype == np.int8 else 1.25)  # int4 may end before its largest weights
        assert np.mean(over) < 0.26


def test_a_tokens_inputs_are_rounded_to_127_steps(tmp_path: Path) -> None:
    """Of its largest magnitude: the first layer's values are what the stored numbers make of such inputs."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="f32", **WIDE)
    engine = nemodiff.load(Builder(checkpoint, tmp_path / "engine", quantization="int8").run(), threads=1)
    cache, ids = engine.backend.open(1), [300, 301, 302]
    cache.forward([causal("prefill", ids, 0)])
    got = cache.read(0, 0, len(ids))["v_cache_0"].swapaxes(0, 1).reshape(len(ids), -1)  # type: ignore[attr-defined]
    arrays, qkv = stored(engine.folder), "layers.0.self_attn.qkv_proj.weight"
    x = arrays["embed_tokens.weight"][ids]
    x /= np.sqrt((x * x).mean(-1, keepdims=True) + engine.info.model.rms_norm_eps)
    x *= arrays["layers.0.input_layernorm.weight"]
    step = np.abs(x).max(-1, keepdims=True) / 127
    expected = (np.rint(x / step) * step @ arrays[qkv] * arrays[f"{qkv}_scale"])[:, -got.shape[1] :]
    assert np.abs(got - expected).mean() < 1e-5 * np.abs(expected).mean()


def test_a_token_has_the_same_bits_in_every_pass(engine: LoadedEngine) -> None:
    ids = np.random.default_rng(0).integers(200, 800, 70).tolist()
    one = causal_bits(engine, ids, 1)
    for size in (2, 3, 16, 33, 70):
        np.testing.assert_array_equal(causal_bits(engine, ids, size), one, err_msg=f"passes of {size}")


def test_a_row_has_the_same_bits_beside_others(engine: LoadedEngine) -> None:
    assert_rows_are_alone(engine, (20, 3, 11))


def test_self_speculation_gives_the_tokens_of_ar(engine: LoadedEngine) -> None:
    assert_speculation_is_ar(engine, questions=5)


def test_predictions_are_near_those_of_f32(kind: str, engine: LoadedEngine, tiny_engine: Path) -> None:
    exact, same = nemodiff.load(tiny_engine, threads=1), []
    for prompt in ("Count from 3 to 9.", "Spell the word house.", "What is 3 plus 4?", "Count down from 9 to 2."):
        ids = nemodiff.generate(exact, prompt, max_new_tokens=60).token_ids
        got, expected = (causal_bits(e, ids, len(ids)).argmax(-1) for e in (engine, exact))
        same.extend(got == expected)
    assert np.mean(same) > {"int8": 0.9, "int4": 0.75}[kind]


def test_a_token_of_zeros_is_no_nan(kind: str, tmp_path: Path) -> None:
    """Its largest magnitude, and so its scale, is 0."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="f32", **WIDE)
    weights = load_file(checkpoint / "model.safetensors")
    weights["encoder.embed_tokens.weight"][300] = 0
    save_file(weights, checkpoint / "model.safetensors")
    engine = nemodiff.load(Builder(checkpoint, tmp_path / "engine", quantization=kind).run())  # type: ignore[arg-type]
    assert np.isfinite(causal_bits(engine, [300, 300, 301], 3)).all()


@pytest.mark.parametrize(
    ("machine", "flags", "overflows"),
    [
        ("x86_64", "flags : fma avx2", True),
        ("x86_64", "flags : avx2 avx512_vnni", False),
        ("AMD64", "flags : avx2 avx_vnni", False),
        ("aarch64", "Features : fp asimd", False),
        ("x86_64", None, True),
    ],
)
def test_a_processor_without_vnni_takes_the_slower_way(
    machine: str, flags: str | None, overflows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **how: str) -> str:
        if flags is None:
            raise FileNotFoundError(path)
        return flags

    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", read)
    assert engine_module._bytes_overflow() is overflows


def test_plan_and_inspect_name_it(kind: str, tmp_path: Path) -> None:
    target = str(tmp_path / "engine")
    output_of("build", str(TINY_CHAT), "-o", target, "--quantization", kind)
    assert f"onnxruntime, f32 with {kind} projections" in output_of("inspect", target)
    plans = [Builder(TINY_CHAT, tmp_path / "none", quantization=q).plan() for q in (kind, None)]  # type: ignore[arg-type]
    embedding = plans[0].parameters and 891 * 256 * 4
    small, large = (plan.weight_bytes - embedding for plan in plans)
    assert small / large < {"int8": 0.27, "int4": 0.18}[kind]
    assert plans[0].memory_loaded < plans[1].memory_loaded / 2


def test_refusals(tmp_path: Path, refused: Refused) -> None:
    narrow = write_checkpoint(tmp_path / "narrow", intermediate_size=40)
    output = ["-o", str(tmp_path / "engine")]
    refused(["build", str(narrow), *output, "--quantization", "int4"], "has 40 inputs, allowed: multiples of 32")
    command = ["build", str(TINY_CHAT), *output, "--quantization", "int8"]
    refused([*command, "--dtype", "f16"], "--dtype f16", "allowed: f32")
    refused([*command, "--backend", "tensorrt"], "not a choice of --backend tensorrt, allowed: onnxruntime, torch")
    single = write_checkpoint(tmp_path / "single", num_key_value_heads=4, num_attention_heads=4)
    refused(["build", str(single), *output, "--quantization", "int8"], "one query head per key/value head")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(kind: str, tmp_path: Path, bad: float) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="f32", **WIDE)
    weights = load_file(checkpoint / "model.safetensors")
    weights["encoder.layers.1.mlp.up_proj.weight"][3, 7] = bad
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds .* near \[3, 7\]"):
        Builder(checkpoint, tmp_path / "engine", quantization=kind).run()  # type: ignore[arg-type]


def test_the_graph_has_no_other_domain_in_int8(tmp_path: Path) -> None:
    """Ops of the standard alone, so that other runtimes and onnx.reference read it."""
    builder = Builder(TINY_CHAT, tmp_path / "engine", quantization="int8")
    assert {o.domain for o in builder.graph.proto.opset_import} == {"", "nemodiff"}
    assert dataclasses.asdict(builder.config)["quantization"] == "int8"
