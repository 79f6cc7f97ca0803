"""Builds of a good checkpoint that are refused: flags, outputs that would destroy something, a full disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Refused

from nemodiff.builder.build import Builder
from nemodiff.errors import BuildError


@pytest.mark.parametrize(
    ("flags", "code", "fragments"),
    [
        pytest.param(
            ["--max-seq-len", "262145"],
            1,
            ["--max-seq-len is 262145, allowed: 1 to 262144"],
            id="longer than the model",
        ),
        pytest.param(["--max-seq-len", "0"], 2, ["'--max-seq-len': 0"], id="no length"),
        pytest.param(["--block-length", "0"], 2, ["'--block-length': 0"], id="block 0"),
        pytest.param(["--block-length", "65"], 1, ["--block-length is 65, allowed: 1 to 64"], id="block 65"),
        pytest.param(["--block-length", "x"], 2, ["--block-length", "'x'"], id="block is text"),
        pytest.param(["--max-batch-size", "0"], 1, ["--max-batch-size is 0, allowed: 1 to 4096"], id="no rows"),
        pytest.param(["--dtype", "int8"], 2, ["'int8'", "'f32', 'f16'"], id="dtype"),
        pytest.param(["--json"], 2, ["--json goes with --dry-run"], id="json without dry run"),
        pytest.param(["--tokens", "1"], 2, ["No such option", "--tokens"], id="unknown flag"),
    ],
)
def test_build_flags_out_of_range_are_refused(
    checkpoint: Path, refused: Refused, flags: list[str], code: int, fragments: list[str]
) -> None:
    refused(["build", str(checkpoint), "-o", str(checkpoint.parent / "engine"), *flags], *fragments, code=code)


@pytest.mark.parametrize("output", ["file", "folder", "link", "file/engine"])
def test_output_that_is_something_else_is_kept(checkpoint: Path, refused: Refused, output: str) -> None:
    root = checkpoint.parent
    (root / "file").write_text("precious")
    (root / "folder").mkdir()
    (root / "folder" / "thesis.txt").write_text("precious")
    (root / "link").symlink_to(root / "folder")
    refused(["build", str(checkpoint), "-o", str(root / output)], f"{root / output}: ", "choose another --output")


def test_output_that_is_the_checkpoint_is_refused(checkpoint: Path, refused: Refused) -> None:
    refused(["build", str(checkpoint), "-o", str(checkpoint)], "is not an engine", "choose another --output")


def test_checkpoint_inside_the_engine_to_replace_is_kept(checkpoint: Path, refused: Refused) -> None:
    engine = checkpoint.parent / "engine"
    Builder(checkpoint, engine).run()
    checkpoint.rename(engine / "checkpoint")
    refused(["build", str(engine / "checkpoint"), "-o", str(engine)], str(engine), "choose another --output")


def test_full_disk_is_refused_before_a_byte_is_written(
    checkpoint: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1024))
    engine = checkpoint.parent / "engine"
    refused(
        ["build", str(checkpoint), "-o", str(engine)],
        f"{engine}: the engine needs 64.",
        "1.0 KiB are free",
        "--dtype f16",
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param("no/such/folder", id="path"), pytest.param("nowhere", id="word"), pytest.param("a/b@", id="id")],
)
def test_checkpoint_that_is_not_there(tmp_path: Path, refused: Refused, name: str) -> None:
    refused(
        ["build", name, "-o", str(tmp_path / "engine")], f"{name}: no such folder; give a checkpoint folder or a hub id"
    )


def test_an_unset_variable_is_no_path(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(["build", "", "-o", "engine"], "'': no such folder; give a checkpoint folder or a hub id")
    refused(["build", "checkpoint", "-o", ""], "-o", "it is empty; give a path", code=2)
    refused(["run", "", "-p", "x"], "ENGINE", "it is empty; give a path", code=2)


def test_checkpoint_that_is_a_file(tiny_engine: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    said = f"{file}: a file, expected a checkpoint folder; give the folder that it is in"
    refused(["build", str(file), "-o", str(tmp_path / "engine")], said)
    refused(["verify", str(tiny_engine), "--against", str(file)], said)
    line = refused(
        ["verify", str(tiny_engine), "--against", str(tmp_path)], f"{tmp_path / 'config.json'}: not readable"
    )
    assert line.endswith("(No such file or directory); give a complete checkpoint folder")


@pytest.mark.parametrize(
    ("choices", "fragment"),
    [
        ({"block_length": 0}, "--block-length is 0, allowed: 1 to 64"),
        ({"block_length": "8"}, "--block-length is '8', allowed"),
        ({"max_seq_len": 0}, "--max-seq-len is 0, allowed"),
        ({"max_batch_size": True}, "--max-batch-size is True, allowed"),
        ({"dtype": "f64"}, "--dtype is 'f64', allowed on onnxruntime: f32, f16"),
    ],
)
def test_choices_out_of_range_in_python(checkpoint: Path, choices: dict[str, Any], fragment: str) -> None:
    with pytest.raises(BuildError) as caught:
        Builder(checkpoint, checkpoint.parent / "engine", **choices)
    assert fragment in str(caught.value)
