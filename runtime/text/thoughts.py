"""Where the thoughts at the beginning of an answer's text end."""

from __future__ import annotations

OPEN = "<think>"
CLOSE = "</think>"


def opens_thoughts(prompt: str) -> bool:
    """Whether a prompt ends inside a think block."""
    return prompt.rfind(OPEN) > prompt.rfind(CLOSE)


def may_open_thoughts(text: str) -> bool:
    """Whether a text, which does not begin inside a think block, may yet turn out to begin with one."""
    return OPEN.startswith(text.lstrip("\n"))


def answer_start(text: str, opened: bool) -> int | None:
    """Where the answer begins, after `</think>` and line ends; None while no character of it is there for certain.

    `opened`: whether the text begins inside a think block. A text without such a block is an answer as a whole.
    """
    if not opened:
        if may_open_thoughts(text):
            return None
        if not text.lstrip("\n").startswith(OPEN):
            return 0
    close = text.find(CLOSE)
    if close < 0:
        return None
    answer = close + len(CLOSE)
    while text.startswith("\n", answer):
        answer += 1
    return answer if answer < len(text) else None
