"""The recipe of tiny-chat-2: its data are what the template renders, and its training goes on where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from safetensors.numpy import load_file

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.runtime.text.codec import TextCodec

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-chat-2"
DRAW = """
import json, random
from make_data import example, render
rng = random.Random(3)
for _ in range(400):
    drawn = example(rng)
    print(json.dumps([*drawn, *render(drawn.messages, drawn.tools, drawn.thinking)]))
"""
TRAIN = """
import dataclasses, sys
from pathlib import Path
import torch
import train
from train import Recipe, Run
torch.set_num_threads(1)
train.HELD_OUT = 2
import objective
objective.POOL = 32
out = Path(sys.argv[1])
whole = Recipe(out / "whole", 2, 0, 200, 0.5, 1, "cpu", 1, 60)
Run(whole).train()
parts = dataclasses.replace(whole, out=out / "parts")
Run(dataclasses.replace(parts, steps=1)).train()
again = Run(parts)
assert again.step == 1
again.train()
"""


def ran(script: str, *words: str) -> str:
    """What a script prints that is run beside the recipe's files."""
    ended = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=FOLDER, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def drawn() -> list[Any]:
    return [json.loads(line) for line in ran(DRAW).splitlines()]


def test_conversations_are_written_as_the_template_renders_them(drawn: list[Any]) -> None:
    codec = TextCodec(FOLDER)
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    kinds = set()
    for task, messages, tools, thinking, prompt, _ in drawn:
        assert codec.render_chat(messages[:-1], thinking, tools) == prompt
        assert codec.encode_chat(messages[:-1], thinking, tools) == tokenizer.encode(prompt).ids
        kinds.add((task, bool(tools), thinking, len(messages)))
    assert len({task for task, *_ in kinds}) == 19  # seventeen, tools, and names
    assert {length for *_, length in kinds} >= {2, 3, 4, 5}


def test_every_answer_can_be_written_by_the_tokenizer(drawn: list[Any]) -> None:
    codec = TextCodec(FOLDER)
    config = json.loads((FOLDER / "config.json").read_text())
    assert codec.tokenizer.get_vocab_size() == config["vocab_size"] == 1536
    for *_, answer in drawn:
        ids = codec.encode_rendered(answer)
        assert codec.decode(ids) == answer
        assert config["mask_token_id"] not in ids


@pytest.mark.torch
def test_training_goes_on_where_it_stopped_and_gives_a_checkpoint(tmp_path: Path) -> None:
    told = ran(TRAIN, str(tmp_path))
    assert told.count("held out") == 3
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all((whole[name] == parts[name]).all() for name in whole)
    engine = nemodiff.load(Builder(tmp_path / "whole", tmp_path / "engine").run(), threads=1)
    for mode in nemodiff.MODES:
        assert len(nemodiff.generate(engine, "Hello", mode=mode, max_new_tokens=5).token_ids) <= 5
