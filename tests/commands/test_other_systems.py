"""Commands do without what another system lacks, and answer the same. What no stand-in can show is in README.md."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE
from stand_ins import other_system
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.http_server import serving

import nemodiff

ROOT = Path(__file__).parents[2]
QUESTION = "Count from 3 to 9."


def commanded(system: str, *commands: list[str]) -> str:
    """What commands print that run one after the other in a process that stands for another system."""
    words = [sys.executable, "-W", "error", other_system.__file__, system, *map(json.dumps, commands)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def answers(system: str, engine: Path, *choices: str) -> list[int]:
    """Build tiny-chat, look at the engine, and ask it; the tokens of the answer."""
    printed = commanded(
        system,
        ["build", str(TINY_CHAT), "-o", str(engine), *choices],
        ["inspect", str(engine)],
        ["run", str(engine), "-p", QUESTION, "--json", "--threads", "1"],
    )
    assert [path.name for path in engine.parent.iterdir()] == [engine.name]
    tokens: list[int] = json.loads(printed.splitlines()[-1])["token_ids"]
    return tokens


@pytest.mark.parametrize("system", other_system.ANSWERS)
def test_an_engine_is_built_runs_and_is_served(engine: nemodiff.LoadedEngine, tmp_path: Path, system: str) -> None:
    expected = nemodiff.generate(engine, QUESTION)
    assert answers(system, tmp_path / "engine") == expected.token_ids
    with serving(tmp_path / "engine", system=system) as served:
        answer = served.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}]})
        assert answer["choices"][0]["message"]["content"] == expected.text
        served.process.send_signal(signal.SIGUSR1)
        assert served.process.stderr is not None
        assert json.loads(served.process.stderr.readline())["state"]["most_memory_bytes"] > 0


def test_a_mac_calls_its_processor_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (
        "from stand_ins.other_system import become; become('darwin');"
        "from nemodiff.runtime.planning.kept_curve import cpu_name; print(cpu_name())"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=":")
    assert subprocess.check_output([sys.executable, "-c", asked], text=True) == "arm\n"
    sysctl = tmp_path / "sysctl"
    sysctl.write_text('#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo Apple M2\n')
    sysctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert subprocess.check_output([sys.executable, "-c", asked], text=True) == "Apple M2\n"


@pytest.mark.torch
@pytest.mark.parametrize("system", other_system.ANSWERS)
def test_torch_runs_on_the_cpu(engine: nemodiff.LoadedEngine, tmp_path: Path, system: str) -> None:
    tokens = answers(f"{system}+torch", tmp_path / "engine", "--backend", "torch", "--dtype", "f32")
    assert tokens == nemodiff.generate(engine, QUESTION).token_ids
