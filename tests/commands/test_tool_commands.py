"""Tools on the command line: `run` shows calls, `chat` takes their results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Refused, output_of
from stand_ins.tool_templates import CLOCK, TOOLS

from nemodiff.cli import main
from nemodiff.commands.calls import CallLines

ASKED = ["-p", "What is the weather in Rome?", "--tool-choice", "weather", "--max-new-tokens", "300"]


@pytest.fixture
def tools(tmp_path: Path) -> str:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS))
    return str(path)


def test_run_shows_a_call_in_each_form(xml_tool_engine: Path, tools: str) -> None:
    asked = ["run", str(xml_tool_engine), *ASKED, "--tools", tools]
    shown = output_of(*asked)
    match = re.fullmatch(r"weather\((\{.*\})\)\n", shown)
    assert match is not None, shown
    assert json.loads(match[1])["days"] in range(1, 10)
    assert output_of(*asked, "--stream") == shown
    (call,) = json.loads(output_of(*asked, "--json"))["tool_calls"]
    assert call == {"name": "weather", "arguments": match[1]}
    thinking = output_of(*asked, "--thinking", "--thinking-budget", "3", "--stream")
    assert re.fullmatch(r"<think>[^\0]*</think>\nweather\(.*\)\n", thinking)


def test_lines_of_a_file_have_their_own_tools(xml_tool_engine: Path, tmp_path: Path) -> None:
    line = {"prompt": "What time is it?", "tools": [CLOCK], "tool_choice": "clock", "id": 3}
    (tmp_path / "lines").write_text(json.dumps(line))
    shown = output_of("run", str(xml_tool_engine), "--input-file", str(tmp_path / "lines"), "--json")
    answer = json.loads(shown)
    assert output_of("run", str(xml_tool_engine), "--input-file", str(tmp_path / "lines")) == "clock({})\n"
    assert (answer["id"], answer["tool_calls"]) == (3, [{"name": "clock", "arguments": "{}"}])


def test_chat_takes_results(xml_tool_engine: Path, tools: str) -> None:
    asked = ["chat", str(xml_tool_engine), "--tools", tools, "--tool-choice", "clock"]
    talk = CliRunner().invoke(main, asked, input="What time is it?\nnoon\n\n3\n", catch_exceptions=False)
    assert talk.exit_code == 0
    assert talk.stdout == "clock({})\n" * 4  # the model must call, so that every line but the first is a result
    ended = CliRunner().invoke(main, asked, input="What time is it?\n", catch_exceptions=False)
    assert (ended.exit_code, ended.stdout) == (0, "clock({})\n")


def test_a_part_begins_and_ends_as_itself() -> None:
    lines = CallLines()
    parts = [("reasoning", "a"), ("content", "b"), ("call", "f"), ("arguments", "{"), ("arguments", "}"), ("call", "g")]
    text = "".join(lines.push(*part) for part in [*parts, ("arguments", "{}"), ("content", "c")])
    assert text + lines.end() == "<think>a</think>\nb\nf({})\ng({})\nc"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--tools", "nowhere.json"], "nowhere.json: No such file"),
        (["--tools", "[{}]"], "tools holds the name null"),
        (["--tool-choice", "clock"], "tool_choice is 'clock', but no tools are given"),
    ],
)
def test_what_is_wrong_with_tools_is_one_line(
    xml_tool_engine: Path, refused: Refused, flags: list[str], problem: str
) -> None:
    refused(["run", str(xml_tool_engine), "-p", "x", *flags], problem, code=2 if "nowhere" in flags[1] else 1)


def test_a_template_without_tools_is_told(tiny_engine: Path, refused: Refused) -> None:
    refused(["run", str(tiny_engine), "-p", "x", "--tools", json.dumps(TOOLS)], "tools are not for this engine")
