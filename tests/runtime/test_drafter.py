"""The drafter adapter: given to a build from anywhere, acting where it should, and refused where it does not act.

The gate is broken on purpose in the graph of a built engine; loading must refuse it.
"""

import json
import shutil
from pathlib import Path

import equality
import numpy as np
import onnx
import pytest
from conftest import Refused
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file
from stand_ins.checkpoints import write_adapter, write_checkpoint
from stand_ins.toy_engine import PagedToyEngine

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.runtime.engines.drafter import check_gate

QUESTIONS = equality.questions(4)


@pytest.mark.parametrize("mode", ["linear_spec", "quadratic_spec"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_adapter_acts_on_every_drafted_token_and_on_no_other(setup: equality.Setup, mode: str, question: str) -> None:
    mask = setup.model.mask_id
    on = 0
    for event in nemodiff.stream(setup.adapted, question, steps=True, mode=mode, max_new_tokens=30):
        if isinstance(event, nemodiff.Step):
            on += len(event.before) if event.kind == "draft" else event.before.count(mask)
        elif isinstance(event, nemodiff.Generation):
            assert event.adapter_tokens == on > 0
            alone = nemodiff.generate(setup.plain, question, mode="ar", max_new_tokens=30)
            assert event.token_ids == alone.token_ids


def test_no_adapter_tokens_without_an_adapter_or_a_draft(setup: equality.Setup) -> None:
    for mode in nemodiff.MODES:
        assert nemodiff.generate(setup.plain, QUESTIONS[0], mode=mode, max_new_tokens=9).adapter_tokens == 0
    for mode in ("ar", "diffusion"):
        assert nemodiff.generate(setup.adapted, QUESTIONS[0], mode=mode, max_new_tokens=9).adapter_tokens == 0


def with_gate(engine: Path, target: Path, nodes: list[onnx.NodeProto]) -> Path:
    """A copy of an engine in which `nodes` lead from `true.gate` to the gate that the layers read."""
    shutil.copytree(engine, target)
    path = target / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    at, cast = next((i, n) for i, n in enumerate(model.graph.node) if "adapter.gate" in n.output)
    cast.output[0] = "true.gate"
    for node in reversed(nodes):
        model.graph.node.insert(at + 1, node)
    for name, value in (("zero", 0), ("one", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    onnx.save(model, path)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"][path.name]["bytes"] = path.stat().st_size
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


BROKEN = {
    "off": [helper.make_node("Mul", ["true.gate", "zero"], ["adapter.gate"])],
    "on": [
        helper.make_node("Mul", ["true.gate", "zero"], ["off"]),
        helper.make_node("Add", ["off", "one"], ["adapter.gate"]),
    ],
    "one for the whole pass": [
        helper.make_node("ReduceMax", ["true.gate"], ["most"], keepdims=1),
        helper.make_node("Mul", ["true.gate", "zero"], ["off"]),
        helper.make_node("Add", ["off", "most"], ["adapter.gate"]),
    ],
}


@pytest.mark.parametrize("broken", sorted(BROKEN))
def test_stuck_gate_is_refused_at_load(setup: equality.Setup, tmp_path: Path, refused: Refused, broken: str) -> None:
    folder = with_gate(setup.adapted.folder, tmp_path / "engine", BROKEN[broken])
    refused(["run", str(folder), "-p", "x"], "the drafter adapter changes nothing", "again with an adapter")


def test_untouched_gate_loads(setup: equality.Setup, tmp_path: Path) -> None:
    """The same change with a gate that passes through: what is refused above is the gate, not the changed graph."""
    same = [helper.make_node("Mul", ["true.gate", "one"], ["adapter.gate"])]
    engine = nemodiff.load(with_gate(setup.adapted.folder, tmp_path / "engine", same))
    answers = [nemodiff.generate(e, QUESTIONS[0], max_new_tokens=30) for e in (engine, setup.adapted)]
    assert answers[0].nfe == answers[1].nfe


def test_adapter_of_zeros_is_refused_at_load(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "linear_spec_lora" / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(nemodiff.EngineError, match="changes nothing"):
        nemodiff.load(Builder(checkpoint, tmp_path / "engine").run())


def test_the_probe_gives_its_memory_back(setup: equality.Setup) -> None:
    """Else an engine with an adapter has a page less for as long as it lives."""
    backend = PagedToyEngine(setup.adapted.info, 4)  # which has no gate
    with pytest.raises(nemodiff.EngineError, match="changes nothing"):
        check_gate(backend, setup.adapted.folder)
    assert (backend.forwards, backend.open_caches, backend.pages.free) == (1, 0, 4)


def test_adapter_from_elsewhere_makes_the_same_engine(checkpoint: Path, tmp_path: Path) -> None:
    whole = Builder(checkpoint, tmp_path / "whole").run()
    adapter = tmp_path / "trained"
    (checkpoint / "linear_spec_lora").rename(adapter)
    plain = Builder(checkpoint, tmp_path / "plain").run()
    put_together = Builder(checkpoint, tmp_path / "together", adapter=adapter).run()
    for name in ("manifest.json", "model.onnx", "model.onnx.data"):
        if (whole / name).exists():
            assert (put_together / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((plain / "manifest.json").read_text())["adapter"] is None


def test_chosen_adapter_takes_the_place_of_the_checkpoints_own(checkpoint: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", dtype="f32")
    write_adapter(other, rank=2, alpha=6, strength=0.5)
    (other / "linear_spec_lora" / "training_args.bin").write_bytes(
        b"\x80\x04"
    )  # trainers leave it, and it is no weight
    builder = Builder(checkpoint, tmp_path / "engine", adapter=other / "linear_spec_lora")
    assert (builder.plan().adapter_rank, builder.checkpoint.adapter.scale) == (2, 3.0)  # type: ignore[union-attr]


def test_wrong_adapters_are_refused(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    command = ["build", str(checkpoint), "-o", str(tmp_path / "engine"), "--adapter"]
    refused([*command, str(tmp_path / "none")], "none: no such folder", "adapter_config.json")
    refused([*command, str(checkpoint)], "adapter_config.json is missing", "linear_spec_lora")
    larger = write_checkpoint(tmp_path / "larger", hidden_size=64)
    write_adapter(larger, rank=2, alpha=6, strength=0.5)
    refused([*command, str(larger / "linear_spec_lora")], "lora_B.weight has shape [64, 2]", "[32, 2]")
    path = larger / "linear_spec_lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj"]}))
    refused([*command, str(path.parent)], "target_modules is ['q_proj']", "build without --adapter")


def test_stats_tell_of_the_adapter(setup: equality.Setup) -> None:
    from click.testing import CliRunner

    from nemodiff.cli import main

    for engine, has_adapter in ((setup.adapted, True), (setup.plain, False)):
        shown = CliRunner().invoke(main, ["run", str(engine.folder), "-p", QUESTIONS[0], "--stats"]).stderr
        assert ("drafter adapter on" in shown) == has_adapter
