"""How the commands show an answer that may call tools: thoughts in their markers, each call on a line of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.requests.generation import Generation


class CallLines:
    """Spells the parts of an answer as they come: `weather({"city": "Rome"})` is a call."""

    def __init__(self) -> None:
        self._part = ""  # the last one
        self._inside = False  # of a line

    def push(self, part: str, text: str) -> str:
        """A part as text, see `Delta`."""
        if part != self._part or part == "call":
            text = self._change(part) + text + ("(" if part == "call" else "")
        self._part = part
        self._inside = not text.endswith("\n") if text else self._inside
        return text

    def _change(self, part: str) -> str:
        """What stands before a part that is another than the last one."""
        if part == "arguments":
            return ""
        before = self.end()
        inside = not before.endswith("\n") if before else self._inside
        if part == "call" or self._part == "arguments":
            before += "\n" if inside else ""
        return before + ("<think>" if part == "reasoning" else "")

    def end(self) -> str:
        """The end of the last part."""
        return {"reasoning": "</think>\n", "call": ")", "arguments": ")"}.get(self._part, "")


def spelled(answer: Generation) -> str:
    """A whole answer."""
    lines = CallLines()
    parts = [("reasoning", answer.reasoning), ("content", answer.content)]
    for call in answer.tool_calls:
        parts += [("call", call.name), ("arguments", call.arguments)]
    return "".join(lines.push(*part) for part in parts if part[1]) + lines.end()
