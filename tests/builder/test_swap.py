"""Outputs that cannot be renamed: mount points, folders of an image or below a parent that is not ours; and links.

Real mounts are made in a name space of their own, which ends with the command. Elsewhere a plain folder plays one.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Refused, answers, snapshot

import nemodiff
from nemodiff.builder import staging, swap
from nemodiff.builder.build import Builder
from nemodiff.builder.export import Exporter
from nemodiff.builder.resources import disk_free
from nemodiff.errors import BuildError
from nemodiff.serving.triton_server.export import export

# Kills itself before the given change of names.
KILLED = """
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("swap", sys.argv[1])
swap = sys.modules["swap"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(swap)
left = [int(sys.argv[2])]
def counting(call):
    def counted(*arguments):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return call(*arguments)
    return counted
pathlib.Path.rename = counting(pathlib.Path.rename)
pathlib.Path.mkdir = counting(pathlib.Path.mkdir)
swap._remove = counting(swap._remove)
ending = swap.Swap(pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4]), "marker")
ending.put(lambda: None)
ending.clean_up()
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder counts as a mount point, and none that exists can be renamed to another folder."""
    rename: Callable[[Path, Path], Path] = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.is_dir() and self.parent != target.parent:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(staging, "is_mount", lambda folder: True)
    monkeypatch.setattr(Path, "rename", refuse)


# ---- real mounts ----


def in_name_space(script: str, *arguments: object) -> str:
    """Run a shell script where mounts are its own; skip where the system does not allow that."""
    unshare = shutil.which("unshare")
    command = [unshare or "unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-ec"]
    if unshare is None or subprocess.run([*command, "mount -t tmpfs none /mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    python = f"'{sys.executable}' -W error -m nemodiff"
    whole = [*command, script.replace("nemodiff", python), "sh", *map(str, arguments)]
    ended = subprocess.run(whole, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("mount", ["-t tmpfs none", "--bind $3"], ids=["another disk", "the same disk"])
def test_an_output_that_is_a_mount_point_is_filled_and_replaced(checkpoint: Path, mount: str) -> None:
    root = checkpoint.parent
    for name in ("volume", "other"):
        (root / name).mkdir()
    script = f"""
        mount {mount} $2; mkdir $2/lost+found
        nemodiff build $1 -o $2 --block-length 4
        nemodiff build $1 -o $2 --block-length 5
        nemodiff inspect $2
        ls -A $2 $2/..
        rm -r $2/*
        nemodiff export $1 -o $2; nemodiff export $1 -o $2; ls -A $2
    """
    out = in_name_space(script, checkpoint, root / "volume", root / "other")
    assert "block length 5" in out
    assert {"manifest.json", "lost+found", "nemodiff_export.json"} <= set(out.split())
    assert ".partial-" not in out


def test_a_triton_model_on_a_mount_point(tiny_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "nemodiff").mkdir(parents=True)
    script = """
        mount -t tmpfs none $2/nemodiff
        nemodiff triton export $1 --repo $2; nemodiff triton export $1 --repo $2
        find $2
    """.replace("/nemodiff", "/nemo''diff")
    out = in_name_space(script, tiny_engine, tmp_path / "models")
    assert "nemodiff/1/engine/manifest.json" in out
    assert ".partial-" not in out


# ---- contents are exchanged ----


def test_every_kill_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    old = {"marker": "old", "a": "old", "kept/x": "old", "gone": "old"}
    new = {"marker": "new", "a": "new", "kept/x": "new", "added/y": "new"}

    def write(folder: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    def read(folder: Path) -> dict[str, str]:
        return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}

    seen = []
    for steps in range(40):
        target = tmp_path / str(steps)
        stage = target / ".target.partial-0"
        write(target, old)
        write(stage, new)
        killed = subprocess.run([sys.executable, "-I", "-S", "-c", KILLED, swap.__file__, str(steps), stage, target])
        halfway = target / "marker"
        assert not halfway.exists() or halfway.read_text() in ("old", "new")
        cleaned = [sys.executable, "-I", "-S", swap.__file__, stage, target, "marker"]
        subprocess.run(cleaned, input=b"", check=True)
        assert read(target) in (old, new)
        assert not any(".partial-" in name for name in names(target))
        seen.append(read(target) == new)
        if killed.returncode == 0:
            break
    assert seen == sorted(seen)  # once it is the new one it stays so
    assert seen[0] is False
    assert seen[-1] is True
    assert len(seen) > 10


@pytest.mark.usefixtures("mounted")
def test_a_build_is_staged_inside_a_mount_point(checkpoint: Path) -> None:
    engine = checkpoint.parent / "engine"
    (engine / "lost+found").mkdir(parents=True)
    (engine / ".engine.partial-dead").mkdir()  # of a machine that lost its power
    left = names(engine)
    where = []

    def look(nbytes: int) -> None:
        where.append((names(engine.parent), len(names(engine) - left)))

    Builder(checkpoint, engine).run(look)
    assert where[0] == ({"checkpoint", "engine"}, 1)
    first = answers(engine)
    before = snapshot(engine)

    def stop(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Builder(checkpoint, engine).run(stop)
    assert snapshot(engine) == before
    Builder(checkpoint, engine, block_length=5).run()
    assert nemodiff.load(engine).info.build.block_length == 5
    assert answers(engine) == first
    assert left < names(engine)


@pytest.mark.usefixtures("mounted")
def test_an_exchange_that_fails_gives_the_old_contents_back(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = checkpoint.parent / "engine"
    engine.mkdir()
    before = snapshot(Builder(checkpoint, engine).run())
    rename: Callable[[Path, Path], Path] = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "manifest.json" and self.parent.name.endswith("partial-new"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(staging.secrets, "token_hex", lambda count: "new")
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BuildError, match="Input/output error"):
        Builder(checkpoint, engine).run()
    assert snapshot(engine) == before


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_folder_that_cannot_be_renamed_after_all_gets_new_contents(
    checkpoint: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder of a container's image, which an overlay does not rename."""
    engine = Builder(checkpoint, checkpoint.parent / "engine", block_length=4).run()
    rename: Callable[[Path, Path], Path] = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == engine:
            raise OSError(number, os.strerror(number))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    Builder(checkpoint, engine, block_length=5).run()
    assert nemodiff.load(engine).info.build.block_length == 5
    assert names(checkpoint.parent) == {"checkpoint", "engine"}


def test_a_parent_that_cannot_be_written(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = checkpoint.parent / "engine"
    engine.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != engine.parent)
    seen = []
    Builder(checkpoint, engine).run(lambda nbytes: seen.append(names(engine.parent)))
    assert seen[0] == {"checkpoint", "engine"}
    assert answers(engine)


# ---- links ----


def test_a_link_is_followed(checkpoint: Path, tiny_engine: Path) -> None:
    root = checkpoint.parent
    (root / "disk").mkdir()
    makers: dict[str, Callable[[Path], object]] = {
        "engine": lambda output: Builder(checkpoint, output).run(),
        "twin": lambda output: Exporter(checkpoint, output).run(),
        "model": lambda output: export(tiny_engine, output.parent, name=output.name),
    }
    for name, make in makers.items():
        link, place = root / f"{name}-link", root / "disk" / name
        link.symlink_to(place)
        for _ in ("new", "replaced"):
            make(link)
            assert link.readlink() == place
            assert names(place) == names(link) != set()
            assert not place.is_symlink()
        assert {path.name for path in root.iterdir() if ".partial-" in path.name} == set()
    assert names(root / "disk") == set(makers)


def test_links_in_a_circle_are_refused(checkpoint: Path, refused: Refused) -> None:
    one, two = checkpoint.parent / "one", checkpoint.parent / "two"
    one.symlink_to(two)
    two.symlink_to(one)
    refused(["build", str(checkpoint), "-o", str(one)], "one: exists and is not a folder; choose another --output")


def test_free_space_is_that_of_the_disk_a_link_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "engine")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or usage)
    disk_free(tmp_path / "link")
    assert asked == [tmp_path / "disk"]
