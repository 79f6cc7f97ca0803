"""Draw questions for tiny-chat, each with its only right answer, from a seed that its training did not use."""

from __future__ import annotations

import dataclasses
import random
import sys

from common import record

sys.path.insert(0, str(record.TINY_CHAT))
from make_data import TASKS

# Training and its held-out loss used 1, 7 and 999. An unused seed makes an unused stream, not unseen questions: of
# tasks with few questions (48 times tables, 610 countings, 1260 functions) training has seen them all.
SEED = 12345

__all__ = ["SEED", "TASKS", "Question", "draw"]


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a task with its only right answer."""

    task: str
    text: str
    answer: str


def draw(per_task: int, seed: int = SEED) -> list[Question]:
    """`per_task` questions of every task, the tasks in turn."""
    rng = random.Random(seed)
    return [Question(task, *make(rng)) for _ in range(per_task) for task, make in TASKS.items()]
