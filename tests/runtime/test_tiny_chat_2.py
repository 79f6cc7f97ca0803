"""The recipe of tiny-chat-2: its data are what the template renders, its training goes on where it stopped, its drafter
is one, and its questions have their answers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from safetensors.numpy import load_file
from stand_ins.chats import chat_ids

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.runtime.text.codec import TextCodec

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-chat-2"
SHIPPED = FOLDER.with_name("tiny-chat-2-drafter") / "linear_spec_lora"
SHOWN = json.loads((FOLDER / "tools.json").read_text())
DRAW = """
import json, random
from make_data import example, render
rng = random.Random(3)
for _ in range(400):
    drawn = example(rng)
    print(json.dumps([*drawn, *render(drawn.messages, drawn.tools, drawn.thinking)]))
"""
ASK = """
import json, random, sys
from pathlib import Path
import make_tasks
from questions import OPEN, SEED, TASKS, WITH_MORE, ask
rng = random.Random(SEED)
for task in (*TASKS, *WITH_MORE, *OPEN):
    for _ in range(int(sys.argv[2])):
        print(json.dumps([task, *ask(task, rng)]))
make_tasks.write(Path(sys.argv[1]), 40)
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
whole = Recipe(out / "whole", 2, 1, 0, 500, 0.5, 1, "cpu", 1, 60)
Run(whole).train()
parts = dataclasses.replace(whole, out=out / "parts")
Run(dataclasses.replace(parts, steps=1)).train()
again = Run(parts)
assert again.step == 1
again.train()
"""
NOISE = """
import random
from itertools import groupby, takewhile
from objective import BLOCK, EOS, MASK, as_batch, exercises, joint_mask, noise, samples
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file("tokenizer.json")
drawn = samples(tokenizer, random.Random(1))
batch = as_batch([next(drawn) for _ in range(40)])
sizes, unmasked = set(), set()
for tokens, learned, fill in ((batch.tokens, batch.learned, BLOCK), (*exercises(tokenizer, "a", 5000, "cpu"), 8)):
    noisy = noise(tokens, learned, random.Random(2), fill)
    mask = joint_mask(noisy, tokens.shape[1])
    assert (noisy.tokens == noisy.target.masked_fill(noisy.masked, MASK)).all()
    for row in range(len(tokens)):
        wanted = [at for at, taught in enumerate(learned[row].tolist()) if taught]
        seen = []
        for number, places in groupby(range(noisy.tokens.shape[1]), noisy.block[row].__getitem__):
            places = list(places)
            if number < 0:
                assert not noisy.masked[row, places].any() and places[-1] + 1 == noisy.tokens.shape[1]
                continue
            at = noisy.position[row, places].tolist()
            assert at == list(range(at[0], at[0] + len(at))) and len(at) <= BLOCK
            answer = list(takewhile(wanted.__contains__, at))
            assert noisy.target[row, places].tolist() == tokens[row, answer].tolist() + [EOS] * (len(at) - len(answer))
            assert (len(at) - len(answer)) <= fill
            seen += answer
            for place in places:
                sees = mask[row, 0, place].nonzero()[:, 0].tolist()
                assert sees == places + [noisy.tokens.shape[1] + i for i in range(at[0])]
            sizes.add(len(at))
            unmasked.add(len(at) - int(noisy.masked[row, places].sum()))
        assert seen == wanted
assert {1, BLOCK} < sizes and {0, 1, 2, 8} < unmasked
print("checked")
"""
DRAFTER = """
import sys
from pathlib import Path
import torch
import objective
from model import TinyChat, save_checkpoint
from train_drafter import BLOCK, MASK, Recipe, Run, drafts_of, save_adapter
torch.set_num_threads(1)
objective.POOL = 16
out = Path(sys.argv[1])
save_checkpoint(TinyChat(), out / "checkpoint")
for name in ("again", "linear_spec_lora"):
    run = Run(Recipe(out / "checkpoint", out / name, 1e-9, 400, 4, 2e-3, 1, "cpu", 1))
    run.train()
    save_adapter(run.drafters, 4, out / name)
for batch in run._held_out:
    drafts = drafts_of(batch, 3)
    for row, (prompt, answer) in enumerate(zip(batch.prompt.tolist(), batch.answer.tolist())):
        tokens = batch.tokens[row].tolist()
        begins = [i for i in range(answer) if drafts.context[row, i] == prompt + i]
        assert begins[0] == 0
        assert all(b - a == BLOCK for a, b in zip(begins[1:], begins[2:]))
        for i in range(answer):
            assert drafts.position[row, i] == prompt + i
            assert drafts.masked[row, i] == (i not in begins)
            assert drafts.tokens[row, i] == (tokens[prompt + i] if i in begins else MASK)
            assert drafts.target[row, i] == tokens[prompt + i]
        assert not drafts.masked[row, answer:].any()
"""


# Of 17 questions, one of each task that has a right answer: fewer than the weights give, as machines round differently.
RIGHT = {"ar": 15, "diffusion": 11}


def ran(script: str, *words: str) -> str:
    """What a script prints that is run beside the recipe's files."""
    ended = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=FOLDER, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def drawn() -> list[Any]:
    return [json.loads(line) for line in ran(DRAW).splitlines()]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> nemodiff.LoadedEngine:
    return nemodiff.load(Builder(FOLDER, tmp_path_factory.mktemp("engines") / "tiny-chat-2").run(), threads=1)


def test_conversations_are_written_as_the_template_renders_them(drawn: list[Any]) -> None:
    codec = TextCodec(FOLDER)
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    kinds = set()
    for task, messages, tools, thinking, prompt, _ in drawn:
        assert codec.render_chat(messages[:-1], thinking, tools) == prompt
        assert chat_ids(codec, messages[:-1], thinking, tools) == tokenizer.encode(prompt).ids
        kinds.add((task, bool(tools), thinking, len(messages)))
    assert len({task for task, *_ in kinds}) == 19  # seventeen, tools, and names
    assert {length for *_, length in kinds} >= {2, 3, 4, 5}


@pytest.mark.parametrize("parameters", [{}, {"type": "object"}, {"type": "object", "properties": None}, None])
def test_tools_without_parameters_are_shown(parameters: Any) -> None:
    """As clients send tools that take none; an empty schema of an object is the same to them."""
    codec, asked = TextCodec(FOLDER), [{"role": "user", "content": "Hello"}]
    tool, empty = (
        {"type": "function", "function": {"name": "f", "parameters": one}}
        for one in (parameters, {"type": "object", "properties": {}})
    )
    assert chat_ids(codec, asked, tools=[tool]) == chat_ids(codec, asked, tools=[empty])


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


@pytest.mark.torch
def test_blocks_hold_the_answers_and_see_what_decoding_sees() -> None:
    assert ran(NOISE) == "checked\n"


@pytest.mark.torch
def test_a_trained_drafter_is_an_adapter_that_drafts_for_the_same_tokens(tmp_path: Path) -> None:
    told = ran(DRAFTER, str(tmp_path))
    assert told.count("held out") == 2 * 2
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "linear_spec_lora" / name).read_bytes()
    checkpoint, adapter = tmp_path / "checkpoint", tmp_path / "linear_spec_lora"
    builder = Builder(checkpoint, tmp_path / "engine", adapter=adapter)
    assert builder.plan().adapter_rank == 4
    weights = load_file(adapter / "adapter_model.safetensors")
    assert all(weights[name].any() for name in weights)
    shipped = load_file(SHIPPED / "adapter_model.safetensors")
    assert {name: [32 if size == 4 else size for size in w.shape] for name, w in weights.items()} == {
        name: list(w.shape) for name, w in shipped.items()
    }
    config, shipped_config = (json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, SHIPPED))
    assert config | {"r": 32, "lora_alpha": 128.0} == shipped_config
    engine = nemodiff.load(builder.run(), threads=1)
    answers = [nemodiff.generate(engine, "Hello", mode=mode, max_new_tokens=9) for mode in ("ar", "linear_spec")]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[1].adapter_tokens > 0


def test_the_shipped_adapter_drafts_better_and_changes_no_answer(engine: nemodiff.LoadedEngine, tmp_path: Path) -> None:
    drafter = nemodiff.load(Builder(FOLDER, tmp_path / "engine", adapter=SHIPPED).run(), threads=1)
    asked = [json.loads(line) for line in ran(ASK, str(tmp_path), "2").splitlines()]
    lengths: dict[str, list[int]] = {"plain": [], "drafter": []}
    for _, messages, tools, *_ in asked:
        prompt = chat_ids(engine.text, messages, False, tools)
        plain, drafted = (nemodiff.generate(e, prompt, max_new_tokens=128) for e in (engine, drafter))
        assert drafted.token_ids == plain.token_ids
        lengths["plain"] += plain.acceptance.lengths
        lengths["drafter"] += drafted.acceptance.lengths
    means = {name: sum(n) / len(n) for name, n in lengths.items()}
    assert means["drafter"] > means["plain"] > 7


def test_tiny_chat_2_itself_has_no_adapter() -> None:
    """Its recorded results are without one."""
    assert not (FOLDER / "linear_spec_lora").exists()


def test_questions_are_asked_as_in_training(tmp_path: Path) -> None:
    told = [json.loads(line) for line in ran(ASK, str(tmp_path), "20").splitlines()]
    codec = TextCodec(FOLDER)
    assert len({task for task, *_ in told}) == 19
    for task, messages, tools, thoughts, answer in told:
        assert (len(messages) > 1 or bool(tools)) == (task in ("tools", "name"))
        assert chat_ids(codec, messages, bool(thoughts), tools)
        assert len(codec.encode_plain(answer)) < 336
    asked = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(asked) == 40
    assert all(question["choices"][question["label"]] == question["answer"] for question in asked)
    assert len({question["task"] for question in asked}) > 10
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == [
        f"tiny_chat_2_{kind}.yaml" for kind in ("answers", "choices", "texts")
    ]


def test_the_weights_answer_most_questions_and_drafts_change_no_token(
    engine: nemodiff.LoadedEngine, tmp_path: Path
) -> None:
    asked = [json.loads(line) for line in ran(ASK, str(tmp_path), "1").splitlines()]
    prompts = [chat_ids(engine.text, messages, False, tools) for _, messages, tools, *_ in asked]
    answers = {
        mode: list(nemodiff.generate_many(engine, prompts, mode=mode, max_new_tokens=336))
        for mode in ("ar", "linear_spec", "diffusion")
    }
    assert [one.token_ids for one in answers["linear_spec"]] == [one.token_ids for one in answers["ar"]]
    for mode, least in RIGHT.items():
        told = zip(asked, answers[mode], strict=True)
        right = [task for (task, *_, answer), said in told if task not in ("story", "loop") and said.text == answer]
        assert len(right) >= least, (mode, right)
    assert sum(answer.acceptance.mean or 0 for answer in answers["linear_spec"]) / len(asked) > 4


def test_the_weights_call_a_tool_and_read_its_result(engine: nemodiff.LoadedEngine) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    for mode in ("ar", "linear_spec", "diffusion"):
        answer = nemodiff.generate(engine, messages, mode=mode, tools=SHOWN, max_new_tokens=96)
        assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == [
            ("get_weather", {"city": "Oslo"})
        ]
    result = {"role": "tool", "tool_call_id": "call_0", "content": '{"degrees": 7, "sky": "rainy"}'}
    answer = nemodiff.generate(engine, [*messages, answer.as_message(), result], tools=SHOWN, max_new_tokens=96)
    assert answer.content == "It is 7 degrees and rainy in Oslo."


def test_the_weights_think_if_they_may(engine: nemodiff.LoadedEngine) -> None:
    question = "Count from 3 to 9."
    thinking, plain = (nemodiff.generate(engine, question, thinking=may, max_new_tokens=96) for may in (True, False))
    assert thinking.reasoning.startswith("From 3 to 9")
    assert not plain.reasoning
    assert thinking.content == plain.content == "3, 4, 5, 6, 7, 8, 9."


def test_the_tools_of_the_readme_are_those_that_the_model_knows() -> None:
    told = ran("import json; from tools import TOOLS; print(json.dumps(TOOLS))")
    assert json.loads(told)[:2] == SHOWN
