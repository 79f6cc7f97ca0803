"""`nemodiff verify`: references, records, refusals, and the backends that a CPU can show."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from conftest import Refused, output_of
from safetensors.numpy import load_file, save_file
from stand_ins import gpu_driver
from stand_ins.checkpoints import TINY_CHAT, write_adapter, write_checkpoint
from stand_ins.planted import GRAPH
from stand_ins.quantized_checkpoints import write as write_quantized

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.weights import write_weights
from nemodiff.builder.graph.graph import build_graph
from nemodiff.cli import main
from nemodiff.commands import verify as command
from nemodiff.engine_folder import VERIFY_FILE, WEIGHTS_FILE
from nemodiff.engine_info import read_engine
from nemodiff.plugins.tensorrt.api import MODULES
from nemodiff.runtime.engines.onnxruntime.cache import OnnxRuntimeCache
from nemodiff.runtime.engines.tensorrt.device import Device
from nemodiff.runtime.engines.tensorrt.engine import TensorRTEngine
from nemodiff.tensorrt_info import Profile, TensorRTInfo
from nemodiff.verification.arithmetic import STORED, Arithmetic
from nemodiff.verification.layers import blame, compare_layers
from nemodiff.verification.network import Network
from nemodiff.verification.recorder import columns
from nemodiff.verification.replay import EngineReference
from nemodiff.verification.report import Report
from nemodiff.verification.script import Block, Script
from nemodiff.verification.verify import verify
from nemodiff.verification.weights import Weights

PROMPTS = [[130 + (i * 7) % 200 for i in range(17)], [140 + (i * 3) % 200 for i in range(9)]]
SHORT = ("-p", "Count from 3 to 9.", "--max-new-tokens", "5", "--threads", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("verify") / "checkpoint", dtype="f32")
    write_adapter(folder, rank=4, alpha=8, strength=0.1)
    return folder


def network(checkpoint: Path) -> Network:
    return Network(Weights(checkpoint, checkpoint / "linear_spec_lora"), Arithmetic(np.float32, STORED["f32"]))


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_keeps_what_it_finds_and_inspect_shows_it(checkpoint: Path, tmp_path: Path) -> None:
    engine = Builder(checkpoint, tmp_path / "engine", block_length=8).run()
    result = run(engine, "--against", checkpoint, *SHORT, "--json")
    assert result.exit_code == 0, result.stdout
    shown = json.loads(result.stdout)
    record = json.loads((engine / VERIFY_FILE).read_text())
    assert record.pop("engine")
    assert record == shown
    assert (shown["ok"], shown["against"], shown["precision"], shown["findings"]) == (True, "checkpoint", "f64", [])
    assert shown["modes"]["linear_spec"]["equal"] == 5
    assert f"verified     ok on {shown['date']} against checkpoint in f64" in output_of("inspect", str(engine))
    assert json.loads(output_of("inspect", str(engine), "--json"))["verified"]["ok"]
    # It is no file of the engine's own: the engine runs, is built anew without it, and a foreign record is not shown.
    shutil.copy(engine / VERIFY_FILE, tmp_path)
    assert "2" in output_of("run", str(engine), "-p", "Hello", "--max-new-tokens", "2", "--json")
    Builder(checkpoint, engine, block_length=4).run()
    assert not (engine / VERIFY_FILE).exists()
    shutil.copy(tmp_path / VERIFY_FILE, engine)
    assert "verified" not in output_of("inspect", str(engine))
    (engine / VERIFY_FILE).write_text("[")
    assert "verified" not in output_of("inspect", str(engine))


def test_something_wrong_is_exit_code_1_and_kept_too(checkpoint: Path, tmp_path: Path) -> None:
    engine = Builder(checkpoint, tmp_path / "engine", block_length=8).run()
    other = write_checkpoint(tmp_path / "other", dtype="f32", seed=3)
    shutil.copytree(checkpoint / "linear_spec_lora", other / "linear_spec_lora")
    result = run(engine, "--against", other, *SHORT)
    assert result.exit_code == 1
    assert "wrong        prompt 0, ar, pass 0 (prefill)" in result.stdout
    assert result.stderr.rstrip().endswith(f"kept in {engine / VERIFY_FILE}")
    assert "verified     WRONG on" in output_of("inspect", str(engine))


def test_of_other_weights_than_the_engines_a_line_says_so(checkpoint: Path, tmp_path: Path) -> None:
    engine = Builder(checkpoint, tmp_path / "engine", block_length=8).run()
    other = write_checkpoint(tmp_path / "other", dtype="f32", seed=3)
    shutil.copytree(checkpoint / "linear_spec_lora", other / "linear_spec_lora")
    told = "not the weights of 'checkpoint' that the engine was built from (model.safetensors differs)"
    for against in (other, Builder(other, tmp_path / "of-other", block_length=8).run()):
        assert run(engine, "--against", against, *SHORT).stdout.splitlines()[-1] == f"note         {against}: {told}"
        shown = json.loads(run(engine, "--against", against, *SHORT, "--json").stdout)
        assert shown["other_weights"] == f"{against}: {told}"
    write_adapter(write_checkpoint(tmp_path / "third", dtype="f32"), rank=4, alpha=8, strength=0.5)
    adapter = tmp_path / "third" / "linear_spec_lora"
    changed = run(engine, "--against", checkpoint, "--adapter", adapter, *SHORT)
    assert changed.exit_code == 1
    assert "(linear_spec_lora/adapter_model.safetensors differs)" in changed.stdout
    right = run(engine, "--against", checkpoint, *SHORT, "--json")
    assert json.loads(right.stdout)["other_weights"] is None
    (engine / WEIGHTS_FILE).write_bytes(bytes((engine / WEIGHTS_FILE).stat().st_size))
    broken = run(engine, "--against", checkpoint, *SHORT)
    assert broken.exit_code == 1
    assert "note " not in broken.stdout


@pytest.mark.torch
def test_an_engine_is_compared_with_another_and_with_itself(checkpoint: Path, tmp_path: Path) -> None:
    one = Builder(checkpoint, tmp_path / "one", block_length=8).run()
    half = Builder(checkpoint, tmp_path / "half", dtype="f16", block_length=8).run()
    torch = Builder(checkpoint, tmp_path / "torch", backend="torch", dtype="bf16", block_length=8).run()
    for engine, against in ((one, torch), (torch, one), (half, one), (torch, half)):
        result = run(engine, "--against", against, *SHORT)
        assert result.exit_code == 0, result.stdout
    for engine in (one, half, torch):
        result = run(engine, *SHORT)
        assert result.exit_code == 0, result.stdout
        assert "against itself" in result.stderr


def test_what_cannot_be_compared_is_refused(
    checkpoint: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = str(Builder(checkpoint, tmp_path / "engine").run())
    larger = write_checkpoint(tmp_path / "larger", num_hidden_layers=3)
    bare = Path(shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("linear_spec_lora")))
    refused(["verify", engine, "--save-outputs", "x.json"], "--save-outputs goes with --layers", code=2)
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    refused(["verify", engine, "--layers"], "--layers needs Polygraphy", 'pip install "nemodiff[verify]"')
    refused(["verify", engine, "--max-new-tokens", "99999"], "max_new_tokens is 99999")
    refused(["verify", engine, "-p", "x", "-p", "9 " * 40000], "the prompt is too long: ")
    # What is behind the line about what is verified.
    for against, word in ((larger, "num_layers is 3 and the engine's is 2"), (bare, "give --adapter")):
        result = run(engine, "--against", against)
        assert result.exit_code == 1
        assert word in result.stderr
    result = run(engine, "--against", bare, "--adapter", checkpoint / "linear_spec_lora", *SHORT)
    assert result.exit_code == 0
    assert run(engine, "--adapter", checkpoint / "linear_spec_lora").exit_code == 1


def test_a_folder_that_cannot_be_written_is_verified_all_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    engine = Builder(checkpoint, tmp_path / "engine", block_length=8).run()
    monkeypatch.setattr(command, "write_record", full)
    result = run(engine, *SHORT)
    assert result.exit_code == 0
    assert "not kept, " in result.stderr
    assert "(No space left on device)" in result.stderr


@pytest.mark.parametrize("fails", ["probe", "draft", "every pass"])
@pytest.mark.parametrize("against", [False, True])
def test_an_engine_that_fails_is_wrong_wherever_it_does(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, against: bool
) -> None:
    engine = Builder(checkpoint, tmp_path / "engine", block_length=8).run()
    forward = OnnxRuntimeCache.forward

    def failing(cache: OnnxRuntimeCache, passes: Any, first: int = 0) -> Any:
        size = passes[0].ids.size
        probe = passes[0].kind == "prefill" and passes[0].predicted.size == size
        if size > 2 and {"probe": probe, "draft": passes[0].kind == "draft", "every pass": True}[fails]:
            raise RuntimeError("out of order")
        return forward(cache, passes, first)

    monkeypatch.setattr(OnnxRuntimeCache, "forward", failing)
    result = run(engine, *(("--against", checkpoint) if against else ()), *SHORT, "--layers")
    assert result.exit_code == 1
    assert "fails (out of order)" in result.stdout
    findings = json.loads((engine / VERIFY_FILE).read_text())["findings"]
    assert all("local variable" not in finding for finding in findings)
    assert (fails != "draft" and not against) == ("the reference: fails (out of order)" in findings)


QUANTIZED: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("gptq", 32, False, {}),
    ("gptq8", 32, False, {}),
    ("awq", 32, False, {}),
    ("pack", 32, True, {}),
    ("pack", 32, False, {"backend": "torch"}),
    ("pack8", 32, True, {}),
    ("int8", 0, True, {}),
    ("int8", 0, True, {"quantization": "int4"}),
    ("fp8", 0, True, {"backend": "torch", "dtype": "f32"}),
    ("modelopt", 0, True, {"backend": "torch"}),
    ("modelopt-rows", 0, True, {}),
    ("nvfp4", 16, True, {}),
]


@pytest.mark.torch
@pytest.mark.parametrize(("form", "group", "symmetric", "choices"), QUANTIZED, ids=str)
def test_a_quantized_checkpoint_is_a_reference(
    tmp_path: Path, form: str, group: int, symmetric: bool, choices: dict[str, Any]
) -> None:
    truth = write_quantized(tmp_path / "checkpoint", form, group, symmetric)
    weights = Weights(tmp_path / "checkpoint", None)
    for name, values in truth.items():
        np.testing.assert_array_equal(weights.read(name), values)
    engine = Builder(tmp_path / "checkpoint", tmp_path / "engine", block_length=8, **choices).run()
    result = run(engine, "--against", tmp_path / "checkpoint", *SHORT, "--layers", "--device", "cpu")
    assert result.exit_code == 0, result.stdout
    write_quantized(tmp_path / "other", form, group, symmetric, seed=1)
    assert run(engine, "--against", tmp_path / "other", *SHORT, "--device", "cpu").exit_code == 1


def test_values_that_cannot_be_written_hide_no_verdict(checkpoint: Path, tmp_path: Path) -> None:
    engine = Builder(checkpoint, tmp_path / "engine", block_length=8).run()
    result = run(engine, *SHORT, "--layers", "--save-outputs", "/dev/full")
    assert result.exit_code == 1
    assert "tensors within rounding" in result.stdout
    assert json.loads((engine / VERIFY_FILE).read_text())["ok"]
    assert result.stderr.splitlines()[-1] == "Error: /dev/full: No space left on device; check the path and its disk"


def test_polygraphys_tools_read_the_values_of_all_layers(checkpoint: Path, tmp_path: Path) -> None:
    engine = Builder(checkpoint, tmp_path / "engine", block_length=8).run()
    result = run(engine, "--against", checkpoint, *SHORT, "--layers", "--save-outputs", tmp_path / "values.json")
    assert result.exit_code == 0, result.stdout
    assert "tensors within rounding" in result.stdout
    tool = [Path(sys.executable).parent / "polygraphy", "inspect", "data", tmp_path / "values.json"]
    shown = subprocess.run(tool, capture_output=True, text=True, timeout=120)
    for text in ("reference", "engine", "graph", "layers.1.mlp.residual", "v_cache_1"):
        assert text in shown.stdout, shown.stdout + shown.stderr


def without_logits(engine: nemodiff.LoadedEngine) -> nemodiff.LoadedEngine:
    build = dataclasses.replace(engine.info.build, gather_generation_logits=False)
    engine.backend.info = dataclasses.replace(engine.info, build=build)
    return engine


def test_an_engine_without_logits_is_judged_by_tokens_and_probabilities(checkpoint: Path, tmp_path: Path) -> None:
    folder = Builder(checkpoint, tmp_path / "engine", block_length=8).run()
    engine = without_logits(nemodiff.load(folder, threads=1))
    for reference in (network(checkpoint), EngineReference(engine.backend, engine.backend)):
        report, _ = verify(engine, PROMPTS, reference, max_new_tokens=5)
        assert report.ok, report.lines()
    wrong = write_checkpoint(tmp_path / "other", dtype="f32", seed=3)
    shutil.copytree(checkpoint / "linear_spec_lora", wrong / "linear_spec_lora")
    assert not verify(engine, PROMPTS, network(wrong), max_new_tokens=5)[0].ok


def layers_of(engine: nemodiff.LoadedEngine, reference: Network) -> Report:
    report, scripts = verify(engine, PROMPTS, reference, max_new_tokens=5)
    few = [scripts[0].shortened(4)]
    report.layers, _ = compare_layers(engine.backend, engine.folder, reference, few, columns(reference_vocab(engine)))
    report.blame = blame(report.layers)
    return report


def reference_vocab(engine: nemodiff.LoadedEngine) -> int:
    return engine.info.model.vocab_size


@pytest.mark.torch
@pytest.mark.parametrize(
    ("weight", "blamed"),
    [
        (None, None),
        ("layers.1.self_attn.k_proj.weight", "k_proj, its rotation, or the cache write of layer 1"),
        ("layers.1.self_attn.v_proj.weight", "v_proj or the cache write of layer 1"),
        ("layers.0.self_attn.o_proj.weight", "attention of layer 0"),
        ("layers.1.mlp.down_proj.weight", "the MLP of layer 1"),
        ("embed_tokens.weight", "the embedding"),
        ("norm.weight", "the last norm or the head"),
    ],
)
def test_a_torch_engine_is_blamed_by_k_and_v_and_hidden_states(
    checkpoint: Path, tmp_path: Path, weight: str | None, blamed: str | None
) -> None:
    folder = Builder(checkpoint, tmp_path / "engine", backend="torch", dtype="f32", block_length=8).run()
    if weight is not None:
        tensors = load_file(folder / "model.safetensors")
        tensors[weight] = tensors[weight] * np.float32(1.001)
        save_file(tensors, folder / "model.safetensors")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["model.safetensors"]["bytes"] = (folder / "model.safetensors").stat().st_size
        (folder / "manifest.json").write_text(json.dumps(manifest))
    report = layers_of(nemodiff.load(folder, device="cpu"), network(checkpoint))
    assert (report.ok, report.blame) == (weight is None, blamed)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (None, "tensorrt-rtx"),
        (None, "tensorrt"),
        ("swapped rotation", "tensorrt-rtx"),
        ("a residual dropped", "tensorrt"),
        ("a span one slot short", "tensorrt-rtx"),
    ],
)
def test_a_tensorrt_engine_is_looked_into_through_its_caches(
    checkpoint: Path, tmp_path: Path, name: str | None, backend: Any
) -> None:
    """The driver and TensorRT are stand-ins, so the paths are shown and not the numbers of a GPU."""
    plain = Builder(checkpoint, tmp_path / "plain", max_seq_len=128, max_batch_size=4, block_length=8).run()
    folder = Path(shutil.copytree(plain, tmp_path / "compiled"))
    builder = Builder(checkpoint, tmp_path / "none")
    adapter = builder.checkpoint.adapter
    assert adapter is not None
    graph = build_graph(read_engine(plain).model, "f32", adapter.rank, adapter.scale, capacity=256)
    change: Callable[[Any], None] = GRAPH[name][0] if name else lambda proto: None
    change(graph.proto.graph)
    onnx.save(graph.proto, folder / "model.onnx")
    write_weights(graph, builder.tensors, folder / "model.onnx.data", lambda nbytes: None)
    (folder / "rank0.engine").write_bytes(b"played by ONNX Runtime")
    info = read_engine(plain)
    profiles = (Profile("block", 4, 64, 64), Profile("prefill", 2, 128, 128))
    about = TensorRTInfo(MODULES[backend], "1.7.1.116", (86, 89), profiles, "native", {}, (), 22)
    info = dataclasses.replace(info, manifest=dataclasses.replace(info.manifest, backend=backend, tensorrt=about))
    driver = gpu_driver.Driver()
    api, _ = gpu_driver.make_api(folder, info, driver)
    loaded = TensorRTEngine(folder, info, Device(0, driver), api=api)
    engine = dataclasses.replace(nemodiff.load(plain), folder=folder, backend=loaded)
    report = layers_of(engine, network(checkpoint))
    assert report.ok == (name is None), report.lines()
    expected = {
        "swapped rotation": "k_proj, its rotation, or the cache write of layer 1",
        "a residual dropped": "what enters layer 1: its input norm, or attention or MLP before it",
        "a span one slot short": "what enters layer 1: its input norm, or attention or MLP before it",
    }
    assert report.blame == (expected[name] if name else None)


def test_a_script_tells_passes_of_the_text_from_blocks() -> None:
    script = Script([5, 6, 7, 8])
    ramp = np.arange(1, 3, dtype=np.int32)
    causal = np.stack([ramp + 1, 0 * ramp, 0 * ramp], axis=1)
    gate = np.zeros(2, np.float32)
    assert script.place(Block(1, np.array([6, 7], np.int32), ramp, causal, gate)) == 1
    other = Block(1, np.array([6, 9], np.int32), ramp, causal, gate)
    assert (script.place(other), script.size) == (4, 6)
    both = np.array([[3, 0, 0]] * 2, np.int32)
    assert script.place(Block(1, np.array([6, 7], np.int32), ramp, both, gate)) == 6
    assert script.place(Block(1, np.array([6, 7], np.int32), ramp, causal, np.array([0, 1], np.float32))) == 8
    assert script.place(Block(1, np.array([6, 7], np.int32), ramp + 3, causal, gate)) == 10
    assert (script.place(other), len(script.blocks)) == (4, 4)


@pytest.mark.parametrize(("quantization", "most"), [("fp8", 0.04), ("int8", 0.01), ("int4", 0.12)])
def test_the_network_rounds_to_the_grid_of_an_engine(quantization: str, most: float) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (48, 64)).astype(np.float32)
    x = rng.normal(0, 1, (5, 64)).astype(np.float32)
    arithmetic = Arithmetic(np.float32, np.float32, quantization)
    for part, inputs in (("projection", quantization != "fp8"), ("head", quantization != "fp8"), ("other", False)):
        stored = arithmetic.weight(weight, part)  # type: ignore[arg-type]
        rounded = part == "projection" or (part == "head" and inputs)
        error = np.abs(stored - weight).mean() / np.abs(weight).mean()
        assert (0 < error < most) if rounded else error == 0
        assert np.array_equal(arithmetic.inputs(x, part), x) != inputs  # type: ignore[arg-type]
    # int4 has 16 values per group, int8 one step per output.
    stored = arithmetic.weight(weight, "projection")
    assert len(np.unique(stored[0, :32])) <= {"fp8": 32, "int8": 32, "int4": 17}[quantization]


def test_threads_of_the_reference_change_no_bit(checkpoint: Path) -> None:
    weights = Weights(checkpoint, checkpoint / "linear_spec_lora")
    scripts = [Script(list(range(5, 5 + size))) for size in (40, 3, 17)]
    judged = Arithmetic(np.float32, STORED["bf16"])
    one, many = (Network(weights, judged, threads).answer(scripts, np.arange(8), states=True) for threads in (1, 3))
    for answers in zip(one, many, strict=True):
        a, b = map(dataclasses.asdict, answers)
        assert [len(a["token"]), len(a["states"]) > 10] == [len(b["logits"]), True]
        for name in a:
            np.testing.assert_equal(a[name], b[name])


def test_the_reference_is_computed_without_threads_of_blas(tiny_engine: Path) -> None:
    """They spin between small products, as many as the machine has cores."""
    pytest.importorskip("threadpoolctl")
    script = (
        "import sys, threadpoolctl, nemodiff.cli; nemodiff.cli.main(sys.argv[1:], standalone_mode=False); "
        "print([one['num_threads'] for one in threadpoolctl.threadpool_info() if one['user_api'] == 'blas'])"
    )
    words = ["verify", tiny_engine, "--against", TINY_CHAT, "-p", "x", "--max-new-tokens", "1", "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[1]"
