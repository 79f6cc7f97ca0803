"""What several test files share: one built engine, a small checkpoint to break, and the form of a refusal.

`refused` runs the command in this process and checks what every refusal owes: one line, no traceback, and below
`tmp_path` exactly the files that were there before.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before numpy comes in: idle BLAS threads spin, which made the oracle 20 times slower beside another busy process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before torch comes in: its idle threads spin too, and the tests run in one process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton comes in: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

import hypothesis
import hypothesis.configuration
import pytest
from click.testing import CliRunner, Result
from stand_ins.checkpoints import TINY_CHAT, write_adapter, write_checkpoint
from stand_ins.tool_templates import tool_engine

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.builder.export import Exporter
from nemodiff.cli import main
from nemodiff.config import ModelConfig

PLAN = re.compile(
    r"(checkpoint|parameters|images|twin|left out|engine|split|disk|KV cache|memory|fits( here)?|ignored|note|"
    r"warning) {2,}"
)
SUBJECT = re.compile(
    r"/|\.json|--[a-z]|[a-z]_[a-z]|\b(ENGINE|device|keep|length|logprobs|mode|prompt|message|option|regex|rounds|seed|standard|stop|system|"
    r"temperature|template|threshold|width|word)\b"
)
REMEDY = re.compile(r"allowed: |; |\bgive\b|\buse\b")

Refused = Callable[..., str]
PATIENCE = 120.0  # seconds until a test says that something hangs; none that passes waits for them to be over

hypothesis.settings.register_profile("nemodiff", database=None, deadline=None)
hypothesis.settings.load_profile("nemodiff")


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis keeps tables of characters and of constants in a folder: a temporary one, not the repository.

    Signals that whatever started the tests ignores, as a shell does for what it runs behind it, would be ignored by
    the processes that tests start as well.
    """
    for sign, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(sign) is signal.SIG_IGN:
            signal.signal(sign, usual)
    folder = tempfile.TemporaryDirectory(prefix="nemodiff-hypothesis-")
    config.add_cleanup(folder.cleanup)
    hypothesis.configuration.set_hypothesis_home_dir(folder.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first: one that began last would be waited for beside an idle core."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


if importlib.util.find_spec("onnxruntime"):  # tests that need a GPU also run without it
    import onnxruntime

    class OneThread(onnxruntime.SessionOptions):
        """What ONNX Runtime takes where no number of threads is given: a second one would spin, mostly waiting.

        With it an answer took twice the processor time. Servers that tests start have one as well, but for one of
        them; commands have those that they take by themselves.
        """

        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    onnxruntime.SessionOptions = OneThread


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/tiny-chat as an engine; read it, never change it."""
    return Builder(TINY_CHAT, tmp_path_factory.mktemp("engines") / "tiny-chat").run()


@pytest.fixture(scope="session")
def xml_tool_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-chat with a template that shows tools and writes calls as XML; read it, never change it."""
    return tool_engine(tmp_path_factory.mktemp("engines") / "tools", "xml")


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> nemodiff.LoadedEngine:
    """tiny-chat, loaded anew for each file of tests."""
    return nemodiff.load(tiny_engine, threads=1)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """tiny-chat's config."""
    return open_checkpoint(TINY_CHAT).model


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-chat's twin; read it, never change it."""
    return Exporter(TINY_CHAT, tmp_path_factory.mktemp("twins") / "tiny-chat").run()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small random checkpoint of 2 layers and vocabulary 891 with an adapter of rank 4, fresh for each test."""
    folder = write_checkpoint(tmp_path / "checkpoint", dtype="f32")
    write_adapter(folder, rank=4, alpha=8, strength=0.01)
    return folder


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below a folder, by path; folders count by name."""
    files = {p: p.lstat() for p in folder.rglob("*")}
    return {str(p): (s.st_size, s.st_mtime_ns) if p.is_file() else (0, 0) for p, s in files.items()}


def assert_one_line(stderr: str, *fragments: str, code: int = 1) -> str:
    """Check that standard error is a well-mannered refusal that holds the fragments, and return its line."""
    assert stderr.endswith("\n")
    assert "Traceback" not in stderr
    *before, line = stderr[:-1].split("\n")
    assert line.startswith("Error: ")
    assert line.isprintable()
    for fragment in fragments:
        assert fragment in line
    assert SUBJECT.search(line), "names neither file nor flag"
    if code == 2:  # a bad flag: click's usage and the pointer to --help stand before it
        assert not before or (before[0].startswith("Usage: ") and "--help" in before[1])
    else:  # the plan may have been shown already, nothing else
        assert all(PLAN.match(other) for other in before), before
        assert REMEDY.search(line), "says neither what is allowed nor what to do next"
    return line


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def answers(engine: Path) -> list[int]:
    """The tokens of a short answer, which an engine that is whole gives."""
    return nemodiff.generate(nemodiff.load(engine), [130, 131, 132], max_new_tokens=8).token_ids


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def output_of(*arguments: object) -> str:
    """What the command prints when it succeeds."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is a checkout on the path, of which an installer knows nothing."""
    found = importlib.metadata.Distribution.from_name

    def from_name(name: str) -> importlib.metadata.Distribution:
        if name == "nemodiff":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", from_name)


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Run the command, check that it refuses as it should and changes no file, and return the line."""

    def run(arguments: list[str], *fragments: str, code: int = 1, stdin: str | bytes = b"") -> str:
        before = snapshot(tmp_path)
        result = CliRunner().invoke(main, arguments, input=stdin, prog_name="nemodiff")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert snapshot(tmp_path) == before
        assert result.stdout == ""
        line = assert_one_line(result.stderr, *fragments, code=code)
        assert result.exit_code == code
        return line

    return run
