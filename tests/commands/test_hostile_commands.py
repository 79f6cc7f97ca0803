"""Wrong requests, on the command line and in Python: each is refused with one line before a token is decoded.

A prompt can be wrong without any wrong flag: JSON spells halves of surrogate pairs, a shell passes on bytes
that are no text, and a valid JSON line may hold a line end of Unicode.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Refused, assert_one_line, snapshot

import nemodiff
from nemodiff.cli import main

DEEP: list[Any] = json.loads("[" * 700 + "]" * 700)
NEMODIFF = Path(sys.executable).with_name("nemodiff")


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        pytest.param(["--mode", "fast"], ["'--mode': 'fast' is not one of 'ar', 'diffusion', "], id="mode"),
        pytest.param(["--beams", "4"], ["No such option", "--beams"], id="unknown flag"),
        pytest.param(["--input-file", "x.jsonl"], ["--prompt or --input-file, not both"], id="two prompts"),
        pytest.param(["--batch-size", "2"], ["--batch-size goes with --input-file"], id="batch of one prompt"),
        pytest.param(["--stream", "--json"], ["--stream or --json, not both"], id="stream and json"),
        pytest.param(["--threads", "0"], ["'--threads': 0"], id="no threads"),
        pytest.param(["--max-new-tokens", "many"], ["'--max-new-tokens': 'many'"], id="limit is text"),
        pytest.param(["--logit-bias", "3"], ["'--logit-bias': '3' is not ID=NUMBER"], id="bias without a number"),
        pytest.param(["--logit-bias", "3=x"], ["'--logit-bias': '3=x' is not ID=NUMBER"], id="bias is text"),
        pytest.param(["--logprobs", "2"], ["--logprobs goes with --json"], id="logprobs without json"),
        pytest.param(["--confidences"], ["--confidences goes with --json"], id="confidences without json"),
        pytest.param(["--policy", "best"], ["'--policy': 'best' is not one of 'threshold', 'topk'"], id="policy"),
        pytest.param(["--json-schema", "no-file"], ["'--json-schema': no-file: ", "give a file"], id="no schema"),
        pytest.param(["--json-schema", ""], ["'--json-schema': it is empty; give a file"], id="schema unset"),
        pytest.param(["--image", ""], ["'--image': it is empty; give a path"], id="image unset"),
        pytest.param(
            ["--image", "https://a.example/x.png"],
            ["'--image': https://a.example/x.png is a URL; download it and give its path"],
            id="image of a URL",
        ),
        pytest.param(["--temperature", "warm"], ["'--temperature': 'warm'"], id="temperature is text"),
        pytest.param(["--seed", "1.5"], ["'--seed': '1.5'"], id="seed is no integer"),
        pytest.param(["--max-new-tokens"], ["'--max-new-tokens' requires an argument"], id="flag without value"),
    ],
)
def test_wrong_flags_are_refused(tiny_engine: Path, refused: Refused, flags: list[str], fragments: list[str]) -> None:
    refused(["run", str(tiny_engine), "-p", "x", *flags], *fragments, code=2)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        pytest.param(["--max-new-tokens", "0"], ["max_new_tokens is 0, allowed: 1 or more"], id="0 tokens"),
        pytest.param(["--max-new-tokens", "-1"], ["max_new_tokens is -1, allowed: 1 or more"], id="-1 tokens"),
        pytest.param(
            ["--max-new-tokens", "32768"],
            [
                "the prompt has ",
                "max_new_tokens is 32768, together 327",
                "context length is 32768 (max_seq_len): shorten",
                "at most 327",
            ],
            id="too many tokens",
        ),
        pytest.param(["--threshold", "-0.1"], ["threshold is -0.1, allowed: 0 or more"], id="threshold negative"),
        pytest.param(["--threshold", "nan"], ["threshold is nan, allowed"], id="threshold nan"),
        pytest.param(["--mode", "ar", "--temperature", "-1"], ["temperature is -1.0, allowed: 0 or 1e-30"], id="cold"),
        pytest.param(["--mode", "ar", "--temperature", "nan"], ["temperature is nan, allowed"], id="temperature nan"),
        pytest.param(["--mode", "ar", "--temperature", "inf"], ["temperature is inf, allowed"], id="temperature inf"),
        pytest.param(["--top-k", "-1"], ["top_k is -1, allowed: 0 (all ids) or more"], id="top-k"),
        pytest.param(["--top-p", "0"], ["top_p is 0.0, allowed: over 0 to 1"], id="top-p 0"),
        pytest.param(["--top-p", "1.1"], ["top_p is 1.1, allowed: over 0 to 1"], id="top-p over 1"),
        pytest.param(["--min-p", "nan"], ["min_p is nan, allowed: 0 to 1"], id="min-p nan"),
        pytest.param(["--temperature", "1e-310"], ["temperature is 1e-310, allowed: 0 or 1e-30 and more"], id="frozen"),
        pytest.param(["--repetition-penalty", "0"], ["repetition_penalty is 0.0, allowed: 0.001"], id="repetition 0"),
        pytest.param(["--repetition-penalty", "1e-320"], ["allowed: 0.001 to 1000 (1 changes"], id="repetition tiny"),
        pytest.param(["--presence-penalty", "2.1"], ["presence_penalty is 2.1, allowed: -2 to 2"], id="presence"),
        pytest.param(["--frequency-penalty", "-3"], ["frequency_penalty is -3.0, allowed: -2 to 2"], id="frequency"),
        pytest.param(["--logit-bias", "891=1"], ["logit_bias holds token id 891, allowed: 0 to 890"], id="biased id"),
        pytest.param(["--logit-bias", "x=1"], ["logit_bias holds 'x', allowed: token ids"], id="biased text"),
        pytest.param(["--logit-bias", "5=101"], ["logit_bias of token id 5 is 101.0, allowed: -100"], id="bias"),
        pytest.param(["--bad-words", ""], ["a bad word is empty; give at least one character"], id="empty bad word"),
        pytest.param(["--stop-token-ids", "-1"], ["stop_token_ids holds token id -1, allowed"], id="stop id"),
        pytest.param(["--min-tokens", "-1"], ["min_tokens is -1, allowed: 0 to max_new_tokens"], id="min tokens"),
        pytest.param(
            ["--min-tokens", "9", "--max-new-tokens", "8"],
            ["min_tokens is 9", "max_new_tokens, which is 8"],
            id="9 of 8",
        ),
        pytest.param(["--thinking", "--thinking-budget", "-1"], ["thinking_budget is -1, allowed: 0"], id="budget"),
        pytest.param(["--thinking-budget", "5"], ["thinking_budget is 5, but thinking is off"], id="no thinking"),
        pytest.param(["--logprobs", "101", "--json"], ["logprobs is 101, allowed: 0 to 100"], id="logprobs"),
        pytest.param(
            ["--logprobs", "1", "--json", "--mode", "diffusion"],
            ["logprobs is 1", "use confidences"],
            id="not logprobs",
        ),
        pytest.param(["--confidences", "--json"], ["confidences is True", "use logprobs"], id="not confidences"),
        pytest.param(["--regex", "(["], ["regex is not understood", "unclosed", "change it"], id="regex"),
        pytest.param(["--json-schema", '{"type": 5}'], ["json_schema is not understood"], id="schema"),
        pytest.param(["--json-schema", "false"], ["json_schema is false, which no answer follows"], id="schema false"),
        pytest.param(["--json-schema", "{"], ["json_schema is not JSON", "give a JSON schema"], id="schema no JSON"),
        pytest.param(["--json-schema", '{"$ref": "#"}'], ["json_schema allows no answer"], id="schema of itself"),
        pytest.param(
            [
                "--json-schema",
                '{"$defs":{"N":{"type":"object","properties":{"next":{"$ref":"#/$defs/N"},"value":{"type":"integer"}},'
                '"required":["next","value"]}},"$ref":"#/$defs/N"}',
            ],
            ["json_schema allows no answer (every value would hold another"],
            id="endless schema",
        ),
        pytest.param(
            ["--json-schema", '{"type":"array","items":{"const":0},"minItems":10716}'],
            ["json_schema is too complex (", "; change it"],
            id="schema of a long answer",
        ),
        pytest.param(
            ["--json-schema", '{"type":"string","format":"password"}', "--strict-schema"],
            ["Unknown format: password", "leave strict_schema out"],
            id="strict schema",
        ),
        pytest.param(["--regex", r"[^\s\S]"], ["regex allows no answer; change it"], id="regex of nothing"),
        pytest.param(["--json-schema", "true", "--regex", "x"], ["both given; use one"], id="two guides"),
        pytest.param(["--regex", "x", "--bad-words", "x"], ["bad_words could leave no way"], id="guide and bad word"),
        pytest.param(["--regex", "x", "--mode", "diffusion"], ["regex depends", "left_to_right"], id="warm guide"),
        pytest.param(
            ["--presence-penalty", "1", "--mode", "diffusion"], ["presence_penalty depends"], id="penalty in diffusion"
        ),
        pytest.param(
            ["--steps", "4"], ["block_steps is 4, but mode linear_spec has no such choice"], id="steps of spec"
        ),
        pytest.param(
            ["--policy", "left_to_right"], ["policy is left_to_right, but mode linear_spec"], id="policy of spec"
        ),
        pytest.param(["--merge-commit"], ["merge_commit is True, but mode linear_spec"], id="merge of spec"),
        pytest.param(["--steps", "0", "--mode", "diffusion"], ["block_steps is 0, allowed: 1 or more"], id="no steps"),
        pytest.param(
            ["--policy", "topk", "--mode", "diffusion"], ["per_step is None, but policy is topk"], id="topk of what"
        ),
        pytest.param(
            ["--policy", "topk", "--per-step", "0", "--mode", "diffusion"],
            ["per_step is 0, allowed: 1"],
            id="topk of 0",
        ),
        pytest.param(
            ["--entropy-bound", "1", "--mode", "diffusion"],
            ["entropy_bound is 1.0, but policy is threshold"],
            id="bound",
        ),
        pytest.param(
            ["--policy", "entropy", "--entropy-bound", "-1", "--mode", "diffusion"],
            ["entropy_bound is -1.0, allowed: 0 or more"],
            id="negative bound",
        ),
        pytest.param(
            ["--policy", "topk", "--per-step", "2", "--threshold", "0.5", "--mode", "diffusion"],
            ["threshold is 0.5, but policy topk has none"],
            id="threshold of topk",
        ),
        pytest.param(["--block-length", "0"], ["block_length is 0, allowed: 1 to 64"], id="block 0"),
        pytest.param(["--block-length", "65"], ["block_length is 65, allowed: 1 to 64"], id="block 65"),
        pytest.param(["--seed", "-1"], ["seed is -1, allowed: 0 to 2**64 - 1"], id="seed negative"),
        pytest.param(["--seed", str(2**64)], [f"seed is {2**64}, allowed"], id="seed too large"),
        pytest.param(["--stop", ""], ["a stop string is empty; give at least one character"], id="empty stop"),
        pytest.param(["--stop", "\udcff"], ["stop", "not UTF-8 text"], id="stop is not text"),
        pytest.param(["--system", "\udcff"], ["system", "not UTF-8 text"], id="system is not text"),
    ],
)
def test_values_out_of_range_are_refused(
    tiny_engine: Path, refused: Refused, flags: list[str], fragments: list[str]
) -> None:
    refused(["run", str(tiny_engine), "-p", "x", *flags], *fragments)


@pytest.mark.parametrize("command", ["run", "bench"])
def test_more_threads_than_processors_are_refused(tiny_engine: Path, refused: Refused, command: str) -> None:
    count = os.cpu_count() or 1
    words = [command, str(tiny_engine), "--threads", str(count + 1)]
    refused(words, f"--threads is {count + 1}, allowed: 1 to {count}, the processors of this machine; give fewer")


def test_prompt_that_does_not_fit_is_refused_with_the_numbers(tiny_engine: Path, refused: Refused) -> None:
    line = refused(
        ["run", str(tiny_engine)],
        "tokens > 32767, as this model's maximum context length is 32768 (max_seq_len); shorten the prompt or build",
        stdin="9 " * 40000,
    )
    assert "at most" not in line


@pytest.mark.parametrize("stdin", [b"", b"\n", b" \t\n"])
def test_empty_standard_input_is_no_prompt(tiny_engine: Path, refused: Refused, stdin: bytes) -> None:
    refused(["run", str(tiny_engine)], "no prompt: give --prompt TEXT, --input-file FILE", code=2, stdin=stdin)


def test_empty_raw_prompt_is_refused(tiny_engine: Path, refused: Refused) -> None:
    refused(["run", str(tiny_engine), "--raw", "-p", ""], "the prompt is empty; give at least one token")


@pytest.mark.parametrize("command", ["run", "chat"])
def test_standard_input_that_is_not_text(tiny_engine: Path, refused: Refused, command: str) -> None:
    refused([command, str(tiny_engine)], "standard input: not UTF-8 at byte 3; convert it first", stdin=b"caf\xe9\n")


def test_prompt_that_is_not_text(tiny_engine: Path, refused: Refused) -> None:
    refused(["run", str(tiny_engine), "-p", "caf\udce9"], "--prompt: not UTF-8 text at character 3; convert it")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["infill", "ENGINE", "--prefix", "TEXT"], id="infill"),
        pytest.param(["revise", "ENGINE", "--text", "TEXT"], id="revise"),
        pytest.param(["verify", "ENGINE", "--prompt", "TEXT"], id="verify"),
        pytest.param(["batch", "ENGINE", "--output", "out", "--input", "TEXT"], id="batch"),
        pytest.param(["serve", "ENGINE", "--api-key", "TEXT"], id="key"),
        pytest.param(["serve", "ENGINE", "--served-model-name", "TEXT"], id="name"),
    ],
)
def test_an_option_that_is_not_text(tiny_engine: Path, refused: Refused, words: list[str]) -> None:
    named = [word.replace("ENGINE", str(tiny_engine)).replace("TEXT", "caf\udce9") for word in words]
    refused(named, f"{words[-2]}: not UTF-8 text at character 3; convert it first")


def test_a_word_that_is_no_block_length_is_refused(tiny_engine: Path, refused: Refused) -> None:
    words = ["run", str(tiny_engine), "--block-length", "long"]
    refused(words, "'long' is not allowed; give an integer or auto", code=2)


@pytest.mark.parametrize("flag", ["--timeout", "--client-timeout", "--drain", "--gpu-memory-utilization"])
def test_what_is_no_number_is_refused(tiny_engine: Path, refused: Refused, flag: str) -> None:
    refused(["serve", str(tiny_engine), flag, "nan"], f"'{flag}': 'nan' is not a valid float", code=2)


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        pytest.param("{", ["line 2: not JSON", "one object per line is allowed"], id="not JSON"),
        pytest.param("[" * 100_000, ["line 2: not JSON"], id="nested too deeply"),
        pytest.param('"text"', ["line 2: allowed: an object with", "fix the line"], id="text"),
        pytest.param("{}", ["line 2: allowed"], id="empty object"),
        pytest.param('{"prompt": 7}', ["line 2: allowed"], id="prompt is a number"),
        pytest.param('{"messages": []}', ["line 2: allowed"], id="no messages"),
        pytest.param('{"prompt": "x", "id": [NaN]}', ["line 2: id holds nan, which is no number of JSON"], id="NaN"),
        pytest.param('{"messages": [5, 6]}', ["line 2: allowed"], id="messages are numbers"),
        pytest.param('{"messages": [{"role": "user", "content": "x"}, 6]}', ["line 2: allowed"], id="one is a number"),
        pytest.param(r'{"prompt": "\ud800"}', ["line 2: not UTF-8 text at character"], id="half a surrogate pair"),
        pytest.param(b'{"prompt": "\xff"}', ["not UTF-8 at byte 28; convert"], id="not UTF-8"),
    ],
)
def test_wrong_lines_are_refused_before_any_is_run(
    tiny_engine: Path, tmp_path: Path, refused: Refused, line: str | bytes, fragments: list[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n' + (line if isinstance(line, bytes) else line.encode()))
    refused(["run", str(tiny_engine), "--input-file", str(path)], str(path), *fragments)


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        pytest.param({"messages": [{"role": "user"}]}, ["malformed; allowed: role (system, user"], id="no content"),
        pytest.param({"messages": [{"role": "boss", "content": "x"}]}, ["malformed; allowed"], id="unknown role"),
        pytest.param(
            {"messages": [{"role": "user", "content": ["x"]}]},
            ["a part of a message is 'x', allowed: text"],
            id="content is a list",
        ),
    ],
)
def test_malformed_messages_are_refused(
    tiny_engine: Path, tmp_path: Path, refused: Refused, line: object, fragments: list[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
    refused(["run", str(tiny_engine), "--input-file", str(tmp_path / "prompts.jsonl")], *fragments)


@pytest.mark.parametrize("path", ["missing.jsonl", "."])
def test_input_file_that_cannot_be_read(tiny_engine: Path, tmp_path: Path, refused: Refused, path: str) -> None:
    path = str(tmp_path / path)
    refused(["run", str(tiny_engine), "--input-file", path], f"{path}: ", "give a file of JSON lines")


def test_a_hyphen_is_standard_input(tiny_engine: Path, tmp_path: Path, refused: Refused) -> None:
    text = '{"prompt": "Count from 3 to 9."}\n{"prompt": "Hi"}\n'
    (tmp_path / "x.jsonl").write_text(text)

    def shown(*words: str) -> str:
        result = CliRunner().invoke(main, [words[0], str(tiny_engine), *words[1:]], input=text)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    few = ("--max-new-tokens", "4")
    assert shown("run", "--input-file", "-", *few) == shown("run", "--input-file", str(tmp_path / "x.jsonl"), *few)
    assert shown("revise", "--file", "-") == shown("revise")
    line = ["run", str(tiny_engine), "--input-file", "-"]
    refused(line, "standard input, line 1: not JSON", stdin="{")
    refused(line, "standard input: no prompts; give a file of JSON lines")
    refused(line, "standard input: not UTF-8 at byte 0", stdin=b"\xff")
    refused([*line, "--json-schema", "-"], "standard input: no prompts", stdin="{}")  # which is read once


@pytest.mark.parametrize("rows", ["0", "9"])
def test_batch_beyond_the_engine_is_refused(tiny_engine: Path, tmp_path: Path, refused: Refused, rows: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "x"}')
    arguments = ["run", str(tiny_engine), "--input-file", str(tmp_path / "x.jsonl"), "--batch-size", rows]
    refused(arguments, f"rows is {rows}, allowed: 1 to 8", "--max-batch-size")


def test_line_ends_of_unicode_do_not_end_a_line(tiny_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "Count\u2028from 3\x85to 5."}\r\n\r\n', encoding="utf-8", newline="")
    command = [NEMODIFF, "run", tiny_engine, "--input-file", tmp_path / "x.jsonl", "--max-new-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "fragment"),
    [
        pytest.param("run", "no prompt: give --prompt", id="run"),
        pytest.param("chat", "standard input is closed", id="chat"),
        pytest.param("revise", "no text: give --text", id="revise"),
    ],
)
def test_closed_standard_input(tiny_engine: Path, command: str, fragment: str) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", NEMODIFF, command, tiny_engine], capture_output=True, text=True, check=False
    )
    assert_one_line(done.stderr, fragment, code=2)
    assert (done.returncode, done.stdout) == (2, "")


def test_bytes_that_are_no_text_in_a_real_shell(tiny_engine: Path) -> None:
    done = subprocess.run(
        [NEMODIFF, "run", tiny_engine, "-p", os.fsdecode(b"\xff")], capture_output=True, text=True, check=False
    )
    assert_one_line(done.stderr, "--prompt: not UTF-8 text at character")
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        pytest.param({"beams": 4}, ["unknown option 'beams'; allowed: mode, max_new_tokens"], id="unknown"),
        pytest.param({"max_tokens": 4}, ["unknown option 'max_tokens'; is max_new_tokens meant?"], id="misspelt"),
        pytest.param({"mode": None}, ["mode is None, allowed: ar, diffusion"], id="mode None"),
        pytest.param({"mode": ["ar"]}, ["mode is ['ar'], allowed"], id="mode is a list"),
        pytest.param({"max_new_tokens": "7"}, ["max_new_tokens is '7', allowed: an integer"], id="limit is text"),
        pytest.param({"max_new_tokens": 7.5}, ["max_new_tokens is 7.5, allowed: an integer"], id="limit is a float"),
        pytest.param({"max_new_tokens": True}, ["max_new_tokens is True, allowed: an integer"], id="limit is a bool"),
        pytest.param({"block_length": "8"}, ["block_length is '8', allowed: an integer"], id="block is text"),
        pytest.param({"threshold": "x"}, ["threshold is 'x', allowed: a number"], id="threshold is text"),
        pytest.param({"temperature": None}, ["temperature is None, allowed: a number"], id="temperature None"),
        pytest.param({"temperature": 1j, "mode": "ar"}, ["temperature is 1j, allowed"], id="temperature is complex"),
        pytest.param({"seed": 1.5}, ["seed is 1.5, allowed: an integer"], id="seed is a float"),
        pytest.param({"stop": 5}, ["stop is 5, allowed: text or a list of texts"], id="stop is a number"),
        pytest.param({"stop": ["x", 5]}, ["stop is ['x', 5], allowed"], id="stop holds a number"),
        pytest.param({"stop": None}, ["stop is None, allowed"], id="stop None"),
        pytest.param({"chat": "no"}, ["chat is 'no', allowed: True or False"], id="chat is text"),
        pytest.param({"thinking": 1}, ["thinking is 1, allowed: True or False"], id="thinking is a number"),
        pytest.param({"system": 5}, ["system is 5, allowed: text"], id="system is a number"),
        pytest.param({"logit_bias": [5]}, ["logit_bias is [5], allowed: an object"], id="bias is a list"),
        pytest.param({"logit_bias": {5: "x"}}, ["is 'x', allowed: a number"], id="bias holds text"),
        pytest.param({"logit_bias": {5: 10**400}}, ["token id 5 is 1000", "allowed: -100 to 100"], id="bias too large"),
        pytest.param({"logit_bias": {"9" * 900: 101}}, [f"id {'9' * 60} is 101"], id="bias of a long id"),
        pytest.param({"stop_token_ids": [1.5]}, ["stop_token_ids is [1.5], allowed: a list"], id="stop id is a float"),
        pytest.param({"json_schema": "[]"}, ["json_schema is [], allowed: an object"], id="schema is a list"),
        pytest.param({"json_schema": 5}, ["json_schema is 5, allowed: a JSON schema"], id="schema is a number"),
        pytest.param({"json_schema": {"a": {1}}}, ["json_schema is not JSON"], id="schema holds a set"),
        pytest.param({"regex": 5}, ["regex is 5, allowed: text"], id="regex is a number"),
        pytest.param({"logprobs": True}, ["logprobs is True, allowed: an integer"], id="logprobs is a bool"),
        pytest.param({"policy": None}, ["policy is None, allowed: threshold"], id="policy None"),
        pytest.param({"prefill_chunk": 0}, ["prefill_chunk is 0, allowed: 1 or more"], id="chunk 0"),
        pytest.param({"prefill_chunk": "x"}, ["prefill_chunk is 'x', allowed: an integer"], id="chunk is text"),
    ],
)
@pytest.mark.parametrize("door", [nemodiff.generate, nemodiff.stream])
def test_wrong_options_in_python(
    engine: nemodiff.LoadedEngine, door: Any, options: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(nemodiff.RequestError) as caught:
        door(engine, "x", **options)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "fragment"),
    [
        pytest.param([5, 891], "prompt holds token id 891, allowed: 0 to 890", id="id too large"),
        pytest.param([-1], "prompt holds token id -1, allowed", id="id negative"),
        pytest.param([5, 100], "prompt holds token id 100, the mask, allowed: any other id", id="mask"),
        pytest.param([5, "x"], "allowed: text, a list of messages", id="mixed"),
        pytest.param([{"role": "user", "content": "x"}, 5], "allowed: text, a list of messages", id="message and id"),
        pytest.param([], "the prompt is empty; give at least one token", id="empty"),
        pytest.param(None, "prompt is None, allowed: text", id="none"),
        pytest.param(5, "prompt is 5, allowed: text", id="number"),
        pytest.param(b"Hello", "prompt is b'Hello', allowed: text", id="bytes"),
        pytest.param([True], "prompt is [True], allowed: text", id="bool"),
        pytest.param("a\ud800", "prompt: not UTF-8 text at character 1", id="surrogate"),
        pytest.param(
            [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "a\ud800"}]}],
            "messages.1.content: not UTF-8 text at character 1",
            id="surrogate in a message",
        ),
        pytest.param([{"role": "user"}], "malformed; allowed: role", id="no content"),
        pytest.param([{"content": "x"}], "malformed; allowed: role", id="no role"),
        pytest.param([{"role": "user", "content": 5}], "malformed; allowed: role", id="content"),
        pytest.param([{"role": "robot", "content": "x" * 9000}], "message {'role': 'robot', 'content': 'x", id="long"),
        pytest.param([{"role": "user", "content": "x", "a": DEEP}], "a message is nested too deeply; give", id="deep"),
    ],
)
def test_wrong_prompts_in_python(engine: nemodiff.LoadedEngine, prompt: Any, fragment: str) -> None:
    with pytest.raises(nemodiff.RequestError) as caught:
        nemodiff.generate(engine, prompt)
    assert fragment in str(caught.value)
    assert len(str(caught.value)) < 300


def test_numbers_of_numpy_are_numbers(engine: nemodiff.LoadedEngine) -> None:
    answer = nemodiff.generate(
        engine, "x", max_new_tokens=np.int64(3), block_length=np.int32(4), threshold=np.float32(0.5), seed=np.uint8(1)
    )
    assert len(answer.token_ids) <= 3
    assert json.loads(json.dumps(answer.as_dict()))["threshold"] == 0.5


@pytest.mark.parametrize("threshold", [5e174, math.inf])  # beyond f32
def test_a_threshold_that_nothing_reaches_commits_one_token_per_pass(
    engine: nemodiff.LoadedEngine, threshold: float
) -> None:
    answer = nemodiff.generate(
        engine, [5, 6, 7], mode="diffusion", threshold=threshold, block_length=4, max_new_tokens=4
    )
    assert answer.nfe["denoise"] == 3 or answer.finish_reason == "stop"


def test_chat_survives_a_refused_turn(tiny_engine: Path) -> None:
    done = subprocess.run(
        [NEMODIFF, "chat", tiny_engine, "--max-new-tokens", "32760"],
        input="/nonsense\n/reset all\nHello\n/exit\n",
        capture_output=True,
        text=True,
        check=False,
    )
    nonsense, more, refusal = done.stderr.splitlines()
    assert nonsense == "unknown command /nonsense; allowed: /reset, /exit"
    assert more == "unknown command /reset all; allowed: /reset, /exit"
    assert refusal.startswith("Error: the prompt has ")
    assert refusal.endswith("; /reset starts over")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens is 0, allowed: 1 or more"),
        (["--regex", "(("], "regex is not understood"),
        (["--block-length", "65"], "block_length is 65, allowed: 1 to 64"),
    ],
)
def test_chat_refuses_before_the_first_turn_what_none_could_have(
    tiny_engine: Path, refused: Refused, flags: list[str], fragment: str
) -> None:
    refused(["chat", str(tiny_engine), *flags], fragment)


@pytest.mark.parametrize("rows", [0, 9, "2", None])
def test_wrong_rows_in_python(engine: nemodiff.LoadedEngine, rows: Any) -> None:
    with pytest.raises(nemodiff.RequestError, match=r"rows is .*, allowed: 1 to 8; .* or build the engine"):
        list(nemodiff.generate_many(engine, ["x"], rows=rows))


@pytest.mark.parametrize("share", [0, -1, 1.5, math.nan, True, "x", None, [0.5]])
def test_a_wrong_share_of_memory_in_python(tiny_engine: Path, share: Any) -> None:
    with pytest.raises(nemodiff.RequestError, match=r"gpu_memory_utilization is .*, allowed: over 0 to 1$"):
        nemodiff.load(tiny_engine, gpu_memory_utilization=share)


@pytest.mark.parametrize("path", [None, 5, b"engine", ["engine"]])
def test_what_is_no_path_in_python(path: Any) -> None:
    with pytest.raises(
        nemodiff.EngineError, match=r"^path is .*, allowed: the path of a folder made by: nemodiff build"
    ):
        nemodiff.load(path)


@pytest.mark.parametrize("engine", ["engines/tiny", Path("engines/tiny"), None])
@pytest.mark.parametrize(
    "door",
    [
        lambda engine: nemodiff.generate(engine, "Hi"),
        lambda engine: list(nemodiff.generate_many(engine, ["Hi"])),
        lambda engine: nemodiff.stream(engine, "Hi"),
        lambda engine: nemodiff.events(engine, ["Hi"]),
        lambda engine: nemodiff.score(engine, "Hi", ["Ho"]),
        lambda engine: list(nemodiff.score_many(engine, [("Hi", "Ho")])),
        lambda engine: nemodiff.fill(engine, ["Hi", 1]),
        lambda engine: nemodiff.infill(engine, "Hi", length=1),
        lambda engine: nemodiff.revise(engine, "Hi"),
        lambda engine: nemodiff.Scheduler(engine),
    ],
)
def test_what_is_no_loaded_engine_in_python(door: Callable[[Any], object], engine: Any) -> None:
    with pytest.raises(nemodiff.RequestError, match=r"^engine is .*, allowed: what load\(\.\.\.\) returns; call that"):
        door(engine)


@pytest.mark.parametrize("threads", [0, -1, "x", True, 100_000])  # the last of which a system may take minutes to start
def test_wrong_threads_in_python(tiny_engine: Path, threads: Any) -> None:
    with pytest.raises(nemodiff.RequestError, match=r"threads is .*, allowed: 1 to 1024, or None"):
        nemodiff.load(tiny_engine, threads=threads)


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ({"messages": [{"role": "user"}]}, "line 2: message {'role': 'user'} is malformed"),
        ({"messages": [{"role": "system", "content": "x"}]}, "line 2: system text is given as an option and"),
    ],
)
def test_every_line_of_a_file_is_checked_before_the_first_is_answered(
    tiny_engine: Path, tmp_path: Path, refused: Refused, line: dict[str, Any], fragment: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "Hi"}) + "\n" + json.dumps(line))
    refused(["run", str(tiny_engine), "--input-file", str(file), "--system", "Be brief."], fragment)


def test_a_path_with_spaces_is_quoted_where_a_command_is_proposed(checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "größe 1"
    built = CliRunner().invoke(main, ["build", str(checkpoint), "-o", str(engine)])
    assert built.stderr.splitlines()[-1].endswith(f"; try: nemodiff run '{engine}' -p \"Hello\"")
    (engine / "manifest.json").write_text("{}")
    refusal = CliRunner().invoke(main, ["inspect", str(engine)]).stderr
    assert refusal.endswith(f"build it again: nemodiff build CHECKPOINT -o '{engine}'\n")


@pytest.mark.parametrize(("name", "room"), [("t.jsonl", 100), ("t.json", 100), ("t.jsonl", 2000)])
def test_a_full_disk_says_which_file(tiny_engine: Path, tmp_path: Path, name: str, room: int) -> None:
    """What fits of a trace in lines can be shown, as that of a killed run can."""
    small = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    small += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room})); "
    small += "from nemodiff.cli import main; main(sys.argv[1:])"
    trace = tmp_path / name
    command = [sys.executable, "-c", small, "run", str(tiny_engine), "-p", "x", "--trace", str(trace)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_one_line(done.stderr, f"{trace}: File too large; check the path and its disk")
    assert done.returncode == 1
    if room > 100:
        shown = CliRunner().invoke(main, ["trace", "show", str(trace)])
        assert (trace.stat().st_size, shown.exit_code) == (room, 0), shown.output
        assert "request 0" in shown.stdout


@pytest.mark.parametrize("flags", [["--system", "hi"], ["--thinking"], ["--chat-template-kwargs", '{"a": 1}']])
def test_what_only_the_chat_template_shows_is_refused_without_it(
    tiny_engine: Path, refused: Refused, flags: list[str]
) -> None:
    fragment = f"{flags[0]} needs the chat template; leave out --raw"
    refused(["run", str(tiny_engine), "-p", "x", "--raw", *flags], fragment, code=2)


@pytest.mark.parametrize("flags", [["--threshold", "0.5"], ["--block-length", "8"], ["--groups", "all"]])
def test_a_choice_that_mode_ar_has_not_is_warned_of(tiny_engine: Path, flags: list[str]) -> None:
    words = ["run", str(tiny_engine), "-p", "x", "--max-new-tokens", "2", *flags]
    warned, other = (CliRunner().invoke(main, [*words, "--mode", mode]) for mode in ("ar", "quadratic_spec"))
    assert warned.stderr == f"Warning: {flags[0]} has no effect in mode ar\n"
    assert (warned.exit_code, other.stderr) == (0, "")


def test_an_option_that_a_backend_has_not_is_warned_of(tiny_engine: Path) -> None:
    words = ["chat", str(tiny_engine), "--gpu-memory-utilization", "0.5"]
    warned = CliRunner().invoke(main, words, input="")
    assert warned.stderr == "Warning: --gpu-memory-utilization has no effect in an engine for onnxruntime\n"
    assert warned.exit_code == 0


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_prompts_is_named(tiny_engine: Path, tmp_path: Path, refused: Refused, text: str) -> None:
    (tmp_path / "empty.jsonl").write_text(text)
    file = str(tmp_path / "empty.jsonl")
    refused(["run", str(tiny_engine), "--input-file", file], f"{file}: no prompts; give a file of JSON lines")


def test_an_empty_file_to_revise_is_named(tiny_engine: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    file = str(tmp_path / "empty.txt")
    refused(["revise", str(tiny_engine), "--file", file], f"{file}: no text to revise; give a file")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["run", "ENGINE", "--input-file", "FILE", "--trace", "FILE"], id="prompts"),
        pytest.param(["run", "ENGINE", "-p", "x", "--image", "FILE", "--trace", "FILE"], id="image"),
        pytest.param(["run", "ENGINE", "-p", "x", "--trace", "ENGINE/config.json"], id="engine"),
        pytest.param(["bench", "ENGINE", "--input-file", "FILE", "--plot", "FILE"], id="bench"),
        pytest.param(["verify", "ENGINE", "--layers", "--save-outputs", "ENGINE/manifest.json"], id="verify"),
        pytest.param(["trace", "view", "FILE", "-o", "FILE"], id="trace"),
    ],
)
def test_an_output_that_would_replace_an_input_is_refused(
    tiny_engine: Path, tmp_path: Path, refused: Refused, words: list[str]
) -> None:
    file = tmp_path / "in.png"
    file.write_text('{"prompt": "x"}' if words[0] != "trace" else '{"event": "trace", "schema": 1}')
    before = snapshot(tiny_engine)
    named = [word.replace("ENGINE", str(tiny_engine)).replace("FILE", str(file)) for word in words]
    refused(named, f"{named[-1]}: writing it would replace what this command reads; give another file", code=2)
    assert snapshot(tiny_engine) == before
