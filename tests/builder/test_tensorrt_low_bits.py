"""int8 and int4 for TensorRT-RTX: the numbers of the CPU engine, as DequantizeLinear before each product."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import output_of
from stand_ins.checkpoints import TINY_CHAT, write_checkpoint
from stand_ins.quantized_checkpoints import write

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.builder.checkpoint.weights import write_weights
from nemodiff.builder.compilers.choices import Choices
from nemodiff.builder.graph.graph import build_graph
from nemodiff.contract import Quantization, cache_names
from nemodiff.runtime.engines.passes import causal

RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the trt extra")


def for_tensorrt(checkpoint: Path, folder: Path, kind: Quantization, **groups: int) -> Path:
    """The graph that TensorRT gets, in f32, with its weights."""
    opened = open_checkpoint(checkpoint)
    graph = build_graph(opened.model, "f32", capacity=128, quantization=kind, **groups)
    folder.mkdir()
    write_weights(graph, opened.tensors, folder / "model.onnx.data", lambda nbytes: None)
    onnx.save(graph.proto, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(("kind", "group"), [("int8", None), ("int4", None), ("int4", 32), ("int4", 128)])
def test_it_computes_what_the_cpu_engine_does_but_for_its_inputs_in_8_bits(
    kind: Quantization, group: int | None, tmp_path: Path
) -> None:
    builder = Builder(TINY_CHAT, tmp_path / "engine", quantization=kind, group_size=group)
    groups = {name: getattr(builder.config, name) for name in ("group_size", "mlp_group_size")}
    path = for_tensorrt(TINY_CHAT, tmp_path / "graph", kind, **groups)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    engine = nemodiff.load(builder.run(), threads=1)
    ids = nemodiff.generate(engine, "Count from 3 to 9.", max_new_tokens=60).token_ids
    pass_ = causal("verify", ids, 0, predict_all=True, logits=True)
    expected = engine.backend.open(1).forward([pass_])[0].logits
    model = engine.info.model
    cache = np.zeros((1, model.num_kv_heads, 128, model.head_dim), np.float32)
    feeds = {
        "ids": pass_.ids[None],
        "pos": pass_.pos[None],
        "write_at": np.zeros(1, np.int32),
        "visible": pass_.visible[None],
        "rows": pass_.predicted[None],
        "threshold": np.zeros(1, np.float32),
        **dict.fromkeys(cache_names(model.num_layers), cache),
    }
    (got,) = session.run(["logits"], feeds)
    assert expected is not None
    assert np.abs(got[0] - expected).mean() < 0.05 * np.abs(expected).mean()
    assert np.mean(got[0].argmax(-1) == expected.argmax(-1)) > 0.9


def test_int4_is_of_signed_halves_of_bytes(tmp_path: Path) -> None:
    truth = write(tmp_path / "checkpoint", "pack", 32, True)
    arrays = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(for_tensorrt(tmp_path / "checkpoint", tmp_path / "graph", "int4")).graph.initializer
    }
    for name, values in truth.items():
        mine = name.removeprefix("encoder.")
        scale = arrays[f"{mine}_scale"].repeat(32, axis=1)
        np.testing.assert_array_equal(arrays[mine].astype(np.float32) * scale, values)


@pytest.mark.trt
@RTX
@pytest.mark.parametrize(("kind", "group"), [("int8", None), ("int4", None), ("int4", 32), ("int4", 128)])
def test_tensorrt_rtx_builds_it_and_keeps_the_few_bits(kind: Quantization, group: int | None, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", hidden_size=512, intermediate_size=1024, head_dim=32)
    options: dict[str, Any] = {"backend": "tensorrt-rtx", "max_seq_len": 64, "choices": Choices(sm=(89,))}
    builder = Builder(checkpoint, tmp_path / "engine", quantization=kind, group_size=group, **options)
    folder = builder.run()
    assert f"bf16 with {kind} projections" in output_of("inspect", str(folder))
    plain = Builder(checkpoint, tmp_path / "plain", **options).weight_bytes
    assert builder.weight_bytes < plain - 1_000_000
    assert (folder / "rank0.engine").stat().st_size < plain


@pytest.mark.parametrize(("form", "symmetric", "kind"), [("awq", False, None), ("pack", True, "int4")])
def test_a_checkpoint_with_zero_points_is_not_kept(
    form: str, symmetric: bool, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemodiff.builder.build.require", lambda backend: None)
    write(tmp_path / "checkpoint", form, 32, symmetric)
    builder = Builder(tmp_path / "checkpoint", tmp_path / "engine", backend="tensorrt-rtx")
    assert builder.config.quantization == kind
    again = Builder(tmp_path / "checkpoint", tmp_path / "engine", backend="tensorrt-rtx", quantization="int4")
    write_weights(again.graph, again.tensors, tmp_path / "weights", lambda nbytes: None)
    assert (tmp_path / "weights").stat().st_size == again.graph.weight_bytes
