"""Ctrl-C ends every command without a word and with 130, SIGTERM with 143, SIGHUP with 129, whatever it is doing;
a reader that has enough ends it with 141.
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import assert_one_line, eventually, snapshot
from stand_ins.checkpoints import TINY_CHAT

NEMODIFF = [sys.executable, "-m", "nemodiff"]
ROOT = Path(__file__).parents[2]
INTERRUPT = b"\x03"


def run_interrupted(
    at: str, words: Sequence[object], stdin: bytes = b"", sign: signal.Signals = signal.SIGINT
) -> tuple[bytes, bytes]:
    """What a command writes that is interrupted."""
    command = [sys.executable, "-m", "stand_ins.interrupted", *map(str, words)]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "AT": at, "SIGNAL": str(int(sign))}
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120, check=False)
    for word in (b"Traceback", b"Error", b"Abort", b"Exception"):
        assert word not in done.stderr, done.stderr
    assert done.returncode == 128 + sign, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "nemodiff.cli",
        "click",
        "nemodiff.runtime.requests.options",
        "numpy",
        "onnxruntime",
    ],
)
def test_an_interrupted_import(tiny_engine: Path, module: str) -> None:
    assert run_interrupted(module, ["run", tiny_engine, "-p", "x"]) == (b"", b"")


def test_an_interrupted_import_is_no_missing_package(tmp_path: Path) -> None:
    words = ["build", TINY_CHAT, "-o", tmp_path / "out", "--backend", "tensorrt-rtx"]
    assert run_interrupted("tensorrt_rtx", words) == (b"", b"")


def test_the_command_begins_where_it_can_be_interrupted() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"nemodiff": "nemodiff.__main__:main"}
    listed = "import sys, nemodiff; print(*(m for m in sys.modules if m.startswith('nemodiff.')))"
    assert subprocess.run([sys.executable, "-c", listed], capture_output=True, check=True).stdout == b"\n"


STEP = "nemodiff.runtime.batching.batch:Batch.step"
WORKING = {
    "build": ("nemodiff.builder.build:copy_carried", ["build", TINY_CHAT, "-o", "OUT"]),
    "build, writing": ("nemodiff.builder.checkpoint.weights:_pieces", ["build", TINY_CHAT, "-o", "OUT"]),
    "export": ("nemodiff.builder.export:copy_tensors", ["export", TINY_CHAT, "-o", "OUT"]),
    "load": ("nemodiff.runtime.loading:TextCodec", ["run", "ENGINE", "-p", "x"]),
    "trace": (STEP, ["run", "ENGINE", "-p", "x", "--trace", "OUT"]),
    "chat": (STEP, ["chat", "ENGINE"]),
    "bench": ("nemodiff.measurement.bench:tests", ["bench", "ENGINE"]),
    "verify": ("nemodiff.verification.verify:_answers", ["verify", "ENGINE", "-p", "x"]),
    "serve": ("uvicorn", ["serve", "ENGINE", "--port", "0"]),
}


WATCHED = """
import contextlib, sys
from nemodiff import whole_file
from nemodiff.builder import staging
def watched(open_stage):
    @contextlib.contextmanager
    def watch(*arguments):
        with open_stage(*arguments) as stage:
            before = {*sys.modules}
            yield stage
            print("imported:", sorted({*sys.modules} - before))
    return watch
whole_file.whole, staging.staged = watched(whole_file.whole), watched(staging.staged)
from nemodiff.cli import main
main()
"""


@pytest.mark.parametrize(
    "words",
    [
        ["build", TINY_CHAT, "-o", "OUT"],
        [
            "bench",
            "ENGINE",
            "--no-keep",
            "--mode",
            "ar",
            "--repetitions",
            "1",
            "--max-new-tokens",
            "2",
            "--plot",
            "OUT",
        ],
    ],
    ids=["build", "bench"],
)
def test_nothing_is_imported_while_a_file_is_half_written(
    tiny_engine: Path, tmp_path: Path, words: list[object]
) -> None:
    """An interrupt ends an import at once, so what is begun then would stay."""
    pytest.importorskip("matplotlib")
    places = {"ENGINE": tiny_engine, "OUT": tmp_path / "out.png"}
    command = [sys.executable, "-c", WATCHED, *(str(places.get(str(word), word)) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("imported:")] == ["imported: []"]


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        *((name, signal.SIGINT) for name in WORKING),
        *((name, signal.SIGTERM) for name in ("build, writing", "export", "trace", "chat", "serve")),
        *((name, signal.SIGHUP) for name in ("build", "load", "trace", "verify", "serve")),
    ],
)
def test_an_interrupt_at_work_leaves_nothing_half_written(
    tiny_engine: Path, tmp_path: Path, name: str, sign: signal.Signals
) -> None:
    at, words = WORKING[name]
    places = {"ENGINE": tiny_engine, "OUT": tmp_path / "out"}
    before = snapshot(tmp_path), snapshot(tiny_engine)
    out, _ = run_interrupted(at, [places.get(str(word), word) for word in words], b"Hi\n", sign)
    assert out == b""
    assert (snapshot(tmp_path), snapshot(tiny_engine)) == before


@pytest.mark.parametrize(
    "words",
    [["inspect", "ENGINE"], ["run", "ENGINE", "-p", "x", "--stream"], ["--help"]],
    ids=lambda words: words[0],
)
def test_a_reader_that_is_gone(tiny_engine: Path, words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*NEMODIFF, *(str(tiny_engine) if word == "ENGINE" else word for word in words)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["--version"], ["run", "--help"]], ids=lambda words: words[0])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_full(words: list[str], unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*NEMODIFF, *words], stdout=full, stderr=subprocess.PIPE, env=environment, timeout=120, check=False
        )
    assert_one_line(done.stderr.decode(), "standard output: No space left on device; check the path and its disk")
    assert done.returncode == 1


@pytest.mark.parametrize(("key", "code"), [(INTERRUPT, 130), (b"\x04", 0)], ids=["interrupt", "end of input"])
def test_a_conversation_that_is_left_leaves_its_line(tiny_engine: Path, key: bytes, code: int) -> None:
    ours, theirs = pty.openpty()
    words = [*NEMODIFF, "chat", str(tiny_engine)]
    with (
        os.fdopen(ours, "r+b", buffering=0) as keys,
        subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs) as process,
    ):
        os.close(theirs)
        shown = b""
        while not shown.endswith(b"> "):
            shown += keys.read(1)
        with contextlib.suppress(OSError):  # how Linux reports that the other end has closed
            while True:  # an interrupt before readline waits for a key is seen with the next one
                if key == INTERRUPT:  # which a terminal sends to the processes that it controls
                    process.send_signal(signal.SIGINT)
                else:
                    keys.write(key)
                while select.select([keys], [], [], 5)[0]:
                    shown += keys.read(4096)
    assert process.returncode == code
    assert shown.endswith(b"\r\n")
    assert b"Traceback" not in shown


def test_a_standard_input_that_does_not_wait(tiny_engine: Path) -> None:
    """As another program may leave one that it shares."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    words = [*NEMODIFF, "run", str(tiny_engine), "--max-new-tokens", "4"]
    with subprocess.Popen(words, stdin=read, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        eventually(lambda: os.get_blocking(read) or process.poll() is not None)
        os.close(read)
        os.write(write, b"Count from 3 to 9.")
        os.close(write)
        assert process.stdout is not None
        assert process.stdout.read().startswith("3")
    assert process.returncode == 0


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    script = 'mkdir "$0"; cd "$0"; rmdir "$0"; exec "$@"'
    words = ["sh", "-c", script, str(tmp_path / "gone"), *NEMODIFF, "build", TINY_CHAT, "-o", "engine"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    said = "Error: the current folder: No such file or directory; check the path and its disk\n"
    assert (done.stderr, done.returncode) == (said, 1)


def test_streams_that_were_closed(tmp_path: Path) -> None:
    def closed(streams: str, *words: object) -> int:
        command = ["sh", "-c", f'exec "$@" {streams}', "sh", *NEMODIFF, *map(str, words)]
        return subprocess.run(command, timeout=120, check=False).returncode

    engine = tmp_path / "engine"
    assert closed("<&- >&- 2>&-", "build", TINY_CHAT, "-o", engine) == 0
    assert closed("<&- >&- 2>&-", "run", engine, "-p", "x") == 0
    assert closed("2>&-", "run", tmp_path / "none", "-p", "x") == 1
