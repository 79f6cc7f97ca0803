"""Compiled kernels are found again, and those that are damaged or of another source are not trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins.checkpoints import write_checkpoint

from nemodiff.builder.build import Builder
from nemodiff.engine_folder import COMPILED_FOLDER
from nemodiff.runtime.engines.torch.kernel_cache import KernelCache

pytestmark = pytest.mark.torch
PROGRAM = Path(__file__).parents[1] / "stand_ins" / "compiled_kernels.py"


def built(tmp_path: Path) -> Path:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1, num_key_value_heads=1)
    return Builder(checkpoint, tmp_path / "engine", backend="torch", dtype="bf16").run()


def test_a_later_load_compiles_nothing(tmp_path: Path) -> None:
    """For SM 90, without a card: the kernels of one pass, by the very path that a launch takes."""
    folder = built(tmp_path)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"HOME": str(tmp_path / "home")}
    environment.pop("TRITON_CACHE_DIR", None)
    child = subprocess.run([sys.executable, PROGRAM, folder], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    counts = json.loads(child.stdout.splitlines()[-1])
    assert counts.pop("first") >= 8
    assert counts == {"second": 0, "damaged": 3, "mended": 0, "moved": 0, "changed": 1, "again": 0}
    assert not (tmp_path / "home").exists()
    Builder(tmp_path / "checkpoint", tmp_path / "moved", backend="torch", dtype="bf16").run()  # takes its place
    assert not (tmp_path / "moved" / COMPILED_FOLDER).exists()


def test_a_folder_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds is read, and what it lacks lies where Triton keeps its own."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))
    folder = tmp_path / "engine"
    kept = KernelCache(folder)._entry("A")
    group = {name: kept.put(content, name) for name, content in (("k.json", "text"), ("k.cubin", b"code"))}
    assert [Path(path).read_bytes() for path in group.values()] == [b"text", b"code"]
    kept.put_group("k.json", group)
    (folder / COMPILED_FOLDER).rename(tmp_path / "held")
    (folder / COMPILED_FOLDER).write_text("in the way, for root too")
    cache = KernelCache(folder)
    assert cache._entry("A").get_group("k.json") is None
    entry = cache._entry("B")
    entry.put_group("k.json", {"k.json": entry.put("{}", "k.json")})
    (folder / COMPILED_FOLDER).unlink()
    (tmp_path / "held").rename(folder / COMPILED_FOLDER)
    cache = KernelCache(folder)
    found = {key: cache._entry(key).get_group("k.json") or {} for key in "AB"}
    assert found["A"] == group
    assert found["B"] == {"k.json": str(cache.places[1] / "B" / "k.json")}
    (folder / COMPILED_FOLDER / "A" / "k.cubin").write_text("of another")
    assert cache._entry("A").get_group("k.json") is None


def test_host_code_is_not_taken_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))
    cache = KernelCache(tmp_path / "engine")
    launcher = cache._entry("C").put(b"\x7fELF", "launcher.so")
    assert Path(launcher).is_relative_to(tmp_path / "home")
    assert cache._entry("C").get_file("launcher.so") == launcher
    (tmp_path / "engine" / COMPILED_FOLDER / "D").mkdir(parents=True)
    (tmp_path / "engine" / COMPILED_FOLDER / "D" / "launcher.so").write_bytes(b"\x7fELF")
    assert cache._entry("D").get_file("launcher.so") is None


def test_a_cache_that_the_user_has_chosen_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    own = knobs.cache.manager_class
    with KernelCache(tmp_path).use():
        assert knobs.cache.manager_class is not None
    assert knobs.cache.manager_class is own
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    with KernelCache(tmp_path).use():
        assert knobs.cache.manager_class is own
