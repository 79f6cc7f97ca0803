"""An engine folder appears whole or not at all, whatever ends the build: kill -9, signals, exceptions, a full disk.

Builds that are to be ended run in a process of their own, which prints `writing` after the first piece of the weights
and then waits.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE, answers, assert_one_line, eventually, snapshot

import nemodiff
from nemodiff.builder import staging
from nemodiff.builder.build import Builder
from nemodiff.builder.swap import Swap
from nemodiff.errors import BuildError

SLOW_BUILD = """
import sys, time
from nemodiff.builder import staging
from nemodiff.builder.build import Builder
if sys.argv[4] == "inside":
    staging.is_mount = lambda folder: True
pieces = []
def advance(nbytes):
    pieces.append(nbytes)
    if len(pieces) == 1:
        print("writing", flush=True)
        if sys.argv[3] == "sleep":
            time.sleep(600)
        else:
            sys.stdin.readline()
Builder(sys.argv[1], sys.argv[2]).run(advance)
"""
KILLED_BETWEEN_RENAMES = """
import os, signal, sys
from pathlib import Path
from nemodiff.builder.build import Builder
rename = Path.rename
def dying(self, target):
    if Path(target).name == "engine":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = dying
Builder(sys.argv[1], sys.argv[2]).run()
"""
SMALL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from nemodiff.cli import main
main(["build", sys.argv[1], "-o", sys.argv[2]])
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def siblings(engine: Path) -> set[str]:
    """Names beside the engine, after the process that cleans up has."""
    eventually(lambda: not any(".partial-" in p.name for p in engine.parent.iterdir()))
    return {p.name for p in engine.parent.iterdir()}


def test_a_build_into_the_folder_that_one_stands_in(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    monkeypatch.chdir(tmp_path / "engine")
    for _ in range(2):  # a new one, and in its place another
        Builder(checkpoint, ".").run()
        assert answers(Path()) == answers(tmp_path / "engine")
        assert not [path for path in Path().iterdir() if path.name.startswith(".")]
    monkeypatch.chdir(tmp_path)
    assert siblings(tmp_path / "engine") == {"checkpoint", "engine"}


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize(
    ("sign", "place"),
    [
        (signal.SIGKILL, "beside"),
        (signal.SIGKILL, "inside"),
        (signal.SIGTERM, "beside"),
        (signal.SIGINT, "beside"),
        (signal.SIGHUP, "inside"),
    ],
)
def test_ended_build_leaves_nothing(checkpoint: Path, sign: signal.Signals, place: str, replacing: bool) -> None:
    engine = checkpoint.parent / "engine"
    if replacing:
        Builder(checkpoint, engine).run()
    elif place == "inside":
        engine.mkdir()
    before = snapshot(engine)
    process = start(SLOW_BUILD, checkpoint, engine, "sleep", place)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    parent = engine.parent if place == "beside" else engine
    assert any(".engine.partial-" in p.name for p in parent.iterdir())
    process.send_signal(sign)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -sign
    if place == "inside":
        siblings(engine / "manifest.json")
    assert siblings(engine) == ({"checkpoint", "engine"} if replacing or place == "inside" else {"checkpoint"})
    assert snapshot(engine) == before
    if replacing:
        assert answers(engine)


def test_kill_between_the_two_renames_gives_the_old_engine_back(checkpoint: Path) -> None:
    engine = checkpoint.parent / "engine"
    before = snapshot(Builder(checkpoint, engine).run())
    process = start(KILLED_BETWEEN_RENAMES, checkpoint, engine)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert siblings(engine) == {"checkpoint", "engine"}
    assert snapshot(engine) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError, OSError])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_exception_leaves_nothing(checkpoint: Path, error: type[BaseException], replacing: bool) -> None:
    engine = checkpoint.parent / "engine"
    if replacing:
        Builder(checkpoint, engine).run()
    before = snapshot(checkpoint.parent)

    def advance(nbytes: int) -> None:
        raise error

    with pytest.raises(BuildError if error is OSError else error):
        Builder(checkpoint, engine).run(advance)
    assert snapshot(checkpoint.parent) == before


@pytest.mark.parametrize("failing", ["engine", "replaced"])
def test_failed_rename_keeps_the_old_engine(checkpoint: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = checkpoint.parent / "engine"
    before = snapshot(Builder(checkpoint, engine).run())
    rename: Callable[[Path, Path], Path] = Path.rename
    refusals = iter([True])

    def refuse(self: Path, target: Path) -> Path:
        if target.name.endswith(failing) and next(refusals, False):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BuildError, match=r"engine: writing failed \(Permission denied\); free some space or choose"):
        Builder(checkpoint, engine).run()
    assert siblings(engine) == {"checkpoint", "engine"}
    assert snapshot(engine) == before


def test_what_was_in_use_when_it_was_replaced_goes_with_the_next_build(checkpoint: Path) -> None:
    engine = checkpoint.parent / "engine"
    left = checkpoint.parent / ".engine.partial-01234567-replaced"
    left.mkdir()
    Swap(checkpoint.parent / ".engine.partial-89abcdef", engine, "manifest.json").clean_up()
    assert left.exists()  # it may be the only one
    Builder(checkpoint, engine).run()
    assert siblings(engine) == {"checkpoint", "engine"}


def test_process_that_cleans_up_cannot_start(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(checkpoint.parent)
    monkeypatch.setattr(staging.sys, "executable", "/nonexistent/python")
    with pytest.raises(OSError, match="No such file"):
        Builder(checkpoint, checkpoint.parent / "engine").run()
    assert snapshot(checkpoint.parent) == before


def test_process_that_cleans_up_does_not_import_from_the_working_folder(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = checkpoint.parent / "here"
    here.mkdir()
    (here / "shutil.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    monkeypatch.chdir(here)
    Builder(checkpoint, checkpoint.parent / "engine").run()
    assert [p.name for p in here.iterdir()] == ["shutil.py"]


def test_rebuild_replaces_the_engine(checkpoint: Path) -> None:
    engine = checkpoint.parent / "engine"
    Builder(checkpoint, engine, block_length=4).run()
    (engine / "model.onnx").write_bytes(b"broken")
    (engine / "manifest.json").write_text("{")
    Builder(checkpoint, engine, block_length=5).run()
    assert nemodiff.load(engine).info.build.block_length == 5
    assert answers(engine)
    assert siblings(engine) == {"checkpoint", "engine"}


def test_empty_folder_is_filled_and_missing_parents_are_made(checkpoint: Path) -> None:
    (checkpoint.parent / "empty").mkdir()
    for engine in (checkpoint.parent / "empty", checkpoint.parent / "a" / "b" / "engine"):
        assert answers(Builder(checkpoint, engine).run())


def test_file_beside_the_engine_s_own_is_never_removed(checkpoint: Path) -> None:
    engine = Builder(checkpoint, checkpoint.parent / "engine").run()
    (engine / "notes.txt").write_text("precious")
    before = snapshot(checkpoint.parent)
    with pytest.raises(BuildError, match=r"would remove 'notes\.txt'.*move it away or choose another --output"):
        Builder(checkpoint, engine)
    assert snapshot(checkpoint.parent) == before


def test_moved_engine_still_runs(checkpoint: Path, tmp_path: Path) -> None:
    engine = Builder(checkpoint, checkpoint.parent / "engine").run()
    expected = answers(engine)
    (tmp_path / "elsewhere").mkdir()
    moved = engine.rename(tmp_path / "elsewhere" / "another name")
    assert answers(moved) == expected
    assert str(checkpoint.parent) not in (moved / "manifest.json").read_text()


@pytest.mark.parametrize("place", ["beside", "inside"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_two_builds_at_once_leave_one_good_engine(checkpoint: Path, replacing: bool, place: str) -> None:
    engine = checkpoint.parent / "engine"
    if replacing:
        Builder(checkpoint, engine).run()
    elif place == "inside":
        engine.mkdir()
    both = [start(SLOW_BUILD, checkpoint, engine, "ask", place) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=PATIENCE)[1] for process in both]
    assert 0 in [process.returncode for process in both]
    for stderr in ends:  # the later one either replaces the earlier or is refused
        assert stderr == "" or "BuildError" in stderr.splitlines()[-1]
    assert siblings(engine) == {"checkpoint", "engine"}
    assert answers(engine)


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_disk_that_fills_up_is_one_line(checkpoint: Path, replacing: bool) -> None:
    engine = checkpoint.parent / "engine"
    before = snapshot(Builder(checkpoint, engine).run()) if replacing else {}
    process = start(SMALL_DISK, checkpoint, engine)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert_one_line(stderr, f"{engine}: writing failed (File too large); free some space or choose another --output")
    assert (process.returncode, stdout) == (1, "")
    assert siblings(engine) == ({"checkpoint", "engine"} if replacing else {"checkpoint"})
    assert snapshot(engine) == before
