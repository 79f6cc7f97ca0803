"""Questions for tiny-chat-2, each with its only right answer unless its task is open, as the benchmarks ask them."""

from __future__ import annotations

import random
from typing import Any

from make_data import example, render
from tasks import TASKS as _DRAWS

# Training draws from seeds that are texts. An unused seed makes an unused stream, not unseen questions: training has
# seen all those of tasks with few (greetings 12, words to spell 68, times tables 187, functions 1260, countings 4698).
SEED = 12345
LONGEST = 336  # tokens, more than any right answer has
OPEN = ("story", "loop")  # tasks with more than one right answer: a loop's variable has any letter
TASKS = tuple(task for task in _DRAWS if task not in OPEN)  # a user's text is all that these need
WITH_MORE = ("tools", "name")  # these need tools or a system text

Asked = tuple[list[dict[str, Any]], list[dict[str, Any]] | None, str | None, str]


def ask(task: str, rng: random.Random) -> Asked:
    """The next question of a task: messages, tools, what might be thought about it, and the answer."""
    if task not in WITH_MORE:
        question, thoughts, answer = _DRAWS[task][0](rng)
        return [{"role": "user", "content": question}], None, thoughts, answer
    while True:
        drawn = example(rng)
        if drawn.task == task:
            return drawn.messages[:-1], drawn.tools, None, render(drawn.messages, drawn.tools, False)[1]
