"""A count of one is followed by a noun in the singular, in everything that a command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from stand_ins.checkpoints import TINY_CHAT

from nemodiff.builder.build import Builder
from nemodiff.cli import main
from nemodiff.contract import counted

# The plural of anything that is counted; `1 x 32768` and `0.1 passes` are no counts of one.
WRONG = re.compile(
    r"(?<![\d.,])1 ((new|near|drafted|key/value|of warm-up) )?"
    r"(cores|files|heads|layers|lines|prompts|rounds|rows|tensors|threads|ties|tokens|workers)\b|\(s\)"
)

BENCH = [
    "--mode",
    "ar",
    "--input-len",
    "8",
    "--max-new-tokens",
    "1",
    "-r",
    "1",
    "--input-file",
    "LINES",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for one request at a time."""
    return Builder(TINY_CHAT, tmp_path_factory.mktemp("single") / "engine", max_batch_size=1).run()


def test_a_count_has_its_noun() -> None:
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert (counted(1, "pass"), counted(2, "pass")) == ("1 pass", "2 passes")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["inspect", "ENGINE"], id="inspect"),
        pytest.param(["build", str(TINY_CHAT), "-o", "OTHER", "--max-batch-size", "1", "--dry-run"], id="build"),
        pytest.param(
            ["build", str(TINY_CHAT), "-o", "OTHER", "--max-batch-size", "1", "--backend", "torch", "--dry-run"]
        ),
        pytest.param(["run", "ENGINE", "-p", "x", "--max-new-tokens", "1", "--stats", "--show-denoise"], id="run"),
        pytest.param(["run", "ENGINE", "-p", "x", "--raw", "--max-new-tokens", "40000"], id="refused"),
        pytest.param(
            ["run", "ENGINE", "--input-file", "LINES", "--json", "--max-new-tokens", "1", "--stats"], id="lines"
        ),
        pytest.param(["verify", "ENGINE", "-p", "x", "--max-new-tokens", "1"], id="verify"),
        pytest.param(["bench", "ENGINE", *BENCH], id="bench"),
        pytest.param(["trace", "show", "TRACE"], id="trace"),
    ],
)
def test_one_of_a_thing_is_no_plural(single: Path, tmp_path: Path, words: list[str]) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "x"}\n')
    trace = tmp_path / "trace.jsonl"
    if "TRACE" in words:
        flags = ["-p", "x", "--raw", "--max-new-tokens", "1"]
        CliRunner().invoke(main, ["run", str(single), *flags, "--trace", str(trace)])
    places = {"ENGINE": str(single), "OTHER": str(tmp_path / "other"), "LINES": str(lines), "TRACE": str(trace)}
    result = CliRunner().invoke(main, [places.get(word, word) for word in words])
    printed = result.stdout + result.stderr
    assert re.search(r"\b1 [a-z]", printed), printed  # something is counted
    assert WRONG.findall(printed) == [], printed
