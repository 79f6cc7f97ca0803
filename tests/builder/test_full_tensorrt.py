"""The full TensorRT, played by TensorRT-RTX, since no package holds the full builder."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest

from nemodiff.builder.build import Builder
from nemodiff.builder.compilers import choices, compile, tensorrt
from nemodiff.builder.compilers.child import read_job
from nemodiff.builder.compilers.choices import Choices
from nemodiff.builder.compilers.tensorrt import Job
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


JOB = Job("tensorrt", Choices(), Path("model.onnx"), Path("engine"), (90,), (), 0, 0, ())
EMPTY = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))


def test_what_is_chosen_reaches_tensorrt(tmp_path: Path) -> None:
    api = mock.Mock()

    def configured(takes_cache: bool = True, **chosen: Any) -> mock.Mock:
        builder = mock.Mock()
        builder.create_builder_config.return_value.set_timing_cache.return_value = takes_cache
        job = dataclasses.replace(JOB, choices=Choices(**chosen))
        made = compile._configure(api, builder, mock.Mock(num_inputs=0), EMPTY, job)
        assert made is builder.create_builder_config.return_value
        return made

    plain = configured()
    assert plain.method_calls == []
    assert isinstance(plain.builder_optimization_level, mock.Mock)  # not set
    flags = api.module.BuilderFlag
    for name, flag in (("strip_weights", "STRIP_PLAN"), ("refit", "REFIT"), ("version_compatible",) * 2):
        assert configured(**{name: True}).method_calls == [mock.call.set_flag(getattr(flags, flag.upper()))]
    assert configured(opt_level=0).builder_optimization_level == 0
    space = api.module.MemoryPoolType.WORKSPACE
    assert configured(workspace=3).method_calls == [mock.call.set_memory_pool_limit(space, 3 * 2**20)]
    aliased = api.module.PreviewFeature.ALIASED_PLUGIN_IO_10_03
    assert configured(plugins=True).method_calls == [mock.call.set_preview_feature(aliased, True)]
    cache = tmp_path / "timing"
    configured(timing_cache=cache).create_timing_cache.assert_called_once_with(b"")
    cache.write_bytes(b"kept")
    configured(timing_cache=cache).create_timing_cache.assert_called_once_with(b"kept")
    with pytest.raises(BuildError, match=r"timing: not a timing cache of this TensorRT and GPU; remove it or name"):
        configured(False, timing_cache=cache)


def test_a_graph_that_cannot_be_parsed_is_one_line() -> None:
    error = mock.Mock(node_name=lambda: "n", desc=lambda: "no\n  such op")
    for count, logged, told in (
        (1, "x", "node 'n': no such op"),
        (0, "x" * 500, "x" * 400),
        (0, "", "no reason given"),
    ):
        parser = mock.Mock(parse=lambda *_: False, num_errors=count, get_error=lambda at: [error, None][at])
        api: Any = mock.Mock(parser=lambda network, parser=parser: parser, errors=lambda logged=logged: logged)
        with pytest.raises(BuildError) as caught:
            compile._parse(api, mock.Mock(), EMPTY, JOB)
        assert str(caught.value) == f"model.onnx: TensorRT cannot parse it ({told}); report it with this line"


@pytest.mark.parametrize(
    ("done", "nbytes", "workspace", "told"),
    [
        (True, 5, None, None),
        (False, 5, None, "report it with this line"),
        (True, 0, None, "report it with this line"),
        (False, 0, 64, "use a larger --workspace or leave it out"),
    ],
)
def test_an_engine_that_is_not_whole_is_none(
    monkeypatch: pytest.MonkeyPatch, done: bool, nbytes: int, workspace: int | None, told: str | None
) -> None:
    api = mock.Mock(errors=lambda: "why", module=compile)
    api.builder.return_value.build_serialized_network_to_stream.return_value = done
    written = mock.Mock(nbytes=nbytes, close=lambda: "digest")
    stand_ins = {
        "load": api,
        "check_inputs": None,
        "check_layers": {},
        "EngineFile": written,
        "_configure": mock.Mock(),
    }
    for name, made in {**stand_ins, "_parse": None}.items():
        monkeypatch.setattr(compile, name, lambda *_, made=made: made)
    monkeypatch.setattr(onnx, "load", lambda *_, **__: EMPTY)
    job = dataclasses.replace(JOB, choices=Choices(workspace=workspace))
    if told is None:
        result = compile.compile_job(job)
        assert (result.layers, result.bytes, result.sha256) == ({}, 5, "digest")
        return
    with pytest.raises(BuildError, match=rf"^--backend tensorrt: building failed \(why\); {told}$"):
        compile.compile_job(job)


@pytest.mark.parametrize(
    ("code", "said", "told"),
    [
        (-9, "", "signal SIGKILL"),
        (3, "no\n memory\n", "3, having said 'no memory'"),
        (1, "x" * 400, "1, .*'x{300}'"),
    ],
)
def test_a_process_that_does_not_end_well_is_one_line(
    monkeypatch: pytest.MonkeyPatch, code: int, said: str, told: str
) -> None:
    @contextlib.contextmanager
    def child(*_: Any, **__: Any) -> Iterator[mock.Mock]:
        yield mock.Mock(wait=lambda: code)

    monkeypatch.setattr(tensorrt, "child", child)
    monkeypatch.setattr(tensorrt, "printed", lambda work: said)
    with pytest.raises(BuildError, match=f"^--backend tensorrt: the compiling process ended with {told}; close other"):
        tensorrt.compile_engine(JOB)


@pytest.mark.parametrize(
    ("module", "said"), [("this", "The Zen of Python"), ("of_nowhere", "No module named of_nowhere")]
)
def test_what_a_child_prints_stays_in_its_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], module: str, said: str
) -> None:
    with tensorrt.child(module, tmp_path, {"a": 1}) as process:
        process.wait(60)
    assert said in tensorrt.printed(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert read_job(tmp_path) == {"a": 1}
