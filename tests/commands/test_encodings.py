"""Text in and out where the locale is not UTF-8, and text that was typed on Windows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import output_of
from stand_ins.terminal import in_terminal

from nemodiff.cli import main
from nemodiff.commands.streams import TEXT, typed

NEMODIFF = Path(sys.executable).with_name("nemodiff")
WORDS = "café 你 🙂"
SAYING = ("--regex", WORDS, "--mode", "ar")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}  # Python takes the locale C for UTF-8 unless told otherwise
LATIN = {"PYTHONIOENCODING": "latin-1"}
PATHS = (
    "against",
    "checkpoint",
    "device",
    "host",
    "sm",
    "tasks",
)  # words for the system, or without anything but ASCII


def run(*words: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [str(NEMODIFF), *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, env={**os.environ, **environment}, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_engine: Path) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "lines.jsonl").write_text(json.dumps({"prompt": WORDS, "regex": WORDS}), encoding="utf-8")
    (folder / "text.txt").write_text(WORDS, encoding="utf-8")
    output_of("run", str(tiny_engine), "-p", WORDS, *SAYING, "--trace", str(folder / "trace.jsonl"))
    return folder


COMMANDS = {
    "run": ["run", "ENGINE", "-p", WORDS, *SAYING],
    "stream": ["run", "ENGINE", "-p", WORDS, *SAYING, "--stream", "--show-denoise", "--stats"],
    "denoise": ["run", "ENGINE", "-p", WORDS, "--mode", "diffusion", "--show-denoise", "--max-new-tokens", "8"],
    "json": ["run", "ENGINE", "-p", WORDS, *SAYING, "--json"],
    "input file": ["run", "ENGINE", "--input-file", "FILES/lines.jsonl"],
    "chat": ["chat", "ENGINE", *SAYING],
    "infill": ["infill", "ENGINE", "--prefix", WORDS, "--length", "2", "--method", "block", "-p", WORDS],
    "template": ["infill", "ENGINE", "--template", WORDS + "{hole:2}", "--method", "block"],
    "revise": ["revise", "ENGINE", "--text", WORDS, "--keep", "0", "--rounds", "1", "--prompt", WORDS],
    "revise a file": ["revise", "ENGINE", "--file", "FILES/text.txt", "--keep", "0", "--rounds", "1"],
    "trace": ["trace", "show", "FILES/trace.jsonl"],
    "inspect": ["inspect", "ENGINE"],
    "refusal": ["infill", "ENGINE", "--template", WORDS],
}
ALIKE = {"stream", "template", "revise", "revise a file", "trace", "inspect"}  # others are tried with ASCII, too


@pytest.mark.parametrize("name", COMMANDS)
def test_no_answer_is_lost_whatever_the_locale_is(tiny_engine: Path, files: Path, name: str) -> None:
    words = [w.replace("ENGINE", str(tiny_engine)).replace("FILES", str(files)) for w in COMMANDS[name]]
    stdin = f"{WORDS}\n".encode() if name == "chat" else b""
    expected = CliRunner().invoke(main, words, input=stdin, prog_name="nemodiff")  # in UTF-8
    assert expected.exit_code == (name == "refusal")
    if name in ("run", "stream", "input file", "chat"):
        assert expected.stdout_bytes == f"{WORDS}\n".encode()
    for environment in (ASCII, LATIN)[name in ALIKE :]:
        got = run(*words, stdin=stdin, **environment)
        assert got.returncode == expected.exit_code, got.stderr
        if name == "json":
            assert json.loads(got.stdout)["text"] == WORDS
        else:
            assert got.stdout == expected.stdout_bytes
        if name in ("denoise", "refusal"):
            assert got.stderr == expected.stderr_bytes
        assert b"Traceback" not in got.stderr


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        pytest.param(LATIN, b"caf\xe9 \\u4f60 \\U0001f642\n", id="latin-1"),
        pytest.param(ASCII, f"{WORDS}\n".encode(), id="ascii"),
    ],
)
def test_a_terminal_shows_what_it_can_and_escapes_the_rest(
    tiny_engine: Path, environment: dict[str, str], shown: bytes
) -> None:
    assert in_terminal(["run", str(tiny_engine), "-p", WORDS, *SAYING], environment) == shown


@pytest.mark.parametrize("command", [["run", "--json", "--raw"], ["revise", "--json", "--keep", "0", "--rounds", "1"]])
def test_standard_input_from_windows(tiny_engine: Path, command: list[str]) -> None:
    name, *flags = command
    flags += ["--max-new-tokens", "2"] if name == "run" else []
    answers = [
        json.loads(run(name, tiny_engine, *flags, stdin=stdin, **LATIN).stdout)
        for stdin in ("\ufeffcafé:\r\n3, 4,\r\n".encode(), "café:\n3, 4,\n".encode())
    ]
    for answer in answers:
        answer.pop("timings_ms", None)
        answer.pop("total_ms", None)
    assert answers[0] == answers[1]


def test_a_chat_from_windows(tiny_engine: Path) -> None:
    typed_there = run(
        "chat", tiny_engine, "--max-new-tokens", "8", stdin=b"\xef\xbb\xbfCount from 3 to 9.\r\n/exit\r\n"
    )
    typed_here = run("chat", tiny_engine, "--max-new-tokens", "8", stdin=b"Count from 3 to 9.\n/exit\n")
    assert (typed_there.returncode, typed_there.stdout) == (0, typed_here.stdout)
    assert run("chat", tiny_engine, stdin=b"\xef\xbb\xbf/exit\r\n").stderr == b""


def test_files_from_windows(tiny_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_bytes(b'\xef\xbb\xbf{\r\n  "type": "integer"\r\n}\r\n')
    output = output_of("run", str(tiny_engine), "-p", "Count.", "--json-schema", str(tmp_path / "schema.json"))
    assert isinstance(json.loads(output), int)
    (tmp_path / "a.txt").write_bytes("\ufeffcafé:\r\n3, 4,\r\n".encode())
    (tmp_path / "b.txt").write_bytes("café:\n3, 4,\n".encode())
    flags = ["--keep", "0", "--rounds", "1"]
    there, here = (
        output_of("revise", str(tiny_engine), "--file", str(tmp_path / n), *flags) for n in ("a.txt", "b.txt")
    )
    assert there == here


def test_a_trace_that_was_saved_on_windows(files: Path, tmp_path: Path) -> None:
    text = (files / "trace.jsonl").read_bytes()
    (tmp_path / "trace.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    shown = [output_of("trace", "show", str(folder / "trace.jsonl")) for folder in (files, tmp_path)]
    assert shown[0] == shown[1]


def test_a_schema_and_a_path_on_the_command_line(tiny_engine: Path, tmp_path: Path) -> None:
    schema = json.dumps({"const": WORDS}, ensure_ascii=False)
    (tmp_path / "schéma.json").write_text(schema, encoding="utf-8")
    for given in (schema, str(tmp_path / "schéma.json")):
        got = run("run", tiny_engine, "-p", "x", "--json-schema", given, **ASCII)
        assert json.loads(got.stdout) == WORDS, got.stderr
    assert run("inspect", tmp_path / "élan", **ASCII).stderr.startswith(b"Error: ")


def test_every_word_of_text_is_taken_as_utf8() -> None:
    def texts(command: click.Command) -> list[str]:
        inner = command.commands.values() if isinstance(command, click.Group) else ()
        params = command.get_params(click.Context(command))
        own = [p.name or "" for p in params if type(p.type) is type(click.STRING)]
        return [*own, *(name for one in inner for name in texts(one))]

    assert set(texts(main)) <= {*PATHS, "json_schema", "tools", "chat_template_kwargs", "block_length", "logit_bias"}
    assert TEXT.convert(WORDS, None, None) == WORDS


def test_words_that_are_not_utf8_stay() -> None:
    assert typed("caf\udce9") == "caf\udce9"
    assert typed("\ud800") == "\ud800"
