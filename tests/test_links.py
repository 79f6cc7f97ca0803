"""What the compiling process reads and writes: the checkpoint through links, and the engine file.

The linked graph needs no TensorRT to be compared with the graph over a copied file. The surprising fact: onnx itself
refuses to read external data through a link, so the tests put the files in the links' place first.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import TINY_CHAT, write_adapter, write_checkpoint
from conftest import assert_one_line, snapshot
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from nemodiff.builder import engine_file, tensorrt
from nemodiff.builder.build import Builder
from nemodiff.builder.engine_file import BUFFER, EngineFile
from nemodiff.builder.links import linkable, over_checkpoint
from nemodiff.builder.tensorrt import Choices
from nemodiff.builder.weights import write_weights
from nemodiff.errors import CheckpointError

RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the trt extra")
DTYPES = {"tensor(int32)": np.int32, "tensor(float16)": np.float16, "tensor(float)": np.float32}
SMALL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (204800, 204800))
from nemodiff.cli import main
main(["build", sys.argv[1], "-o", sys.argv[2], "--backend", "tensorrt-rtx", "--sm", "89"])
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small f16 checkpoint in two files, with an adapter of the same dtype and a scale that is not 1."""
    folder = write_checkpoint(tmp_path / "checkpoint", dtype="f16", shards=2)
    write_adapter(folder, rank=4, alpha=8, strength=0.01)
    path = folder / "linear_spec_lora" / "adapter_model.safetensors"
    save_file({name: tensor.astype(np.float16) for name, tensor in load_file(path).items()}, path)
    return folder


def build(checkpoint: Path, **changes: Any) -> Builder:
    choices = {"backend": "tensorrt-rtx", "dtype": "f16", "max_seq_len": 64} | changes
    return Builder(checkpoint, checkpoint.parent / "engine", **choices)


def both_graphs(builder: Builder, folder: Path) -> tuple[Path, Path]:
    """The graph over a copied file and the one over links, whose places the files have taken."""
    plain, linked = folder / "plain", folder / "linked"
    plain.mkdir()
    linked.mkdir()
    for graph, place in (
        (builder.graph, plain),
        (over_checkpoint(builder.graph, builder.linked, builder.tensors, linked), linked),
    ):
        write_weights(graph, builder.tensors, place / "model.onnx.data", lambda nbytes: None, hashed=False)
        onnx.save(graph.proto, place / "model.onnx")
    links = [path for path in linked.iterdir() if path.is_symlink()]
    assert {path.resolve() for path in links} == {builder.tensors[w.source].file for w in builder.linked}
    for link in links:
        data = link.read_bytes()
        link.unlink()
        link.write_bytes(data)
    return plain / "model.onnx", linked / "model.onnx"


def test_linked_graph_holds_the_same_weights(small: Path, tmp_path: Path) -> None:
    builder = build(small)
    copied = {w.name for w in builder.graph.weights} - {w.name for w in builder.linked}
    assert copied == {f"layers.{n}.self_attn.o_proj.lora_B.weight" for n in range(2)}  # which have the adapter's scale
    plain, linked = (onnx.load(path).graph for path in both_graphs(builder, tmp_path))
    turned = {node.output[0]: node.input[0] for node in linked.node if node.name.endswith(".turn")}
    assert list(plain.node) == [node for node in linked.node if not node.name.endswith(".turn")]
    assert len(turned) == sum(w.transposed for w in builder.linked)
    found = {t.name: numpy_helper.to_array(t) for t in linked.initializer}
    for tensor in plain.initializer:
        expected = numpy_helper.to_array(tensor)
        got = found[turned[tensor.name]].T if tensor.name in turned else found[tensor.name]
        np.testing.assert_array_equal(got, expected, err_msg=tensor.name)


def test_linked_graph_gives_the_same_answers(small: Path, tmp_path: Path) -> None:
    builder, rng = build(small, max_batch_size=1), np.random.default_rng(0)
    sessions = [onnxruntime.InferenceSession(path) for path in both_graphs(builder, tmp_path)]
    sizes = {"B": 1, "S": 4, "R": 4}
    feed: dict[str, np.ndarray] = {}
    for value in sessions[0].get_inputs():
        shape = [sizes[n] if isinstance(n, str) else n for n in value.shape]
        feed[value.name] = np.zeros(shape, DTYPES[value.type])
    feed["ids"][:] = rng.integers(101, 891, feed["ids"].shape)
    feed["pos"][:] = feed["rows"][:] = np.arange(4)
    feed["visible"][..., 0] = 4
    feed["adapter"][:] = 1
    names = [value.name for value in sessions[0].get_outputs()]
    answers = [dict(zip(names, session.run(names, feed), strict=True)) for session in sessions]
    assert np.ptp(answers[0]["logits"]) > 1
    np.testing.assert_allclose(answers[1]["logits"], answers[0]["logits"], rtol=0, atol=1e-2)
    np.testing.assert_array_equal(answers[1]["token"], answers[0]["token"])


def test_what_is_linked(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(small, dtype="bf16").linked == ()  # converted
    assert build(small, backend="onnxruntime").linked == ()
    assert build(small, backend="torch").linked == ()
    monkeypatch.setattr(tensorrt, "device_sm", lambda: 89)  # with a driver; the weights stay in the folder
    assert build(small, choices=Choices(refit=True)).linked == ()
    builder = build(small)
    assert builder.linked == linkable(builder.graph, builder.tensors)
    size = builder.graph.weight_bytes
    assert build(small, dtype="bf16").plan().disk_needed == 2 * size
    assert size < builder.plan().disk_needed < 1.5 * size


@RTX
def test_nan_is_refused_before_anything_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layers.1.mlp.up_proj.weight"][5, 7] = ml_dtypes.bfloat16("nan")
    save_file(tensors, path)
    before = snapshot(tmp_path)
    monkeypatch.delattr(tensorrt, "compile_engine")
    builder = build(folder, dtype="bf16")
    assert builder.linked
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds nan near \[5, 7\], allowed: finite numbers"):
        builder.run()
    assert snapshot(tmp_path) == before


# The engine file.


@pytest.mark.parametrize("direct", [True, False], ids=["past the cache", "through the cache"])
@pytest.mark.parametrize("sizes", [[], [1], [4096, 5], [5000, BUFFER, 3], [BUFFER], [2 * BUFFER + 17, 9]])
def test_engine_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], direct: bool) -> None:
    if not direct:
        opening = os.open

        def refuse(path: Path, flags: int, mode: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return opening(path, flags, mode)

        monkeypatch.setattr(engine_file.os, "open", refuse)
    data = np.random.default_rng(0).bytes(sum(sizes))
    file, at = EngineFile(tmp_path / "engine"), 0
    for size in sizes:
        assert file.write(memoryview(data)[at : at + size]) == size
        at += size
    assert file.close() == hashlib.sha256(data).hexdigest()
    assert file.nbytes == len(data)
    assert (tmp_path / "engine").read_bytes() == data


@RTX
def test_engine_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SMALL_DISK, str(TINY_CHAT), str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    line = done.stderr.splitlines(keepends=True)[-1]  # after the plan
    assert_one_line(line, "writing the engine failed (File too large); free some space or choose another --output")
    assert list(tmp_path.iterdir()) == []
