"""The command line as a user meets it: what is on standard output, what is not, and the exit codes."""

import ast
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import click.testing
import pytest
from conftest import run
from stand_ins.terminal import in_terminal

import nemodiff

QUESTION = "Write JSON for Emil, age 31, from Oslo, who owns a yak."
KEYS = ["text", "token_ids", "prompt_tokens", "reused_tokens", "finish_reason", "mode", "block_length", "threshold"]
KEYS += ["nfe", "decode_tpf", "e2e_tpf", "acceptance", "adapter_tokens", "timings_ms"]


def answers(result: click.testing.Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_run_prints_the_answer_and_nothing_else(tiny_engine: Path, mode: str) -> None:
    result = run("run", tiny_engine, "-p", QUESTION, "--mode", mode)
    assert json.loads(result.stdout)["pet"] == "yak"
    assert result.stderr == ""
    streamed = run("run", tiny_engine, "-p", QUESTION, "--mode", mode, "--stream", "--stats", "--show-denoise")
    assert streamed.stdout == result.stdout
    assert f"{mode}: " in streamed.stderr
    assert "\x1b" not in streamed.stderr  # no colours where there is no terminal


def test_json_has_the_promised_shape(tiny_engine: Path) -> None:
    began = time.perf_counter()
    value = answers(run("run", tiny_engine, "-p", QUESTION, "--json", "--max-new-tokens", "20"))
    whole = (time.perf_counter() - began) * 1e3
    assert list(value) == KEYS
    assert list(value["nfe"]) == ["prefill", "decode", "denoise", "draft", "verify", "commit"]
    assert list(value["acceptance"]) == ["mean", "lengths", "verified"]
    assert list(times := value["timings_ms"]) == ["load", "queued", "prefill", "decode", "total"]
    assert min(times.values()) > 0
    assert times["prefill"] + times["decode"] == pytest.approx(times["total"])
    assert whole / 100 < times["load"] + times["queued"] + times["total"] < whole
    assert (value["finish_reason"], len(value["token_ids"]), value["mode"]) == ("length", 20, "linear_spec")


def test_options_reach_the_request(tiny_engine: Path) -> None:
    flags = (
        "--mode diffusion --block-length 8 --threshold 0.5 --max-new-tokens 12 --system Hello --thinking --threads 1"
    )
    value = answers(run("run", tiny_engine, "-p", QUESTION, "--json", *flags.split()))
    assert (value["mode"], value["block_length"], value["threshold"]) == ("diffusion", 8, 0.5)
    plain = answers(run("run", tiny_engine, "-p", QUESTION, "--json"))
    assert value["prompt_tokens"] > plain["prompt_tokens"]
    raw = answers(
        run("run", tiny_engine, "-p", QUESTION, "--json", "--raw", "--max_new_tokens", "5", "--mode", "linear_spec")
    )
    assert raw["prompt_tokens"] < plain["prompt_tokens"]
    assert len(raw["token_ids"]) == 5  # an underscore spelling is understood
    sampled = [
        answers(run("run", tiny_engine, "-p", "Hi", "--json", "--mode", "ar", "--temperature", "2", "--seed", seed))[
            "text"
        ]
        for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    stopped = run("run", tiny_engine, "-p", QUESTION, "--stop", "city", "--stop", "pet")
    assert stopped.stdout.rstrip("\n").endswith('31,\n  "')


@pytest.mark.parametrize(
    "options", [["--mode", m] for m in nemodiff.MODES] + [["--mode", "diffusion", "--merge-commit"]]
)
def test_show_denoise_tells_the_answers_own_tokens(tiny_engine: Path, options: list[str]) -> None:
    """Also where masks stand after a prompt or a block, whose predictions are another thing."""
    prompt = ["-p", "Count from 3 to 9.", "--block-length", 4, "--groups", "all", "--max-new-tokens", 16]
    shown = run("run", tiny_engine, *prompt, *options, "--show-denoise")
    texts = [ast.literal_eval(line.split(" -> ")[1]) for line in shown.stderr.splitlines() if "-> " in line]
    assert texts[0] == shown.stdout[0] == "3"
    assert all(text.partition("░")[0] in shown.stdout for text in texts)
    assert ("merge" in options[-1]) == any(len(text) > 1 for text in texts)


def test_prompt_from_standard_input(tiny_engine: Path) -> None:
    assert run("run", tiny_engine, stdin=QUESTION + "\n").stdout == run("run", tiny_engine, "-p", QUESTION).stdout


@pytest.mark.parametrize("rows", [1, 3])
def test_input_file_gives_one_answer_per_line(tiny_engine: Path, tmp_path: Path, rows: int) -> None:
    lines = [{"prompt": QUESTION}, {"messages": [{"role": "user", "content": "Count from 3 to 9."}]}, {"prompt": "Hi"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    result = run("run", tiny_engine, "--input-file", file, "--json", "--batch-size", rows)
    got = [json.loads(line)["text"] for line in result.stdout.splitlines()]
    expected = [run("run", tiny_engine, "-p", p).stdout[:-1] for p in (QUESTION, "Count from 3 to 9.", "Hi")]
    assert got == expected


def test_what_of_a_schema_is_ignored_is_said_once_on_standard_error(tiny_engine: Path, tmp_path: Path) -> None:
    schema = '{"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": true, "minItems": 2, "maxItems": 2}'
    warning = "Warning: json_schema: uniqueItems is ignored, so items may repeat\n"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    for source in (("-p", "one"), ("-p", "one", "--stream"), ("--input-file", tmp_path / "prompts.jsonl")):
        result = run("run", tiny_engine, *source, "--json-schema", schema)
        assert result.stderr == warning
        assert all(len(json.loads(line)) == 2 for line in result.stdout.splitlines())
    assert answers(run("run", tiny_engine, "-p", "one", "--json", "--json-schema", schema))["warnings"]
    talk = run("chat", tiny_engine, "--json-schema", schema, stdin="one\ntwo\n")
    assert talk.stderr == warning


def test_chat_keeps_the_conversation(tiny_engine: Path) -> None:
    lines = "Count from 3 to 9.\n\n/what\nCount from 3 to 9.\n/reset\nCount from 3 to 9.\n/exit\nnever\n"
    result = run("chat", tiny_engine, "--mode", "ar", "--max-new-tokens", "12", stdin=lines)
    assert result.exit_code == 0
    first, second, third = result.stdout.splitlines()
    assert first == third
    assert "unknown command /what" in result.stderr
    assert second  # with the first turn in its prompt, which changes this model's answer or not


def test_build_dry_run_writes_nothing(tmp_path: Path) -> None:
    checkpoint = Path(__file__).parents[2] / "examples" / "tiny-chat"
    flags = ["-o", tmp_path / "engine", "--dtype", "f16", "--max-seq-len", "1000", "--dry-run"]
    shown = run("build", checkpoint, *flags)
    for text in ("4,588,288", "3,072 bytes per token", "f16", "1000 tokens", "fits here"):
        assert text in shown.stdout
    plan = answers(run("build", checkpoint, *flags, "--json"))
    assert (plan["parameters"], plan["kv_bytes_per_token"]) == (4588288, 3072)
    assert list(tmp_path.iterdir()) == []
    built = run("build", checkpoint, *flags[:-1])
    assert built.exit_code == 0
    assert built.stdout == ""
    assert (tmp_path / "engine" / "model.onnx.data").stat().st_size == plan["weight_bytes"]
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["build_config"] == {
        "dtype": "f16",
        "max_seq_len": 1000,
        "max_batch_size": 8,
        "block_length": 32,
        "max_input_len": 512,
        "gather_generation_logits": True,
        "quantization": None,
        "max_image_size": 0,
        "kv_cache_dtype": "auto",
        "group_size": 32,
        "mlp_group_size": 32,
    }
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in (tmp_path / "engine").iterdir()} - {
        "config.json",
        "manifest.json",
    }


def test_inspect_tells_what_an_engine_is(tiny_engine: Path) -> None:
    shown = run("inspect", tiny_engine).stdout
    for text in (
        "onnxruntime, f32",
        "tiny-chat",
        "4,588,288, no drafter",
        "yarn, theta 1e+06, factor 16",
        "6,144 bytes",
    ):
        assert text in shown
    value = answers(run("inspect", tiny_engine, "--json"))
    assert value["graph"]["plugins"] == {"BlockAttention": 6, "ConfidenceCommit": 1}
    assert value["graph"]["ops"]["TensorScatter"] == 12
    assert value["files"]["model.onnx.data"] == (tiny_engine / "model.onnx.data").stat().st_size
    assert (value["model"]["mask_id"], value["model"]["eos_ids"]) == (100, [11])


def test_help_and_version() -> None:
    for command in ([], ["build"], ["export"], ["inspect"], ["run"], ["chat"]):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.stdout
        assert "linear-spec" not in result.stdout
    assert "0.1.0" in run("--version").stdout
    for command in ([], ["trace"], ["triton"]):
        assert "..." not in run(*command, "--help").stdout.replace("[ARGS]...", ""), "a sentence is cut"


def test_terminal_gets_a_progress_bar_and_colours(tiny_engine: Path, tmp_path: Path) -> None:
    checkpoint = Path(__file__).parents[2] / "examples" / "tiny-chat"
    built = in_terminal(["build", str(checkpoint), "-o", str(tmp_path / "engine")], {}, subprocess.DEVNULL)
    assert b"writing: 100%" in built
    command = ["run", str(tiny_engine), "-p", "Count from 3 to 9.", "--mode", "diffusion", "--show-denoise"]
    assert b"\x1b[" in in_terminal(command, {}, subprocess.DEVNULL)
    assert b"\x1b[" not in in_terminal(command, {"NO_COLOR": "1"}, subprocess.DEVNULL)
