"""What the benchmarks share that compare engines of one checkpoint: their options, CPU time in turns, answers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nemodiff.runtime.engines.passes import causal
from nemodiff.runtime.generate import generate
from nemodiff.runtime.loading import LoadedEngine

from . import record
from .questions import draw, first

MODES = (("linear_spec", 16), ("linear_spec", 32), ("quadratic_spec", 16), ("quadratic_spec", 32))
WARMUP = 2
_Key = TypeVar("_Key", bound=Hashable)


def parser(description: str, name: str, questions: int, rounds: int) -> argparse.ArgumentParser:
    """The options of such a benchmark, whose result has that name unless told otherwise."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--checkpoint", type=Path, default=record.MODEL, help=f"default examples/{record.MODEL.name}")
    made.add_argument("--name", default=name, help=f"name of the result, default {name}")
    made.add_argument(
        "--questions", type=int, default=questions, help=f"default {questions}; 0 where the model answers nothing"
    )
    made.add_argument("--rounds", type=int, default=rounds, help=f"passes of each kind, default {rounds}")
    made.add_argument("--threads", type=int, default=1, help="default 1")
    return made


def in_turns(runs: Mapping[_Key, Callable[[], object]], rounds: int) -> dict[_Key, list[float]]:
    """CPU milliseconds of each run by its key, `rounds` of them, after a warm-up.

    A run comes twice and the second counts: the first finds the other's weights in the processor's cache.
    """
    times: dict[_Key, list[float]] = {key: [] for key in runs}
    for turn in range(WARMUP + rounds):
        for key, run in runs.items():
            run()
            started = time.process_time()
            run()
            if turn >= WARMUP:
                times[key].append((time.process_time() - started) * 1e3)
    return times


def answers(engines: dict[str, LoadedEngine], questions: int, new_tokens: int) -> dict[str, Any]:
    """By engine: right answers, answers equal to f32's, and answers of each other mode that are not its own ar's."""
    asked = first(questions)
    results: dict[str, Any] = {}
    plain: list[list[int]] = []
    for name, engine in engines.items():
        result = {"right": 0, "equal to f32": 0, "unequal to ar": {f"{m} {b}": 0 for m, b in MODES}}
        for number, question in enumerate(asked):
            answer = generate(engine, question.text, mode="ar", max_new_tokens=new_tokens)
            if name == "f32":
                plain.append(answer.token_ids)
            result["right"] += answer.text.strip() == question.answer.strip()
            result["equal to f32"] += answer.token_ids == plain[number]
            for mode, block in MODES:
                other = generate(engine, question.text, mode=mode, block_length=block, max_new_tokens=new_tokens)
                result["unequal to ar"][f"{mode} {block}"] += other.token_ids != answer.token_ids
        results[name] = {"answers": len(asked), **result}
        print(name, results[name], flush=True)
    return results


def texts(engine: LoadedEngine) -> list[list[int]]:
    """The ids of a question of every task with its answer."""
    codec = engine.text
    return [[*question.prompt(codec), *codec.encode_plain(question.answer)] for question in draw(1)]


def logits(engine: LoadedEngine, ids: Sequence[list[int]]) -> np.ndarray:
    """The logits after every token of some texts, one text after the other, (tokens, V) f32."""
    got = []
    for text in ids:
        cache = engine.backend.open(1)
        (prediction,) = cache.forward([causal("verify", text, 0, predict_all=True, logits=True)])
        assert prediction.logits is not None
        got.append(prediction.logits.copy())
        cache.close()
    return np.concatenate(got)


def differences(got: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """How far logits (positions, V) are from the exact ones.

    `error` is the root mean square of what they are off, over the standard deviation of the exact ones,
    `kl_divergence` the mean of the distributions' in nats, `same_best` the share of positions with the same best token.
    """
    wanted, given = (logits - np.logaddexp.reduce(logits, -1, keepdims=True) for logits in (exact, got))
    figures = {
        "error": np.sqrt(np.mean((got - exact) ** 2)) / exact.std(),
        "kl_divergence": (np.exp(wanted) * (wanted - given)).sum(-1).mean(),
        "same_best": np.mean(got.argmax(-1) == exact.argmax(-1)),
    }
    return {name: round(float(figure), 6) for name, figure in figures.items()}


def unequal_goals(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """That no engine's self-speculation differs from its own ar; `asked` is what `answers` gives."""
    unequal = {name: sum(result["unequal to ar"].values()) for name, result in asked.items()}
    return [
        record.goal(f"{name}: answers that are not ar's", count, "at most", 0, "answers")
        for name, count in unequal.items()
    ]
