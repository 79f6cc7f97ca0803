"""Files of prompts: options of their own, what is refused beforehand, and what fails alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click.testing
import pytest
from conftest import Refused

import nemodiff
from nemodiff.batch import lines as lines_of_a_file
from nemodiff.cli import main
from nemodiff.runtime.requests.options import OPTIONS

QUESTION = "Count from 3 to 9."
LONG = "word " * 40_000


def run(engine: Path, file: Path, lines: list[Any], *flags: object) -> click.testing.Result:
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    arguments = ["run", engine, "--input-file", file, *flags]
    return click.testing.CliRunner().invoke(main, [str(a) for a in arguments])


def answers(result: click.testing.Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


def test_a_line_spells_options_as_servers_do(tiny_engine: Path, file: Path) -> None:
    own: list[dict[str, Any]] = [
        {},
        {"max_tokens": -1, "seed": -1, "top_k": -1},
        {"max_tokens": 60, "ignore_eos": True},
    ]
    plain, same, long = answers(run(tiny_engine, file, [{"prompt": QUESTION, **o} for o in own], "--json"))
    assert same["token_ids"] == plain["token_ids"]
    assert len(long["token_ids"]) == 60 > len(plain["token_ids"])


@pytest.mark.parametrize("rows", [1, 3])
def test_options_of_a_line_go_on_top_of_the_flags(tiny_engine: Path, file: Path, rows: int) -> None:
    own: list[dict[str, Any]] = [
        {"max_new_tokens": 3},
        {"mode": "ar", "max_tokens": 5},
        {"mode": "diffusion", "threshold": 0.5, "block_length": 4, "max_completion_tokens": 8},
        {"mode": "quadratic_spec", "temperature": 1, "seed": 7, "stop": [","]},
        {"mode": None, "temperature": 0.5, "logit_bias": {"5": -3.5}, "json_schema": {"type": "integer"}},
        {"chat": False, "prefill_chunk": 2, "logprobs": 1},
        {},
    ]
    got = answers(
        run(
            tiny_engine,
            file,
            [{"prompt": QUESTION, **o} for o in own],
            *("--json", "--max-new-tokens", 12, "--block-length", 8, "--batch-size", rows, "--no-prefix-reuse"),
        )
    )
    engine = nemodiff.load(tiny_engine)
    for mine, answer in zip(own, got, strict=True):
        options = {"max_new_tokens": 12, "block_length": 8}
        options |= {("max_new_tokens" if "max" in n else n): v for n, v in mine.items() if v is not None}
        alone = nemodiff.generate(engine, QUESTION, **options)
        for name in ("text", "token_ids", "mode", "block_length", "threshold", "prompt_tokens", "nfe"):
            assert answer[name] == getattr(alone, name), (mine, name)
        assert ("logprobs" in answer) == ("logprobs" in mine)


def test_every_option_of_a_request_is_a_key() -> None:
    assert set(OPTIONS) < set(lines_of_a_file._KEYS)


def test_labels_come_back(tiny_engine: Path, file: Path) -> None:
    labels: list[dict[str, Any]] = [{"id": 7}, {"custom_id": "b"}, {"id": "x", "custom_id": [1]}, {"id": None}]
    lines = [{"prompt": QUESTION, "max_tokens": 2, **label} for label in labels]
    got = answers(run(tiny_engine, file, lines, "--json"))
    assert [{n: a[n] for n in ("id", "custom_id") if n in a} for a in got] == [*labels[:3], {}]
    assert run(tiny_engine, file, lines).exit_code == 0


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_answers_come_in_the_order_of_the_lines(tiny_engine: Path, file: Path, rows: int) -> None:
    lines = [{"prompt": QUESTION, "mode": "ar", "id": i, "max_tokens": n} for i, n in enumerate((40, 1, 20, 2, 1, 30))]
    got = answers(run(tiny_engine, file, lines, "--json", "--batch-size", rows))
    assert len(got[0]["token_ids"]) > len(got[1]["token_ids"])  # so the second ends first in a batch
    assert [a["id"] for a in got] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("own", "fragments"),
    [
        pytest.param({"max_new_token": 4}, ["'max_new_token' is no key", "is max_new_tokens meant?"], id="misspelt"),
        pytest.param({"temprature": None, "tempature": 1}, ["is temperature meant?"], id="misspelt beside null"),
        pytest.param({"steps": 4}, ["'steps' is no key of a line; is block_steps meant?"], id="a flag's name"),
        pytest.param({"zzzz": 4}, ["'zzzz' is no key of a line; allowed: prompt or messages, id"], id="unknown"),
        pytest.param({"mode": "fast"}, ["mode is 'fast', allowed: ar, diffusion"], id="mode"),
        pytest.param({"max_tokens": 0}, ["max_new_tokens is 0, allowed: 1 or more"], id="limit"),
        pytest.param({"max_tokens": "4"}, ["max_new_tokens is '4', allowed: an integer"], id="limit is text"),
        pytest.param({"ignore_eos": 1}, ["ignore_eos is 1, allowed: true or false"], id="ignore_eos"),
        pytest.param({"ignore_eos": True}, ["ignore_eos needs a limit; give max_tokens"], id="no limit"),
        pytest.param({"max_tokens": 4, "max_new_tokens": 5}, ["max_tokens and max_new_tokens differ"], id="two limits"),
        pytest.param({"messages": [{"role": "user", "content": "x"}]}, ["prompt and messages are both"], id="both"),
        pytest.param({"stop": [""]}, ["a stop string is empty; give"], id="stop"),
        pytest.param({"temperature": math.nan}, ["temperature is nan, allowed: 0"], id="no number"),
        pytest.param({"logprobs": 1}, ["logprobs goes with --json; give the flag"], id="logprobs"),
        pytest.param({"confidences": True}, ["confidences goes with --json"], id="confidences"),
        pytest.param(
            {"policy": "topk"}, ["per_step is None, but policy is topk"], id="options that do not go together"
        ),
        pytest.param({"regex": "(["}, ["regex is not understood"], id="regex"),
        pytest.param({"stop_token_ids": [891]}, ["stop_token_ids holds token id 891, allowed: 0 to 890"], id="id"),
        pytest.param(
            {"max_tokens": 40_000}, ["the prompt has 23 tokens", "max_new_tokens is 40000", "at most 32"], id="room"
        ),
    ],
)
def test_wrong_lines_are_refused_beforehand(
    tiny_engine: Path, file: Path, refused: Refused, own: dict[str, Any], fragments: list[str]
) -> None:
    lines = [{"prompt": QUESTION}, {"prompt": QUESTION, **own}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    refused(["run", str(tiny_engine), "--input-file", str(file)], f"{file}, line 3: ", *fragments)


def test_a_line_may_make_a_flag_right_or_wrong(tiny_engine: Path, file: Path, refused: Refused) -> None:
    lines = [{"prompt": QUESTION, "thinking": True}]
    assert run(tiny_engine, file, lines, "--thinking-budget", 1, "--max-new-tokens", 4).exit_code == 0
    file.write_text(json.dumps({"prompt": QUESTION, "mode": "ar"}))
    flags = ["--mode", "diffusion", "--confidences", "--json"]
    refused(["run", str(tiny_engine), "--input-file", str(file), *flags], "line 1: confidences is True, but mode ar")


@pytest.mark.parametrize("rows", [1, 3])
def test_a_prompt_that_does_not_fit_fails_alone(tiny_engine: Path, file: Path, rows: int) -> None:
    lines = [{"prompt": p, "id": i, "max_tokens": 4} for i, p in enumerate((QUESTION, LONG, "Hi", LONG, QUESTION))]
    result = run(tiny_engine, file, lines, "--batch-size", rows)
    expected = run(tiny_engine, file.with_name("short"), [line for line in lines if line["prompt"] != LONG])
    assert (result.exit_code, result.stdout) == (1, expected.stdout)
    first, second = result.stderr.splitlines()
    assert first.startswith(f"Error: {file}, line 2: the prompt is too long: 120016 tokens")
    assert second.startswith(f"Error: {file}, line 4: the prompt is too long: 120016 tokens")


def test_with_json_a_failed_line_is_an_object_in_its_place(tiny_engine: Path, file: Path) -> None:
    lines = [{"prompt": p, "custom_id": f"{i}", "max_tokens": 2} for i, p in enumerate((QUESTION, LONG, "Hi", LONG))]
    result = run(tiny_engine, file, lines, "--json", "--batch-size", 2)
    got = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(a["custom_id"], "text" in a, a.get("error", {}).get("line")) for a in got] == [
        ("0", True, None),
        ("1", False, 2),
        ("2", True, None),
        ("3", False, 4),
    ]
    assert got[1]["error"]["message"].startswith("the prompt is too long: 120016 tokens")
    assert result.exit_code == 1
    assert result.stderr == f'Error: {file}: refused 2 of 4 lines; see "error" in their objects\n'


def test_a_request_that_cannot_go_on_fails_alone(
    tiny_engine: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemodiff.runtime.requests.sequence import Sequence

    emit = Sequence.emit

    def breaking(sequence: Sequence, token: int) -> bool:
        if sequence.settings.params.seed == 13 and len(sequence.tokens) == 2:
            raise nemodiff.RequestError("the grammar has no way on; change it")
        return emit(sequence, token)

    monkeypatch.setattr(Sequence, "emit", breaking)
    lines = [{"prompt": QUESTION, "id": i, "seed": i, "mode": "ar", "max_tokens": 6} for i in (12, 13, 14)]
    result = run(tiny_engine, file, lines, "--json", "--batch-size", 3)
    got = [json.loads(line) for line in result.stdout.splitlines()]
    assert got[1] == {"id": 13, "error": {"message": "the grammar has no way on; change it", "line": 2}}
    assert got[0]["text"] == got[2]["text"]
    assert result.exit_code == 1
    with pytest.raises(nemodiff.RequestError, match="no way on"):
        nemodiff.generate(nemodiff.load(tiny_engine), QUESTION, seed=13, mode="ar")


def test_options_beyond_those_checked_beforehand_fail_alone(
    tiny_engine: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_of_a_file, "_SETS", 1)
    lines = [{"prompt": QUESTION, "max_tokens": 2}, {"prompt": QUESTION, "regex": "(["}]
    result = run(tiny_engine, file, lines)
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr.startswith(f"Error: {file}, line 2: regex is not understood")


def test_many_lines_are_checked_without_being_encoded(
    tiny_engine: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 2_000
    file.write_text("\n".join(json.dumps({"prompt": QUESTION, "seed": i, "id": i}) for i in range(count)))
    engine = nemodiff.load(tiny_engine)
    encoded: list[str] = []
    for name in ("encode", "encode_plain", "encode_rendered"):
        monkeypatch.setattr(type(engine.text), name, lambda codec, text, **_: encoded.append(text))
    lines = lines_of_a_file.read_lines(file, as_json=True)
    assert len(lines) == count
    lines_of_a_file.check_lines(engine, lines, {}, 1)
    assert encoded == []


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_file_from_windows(tiny_engine: Path, file: Path, mark: str, end: str) -> None:
    lines = [{"prompt": "Hi", "max_tokens": 2}, {"prompt": QUESTION, "max_tokens": 2}]
    file.write_bytes((mark + end.join(map(json.dumps, lines)) + end).encode())
    result = click.testing.CliRunner().invoke(main, ["run", str(tiny_engine), "--input-file", str(file)])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == run(tiny_engine, file.with_name("plain"), lines).stdout
