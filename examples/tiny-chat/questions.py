"""Questions for tiny-chat, each with its only right answer, as the benchmarks ask them."""

from __future__ import annotations

import random
from typing import Any

from make_data import TASKS as _DRAWS

# Training and its held-out loss used the seeds 1, 7 and 999. An unused seed makes an unused stream, not unseen
# questions: of tasks with few questions (48 times tables, 610 countings, 1260 functions) training has seen them all.
SEED = 12345
LONGEST = 128  # tokens, more than any right answer has
TASKS = tuple(_DRAWS)  # a user's text is all that these need
WITH_MORE: tuple[str, ...] = ()  # these need tools or a system text
OPEN: tuple[str, ...] = ()  # and these have more than one right answer

Asked = tuple[list[dict[str, Any]], list[dict[str, Any]] | None, str | None, str]


def ask(task: str, rng: random.Random) -> Asked:
    """The next question of a task: messages, tools, what might be thought about it, and the answer."""
    question, answer = _DRAWS[task](rng)
    return [{"role": "user", "content": question}], None, None, answer
