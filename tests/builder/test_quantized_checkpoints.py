"""GPTQ, AWQ and compressed-tensors: read to the last bit, kept as they are where the engine has such bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Refused
from safetensors.numpy import load_file, save_file
from stand_ins import quantized_checkpoints
from stand_ins.low_bits import loaded, nibbles, torch_values
from stand_ins.packed import packed
from stand_ins.quantized_checkpoints import WIDE, write

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.builder.checkpoint.low_bits import quantise_rows
from nemodiff.builder.checkpoint.quantized import QuantizedTensor
from nemodiff.runtime.engines.passes import causal

FORMS: list[tuple[str, int, bool]] = [
    ("gptq", 32, False),
    ("gptq", 32, True),
    ("gptq8", 32, False),
    ("awq", 32, False),
    ("pack", 32, True),
    ("pack", 32, False),
    ("pack", 0, True),
    ("pack8", 32, True),
    ("int8", 0, True),
    ("fp8", 0, True),
    ("modelopt", 0, True),
    ("modelopt-rows", 0, True),
    ("nvfp4", 16, True),
]
NAMED = [f"{form}-{group}-{'symmetric' if symmetric else 'zeros'}" for form, group, symmetric in FORMS]


@pytest.mark.parametrize(("form", "group", "symmetric"), FORMS, ids=NAMED)
def test_rows_and_columns_are_what_was_written(form: str, group: int, symmetric: bool, tmp_path: Path) -> None:
    truth = write(tmp_path / "checkpoint", form, group, symmetric)
    tensors = open_checkpoint(tmp_path / "checkpoint").tensors
    for name, values in truth.items():
        tensor = tensors[name]
        assert isinstance(tensor, QuantizedTensor)
        assert tensor.shape == values.shape
        np.testing.assert_array_equal(tensor.rows(0, len(values)), values)
        np.testing.assert_array_equal(tensor.rows(3, 13), values[3:13])  # from the middle of a word
        np.testing.assert_array_equal(tensor.columns(5, 40), values.T[5:40])


def logits(folder: Path) -> np.ndarray:
    engine = nemodiff.load(folder, device="cpu", threads=1)
    ids = np.random.default_rng(0).integers(200, 800, 12).tolist()
    (prediction,) = engine.backend.open(1).forward([causal("verify", ids, 0, predict_all=True, logits=True)])
    assert prediction.logits is not None
    return prediction.logits.copy()


def dequantized(folder: Path, truth: dict[str, np.ndarray]) -> Path:
    """The same model as a plain f32 checkpoint."""
    quantized_checkpoints.write_checkpoint(folder, dtype="f32", **WIDE)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | truth, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("form", "group", "symmetric"), FORMS, ids=NAMED)
def test_an_engine_computes_with_the_same_values(form: str, group: int, symmetric: bool, tmp_path: Path) -> None:
    truth = write(tmp_path / "checkpoint", form, group, symmetric)
    plain = Builder(dequantized(tmp_path / "plain", truth), tmp_path / "expected").run()
    builder = Builder(tmp_path / "checkpoint", tmp_path / "engine")
    kind = {"gptq": "int4", "awq": "int4", "pack": "int4", "int8": "int8"}.get(form)
    assert builder.config.quantization == kind
    got, expected = logits(builder.run()), logits(plain)
    if kind is None:
        np.testing.assert_array_equal(got, expected)
    else:  # the activations are in 8 bits
        assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(("form", "symmetric"), [("awq", False), ("gptq", False), ("pack", True)])
def test_int4_is_kept_bit_for_bit(form: str, symmetric: bool, tmp_path: Path) -> None:
    truth = write(tmp_path / "checkpoint", form, 32, symmetric)
    model = onnx.load(Builder(tmp_path / "checkpoint", tmp_path / "engine").run() / "model.onnx")
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    for mine, values in packed(truth).items():
        numbers, scale = nibbles(arrays[mine]), arrays[f"{mine}_scale"]
        zeros = np.full(scale.shape, np.float32(8))
        if not symmetric:
            zeros = nibbles(arrays[f"{mine}_zero"])[:, : scale.shape[1]]
        np.testing.assert_array_equal((numbers - zeros.repeat(32, 1)) * scale.repeat(32, 1), values)


def test_a_token_has_the_same_bits_in_every_pass(tmp_path: Path) -> None:
    """With zero points too, or self-speculation would not equal ar."""
    write(tmp_path / "checkpoint", "awq")
    folder = Builder(tmp_path / "checkpoint", tmp_path / "engine").run()
    cache = nemodiff.load(folder, threads=1).backend.open(1)
    ids = np.random.default_rng(0).integers(200, 800, 12).tolist()
    for place, (token, whole) in enumerate(zip(ids, logits(folder), strict=True)):
        (alone,) = cache.forward([causal("decode", [token], place, logits=True)])
        assert alone.logits is not None
        np.testing.assert_array_equal(alone.logits[0], whole)


def test_what_the_checkpoint_leaves_in_f32_stays_so(tmp_path: Path) -> None:
    truth = write(tmp_path / "checkpoint", "pack", 32, True)
    path = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    base = "encoder.layers.0.self_attn.q_proj"
    tensors = {name: t for name, t in tensors.items() if not name.startswith(base)}
    save_file(tensors | {f"{base}.weight": truth[f"{base}.weight"]}, path)
    engine = Builder(tmp_path / "checkpoint", tmp_path / "engine").run()
    model = onnx.load(engine / "model.onnx", load_external_data=False)
    ops = {node.name: node.op_type for node in model.graph.node}
    assert ops["layers.0.self_attn.q_proj"] == "MatMul"
    assert ops["layers.0.self_attn.k_proj"] == "MatMulNBits"


@pytest.mark.torch
@pytest.mark.parametrize(("form", "group", "symmetric"), FORMS, ids=NAMED)
def test_torch_keeps_the_numbers(form: str, group: int, symmetric: bool, tmp_path: Path) -> None:
    """To the last bit; what no engine has in such bits is computed with the same values."""
    truth = write(tmp_path / "checkpoint", form, group, symmetric)
    builder = Builder(tmp_path / "checkpoint", tmp_path / "engine", backend="torch")
    kind = {"gptq": "int4", "awq": "int4", "pack": "int4", "int8": "int8", "fp8": "fp8"}.get(form)
    kind = "fp8" if form.startswith("modelopt") else kind
    assert builder.config.quantization == kind
    builder.run()
    stored = loaded(tmp_path / "engine" / "model.safetensors")
    for name, values in truth.items():
        mine = name.removeprefix("encoder.")
        if kind is None:
            np.testing.assert_array_equal(stored[mine], values.astype(stored[mine].dtype))
        else:
            np.testing.assert_array_equal(torch_values(stored, mine), values)


@pytest.mark.torch
@pytest.mark.parametrize(("form", "group"), [("gptq", 32), ("awq", 32), ("pack", 0), ("int8", 0), ("fp8", 0)])
def test_torch_computes_with_the_numbers_it_keeps(form: str, group: int, tmp_path: Path) -> None:
    """Also where the checkpoint has a projection of a stack whole: q is, k and v are not."""
    truth = write(tmp_path / "checkpoint", form, group)
    path = tmp_path / "checkpoint" / "model.safetensors"
    base = "encoder.layers.0.self_attn.q_proj"
    tensors = {name: t for name, t in loaded(path).items() if not name.startswith(base)}
    save_file(tensors | {f"{base}.weight": truth[f"{base}.weight"]}, path)
    plain = dequantized(tmp_path / "plain", truth)
    kind = {"int8": "int8", "fp8": "fp8"}.get(form, "int4")
    if kind != "fp8":  # the head is in int8 then
        weights = load_file(plain / "model.safetensors")
        numbers, scale = quantise_rows(weights["diffusion_head.weight"])
        weights["diffusion_head.weight"] = numbers * scale[:, None]
        save_file(weights, plain / "model.safetensors")
    choices: dict[str, Any] = {"backend": "torch", "dtype": "f32"}
    kept = Builder(tmp_path / "checkpoint", tmp_path / "engine", **choices, quantization=kind).run()
    whole = Builder(plain, tmp_path / "whole", **choices).run()
    np.testing.assert_allclose(logits(kept), logits(whole), rtol=1e-4, atol=1e-4)


CHANNELS = {"type": "int", "symmetric": True, "strategy": "channel"}


def one_group(**described: Any) -> dict[str, Any]:
    return {"config_groups": {"0": {"targets": ["Linear"], "weights": CHANNELS, **described}}}


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("form", "changes", "fragment"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', allowed: gptq, awq"),
        ("gptq", {"desc_act": True}, "desc_act is True, allowed: false"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("gptq", {"bits": 3}, "bits is 3, allowed: 4 or 8"),
        ("gptq", {"bits": None}, "bits is None"),
        ("gptq", {"bits": 4.0}, "bits is 4.0, allowed: 4 or 8"),
        ("gptq", {"quant_method": ["gptq"]}, "quant_method is ['gptq'], allowed: gptq, awq"),
        ("gptq", {"group_size": 48}, "group_size is 48, allowed: a multiple of 32"),
        ("gptq", {"group_size": 128}, " inputs, allowed: multiples of the group of 128"),
        ("awq", {"version": "gemv"}, "version is 'gemv', allowed: gemm"),
        ("awq", {"zero_point": False}, "zero_point is False"),
        ("pack", {"format": "marlin-24"}, "format is 'marlin-24 of type int'"),
        ("fp8", {"format": "naive-quantized"}, "format is 'naive-quantized of type float'"),
        ("fp8", {"format": "pack-quantized"}, "format is 'pack-quantized of type float'"),
        ("fp8", {"format": "int-quantized"}, "format is 'int-quantized of type float'"),
        ("int8", {"format": "float-quantized"}, "format is 'float-quantized of type int'"),
        ("pack", {"config_groups": {}}, "config_groups is {}, allowed: one group"),
        ("int8", one_group(weights={**CHANNELS, "num_bits": 4}), "bits is 4, allowed: 8"),
        ("pack", one_group(weights=None), "config_groups.weights is None, allowed: an object"),
        ("pack", one_group(targets=["Embedding"]), "config_groups.targets is ['Embedding']"),
        ("pack", one_group(input_activations={"dynamic": False}), "input_activations.dynamic is False, allowed: true"),
        ("pack", one_group(weights={**CHANNELS, "actorder": "group"}), "actorder is 'group', allowed: null"),
        ("pack", one_group(weights={**CHANNELS, "strategy": "block"}), "strategy is 'block', allowed: tensor"),
        ("int8", one_group(weights={**CHANNELS, "symmetric": False}), "format is 'int-quantized of type int', allowed"),
        (
            "fp8",
            one_group(weights={**CHANNELS, "type": "float", "symmetric": False}),
            "format is 'float-quantized of type float', allowed",
        ),
        ("pack", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("modelopt", {"kv_cache_quant_algo": "FP8"}, "kv_cache_quant_algo is 'FP8', allowed: null"),
        ("nvfp4", {"quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ', allowed: FP8"),
    ],
)
def test_refused_configs(form: str, changes: dict[str, Any], fragment: str, tmp_path: Path, refused: Refused) -> None:
    write(tmp_path / "checkpoint", form, 32, symmetric=True)
    change_config(tmp_path / "checkpoint", **changes)
    refused(["build", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "engine")], fragment)


@pytest.mark.parametrize(
    ("form", "change", "fragment"),
    [
        ("gptq", lambda t, p: t.pop(f"{p}.qzeros"), "qzeros is missing"),
        ("gptq", lambda t, p: t.update({f"{p}.qweight": t[f"{p}.qweight"].astype(np.int64)}), "qweight is int64"),
        ("gptq", lambda t, p: t.update({f"{p}.scales": t[f"{p}.scales"][:1]}), "scales is float16 [1, 64]"),
        ("gptq", lambda t, p: t.update({f"{p}.extra": t[f"{p}.scales"]}), "extra is there"),
        ("gptq", lambda t, p: t.update({f"{p}.g_idx": t[f"{p}.g_idx"][::-1].copy()}), "g_idx reorders the inputs"),
        (  # of one that is joined with another
            "gptq",
            lambda t, p: t.update({(name := f"{p}.g_idx".replace("down", "up")): t[name][::-1].copy()}),
            "up_proj.g_idx reorders the inputs",
        ),
        ("pack", lambda t, p: t.update({f"{p}.bias": t[f"{p}.weight_scale"]}), "bias is there"),
        (
            "pack",
            lambda t, p: t.update({f"{p}.weight_scale": t[f"{p}.weight_scale"][:1, :1].copy()}),
            "[1, 1], allowed",
        ),
        ("fp8", lambda t, p: t.update({f"{p}.weight_scale": t[f"{p}.weight_scale"] * np.float32("nan")}), "nan"),
    ],
)
def test_refused_tensors(
    form: str, change: Callable[[dict[str, Any], str], Any], fragment: str, tmp_path: Path, refused: Refused
) -> None:
    write(tmp_path / "checkpoint", form, 0 if form == "fp8" else 32, symmetric=True)
    path = tmp_path / "checkpoint" / "model.safetensors"
    tensors = loaded(path)
    change(tensors, "encoder.layers.1.mlp.down_proj")
    save_file(tensors, path)
    refused(["build", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "engine")], fragment)


@pytest.mark.parametrize("described", [{"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}, 7])
def test_older_exports_of_modelopt_say_it_in_a_file_of_their_own(
    described: object, tmp_path: Path, refused: Refused
) -> None:
    folder = tmp_path / "checkpoint"
    truth = write(folder, "nvfp4")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": described}))
    if described == 7:
        refused(["build", str(folder), "-o", str(tmp_path / "engine")], "quantization_config is no object")
        return
    tensors = open_checkpoint(folder).tensors
    for name, values in truth.items():
        tensor = tensors[name]
        assert isinstance(tensor, QuantizedTensor)
        np.testing.assert_array_equal(tensor.rows(0, len(values)), values)


def test_config_json_decides_beside_the_file_of_older_exports(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint", "nvfp4")
    (tmp_path / "checkpoint" / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert any("(nvfp4, 4 bits" in note for note in open_checkpoint(tmp_path / "checkpoint").notes)


def test_no_twin_of_a_quantized_checkpoint(tmp_path: Path, refused: Refused) -> None:
    write(tmp_path / "checkpoint", "awq")
    refused(["export", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "twin")], "its projections are quantized")
