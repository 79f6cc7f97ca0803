"""ONNX Runtime's telemetry is off in every entry unless the user turns it on: no file, no look-up, no socket."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from stand_ins.http_server import serving
from stand_ins.network import compile_recorder

from nemodiff.serving.triton_server.export import export

ROOT = Path(__file__).parents[1]
SWITCH = "ORT_DISABLE_TELEMETRY"
# ONNX Runtime 1.32 sends nothing where one of these is set, whatever the switch says.
CONTINUOUS_INTEGRATION = (
    *("APPVEYOR", "BUILDKITE", "CI", "CIRCLECI", "CODEBUILD_BUILD_ID", "GITHUB_ACTIONS"),
    *("GITLAB_CI", "JENKINS_URL", "TEAMCITY_VERSION", "TF_BUILD", "TRAVIS"),
)
LIBRARY = """
import sys
import nemodiff
assert "onnxruntime" not in sys.modules
nemodiff.generate(nemodiff.load(sys.argv[1], threads=1), "Hello", max_new_tokens=2)
assert "onnxruntime" in sys.modules
print("answered", flush=True)
sys.stdin.read()
"""
PLAIN = [sys.executable, "-W", "error"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def environment(home: Path, switch: str | None = None) -> dict[str, str]:
    """A user's environment with another home, and with the switch as the user has set it."""
    values = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    for name in (SWITCH, *CONTINUOUS_INTEGRATION):  # the switch is set by this process's own import of nemodiff
        values.pop(name, None)
    return values if switch is None else {**values, SWITCH: switch}


def written(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file())


def run(command: list[str], variables: dict[str, str]) -> None:
    ended = subprocess.run(command, env=variables, input="", capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr


def test_the_library_leaves_nothing_in_the_user_s_folders(tiny_engine: Path, home: Path) -> None:
    run([*PLAIN, "-c", LIBRARY, str(tiny_engine)], environment(home))
    assert written(home) == []


def test_the_command_leaves_nothing(tiny_engine: Path, home: Path) -> None:
    command = [*PLAIN, "-m", "nemodiff", "run", str(tiny_engine), "-p", "Hello", "--max-new-tokens", "2"]
    run(command, environment(home))
    assert written(home) == []


def test_the_server_leaves_nothing(tiny_engine: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SWITCH, *CONTINUOUS_INTEGRATION):
        monkeypatch.delenv(name, raising=False)
    with serving(tiny_engine, environment={"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}) as served:
        served.ask("/v1/completions", {"prompt": "Hello", "max_tokens": 2})
    assert written(home) == []


def test_the_triton_model_leaves_nothing(tiny_engine: Path, home: Path, tmp_path: Path) -> None:
    model = export(tiny_engine, tmp_path / "models")
    run([*PLAIN, str(ROOT / "tests" / "stand_ins" / "triton_backend.py"), str(model)], environment(home))
    assert written(home) == []


@pytest.mark.parametrize(("switch", "kept"), [("0", "0"), ("1", "1"), ("", "1"), (None, "1")])
def test_what_the_user_has_set_is_kept(switch: str | None, kept: str, home: Path) -> None:
    script = f"import nemodiff, os; assert os.environ['{SWITCH}'] == '{kept}'; import onnxruntime"
    run([*PLAIN, "-c", script], environment(home, switch))
    assert bool(written(home)) == (kept == "0")


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    library = compile_recorder(tmp_path)
    if library is None:
        pytest.skip("needs a C compiler")
    return library


def test_nothing_is_looked_up(tiny_engine: Path, recorder: Path, tmp_path: Path) -> None:
    """Two processes at once, one with telemetry on: when that one looks its vendor up, the other would have too."""
    processes, logs = [], {}
    try:
        for switch in ("0", None):
            home, log = tmp_path / f"home-{switch}", tmp_path / f"log-{switch}"
            home.mkdir()
            log.touch()
            logs[switch] = log
            variables = {**environment(home, switch), "LD_PRELOAD": str(recorder), "NETWORK_LOG": str(log)}
            command = [*PLAIN, "-c", LIBRARY, str(tiny_engine)]
            processes.append(
                subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "answered\n"
        eventually(lambda: "getaddrinfo" in logs["0"].read_text())  # about 9 seconds after it is imported
        time.sleep(1)
    finally:
        for process in processes:
            process.communicate(timeout=PATIENCE)
    assert "events.data" in logs["0"].read_text()  # else this test would see nothing
    assert logs[None].read_text() == ""


def test_no_file_imports_onnxruntime_before_nemodiff() -> None:
    """Outside a function it may stand in tests alone, since their conftest.py has imported nemodiff before."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    early = []
    for name in listed.splitlines():
        if name.startswith("tests/") or not (ROOT / name).is_file():
            continue
        for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            early += [name for module in modules if module.partition(".")[0] == "onnxruntime"]
    assert early == []
