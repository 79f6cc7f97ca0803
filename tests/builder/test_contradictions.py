"""Checkpoints whose files contradict each other without being broken: what is taken, and what the plan says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Refused
from safetensors.numpy import load_file, save_file
from stand_ins.checkpoints import write_checkpoint

from nemodiff.builder.build import Builder
from nemodiff.builder.export import Exporter
from nemodiff.config import parse_config
from nemodiff.engine_info import read_engine

INDEX = "model.safetensors.index.json"
NORM = "encoder.norm.weight"
BOTH = f"model.safetensors lies beside {INDEX}: the index decides, and model.safetensors is not read"


def change(path: Path, **values: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def notes(checkpoint: Path) -> list[str]:
    """What the plan's lines say of contradictions."""
    builder = Builder(checkpoint, checkpoint.parent / "engine")
    lines = builder.plan().lines("checkpoint", builder.output)
    return [line.removeprefix("note").strip() for line in lines if line.startswith("note ")]


def test_a_checkpoint_in_one_voice_has_no_notes(checkpoint: Path) -> None:
    assert notes(checkpoint) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"), [(11, 2, (2, 11)), ([11, 2], [11], (11, 2)), (11, [10, 11, 2], (10, 11, 2))]
)
def test_ends_of_both_files_end_a_text(
    checkpoint: Path, ours: object, theirs: object, expected: tuple[int, ...]
) -> None:
    change(checkpoint / "config.json", eos_token_id=ours)
    change(checkpoint / "generation_config.json", eos_token_id=theirs)
    said = [note for note in notes(checkpoint) if "generation_config.json" in note]
    each = ", ".join(map(str, expected))
    assert said == [f"config.json ends a text at {ours}, generation_config.json at {theirs}: each of {each} ends it"]
    assert read_engine(Builder(checkpoint, checkpoint.parent / "engine").run()).model.eos_ids == expected
    exporter = Exporter(checkpoint, checkpoint.parent / "twin")
    assert said[0] in exporter.plan().notes
    twin = exporter.run()
    assert json.loads((twin / "generation_config.json").read_text())["eos_token_id"] == list(expected)


def test_an_older_engine_still_loads(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for unusable in (-1, "11", [], [True], 100, 10**9):  # 100 is the mask
        assert parse_config(config | {"eos_token_id": unusable}, {"eos_token_id": 2}).eos_ids == (2,)


def test_the_same_ends_in_another_order_are_no_contradiction(checkpoint: Path) -> None:
    change(checkpoint / "config.json", eos_token_id=[11, 2])
    change(checkpoint / "generation_config.json", eos_token_id=[2, 11])
    assert not [note for note in notes(checkpoint) if "generation_config.json" in note]


def test_an_end_that_the_tokenizer_does_not_call_one_is_warned_about(checkpoint: Path) -> None:
    change(checkpoint / "generation_config.json", eos_token_id=[11, 2, 500])
    change(checkpoint / "config.json", eos_token_id=[11, 2, 500])
    plain, unlike = notes(checkpoint)
    assert plain.startswith("500 (")
    assert plain.endswith("ends a text, but is no special token of tokenizer.json")
    end = "11 ('<|im_end|>')"
    assert unlike == f"2 ('</s>') ends a text, but the eos_token of tokenizer_config.json is {end}"
    change(checkpoint / "tokenizer_config.json", eos_token={"content": "</s>"})
    assert notes(checkpoint)[1] == f"{end} ends a text, but the eos_token of tokenizer_config.json is 2 ('</s>')"


def test_sampling_that_is_not_used_is_mentioned(checkpoint: Path) -> None:
    change(checkpoint / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.95, top_k=None)
    expected = "temperature 0.6, top_p 0.95 of generation_config.json: not used unless given as options "
    expected += "or by --generation-config auto"
    assert notes(checkpoint) == [expected]
    plan = Builder(checkpoint, checkpoint.parent / "engine").plan()
    assert plan.as_dict()["notes"] == (expected,)
    assert Exporter(checkpoint, checkpoint.parent / "twin").plan().notes == ()  # the twin carries them


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in three shards."""
    return write_checkpoint(tmp_path / "sharded", dtype="f32", shards=3)


def merged(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of all shards."""
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("model-*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("content", ["other values", "a few tensors", "a cut file"])
def test_the_index_decides_over_a_stray_file(sharded: Path, content: str) -> None:
    engine = Builder(sharded, sharded.parent / "before", backend="torch").run()
    expected = load_file(engine / "model.safetensors")
    stray = sharded / "model.safetensors"
    tensors = {name: array * 2 for name, array in merged(sharded).items()}
    save_file({NORM: tensors[NORM], "extra": tensors[NORM]} if content == "a few tensors" else tensors, stray)
    if content == "a cut file":
        stray.write_bytes(stray.read_bytes()[:-100])
    assert notes(sharded) == [BOTH]
    builder = Builder(sharded, sharded.parent / "after", backend="torch")
    built = load_file(builder.run() / "model.safetensors")
    assert {name: array.tobytes() for name, array in built.items()} == {n: a.tobytes() for n, a in expected.items()}
    files = json.loads((builder.output / "manifest.json").read_text())["checkpoint"]["files"]
    assert "model.safetensors" not in files
    exporter = Exporter(sharded, sharded.parent / "twin")
    assert exporter.plan().notes == (BOTH,)
    assert list(exporter.shards) == [path.name for path in sorted(sharded.glob("model-*.safetensors"))]


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (np.ones(16, np.float32), "is F32 [16], allowed: F32 [32] as in model-"),
        (np.ones(32, ml_dtypes.bfloat16), "is BF16 [32], allowed: F32 [32] as in model-"),
        (np.ones(32, np.int8), "is I8 [32], allowed: F32 [32] as in model-"),
    ],
    ids=["shape", "dtype", "a dtype that is not read"],
)
def test_a_stray_file_that_contradicts_the_index_is_refused(
    sharded: Path, refused: Refused, norm: np.ndarray, said: str
) -> None:
    save_file(merged(sharded) | {NORM: norm}, sharded / "model.safetensors")
    for command in (["build"], ["build", "--dry-run"], ["export"]):
        refused([*command, str(sharded), "-o", str(sharded.parent / "new")], f"tensor {NORM} {said}", "remove")


def test_a_stale_index_is_refused_with_the_way_out(checkpoint: Path, refused: Refused) -> None:
    index = json.dumps({"weight_map": {NORM: "model-00001-of-00001.safetensors"}})
    (checkpoint / INDEX).write_text(index)
    command = ["build", str(checkpoint), "-o", str(checkpoint.parent / "new")]
    refused(command, f"missing although {INDEX} names it", f"or remove {INDEX} if model.safetensors is the whole model")


def test_an_index_that_names_the_one_file_is_no_contradiction(checkpoint: Path) -> None:
    names = load_file(checkpoint / "model.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert notes(checkpoint) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_copy_in_another_shard_is_passed_over(sharded: Path, dtype: type) -> None:
    before = Builder(sharded, sharded.parent / "before", backend="torch").run()
    place = json.loads((sharded / INDEX).read_text())["weight_map"][NORM]
    for file in sharded.glob("model-*.safetensors"):
        if file.name != place:
            save_file(load_file(file) | {NORM: np.full(7, 5, dtype)}, file)
    after = Builder(sharded, sharded.parent / "after", backend="torch").run()
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
