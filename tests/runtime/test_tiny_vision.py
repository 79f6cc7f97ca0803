"""tiny-vision: its pictures, what its checkpoint answers about them, and that its recipe makes a checkpoint."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from stand_ins.scripts import load_script

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.runtime.loading import LoadedEngine

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-vision"


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    return load_script(FOLDER / "make_pictures.py")


def test_pictures_hold_what_their_scene_says(pictures: ModuleType) -> None:
    rng = random.Random(3)
    for _ in range(50):
        scene = pictures.draw_scene(rng)
        pixels = np.asarray(pictures.paint(scene, rng)).astype(int)
        for _, colour, place in scene.things:
            y, x = 16 * ("bottom" in place), 16 * ("right" in place)
            distance = np.abs(pixels[y : y + 16, x : x + 16] - np.array(pictures.COLOURS[colour])).max(axis=-1)
            assert (distance <= 15).sum() > 30
        assert len({place for _, _, place in scene.things} | {scene.digit_place}) == 3
        assert len(set(pictures.quarters(scene))) == 4
    again = [pictures.example(random.Random(5), task) for task in pictures.TASKS]
    assert [one[1:] for one in again] == [pictures.example(random.Random(5), task)[1:] for task in pictures.TASKS]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    return nemodiff.load(Builder(FOLDER, tmp_path_factory.mktemp("engines") / "tiny-vision").run(), threads=1)


def test_the_checkpoint_answers_questions_about_pictures(pictures: ModuleType, engine: LoadedEngine) -> None:
    rng = random.Random(8)
    asked = [(task, *pictures.example(rng, task)) for task in pictures.TASKS for _ in range(6)]
    prompts: list[Any] = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for _, picture, question, _ in asked
    ]
    given = {
        mode: list(nemodiff.generate_many(engine, prompts, rows=1, mode=mode, max_new_tokens=64))
        for mode in nemodiff.MODES
    }
    for mode, answers in given.items():
        right = sum(answer.text == expected for answer, (*_, expected) in zip(answers, asked, strict=True))
        assert right >= (20 if mode == "diffusion" else 26), mode
    for mode in ("linear_spec", "quadratic_spec"):
        assert [one.token_ids for one in given[mode]] == [one.token_ids for one in given["ar"]]
    assert {tuple(one.image_tokens) for one in given["ar"]} == {(21,)}


@pytest.mark.torch
def test_the_recipe_makes_a_checkpoint(pictures: ModuleType, tmp_path: Path) -> None:
    short = ["--look", "0.005", "--causal", "0.005", "--minutes", "0.005", "--batch", "2"]
    command = [sys.executable, str(FOLDER / "train.py"), "--out", str(tmp_path / "checkpoint"), *short]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    engine = nemodiff.load(Builder(tmp_path / "checkpoint", tmp_path / "engine").run(), threads=1)
    picture, question, _ = pictures.example(random.Random(1), "describe")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    answers = [
        nemodiff.generate(engine, [{"role": "user", "content": content}], mode=mode, max_new_tokens=24)
        for mode in ("ar", "linear_spec", "quadratic_spec", "diffusion")
    ]
    assert answers[0].image_tokens == [21]
    assert answers[1].token_ids == answers[2].token_ids == answers[0].token_ids
