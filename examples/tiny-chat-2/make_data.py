"""Deterministic conversations for tiny-chat-2: questions, tools with results, system texts, thoughts, second turns.

`example` draws a conversation whose last turn is the assistant's; `render` writes it as chat_template.jinja does. The
order of the random calls is part of the recipe.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from tasks import NAMES, TASKS
from tools import TOOLS, Tool, result_text, shown_call, shown_tools, tool_case

Message = dict[str, Any]
SYSTEMS: list[tuple[str, Callable[[str], str]]] = [
    ("Answer in capital letters.", str.upper),
    ("End every answer with the word done.", lambda answer: f"{answer} done"),
    ("Begin every answer with Sure:", lambda answer: f"Sure: {answer}"),
]
# Shares of the conversations that need tools, have tools without need, are told their name, obey a system text, and
# have an earlier turn; thoughts are of 30 % of what may be thought about.
_NEED_TOOLS, _HAVE_TOOLS = 0.16, 0.19
_NAMED, _OBEYING, _LONGER = 0.82, 0.84, 0.90
_THINKING = 0.3


class Example(NamedTuple):
    """A conversation; the last message is the assistant's, with its thoughts, if any, in `reasoning`."""

    task: str
    messages: list[Message]
    tools: list[Tool] | None
    thinking: bool


def example(rng: random.Random) -> Example:
    """The next conversation of `rng`."""
    kind = rng.random()
    if kind < _NEED_TOOLS:
        return _with_tools(rng)
    task = rng.choices(list(TASKS), [often for _, often in TASKS.values()])[0]
    question, thoughts, answer = TASKS[task][0](rng)
    tools = None
    before: list[Message] = []
    if kind < _HAVE_TOOLS:
        tools = rng.sample(TOOLS, rng.randint(1, 2))
    if kind > _LONGER:
        earlier, _, said = TASKS[rng.choice(list(TASKS))][0](rng)
        before = [{"role": "user", "content": earlier}, {"role": "assistant", "content": said}]
    elif kind > _OBEYING:
        system, obey = rng.choice(SYSTEMS)
        before = [{"role": "system", "content": system}]
        answer, thoughts = obey(answer), None
    elif kind > _NAMED:
        name = rng.choice(NAMES)
        before = [{"role": "system", "content": f"Your name is {name}."}]
        task, question = "name", rng.choice(["What is your name?", "Who are you?"])
        answer, thoughts = f"My name is {name}.", None
    thinking = thoughts is not None and rng.random() < _THINKING
    reply = {"role": "assistant", "content": answer, **({"reasoning": thoughts} if thinking else {})}
    return Example(task, [*before, {"role": "user", "content": question}, reply], tools, thinking)


def _with_tools(rng: random.Random) -> Example:
    """A question that needs tools: up to the calls, or up to the answer made of what they give."""
    case = tool_case(rng)
    needed = {name for name, _ in case.calls}
    tools = [tool for tool in TOOLS if tool["function"]["name"] in needed or rng.random() < 0.5]
    rng.shuffle(tools)
    calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in case.calls]
    messages = [{"role": "user", "content": case.question}, {"role": "assistant", "content": "", "tool_calls": calls}]
    if rng.random() < 0.5:
        messages += [{"role": "tool", "content": result_text(result)} for result in case.results]
        messages += [{"role": "assistant", "content": case.answer}]
    return Example("tools", messages, tools, False)


def render(messages: list[Message], tools: list[Tool] | None, thinking: bool) -> tuple[str, str]:
    """What the model sees before the last turn, and what it should write."""
    *before, last = messages
    system = before.pop(0)["content"] if before[0]["role"] == "system" else ""
    if tools:
        system = (f"{system}\n\n" if system else "") + shown_tools(tools)
    text = _turn("system", system)
    results = ""  # of tools, which stand in one turn of the user
    for message, following in zip(before, [*before[1:], last], strict=True):
        if message["role"] == "tool":
            results += f"<tool_response>\n{message['content']}\n</tool_response>\n"
            if following["role"] != "tool":
                text += _turn("user", results)
                results = ""
        elif message["role"] == "assistant":
            text += _turn("assistant", f"<think></think>{_said(message)}")
        else:
            text += _turn(message["role"], message["content"])
    opened = "<think>\n" if thinking else "<think></think>"
    thoughts = f"{last['reasoning']}\n</think>" if last.get("reasoning") else ""
    return f"{text}<|im_start|>assistant\n{opened}", thoughts + _said(last)


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def _said(message: Message) -> str:
    """What an assistant wrote: text, and calls."""
    return message["content"] + "\n".join(shown_call(call) for call in message.get("tool_calls", []))
