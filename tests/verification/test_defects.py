"""Planted defects: each is caught, and named to the op where the graph can be looked into; honest rounding is not."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from stand_ins import planted
from stand_ins.checkpoints import write_checkpoint
from stand_ins.torch_pair import EARLY, MODELS, adapted
from stand_ins.vision import write_vision_checkpoint

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.engine_info import read_engine
from nemodiff.runtime.batching.neighbours import NeighbouringRows
from nemodiff.runtime.batching.rows import Rows
from nemodiff.runtime.engines.engine import Cache, Engine
from nemodiff.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from nemodiff.runtime.engines.passes import Pass, Prediction, bidirectional
from nemodiff.runtime.requests.sequence import Sequence as Request
from nemodiff.verification.arithmetic import STORED, Arithmetic
from nemodiff.verification.layers import blame, compare_layers
from nemodiff.verification.network import Network
from nemodiff.verification.prompts import QUESTIONS, token_ids
from nemodiff.verification.recorder import columns
from nemodiff.verification.replay import EngineReference
from nemodiff.verification.report import Report
from nemodiff.verification.verify import verify
from nemodiff.verification.weights import Weights

PROMPTS = [[130 + (i * 7 + j) % 200 for i in range(21)] for j in (0, 5)]
TOKENS = 9


@dataclasses.dataclass(frozen=True)
class Setup:
    """A small random model with every feature of positions, its engine and its reference."""

    checkpoint: Path
    folder: Path
    network: Network


def network(
    checkpoint: Path, dtype: str = "f32", quantization: str | None = None, kv_bits: str | None = None
) -> Network:
    adapter = checkpoint / "linear_spec_lora"
    judged = Arithmetic(np.float32, STORED[dtype], quantization, kv_bits=kv_bits)
    return Network(Weights(checkpoint, adapter if adapter.is_dir() else None), judged)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    work = tmp_path_factory.mktemp("verify")
    # Every frequency band and some steps of the query scale within a short text, and a norm that feels its epsilon.
    changes = {"rope_parameters": EARLY, "rms_norm_eps": 0.05, "hidden_size": 24}
    checkpoint = adapted(write_checkpoint(work / "checkpoint", seed=2, dtype="f32", **changes), 0.1)
    folder = Builder(checkpoint, work / "engine", block_length=8).run()
    return Setup(checkpoint, folder, network(checkpoint))


def judged(engine: nemodiff.LoadedEngine, reference: Network) -> Report:
    """What a short verification finds."""
    report, scripts = verify(engine, PROMPTS, reference, max_new_tokens=TOKENS)
    few = [scripts[0].shortened(6)]
    sample = columns(engine.info.model.vocab_size)
    report.layers, _ = compare_layers(engine.backend, engine.folder, reference, few, sample)
    report.blame = blame(report.layers)
    return report


def with_graph(setup: Setup, folder: Path, change: Callable[[onnx.ModelProto], None]) -> nemodiff.LoadedEngine:
    """The engine with a changed graph; the file keeps the size that the manifest gives."""
    shutil.copytree(setup.folder, folder, copy_function=os.link)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto)
    (folder / "model.onnx").unlink()
    onnx.save(proto, folder / "model.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"]["bytes"] = (folder / "model.onnx").stat().st_size
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    info = read_engine(folder)
    # Not by load, which would find a stuck gate.
    return dataclasses.replace(nemodiff.load(setup.folder), folder=folder, backend=OnnxRuntimeEngine(folder, info, 1))


def test_an_honest_engine_is_right_in_every_layer(setup: Setup) -> None:
    report = judged(nemodiff.load(setup.folder, threads=1), setup.network)
    assert (report.ok, report.blame, report.findings) == (True, None, [])
    assert {layer["name"] for layer in report.layers} >= {"embed_tokens", "layers.1.mlp.residual", "logits"}
    assert set(report.passes) == {"prefill", "decode", "draft", "verify", "denoise", "commit"}
    assert all(0 < tally.usual < 1.5 for tally in report.passes.values())


@pytest.mark.parametrize("name", list(planted.GRAPH))
def test_a_wrong_graph_is_caught_and_named(setup: Setup, tmp_path: Path, name: str) -> None:
    change, op = planted.GRAPH[name]
    report = judged(with_graph(setup, tmp_path / "engine", lambda proto: change(proto.graph)), setup.network)
    assert not report.ok
    assert not all(tally.ok for tally in report.passes.values()), "caught by the layers alone"
    assert report.blame == op


@pytest.mark.parametrize("name", list(planted.COMMIT))
def test_a_wrong_commit_rule_is_caught_and_no_layer_blamed(setup: Setup, tmp_path: Path, name: str) -> None:
    change, word = planted.COMMIT[name]
    report = judged(with_graph(setup, tmp_path / "engine", change), setup.network)
    assert not report.ok
    assert any(word in finding for finding in report.findings)
    assert report.blame is None


@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_a_changed_weight_is_named(setup: Setup, tmp_path: Path, value: float) -> None:
    engine = with_graph(setup, tmp_path / "engine", lambda proto: None)
    proto = onnx.load(engine.folder / "model.onnx", load_external_data=False)
    weight = next(one for one in proto.graph.initializer if one.name == "layers.1.self_attn.qkv_proj.weight")
    offset = int(next(entry.value for entry in weight.external_data if entry.key == "offset"))
    offset += 4 * (weight.dims[1] - 1)  # the last output of the first input is v's
    data = bytearray((engine.folder / "model.onnx.data").read_bytes())
    data[offset : offset + 4] = np.float32(value).tobytes()
    (engine.folder / "model.onnx.data").unlink()
    (engine.folder / "model.onnx.data").write_bytes(data)
    report = judged(nemodiff.load(engine.folder, threads=1), setup.network)
    assert (report.ok, report.blame) == (False, "layers.1.self_attn.v_proj")
    assert "NaN" not in json.dumps(report.as_dict())


class Around:
    """An engine whose caches go through `change`."""

    def __init__(self, engine: Engine, change: Callable[[Any], Cache]) -> None:
        self.info = engine.info
        self.samples = engine.samples
        self.pages = None
        self._engine = engine
        self._change = change

    def open(self, rows: int) -> Cache:
        return self._change(self._engine.open(rows))


class Passing:
    """A cache that passes everything on; the defects are derived from it."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        return self.cache.forward(passes, first)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class StalePage(Passing):
    """The first slots keep what another request has left there."""

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        rows = len(passes)
        before = {name: array[:, :, :4].copy() for name, array in self.cache.memory.views(first, rows).items()}
        predictions = super().forward(passes, first)
        if passes[0].write_at == 0:
            for name, array in self.cache.memory.views(first, rows).items():
                if before[name].size:
                    array[:, :, :4] = before[name]
        return predictions


class GateAlwaysOpen(Passing):
    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        return super().forward([p._replace(adapter=True) for p in passes], first)


class LosesASlot(Passing):
    """Moving a row forgets its last slot."""

    def move(self, source: int, target: int, slots: int) -> None:
        self.cache.move(source, target, slots - 1)


class RowsMixedUp(Passing):
    """Of two rows in a forward each gets what is the other's."""

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        predictions = super().forward(passes, first)
        alike = len(passes) > 1 and len({p.predicted.size for p in passes}) == 1
        return predictions[::-1] if alike else predictions


@pytest.mark.parametrize(
    ("defect", "where"),
    [(StalePage, "pass"), (GateAlwaysOpen, "pass"), (LosesASlot, "side by side"), (RowsMixedUp, "side by side")],
)
def test_a_wrong_cache_is_caught(setup: Setup, defect: Callable[[Any], Cache], where: str) -> None:
    engine = nemodiff.load(setup.folder, threads=1)
    broken = dataclasses.replace(engine, backend=Around(engine.backend, defect))
    prompts = [*PROMPTS, [*PROMPTS[0][:20], 400, 401, 402, 403], PROMPTS[1][:-3]]
    report, _ = verify(broken, prompts, setup.network, max_new_tokens=TOKENS)
    assert not report.ok
    assert any(where in finding for finding in report.findings)


def short_span(*arguments: Any, **options: Any) -> Pass:
    """A block that does not see its last token."""
    pass_ = bidirectional(*arguments, **options)
    visible = pass_.visible.copy()
    visible[:, 0] -= 1
    return pass_._replace(visible=visible)


def test_a_wrong_loop_is_caught_without_a_reference(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = nemodiff.load(setup.folder, threads=1)
    itself = EngineReference(engine.backend, engine.backend)
    assert verify(engine, PROMPTS, itself, max_new_tokens=TOKENS)[0].ok
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("nemodiff.runtime.modes.diffusion"), "bidirectional", short_span)
        report, _ = verify(engine, PROMPTS, itself, max_new_tokens=TOKENS)
        assert any("does not see itself" in finding and "(draft)" in finding for finding in report.findings)
    original = Request.verify
    with monkeypatch.context() as patch:

        def one_too_far(request: Request, prediction: Prediction, draft: list[int], unseen: list[float]) -> int:
            accepted = original(request, prediction, draft, unseen)
            request.length += len(draft) > accepted
            return accepted

        patch.setattr(Request, "verify", one_too_far)
        report, _ = verify(engine, PROMPTS, itself, max_new_tokens=TOKENS)
        assert any("which holds K/V of a draft" in finding for finding in report.findings)
    with monkeypatch.context() as patch:
        # The first drafted token is emitted, whatever the model says.
        patch.setattr(
            Request, "verify", lambda r, p, draft, _: original(r, p, draft, []) if not draft else _believe(r, p, draft)
        )
        report, _ = verify(engine, PROMPTS, itself, max_new_tokens=TOKENS)
        assert any("where ar has" in finding for finding in report.findings)
        assert not report.modes["linear_spec"].ok


def _believe(request: Request, prediction: Prediction, draft: list[int]) -> int:
    request.emit(draft[:1])
    request.length += 1
    request.accepted.append(1)
    return 1


def test_a_batch_that_moves_no_row_is_caught(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = nemodiff.load(setup.folder, threads=1)
    original = NeighbouringRows._place

    def not_moved(rows: NeighbouringRows, slot: Any, source: int, target: int) -> None:
        reach, slot.reach = slot.reach, 0
        original(rows, slot, source, target)
        slot.reach = reach

    monkeypatch.setattr(NeighbouringRows, "_place", not_moved)
    report, _ = verify(engine, [*PROMPTS, PROMPTS[0][3:], PROMPTS[1][6:]], setup.network, max_new_tokens=TOKENS)
    assert {name for name, tally in report.modes.items() if not tally.ok} != set()
    assert all("side by side" in name for name, tally in report.modes.items() if not tally.ok)


def test_a_prefix_copied_one_slot_too_far_is_caught(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the built-in questions, of which one begins as another that has left the batch."""
    engine = nemodiff.load(tiny_engine, threads=1)
    prompts = token_ids(engine, QUESTIONS, TOKENS, raw=False)
    itself = EngineReference(engine.backend, engine.backend)
    assert verify(engine, prompts, itself, max_new_tokens=TOKENS)[0].ok
    original = Rows.find

    def one_too_far(rows: Rows, slot: Any) -> Any:
        found = original(rows, slot)
        return found._replace(length=found.length + 1) if found.length else found

    monkeypatch.setattr(Rows, "find", one_too_far)
    report, _ = verify(engine, prompts, itself, max_new_tokens=TOKENS)
    assert any("side by side" in finding for finding in report.findings)


@pytest.mark.torch
def test_scales_of_other_tokens_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemodiff.runtime.engines.torch import stored

    right = stored._quantised

    def shifted(rows: Any, bits: Any) -> Any:
        values, scale = right(rows, bits)
        return values, scale.roll(1, 0)

    checkpoint = MODELS["plain rotation"](tmp_path / "checkpoint")
    builder = Builder(checkpoint, tmp_path / "engine", backend="torch", dtype="f32", kv_cache_dtype="int8")
    engine = nemodiff.load(builder.run(), device="cpu")
    monkeypatch.setattr(stored, "_quantised", shifted)
    report = judged(engine, network(checkpoint, kv_bits="int8"))
    assert not report.ok
    assert "layer 0" in str(report.blame)


HONEST: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "torch f32": (MODELS["early YaRN"], {"backend": "torch", "dtype": "f32"}),
    "torch f16": (MODELS["early YaRN"], {"backend": "torch", "dtype": "f16"}),
    "torch bf16": (MODELS["tiny-chat with adapter"], {"backend": "torch", "dtype": "bf16"}),
    "torch fp8": (MODELS["plain rotation"], {"backend": "torch", "quantization": "fp8"}),
    "torch fp8 K/V": (MODELS["early YaRN"], {"backend": "torch", "dtype": "f32", "kv_cache_dtype": "fp8"}),
    "torch int8 K/V": (MODELS["tiny-chat"], {"backend": "torch", "kv_cache_dtype": "int8"}),
    "onnxruntime f16": (MODELS["plain rotation"], {"dtype": "f16"}),
    "onnxruntime int8": (MODELS["early YaRN"], {"quantization": "int8"}),
    "onnxruntime int8 K/V": (MODELS["tiny-chat with adapter"], {"kv_cache_dtype": "int8"}),
    "onnxruntime int4": (MODELS["tiny-chat"], {"quantization": "int4"}),
    "sees images": (write_vision_checkpoint, {}),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", list(HONEST))
def test_honest_rounding_is_not_wrong(tmp_path: Path, name: str) -> None:
    make, choices = HONEST[name]
    checkpoint = make(tmp_path / "checkpoint")
    folder = Builder(checkpoint, tmp_path / "engine", block_length=8, **choices).run()
    engine = nemodiff.load(folder, device="cpu")
    build = engine.info.build
    report = judged(engine, network(checkpoint, build.dtype, build.quantization, build.kv_bits))
    assert (report.ok, report.blame) == (True, None), report.lines()
    assert sum(tally.near_ties for tally in report.passes.values()) >= (name in ("torch bf16", "onnxruntime int4"))
