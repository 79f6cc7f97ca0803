"""The full TensorRT, played by TensorRT-RTX, since no package holds the full builder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import onnx
import pytest

from nemodiff.builder.build import Builder
from nemodiff.builder.compilers import choices, tensorrt
from nemodiff.builder.compilers.choices import Choices
from nemodiff.builder.graph.stages import split
from nemodiff.engine_info import read_engine
from nemodiff.errors import BuildError
from nemodiff.plugins import OPS
from nemodiff.plugins.tensorrt.api import device_sm, library_folder

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the trt extra"),
]
NO_DRIVER = pytest.mark.skipif(device_sm() is not None, reason="needs a machine without a GPU")


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "modules").mkdir()
    text = "from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n"
    (folder / "modules" / "tensorrt.py").write_text(text)
    monkeypatch.syspath_prepend(folder / "modules")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


def full(checkpoint: Path, flags: Choices) -> Builder:
    return Builder(checkpoint, checkpoint.parent / "engine", backend="tensorrt", choices=flags, max_seq_len=128)


@NO_DRIVER
def test_full_tensorrt_needs_a_gpu(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(checkpoint.parent, monkeypatch)
    with pytest.raises(BuildError, match="needs a GPU and its driver to build"):
        full(checkpoint, Choices()).run()


def test_full_tensorrt_takes_the_same_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(checkpoint.parent, monkeypatch)
    monkeypatch.setattr(choices, "device_sm", lambda: 90)
    cache = checkpoint.parent / "timing"
    flags = Choices(timing_cache=cache, opt_level=1, workspace=512)
    info = read_engine(full(checkpoint, flags).run())
    about = info.manifest.tensorrt
    assert about is not None
    assert (info.manifest.backend, about.sms) == ("tensorrt", (90,))
    assert about.flags == ("--timing-cache", "--workspace", "--opt-level")
    assert cache.stat().st_size > 0


@pytest.mark.parametrize("name", ["missing/timing", "."])
def test_a_timing_cache_that_cannot_be_kept_is_refused_before_the_build(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stand_in(checkpoint.parent, monkeypatch)
    monkeypatch.setattr(choices, "device_sm", lambda: 90)
    with pytest.raises(BuildError, match=r"--timing-cache is .*, allowed: a file.* name another$"):
        full(checkpoint, Choices(timing_cache=checkpoint.parent / name))


def test_full_tensorrt_takes_an_op_as_a_chain_of_plugins(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(checkpoint.parent, monkeypatch)
    monkeypatch.setattr(choices, "device_sm", lambda: 90)
    monkeypatch.setattr(tensorrt, "CREATORS", "stand_ins.creators:stages")
    folder = checkpoint.parent / "library"  # the stand-in parses plugins as TensorRT-RTX does
    folder.mkdir()
    monkeypatch.setenv("LD_LIBRARY_PATH", library_folder(folder)["LD_LIBRARY_PATH"])
    about = read_engine(full(checkpoint, Choices(plugins=True)).run()).manifest.tensorrt
    assert about is not None
    assert about.layers["plugin"] == {
        "BlockAttentionSplit": 2,
        "BlockAttentionMerge": 2,
        "ConfidenceCommitScan": 1,
        "ConfidenceCommitRule": 1,
    }
    assert about.layers["native"] == {"KV_CACHE_UPDATE": 4, "ROTARY_EMBEDDING": 4}


def test_a_chain_joins_what_its_node_joined(checkpoint: Path) -> None:
    graph = split(Builder(checkpoint, checkpoint.parent / "engine").graph.proto, OPS).graph
    nodes = {node.name: node for node in graph.node}
    first, second = (nodes[f"layers.1.self_attn.BlockAttention{part}"] for part in ("Split", "Merge"))
    assert list(first.input[1:]) == ["k_cache_1_out", "v_cache_1_out", "visible"]
    assert list(first.output) == ["layers.1.self_attn.part", "layers.1.self_attn.stats"]
    assert list(second.input) == [first.input[0], *first.output]
    assert list(second.output) == ["layers.1.self_attn"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in second.attribute}
    assert attributes == {"scale": 0.25, "plugin_namespace": b"nemodiff", "aot": 1}
    made = {"", *(v.name for v in graph.input), *(t.name for t in graph.initializer)}
    for node in graph.node:  # still in order
        assert set(node.input) <= made, node.name
        made |= set(node.output)
