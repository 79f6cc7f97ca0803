"""Draw questions for the demonstration model from a seed that its training did not use; its folder says of what."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Sequence
from typing import Any

from common import record

sys.path.insert(0, str(record.MODEL))
from questions import LONGEST, OPEN, SEED, TASKS, WITH_MORE, ask

__all__ = ["LONGEST", "OPEN", "SEED", "TASKS", "WITH_MORE", "Question", "draw", "first"]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a task with its answer, the only right one unless the task is open. `thoughts` may precede it."""

    task: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thoughts: str | None
    answer: str

    @property
    def text(self) -> str:
        """What the user says at last: all of the question, if it is one of `TASKS`."""
        return str(self.messages[-1]["content"])

    def prompt(self, codec: Any, thinking: bool = False) -> list[int]:
        """Its token ids; `codec` is an engine's `text`."""
        ids: list[int] = codec.encode_rendered(codec.render_chat(self.messages, thinking, self.tools))
        return ids


def draw(per_task: int, seed: int = SEED, tasks: Sequence[str] = TASKS) -> list[Question]:
    """`per_task` questions of every task, the tasks in turn."""
    rng = random.Random(seed)
    return [Question(task, *ask(task, rng)) for _ in range(per_task) for task in tasks]


def first(count: int) -> list[Question]:
    """`count` questions, the tasks in turn."""
    return draw(-(-count // len(TASKS)))[:count]
