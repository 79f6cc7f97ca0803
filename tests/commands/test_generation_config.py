"""The sampling that a model proposes is taken where `--generation-config auto` asks for it, and nowhere else."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Refused, output_of
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.http_server import serving
from stand_ins.triton_backend import Request, module

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.cli import main
from nemodiff.serving.triton_server.model import TritonPythonModel

PROPOSED = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}
SAMPLING = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}
PROMPT = "Count from 3 to 9."


def engine_with(folder: Path, generation: dict[str, Any]) -> Path:
    """tiny-chat as an engine, whose generation_config.json says this too."""
    checkpoint = folder / "checkpoint"
    shutil.copytree(TINY_CHAT, checkpoint)
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | generation))
    return Builder(checkpoint, folder / "engine").run()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_with(tmp_path_factory.mktemp("sampling"), PROPOSED)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {}),
        ({"temperature": None, "top_p": None}, {}),
        ({"temperature": 1, "top_k": -1}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"top_p": 0.9}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"min_p": 0.1, "max_new_tokens": 3, "eos_token_id": 11}, {"min_p": 0.1}),
        (PROPOSED, SAMPLING),
    ],
)
def test_what_the_file_proposes(tmp_path: Path, said: dict[str, Any], expected: dict[str, Any]) -> None:
    assert nemodiff.sampling_defaults(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert nemodiff.sampling_defaults(tmp_path) == expected


@pytest.mark.parametrize("path", [None, 5, b"engine"])
def test_what_is_no_path_proposes_nothing(path: Any) -> None:
    with pytest.raises(nemodiff.EngineError, match=r"^path is .*, allowed: the path of a folder made by"):
        nemodiff.sampling_defaults(path)


@pytest.mark.parametrize("text", ["[]", "7", "{", "[" * 100_000])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, refused: Refused, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    words = ["run", str(tmp_path), "-p", "x", "--generation-config", "auto"]
    refused(words, "generation_config.json: ", "JSON", "build it again: nemodiff build")


def test_run_takes_it_where_the_user_chose_nothing(engine: Path, tmp_path: Path) -> None:
    loaded = nemodiff.load(engine, threads=1)

    def expected(**changes: Any) -> str:
        return nemodiff.generate(loaded, PROMPT, mode="ar", max_new_tokens=30, **changes).text + "\n"

    def ran(*words: str) -> str:
        return output_of("run", str(engine), "--threads", "1", "--mode", "ar", "--max-new-tokens", "30", *words)

    auto = ("--generation-config", "auto")
    assert ran("-p", PROMPT) == ran("-p", PROMPT, "--generation-config", "none") == expected()
    sampled = expected(**SAMPLING, seed=4)
    assert sampled != expected()
    assert ran("-p", PROMPT, *auto, "--seed", "4") == sampled
    assert ran("-p", PROMPT, *auto, "--temperature", "0") == expected(**SAMPLING | {"temperature": 0})
    lines = tmp_path / "lines"
    lines.write_text(json.dumps({"prompt": PROMPT, "seed": 4}) + "\n" + json.dumps({"prompt": PROMPT, "top_k": 1}))
    greedy = expected(**SAMPLING | {"top_k": 1})
    assert ran("--input-file", str(lines), *auto) == sampled + greedy


def test_chat_takes_it(engine: Path) -> None:
    loaded = nemodiff.load(engine, threads=1)
    words = ["chat", str(engine), "--threads", "1", "--seed", "4", "--generation-config", "auto"]
    result = CliRunner().invoke(main, words, input=PROMPT + "\n", catch_exceptions=False)
    assert result.stdout == nemodiff.generate(loaded, PROMPT, seed=4, **SAMPLING).text + "\n"


def test_the_server_takes_it_below_what_requests_say(engine: Path) -> None:
    loaded = nemodiff.load(engine, threads=1)
    with serving(engine, "--mode", "ar", "--generation-config", "auto", threads=None) as server:
        assert server.process.stderr is not None
        said = server.process.stderr.readline()
        assert said.endswith(
            "by generation_config.json: temperature 1.5, top_p 0.9, top_k 40, repetition_penalty 1.2\n"
        )
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 30}

        def answer(**fields: Any) -> str:
            return str(server.ask("/v1/chat/completions", body | fields)["choices"][0]["message"]["content"])

        assert (
            answer(seed=4) == nemodiff.generate(loaded, PROMPT, mode="ar", max_new_tokens=30, seed=4, **SAMPLING).text
        )
        assert answer(temperature=0, repetition_penalty=1) == nemodiff.generate(loaded, PROMPT, max_new_tokens=30).text
        assert len({answer() for _ in range(24)}) > 1  # who samples by default draws a seed too


def test_triton_takes_it_as_a_parameter_of_the_model(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module())
    loaded = nemodiff.load(engine, threads=1)
    texts = []
    for choice in ("auto", "none"):
        values = {"engine": str(engine), "threads": "1", "mode": "ar", "top_k": "30", "generation_config": choice}
        config = {"parameters": {name: {"string_value": value} for name, value in values.items()}}
        model = TritonPythonModel()
        place = {"model_repository": str(engine.parent), "model_version": "1", "model_name": "played"}
        place["model_instance_name"] = "played_0_0"
        model.initialize({**place, "model_config": json.dumps(config)})
        request = Request({"text_input": PROMPT, "seed": 4, "max_tokens": 30})
        model.execute([request])
        texts.append(request.responses()[0].outputs()["text_output"])
        model.finalize()
    sampled = nemodiff.generate(loaded, PROMPT, mode="ar", max_new_tokens=30, seed=4, **SAMPLING | {"top_k": 30})
    assert texts == [sampled.text, nemodiff.generate(loaded, PROMPT, mode="ar", max_new_tokens=30).text]


def test_what_is_no_value_is_refused(tmp_path: Path, refused: Refused) -> None:
    folder = engine_with(tmp_path, {"temperature": "hot"})
    words = ["--generation-config", "auto"]
    for command in (["run", str(folder), "-p", "x"], ["chat", str(folder)], ["serve", str(folder), "--port", "0"]):
        refused([*command, *words], "generation_config.json: temperature is 'hot', allowed: a number")
    assert output_of("run", str(folder), "-p", PROMPT, "--threads", "1", "--max-new-tokens", "4")
    export = ["triton", "export", str(folder), "--repo", str(tmp_path / "repo"), "--set"]
    refused([*export, "generation_config=auto"], "generation_config.json: temperature is 'hot'")
    refused([*export, "generation_config=vllm"], "generation_config is 'vllm', allowed: auto or none")
