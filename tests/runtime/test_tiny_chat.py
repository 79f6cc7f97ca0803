"""The example checkpoint: its data, its prompt format and its training script.

Answers are checked against what their questions say, by code that shares nothing with the generator. The
training script runs for two steps in its own process; the mask of its objective is checked against plain
forwards.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from safetensors import safe_open
from stand_ins.checkpoints import TINY_CHAT, load_make_data

CHECKPOINT = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


DATA = load_make_data()

PINNED = [
    (
        0,
        "reverse",
        "Reverse the list: blue glass tower light bread river",
        "river bread light tower glass blue",
    ),
    (7, "sort", "Sort these numbers: 51, 84, 7, 10.", "Sorted: 7, 10, 51, 84."),
    (
        1,
        "two",
        "Sami has 21 books, buys 5 more and then gives away 16. How many books does Sami have now?",
        "Sami starts with 21 books. After buying 5 more, Sami has 21 + 5 = 26. "
        "After giving away 16, Sami has 26 - 16 = 10. The answer is 10.",
    ),
    (
        9,
        "json",
        "Write JSON for Tara, age 41, from Oslo, who owns a fox.",
        '{\n  "name": "Tara",\n  "age": 41,\n  "city": "Oslo",\n  "pet": "fox",\n  "adult": true\n}',
    ),
    (
        17,
        "code",
        "Write a Python function that returns the difference of n and q.",
        'def subtract(n, q):\n    """Return the difference of n and q."""\n    result = n - q\n    return result',
    ),
]
# SHA-256 of the first 2000 examples of seed 1, the head of the tokenizer's corpus.
DIGEST = "958f161c4988d592bb09e06c3b5268f53ca90ab5fc7b8cb46f1d867f8f626cb0"


@pytest.mark.parametrize(("seed", "task", "question", "answer"), PINNED)
def test_examples_of_a_seed_never_change(seed: int, task: str, question: str, answer: str) -> None:
    assert DATA.example(random.Random(seed)) == (task, question, answer)


def test_corpus_never_changes() -> None:
    rng = random.Random(1)
    text = "\n".join("\n".join(DATA.example(rng)) for _ in range(2000))
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


def test_example_draws_every_task_and_repeats() -> None:
    first, second = random.Random(3), random.Random(3)
    examples = [DATA.example(first) for _ in range(300)]
    assert examples == [DATA.example(second) for _ in range(300)]
    assert {task for task, _, _ in examples} == set(DATA.TASKS)


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def story(result: Callable[..., int]) -> Callable[[str, str], bool]:
    """Right if the last number is `result` of the question's numbers and every equation holds."""

    def check(question: str, answer: str) -> bool:
        equations = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", answer)
        operate = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
        holds = all(operate[op](int(a), int(b)) == int(c) for a, op, b, c in equations)
        return bool(equations) and holds and answer.endswith(f" The answer is {result(*numbers(question))}.")

    return check


def right_json(question: str, answer: str) -> bool:
    name, age, city, pet = re.findall(r"for (\w+), age (\d+), from (\w+), who owns a (\w+)\.", question)[0]
    expected = {"name": name, "age": int(age), "city": city, "pet": pet, "adult": True}
    return bool(json.loads(answer) == expected)


def right_code(question: str, answer: str) -> bool:
    noun, a, b = re.findall(r"the (\w+) of (\w) and (\w)\.", question)[0]
    scope: dict[str, Any] = {}
    exec(answer, scope)
    (function,) = (value for name, value in scope.items() if name != "__builtins__")
    expected = {"sum": 14, "difference": 8, "product": 33}[noun]
    documented = function.__doc__ == f"Return the {noun} of {a} and {b}."
    return documented and bool(function(**{a: 11, b: 3}) == expected)


def right_table(question: str, answer: str) -> bool:
    a, last = numbers(question)
    return [numbers(line) for line in answer.split("\n")] == [[a, i, a * i] for i in range(1, last + 1)]


RIGHT: dict[str, Callable[[str, str], bool]] = {
    "gain": story(lambda a, b: a + b),
    "lose": story(lambda a, b: a - b),
    "two": story(lambda a, b, c: a + b - c),
    "times": story(lambda a, b: a * b),
    "count": lambda q, a: numbers(a) == list(range(numbers(q)[0], numbers(q)[1] + 1)),
    "sort": lambda q, a: numbers(a) == sorted(numbers(q)),
    "reverse": lambda q, a: a.split() == q.removeprefix("Reverse the list: ").split()[::-1],
    "json": right_json,
    "code": right_code,
    "table": right_table,
}


@pytest.mark.parametrize("task", sorted(RIGHT))
def test_answers_are_right(task: str) -> None:
    for seed in range(300):
        question, answer = DATA.TASKS[task](random.Random(seed))
        assert RIGHT[task](question, answer), (seed, question, answer)


def test_every_task_is_checked() -> None:
    assert set(RIGHT) == set(DATA.TASKS)


@pytest.mark.parametrize("system", ["", "Answer in one line."])
def test_prompt_is_the_rendered_template(system: str) -> None:
    template = jinja2.Environment().from_string((TINY_CHAT / "chat_template.jinja").read_text())
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "Count from 7 to 15."})
    rendered = template.render(messages=turns, add_generation_prompt=True)
    assert DATA.prompt("Count from 7 to 15.", system) == rendered


def tensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Data type and shape by name, from the header alone."""
    with safe_open(path, framework="numpy") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}


@pytest.mark.torch
def test_training_writes_the_shipped_layout(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-B", "train.py", "--out", str(tmp_path / "out"), "--steps", "2"]
    command += ["--batch", "2", "--threads", "1"]
    subprocess.run(command, cwd=TINY_CHAT, check=True, capture_output=True, timeout=120)
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(written) == CHECKPOINT
    shipped = tensors(TINY_CHAT / "model.safetensors")
    assert tensors(written["model.safetensors"]) == shipped
    assert len(shipped) == 9 * 6 + 3
    for name in CHECKPOINT - {"model.safetensors"}:
        assert written[name].read_bytes() == (TINY_CHAT / name).read_bytes(), name


@pytest.mark.torch
def test_bad_length_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-B", "train.py", "--out", str(tmp_path / "out"), "--steps", "0"]
    result = subprocess.run(command, cwd=TINY_CHAT, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("--steps 0: both must be over zero")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    """torch, the scripts' modules, the shipped model in f32 and one noised batch with its joint logits."""
    torch = pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    names = ("make_data", "model", "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TINY_CHAT))
        for name in names:  # tiny-chat-2 has modules of these names too
            patch.delitem(sys.modules, name, raising=False)
        train = importlib.import_module("train")
        network = importlib.import_module("model").TinyChat()
        importlib.import_module("model").load_weights(network, TINY_CHAT)
        tokenizer = tokenizers.Tokenizer.from_file(str(TINY_CHAT / "tokenizer.json"))
        batch = train.draw_batch(tokenizer, random.Random(3), 4)
        torch.manual_seed(3)
        noisy = train.noise(batch)
        positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)

        def logits(tokens: Any, at: Any, mask: Any) -> Any:  # (B, S, V) f32
            with torch.no_grad():
                return network.diffusion_head(network(tokens, at, mask))

        joint = logits(
            torch.cat([noisy.tokens, batch.tokens], 1),
            torch.cat([noisy.position, positions], 1),
            train.joint_mask(noisy, batch.tokens.shape[1]),
        )
        parts = {"batch": batch, "noisy": noisy, "positions": positions, "joint": joint}
        yield SimpleNamespace(torch=torch, logits=logits, **parts)
        for name in names:
            sys.modules.pop(name, None)


@pytest.mark.torch
def test_clean_half_is_a_plain_causal_forward(recipe: SimpleNamespace) -> None:
    length = recipe.batch.tokens.shape[1]
    causal = recipe.torch.ones(1, 1, length, length, dtype=recipe.torch.bool).tril()
    plain = recipe.logits(recipe.batch.tokens, recipe.positions, causal)
    recipe.torch.testing.assert_close(recipe.joint[:, -length:], plain, rtol=0, atol=1e-3)


@pytest.mark.torch
def test_noisy_block_is_a_bidirectional_pass_after_its_clean_prefix(recipe: SimpleNamespace) -> None:
    torch = recipe.torch
    noisy = recipe.noisy
    blocks = 0
    for row in range(noisy.tokens.shape[0]):
        for block in noisy.block[row].unique():
            index = (noisy.block[row] == block).nonzero()[:, 0]
            prefix = int(noisy.context[row, index[0]])
            assert prefix == int(recipe.batch.prompt[row] + index[0])
            if prefix >= recipe.batch.tokens.shape[1]:
                assert not noisy.masked[row, index].any()  # past the sequence, nothing to learn
                continue
            tokens = torch.cat([recipe.batch.tokens[row, :prefix], noisy.tokens[row, index]])
            at = torch.cat([recipe.positions[row, :prefix], noisy.position[row, index]])
            mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
            mask[prefix:] = True
            plain = recipe.logits(tokens[None], at[None], mask[None, None])[0, prefix:]
            torch.testing.assert_close(recipe.joint[row, index], plain, rtol=0, atol=1e-3)
            blocks += 1
    assert blocks >= 8
