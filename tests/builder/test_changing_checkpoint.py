"""A checkpoint that somebody replaces, cuts or removes while it is read gives one line, and no engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Refused, snapshot

from nemodiff.builder.build import Builder
from nemodiff.builder.export import Exporter
from nemodiff.errors import BuildError, CheckpointError

WEIGHTS = "model.safetensors"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    """As a download does that ends while the build reads: the same size, another file."""
    shutil.copyfile(path, path.with_name("new"))
    path.with_name("new").replace(path)


def rewrite(path: Path) -> None:
    """In place, with the bytes that it had: only the time says so."""
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(0, 1))


CHANGES = [truncate, replace, rewrite, Path.unlink]


def refused(work: Callable[[], object], path: Path) -> None:
    with pytest.raises((CheckpointError, BuildError)) as caught:
        work()
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    assert "; " in line
    assert "free some space" not in line


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "linear_spec_lora/adapter_model.safetensors"])
def test_a_file_that_changes_before_its_tensors_are_read(
    checkpoint: Path, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    builder = Builder(checkpoint, tmp_path / "engine")
    change(checkpoint / name)
    refused(builder.run, checkpoint / name)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_export_of_a_file_that_changes(checkpoint: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    exporter = Exporter(checkpoint, tmp_path / "twin")
    change(checkpoint / WEIGHTS)
    refused(exporter.run, checkpoint / WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_file_that_changes_while_its_tensors_are_read(checkpoint: Path, tmp_path: Path, backend: str) -> None:
    changed: list[int] = []

    def advance(nbytes: int) -> None:
        if not changed:
            replace(checkpoint / WEIGHTS)
        changed.append(nbytes)

    refused(lambda: Builder(checkpoint, tmp_path / "engine", backend=backend).run(advance), checkpoint / WEIGHTS)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_adapter_folder_without_an_adapter(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    words = ["build", str(checkpoint), "-o", str(tmp_path / "engine"), "--adapter"]
    line = refused([*words, str(empty)], f"{empty}: adapter_config.json is missing", "give --adapter a folder with")
    assert "checkpoint folder" not in line
    inside = checkpoint / "linear_spec_lora"
    refused([*words, str(checkpoint)], f"{checkpoint}: adapter_config.json is missing", f"give --adapter {inside}")
    refused([*words, str(inside / "adapter_config.json")], "a file, expected a folder", f"give --adapter {inside}")
    (inside / "adapter_model.safetensors").unlink()
    refused([*words, str(inside)], f"{inside}: adapter_model.safetensors is missing", "give --adapter a folder with")
    (inside / "adapter_config.json").unlink()
    refused(words[:-1], f"{inside}: adapter_config.json is missing", "remove linear_spec_lora/ to build without one")
    assert snapshot(tmp_path / "empty") == {}
