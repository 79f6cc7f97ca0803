"""Folders that are nearly the wanted one: older checkpoints with buffers, and folders that nemodiff itself has made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Refused
from safetensors.numpy import load_file, save_file
from stand_ins.checkpoints import write_checkpoint

from nemodiff.builder.build import Builder
from nemodiff.builder.export import Exporter
from nemodiff.serving.triton_server.export import export

BUFFERS = {
    "encoder.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    "encoder.layers.1.self_attn.rotary_emb.inv_freq": np.ones(8, np.float64),
    "encoder.layers.1.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 40, 16), np.float16),
    "encoder.rotary_emb.original_inv_freq": np.ones(8, np.float32),
    "encoder.embeddings.position_ids": np.arange(40).reshape(1, 40),
}


def files(folder: Path) -> dict[str, bytes]:
    """The files that hold weights, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("model")}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_buffers_that_the_config_gives_are_passed_over(tmp_path: Path, shards: int, backend: str) -> None:
    plain = write_checkpoint(tmp_path / "plain", dtype="f32", shards=shards)
    older = tmp_path / "older"
    shutil.copytree(plain, older)
    for number, file in enumerate(sorted(older.glob("*.safetensors"))):
        ours = BUFFERS if number == 0 else {}
        save_file(load_file(file) | ours, file, {"format": "pt"})
        if shards > 1 and ours:
            index = json.loads((older / "model.safetensors.index.json").read_text())
            index["weight_map"] |= dict.fromkeys(ours, file.name)
            (older / "model.safetensors.index.json").write_text(json.dumps(index))
    built = [Builder(source, tmp_path / f"engine of {source.name}", backend=backend).run() for source in (plain, older)]  # type: ignore[arg-type]
    assert files(built[0]) == files(built[1])
    twins = [Exporter(source, tmp_path / f"twin of {source.name}").run() for source in (plain, older)]
    for file in sorted(twins[0].glob("*.safetensors")):
        ours, theirs = load_file(file), load_file(twins[1] / file.name)
        assert {name: array.tobytes() for name, array in ours.items()} == {n: a.tobytes() for n, a in theirs.items()}


def test_a_weight_of_a_like_name_is_still_refused(checkpoint: Path, refused: Refused) -> None:
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"encoder.rotary_emb.inv_freq.weight": np.ones(8, np.float32)}, weights)
    command = ["build", str(checkpoint), "-o", str(checkpoint.parent / "engine")]
    refused(command, "tensor encoder.rotary_emb.inv_freq.weight is not part of this architecture")


def test_what_nemodiff_made_is_no_checkpoint_and_says_which_is(checkpoint: Path, refused: Refused) -> None:
    root = checkpoint.parent
    made = {
        "an engine": Builder(checkpoint, root / "engine").run(),
        "an exported twin": Exporter(checkpoint, root / "twin").run(),
        "an exported Triton model": export(root / "engine", root / "models"),
    }
    for kind, folder in made.items():
        for command in (["build", str(folder)], ["build", str(folder), "--dry-run"], ["export", str(folder)]):
            line = refused(
                [*command, "-o", str(root / "new")], f"{folder}: {kind}, not a checkpoint; give the checkpoint"
            )
            assert line.endswith("that it was made from: checkpoint")
    (root / "engine" / "manifest.json").write_text("{")
    refused(["build", str(root / "engine"), "-o", str(root / "new")], "architectures")
    twin = ["not an engine", "it is an exported twin for other programs; build an engine from the checkpoint"]
    refused(["run", str(root / "twin"), "-p", "x"], *twin)
    model = root / "models" / "nemodiff"
    refused(["run", str(model), "-p", "x"], "not an engine", f"whose engine is in {model / '1' / 'engine'}")


def test_a_checkpoint_with_a_manifest_of_others_is_built(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"name": "a progressive web app"}')
    assert Builder(checkpoint, checkpoint.parent / "engine").run().is_dir()


def test_nothing_is_built_inside_an_engine(checkpoint: Path, refused: Refused) -> None:
    engine = Builder(checkpoint, checkpoint.parent / "engine").run()
    (checkpoint.parent / "manifest.json").write_text('{"name": "a progressive web app"}')  # in which engines may lie
    said = f"lies in an engine, {engine}, which could not be replaced then; choose another --"
    for inside in (engine / "sub", engine / "sub" / "sub"):
        refused(["build", str(checkpoint), "-o", str(inside)], f"{inside}: {said}output")
        refused(["export", str(checkpoint), "-o", str(inside)], f"{inside}: {said}output")
    refused(["triton", "export", str(engine), "--repo", str(engine)], f"{engine / 'nemodiff'}: {said}repo")
    assert Builder(checkpoint, engine).run() == engine


def test_nothing_is_built_inside_an_export(checkpoint: Path, refused: Refused) -> None:
    twin = Exporter(checkpoint, checkpoint.parent / "twin").run()
    engine = Builder(checkpoint, checkpoint.parent / "engine").run()
    model = export(engine, checkpoint.parent / "models")
    for folder, kind in ((twin, "an exported twin"), (model, "an exported Triton model")):
        said = f"lies in {kind}, {folder}, which could not be replaced then; choose another --output"
        refused(["build", str(checkpoint), "-o", str(folder / "sub")], f"{folder / 'sub'}: {said}")
        refused(["export", str(checkpoint), "-o", str(folder / "sub")], f"{folder / 'sub'}: {said}")
    assert Exporter(checkpoint, twin).run() == twin
    assert export(engine, checkpoint.parent / "models") == model


@pytest.mark.parametrize("named", ["model.Q4_K_M.gguf", "."], ids=["file", "folder"])
def test_gguf_is_not_read(tiny_engine: Path, tmp_path: Path, refused: Refused, named: str) -> None:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    made = ["-o", str(tmp_path / "new")]
    for command in (["build", *made], ["export", *made], ["verify", str(tiny_engine), "--against"]):
        line = refused(
            [*command, str(folder / named)],
            f"{folder / 'model.Q4_K_M.gguf'}: GGUF is not read, allowed: a folder with config.json",
        )
        assert line.endswith("safetensors files; give the checkpoint that it was made from")


def test_gguf_beside_a_checkpoint_is_passed_over(checkpoint: Path) -> None:
    (checkpoint / "model.gguf").write_bytes(b"GGUF")
    assert Builder(checkpoint, checkpoint.parent / "engine").run().is_dir()
