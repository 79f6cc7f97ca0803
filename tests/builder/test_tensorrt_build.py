"""TensorRT engines, built without a GPU: both lowerings for every target, the guards, and inspect.

The two ops as plugins come from `creators.py`, which could not run them. The tests show that the parser takes a plugin
where one is registered, and that a build which does not get the lowering it needs is refused.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import PATIENCE, Refused, eventually, snapshot
from onnx import TensorProto, helper
from stand_ins.checkpoints import TINY_CHAT, random_tensors, write_checkpoint

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.weights import write_weights
from nemodiff.builder.compilers import checks, compile, tensorrt
from nemodiff.builder.compilers.choices import Choices
from nemodiff.builder.compilers.profiles import corners, shape
from nemodiff.builder.compilers.tensorrt import Job
from nemodiff.builder.inspect import describe
from nemodiff.cli import main
from nemodiff.contract import BuildConfig, cache_slots, inputs, outputs
from nemodiff.engine_info import read_engine
from nemodiff.errors import BuildError, EngineError
from nemodiff.plugins import OPS, SAMPLED
from nemodiff.plugins.tensorrt import api
from nemodiff.plugins.tensorrt.api import RTX_SMS, device_sm, library_folder, load
from nemodiff.plugins.tensorrt.launch import Kernels
from nemodiff.tensorrt_info import Kernel, Profile

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the trt extra"),
]
PLUGINS = Choices(plugins=True, sm=(89,))
TRITON_PTXAS = Path(str(importlib.util.find_spec("triton").origin)).parent / "backends" / "nvidia" / "bin" / "ptxas"
NO_DRIVER = pytest.mark.skipif(device_sm() is not None, reason="needs a machine without a GPU")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-chat for the default targets; read it, never change it."""
    return Builder(TINY_CHAT, tmp_path_factory.mktemp("rtx") / "tiny-chat", backend="tensorrt-rtx").run()


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "copy"))


def small(checkpoint: Path, **changes: Any) -> Builder:
    """A build of the small checkpoint for one target."""
    arguments = {"backend": "tensorrt-rtx", "choices": Choices(sm=(89,)), "max_seq_len": 128} | changes
    return Builder(checkpoint, checkpoint.parent / "engine", **arguments)


def edit(folder: Path, name: str, **values: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


@pytest.mark.parametrize(("sms", "plugins"), [(RTX_SMS, False), ((80, 121), True)], ids=["native", "plugin"])
def test_tiny_chat_is_built_for_every_target(tmp_path: Path, sms: tuple[int, ...], plugins: bool) -> None:
    """As plugins for two: `test_kernels_compile_for_every_card` has their kernels for the others."""
    flags = Choices(sm=sms, plugins=plugins)
    folder = Builder(TINY_CHAT, tmp_path / "engine", backend="tensorrt-rtx", choices=flags).run()
    about = read_engine(folder).manifest.tensorrt
    assert about is not None
    assert about.sms == sms
    ops = {"BlockAttention": 6, "ConfidenceCommit": 1}
    common = {"KV_CACHE_UPDATE": 12, "ROTARY_EMBEDDING": 12}
    if plugins:
        assert about.layers == {"plugin": ops, "native": common}
    else:
        assert about.layers == {"plugin": {}, "native": {**ops, **common, "ATTENTION_INPUT": 6}}
    data = (folder / "rank0.engine").read_bytes()
    assert len(data) == about.engine_bytes
    assert (b"ConfidenceCommit" in data) == plugins
    for sm in sms:
        kernels = Kernels(folder, about.kernels, sm)
        for op in (*(OPS if plugins else ()), SAMPLED):
            assert kernels.fit(op, read_engine(folder).model, "bf16")


def test_folder_holds_what_runs_and_nothing_else(engine: Path) -> None:
    info = read_engine(engine)
    carried = {p.name for p in TINY_CHAT.glob("*.json*")} - {"config.json"} | {"chat_template.jinja"}
    names = carried | {"config.json", "manifest.json", "model.onnx", "rank0.engine"}
    assert {p.name for p in engine.iterdir()} == names | {"kernels"}
    assert info.manifest.tensorrt is not None
    drawing = info.manifest.tensorrt.kernels  # what samples after the engine
    assert {(k.stage, k.sm) for k in drawing} == {(s.name, sm) for s in SAMPLED.stages for sm in (80, 86, 89, 120)}
    files = {kernel.file(suffix) for kernel in drawing for suffix in ("ptx", "cubin")}
    assert set(info.manifest.files) == names - {"config.json", "manifest.json"} | files
    assert (info.build.dtype, info.build.max_input_len) == ("bf16", 512)
    about = info.manifest.tensorrt
    assert about is not None
    assert about.sms == (80, 86, 89, 120)
    assert about.profiles == (Profile("block", 8, 64, 64), Profile("prefill", 8, 512, 512))
    assert (about.module, about.version) == ("tensorrt_rtx", info.manifest.versions["tensorrt_rtx"])
    graph = onnx.load(engine / "model.onnx", load_external_data=False).graph
    assert [v.name for v in graph.input] == [b.name for b in inputs(info.model, adapter=False)]
    assert [v.name for v in graph.output] == [b.name for b in outputs(info.model)]
    cache = graph.input[-1].type.tensor_type
    assert cache.elem_type == TensorProto.BFLOAT16
    assert [d.dim_value for d in cache.shape.dim[1:]] == [2, cache_slots(info.build), 64]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("plugins", [False, True], ids=["native", "plugin"])
def test_adapter_short_engine_and_no_logits(checkpoint: Path, dtype: Any, plugins: bool) -> None:
    flags = Choices(sm=(86, 120), plugins=plugins)
    folder = small(checkpoint, dtype=dtype, choices=flags, max_seq_len=40, max_batch_size=3, logits=False).run()
    info = read_engine(folder)
    assert info.has_adapter
    assert not info.build.gather_generation_logits
    about = info.manifest.tensorrt
    assert about is not None
    assert about.profiles == (Profile("block", 3, 64, 64),)
    graph = describe(folder)["graph"]
    assert "adapter" in graph["inputs"]
    assert "logits" not in graph["outputs"]


def test_profiles_keep_a_pass_within_limits(checkpoint: Path) -> None:
    builder = small(checkpoint, max_seq_len=2048, max_input_len=1024, max_batch_size=400)
    block, prefill = builder.profiles
    assert (block.max_batch_size, block.max_tokens) == (400, 64)
    vocabulary = builder.checkpoint.model.vocab_size
    logits = 4 * prefill.max_batch_size * prefill.max_rows * vocabulary
    assert logits <= 2**30 < logits + 4 * prefill.max_rows * vocabulary
    declared = compile.declared_shapes(builder.graph.proto)
    best, most = corners(dataclasses.replace(prefill, max_batch_size=2))[1:]
    assert [shape(declared[name], most) for name in ("rows", "visible")] == [(2, 1024), (2, 1024, 3)]
    assert shape(declared["k_cache_0"], best) == (1, *declared["k_cache_0"][1:])
    assert shape(declared["rows"], best) == (1, 1)


def test_bf16_weights_are_the_checkpoints_bits(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", dtype="bf16", hidden_size=70)
    builder = small(folder)
    path = tmp_path / "weights"
    written: list[int] = []
    assert write_weights(builder.graph, builder.tensors, path, written.append, hashed=False) == ""
    data = path.read_bytes()
    tensors = random_tensors(json.loads((folder / "config.json").read_text()), seed=0)
    for weight in builder.graph.weights:
        expected = tensors[weight.source].astype(ml_dtypes.bfloat16)
        expected = expected.T if weight.transposed else expected
        got = np.frombuffer(data, ml_dtypes.bfloat16, expected.size, weight.offset).reshape(expected.shape)
        np.testing.assert_array_equal(got.view(np.uint16), np.ascontiguousarray(expected).view(np.uint16))
    assert sum(written) == sum(w.nbytes for w in builder.graph.weights)


# The guards, each made to fail.


def test_an_input_that_the_parser_drops_is_refused(tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 parses Attention's nonpad_kv_seqlen and forgets it."""
    shape = ["B", 2, 8, 16]
    named = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("q", "k", "v", "y")]
    lengths = helper.make_tensor_value_info("lengths", TensorProto.INT64, ["B"])
    node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["y"], name="attention")
    graph = helper.make_graph([node], "dropped", [*named[:3], lengths], named[3:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path)
    rtx = load("tensorrt-rtx", BuildError)
    network = rtx.network(rtx.builder())
    assert rtx.parser(network).parse(path.read_bytes(), str(path)), rtx.errors()
    with pytest.raises(BuildError, match="input 'lengths' of the graph reaches no layer"):
        checks.check_inputs(network)


def test_a_cache_that_is_not_updated_in_place_is_refused(checkpoint: Path) -> None:
    builder = small(checkpoint)
    node = next(n for n in builder.graph.proto.graph.node if n.output[0] == "v_cache_1_out")
    node.op_type = "Identity"
    del node.input[1:]
    del node.attribute[:]
    with pytest.raises(BuildError, match="3 KV_CACHE_UPDATE layers, allowed: 4"):
        builder.run()
    assert not builder.output.exists()


def test_an_attention_that_is_none_is_refused(checkpoint: Path) -> None:
    builder = small(checkpoint)
    body = next(f for f in builder.graph.proto.functions if f.name == "BlockAttention").node
    attention = next(n for n in body if n.op_type == "Attention")
    attention.op_type = "Identity"
    del attention.input[1:]
    del attention.attribute[:]
    with pytest.raises(BuildError, match="0 ATTENTION_INPUT layers, allowed: 2"):
        builder.run()


@pytest.mark.parametrize(("creators", "missing"), [("nothing", "BlockAttention"), ("only_attention", "Confidence")])
def test_plugins_that_were_not_taken_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, creators: str, missing: str
) -> None:
    monkeypatch.setattr(tensorrt, "CREATORS", f"stand_ins.creators:{creators}")
    with pytest.raises(BuildError, match=rf"{missing}.* became native layers, asked for: plugin"):
        small(checkpoint, choices=PLUGINS).run()


def test_a_plugin_that_nobody_asked_for_is_refused(checkpoint: Path) -> None:
    builder = small(checkpoint)
    path = checkpoint.parent / "model.onnx"
    onnx.save(builder.graph.proto, path)
    (checkpoint.parent / "model.onnx.data").write_bytes(bytes(builder.graph.weight_bytes))
    values: dict[str, Any] = dict.fromkeys(f.name for f in Job.__dataclass_fields__.values())
    values |= {"backend": "tensorrt-rtx", "choices": Choices(), "attentions": 2, "caches": 4}
    code = f"""
import onnx
from nemodiff.plugins.tensorrt.register import register
from nemodiff.builder.compilers.checks import check_layers
from nemodiff.builder.compilers.choices import Choices
from nemodiff.builder.compilers.tensorrt import Job
from nemodiff.plugins.tensorrt.api import load
from nemodiff.errors import BuildError
api = load("tensorrt-rtx", BuildError)
register(api)
network = api.network(builder := api.builder())
proto = onnx.load({str(path)!r}, load_external_data=False)
assert api.parser(network).parse(proto.SerializeToString(), {str(path)!r})
try:
    check_layers(network, proto, Job(**{values!r}))
except BuildError as error:
    print(error)
"""
    fix = library_folder(checkpoint.parent)
    environment = os.environ | fix | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code]
    line = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout
    assert "became a plugin, asked for: native layers" in line


def test_without_the_second_library_name_the_process_dies(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensorrt, "library_folder", lambda folder: {})
    before = snapshot(tmp_path)
    with pytest.raises(BuildError, match="ended with signal SIGABRT"):
        small(checkpoint, choices=PLUGINS).run()
    assert snapshot(tmp_path) == before


# What ends a build leaves nothing.


@pytest.mark.parametrize(("creators", "end"), [("killed", "SIGKILL"), ("abort", "SIGABRT, having said 'terminate")])
def test_a_child_that_dies_leaves_nothing(
    checkpoint: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, creators: str, end: str
) -> None:
    monkeypatch.setattr(tensorrt, "CREATORS", f"stand_ins.creators:{creators}")
    output = str(checkpoint.parent / "engine")
    flags = ["--backend", "tensorrt-rtx", "--plugins", "--sm", "89"]
    refused(["build", str(checkpoint), "-o", output, *flags], f"signal {end}")


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_takes_its_child_along(checkpoint: Path, sign: signal.Signals) -> None:
    code = """
import contextlib, sys
from nemodiff.builder import build
from nemodiff.builder.compilers import tensorrt
from nemodiff.builder.compilers.choices import Choices
build.compiling_kernels = lambda *_: contextlib.nullcontext(tuple)  # which the child would only have registered
tensorrt.CREATORS = "stand_ins.creators:wait"
build.Builder(sys.argv[1], sys.argv[2], backend="tensorrt-rtx", choices=Choices(plugins=True, sm=(89,))).run()
"""
    pid_file = checkpoint.parent / "pid"
    before = {p.name for p in checkpoint.parent.iterdir()}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "NEMODIFF_TEST_PID": str(pid_file),
    }
    command = [sys.executable, "-c", code, str(checkpoint), str(checkpoint.parent / "engine")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    eventually(lambda: pid_file.exists() and pid_file.read_text() != "")
    child = int(pid_file.read_text())
    process.send_signal(sign)
    process.wait(timeout=PATIENCE)
    eventually(lambda: not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text())
    eventually(lambda: {p.name for p in checkpoint.parent.iterdir()} == before | {"pid"})


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_ended_build_takes_the_compiling_of_kernels_along(checkpoint: Path, sign: signal.Signals) -> None:
    """An assembler that never ends stands for many kernels: it is a child of a child of the child."""
    folder = checkpoint.parent
    began = folder / "pid"
    script = folder / "ptxas"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) exec {TRITON_PTXAS} --version;; esac\n'
        f"echo $$ > {began}.new && mv {began}.new {began} && exec sleep 600\n"
    )
    script.chmod(0o755)
    (folder / "tmp").mkdir()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "TRITON_PTXAS_PATH": str(script),
        "TMPDIR": str(folder / "tmp"),
    }
    before = {p.name for p in folder.iterdir()} | {"pid"}
    command = [sys.executable, "-m", "nemodiff", "build", checkpoint, "-o", folder / "engine", "--max-seq-len", "128"]
    process = subprocess.Popen(
        [*map(str, command), "--backend", "tensorrt-rtx", "--plugins", "--sm", "89"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    eventually(began.exists)
    process.send_signal(sign)
    said = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == (-sign if sign == signal.SIGKILL else 128 + sign)
    assert [line for line in said.splitlines() if "Traceback" in line or "Error" in line] == []
    assembler = Path(f"/proc/{int(began.read_text())}/stat")
    eventually(lambda: not assembler.exists() or " Z " in assembler.read_text())
    eventually(lambda: {p.name for p in folder.iterdir()} == before)
    if sign != signal.SIGKILL:
        assert list((folder / "tmp").iterdir()) == []


# The plan, inspect, and loading.


def test_dry_run_counts_for_the_gpu(tmp_path: Path) -> None:
    flags = ["--backend", "tensorrt-rtx", "--max-batch-size", "90", "--dry-run"]
    arguments = ["build", str(TINY_CHAT), "-o", str(tmp_path / "e"), *flags]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    plan = json.loads(result.stdout)
    builder = Builder(TINY_CHAT, tmp_path / "e", backend="tensorrt-rtx", max_batch_size=90)
    weights = builder.graph.weight_bytes
    logits = 4 * 90 * 512 * builder.checkpoint.model.vocab_size
    assert builder.profiles[-1] == Profile("prefill", 90, 512, 512)
    row = plan["kv_bytes_per_token"] * cache_slots(BuildConfig(**plan["build"]))
    assert plan["kv_bytes_per_token"] == 2 * 6 * 2 * 64 * 2
    assert (plan["memory_loaded"], plan["disk_needed"]) == (weights + logits, 2 * weights)
    assert plan["build_memory"] > weights
    assert plan["rows_that_fit"]["8"] == (7 * 2**30 - weights - logits) // row
    assert plan["rows_that_fit"]["80"] == 90
    text = CliRunner().invoke(main, arguments).stdout
    assert f"{plan['rows_that_fit']['8']} in 8 GiB" in text
    assert "90 in 12 GiB (rows" in text
    assert re.search(r"GiB of GPU memory for .*; this machine has [\d.]+ GiB of main memory\n", text)
    assert "of GPU memory for weights, logits and all rows; to compile" in text
    few = json.loads(CliRunner().invoke(main, [*arguments, "--no-logits", "--json"]).stdout)
    assert few["memory_loaded"] == weights
    assert list(tmp_path.iterdir()) == []


def test_inspect(engine: Path) -> None:
    shown = json.loads(CliRunner().invoke(main, ["inspect", str(engine), "--json"]).stdout)
    assert shown["engine"]["backend"] == "tensorrt-rtx"
    assert shown["tensorrt"]["sms"] == [80, 86, 89, 120]
    assert [p["name"] for p in shown["tensorrt"]["profiles"]] == ["block", "prefill"]
    assert shown["tensorrt"]["layers"]["native"]["BlockAttention"] == 6
    assert shown["kv_bytes_per_token"] == 3072
    text = CliRunner().invoke(main, ["inspect", str(engine)]).stdout
    for fragment in (
        "engine       tensorrt-rtx, bf16",
        "for SM 80, 86, 89, 120",
        "TensorRT-RTX 1.7 runs on no SM 90 card, such as H100 and H200 (2026-11-27)",
        "profiles     block up to 8 rows of 64 tokens, 64 predicted; prefill up to 8 rows of 512",
        "layers       native 6 BlockAttention, 1 ConfidenceCommit, 6 ATTENTION_INPUT, 12 KV_CACHE_UPDATE",
        "rank0.engine",
        "KV cache     3,072 bytes per token",
    ):
        assert fragment in text


def test_inspect_shows_kernels_by_target(copy: Path) -> None:
    about = json.loads((copy / "manifest.json").read_text())["tensorrt"]
    kernel = Kernel("SampledCommitScan", 80, "split", 8, 4096, 96, 0, ("*bf16 q", "i32 S"))
    about["kernels"] = [dataclasses.asdict(dataclasses.replace(kernel, sm=sm)) for sm in (80, 89)]
    edit(copy, "manifest.json", tensorrt=about)
    text = CliRunner().invoke(main, ["inspect", str(copy)], catch_exceptions=False).stdout
    assert "kernels      SM 80: SampledCommitScan (96 registers, 4096 bytes shared, 0 spilled)\n" in text
    assert "kernels      SM 89: " in text


@NO_DRIVER
@pytest.mark.parametrize("module", ["tensorrt_rtx", "no_such_tensorrt_rtx"])
def test_inspect_on_a_gpu_needs_no_engine_that_loads(
    engine: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """The package may be missing where such a GPU is, or of another version, or the driver too old as here."""
    monkeypatch.setattr(api, "device_sm", lambda: 89)
    monkeypatch.setitem(api.MODULES, "tensorrt-rtx", module)
    shown = CliRunner().invoke(main, ["inspect", str(engine)], catch_exceptions=False)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "in engine" not in shown.stdout


@NO_DRIVER
def test_engine_does_not_load_without_a_gpu(engine: Path, refused: Refused) -> None:
    refused(["run", str(engine), "-p", "Hello"], str(engine))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensorrt": None}, "field tensorrt does not belong to backend tensorrt-rtx"),
        ({"tensorrt": {}}, "are incomplete"),
        ({"tensorrt": []}, "are incomplete"),
        ({"backend": "onnxruntime"}, "dtype is bf16 on onnxruntime, allowed: f32, f16"),
        ({"backend": "other"}, "built for backend 'other', allowed: onnxruntime, tensorrt-rtx, tensorrt"),
    ],
)
def test_broken_manifest(copy: Path, change: dict[str, Any], message: str) -> None:
    edit(copy, "manifest.json", **change)
    with pytest.raises(EngineError, match=message):
        read_engine(copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("engine_bytes", None),
        ("engine_bytes", -1),
        ("module", 3),
        ("layers", {"native": 3}),
        ("layers", {"native": {"KV_CACHE_UPDATE": None}}),
        ("flags", [1]),
        ("profiles", []),
        ("profiles", [{"name": "block", "max_batch_size": "8", "max_tokens": 64, "max_rows": 64}]),
    ],
)
def test_what_the_manifest_says_of_tensorrt_is_checked(copy: Path, refused: Refused, name: str, value: Any) -> None:
    about = json.loads((copy / "manifest.json").read_text())["tensorrt"]
    edit(copy, "manifest.json", tensorrt=about | {name: value})
    for command in (["inspect", str(copy)], ["run", str(copy), "-p", "Hello"]):
        refused(command, "config.json and manifest.json are incomplete (", "build it again")


def test_every_file_that_runs_is_in_the_manifest(copy: Path) -> None:
    """A file that is not could be missing or another's, and nobody would notice before a pass."""
    files = json.loads((copy / "manifest.json").read_text())["files"]
    needed = [name for name in files if name.endswith((".cubin", ".engine"))]
    assert len(needed) == 9
    for name in (needed[0], "rank0.engine"):
        edit(copy, "manifest.json", files={other: entry for other, entry in files.items() if other != name})
        with pytest.raises(EngineError, match=f"lists no {re.escape(name)}, which the engine needs; build it again"):
            read_engine(copy)
    edit(copy, "manifest.json", files=files | {"rank0.engine": {"bytes": 0}})
    (copy / "rank0.engine").write_bytes(b"")
    with pytest.raises(EngineError, match=r"lists no rank0\.engine"):
        read_engine(copy)


def test_broken_engine_file(copy: Path) -> None:
    (copy / "rank0.engine").write_bytes(b"short")
    with pytest.raises(EngineError, match=r"rank0.engine: 5 bytes, the manifest says"):
        read_engine(copy)


def test_an_engine_of_schema_1_still_answers(tiny_engine: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(tiny_engine, tmp_path / "old"))
    graph = onnx.load(old / "model.onnx", load_external_data=False)
    assert graph.graph.input.pop().name == "memory_pattern"
    onnx.save(graph, old / "model.onnx")
    manifest, config = (json.loads((old / f"{name}.json").read_text()) for name in ("manifest", "config"))
    del manifest["tensorrt"]
    manifest["files"]["model.onnx"]["bytes"] = (old / "model.onnx").stat().st_size
    for name in ("max_input_len", "gather_generation_logits"):
        del config["build_config"][name]
    (old / "manifest.json").write_text(json.dumps(manifest | {"schema": 1}))
    (old / "config.json").write_text(json.dumps(config))
    answers = [nemodiff.generate(nemodiff.load(f), "Count from 3 to 9.").token_ids for f in (old, tiny_engine)]
    assert answers[0] == answers[1]


def test_a_compiled_engine_replaces_another(checkpoint: Path) -> None:
    folder = Builder(checkpoint, checkpoint.parent / "engine").run()
    assert small(checkpoint).run() == folder
    assert read_engine(folder).manifest.backend == "tensorrt-rtx"
    assert not (folder / "model.onnx.data").exists()
