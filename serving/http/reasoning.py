"""Thinking told apart from the answer.

In: an answer's text as it comes. Out: what is reasoning and what is content. A think block stands at the beginning or
nowhere: behind it, or without one, all text is content as it is. The surprising fact: a template may open the block
itself, so the text begins inside it and only the closing marker is seen.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class Splitter:
    """Splits one answer. `thinking`: whether it begins inside a think block."""

    def __init__(self, thinking: bool) -> None:
        self._opened, self._closed = thinking, False
        self._trims = thinking  # line ends behind a marker belong to it
        self._held = ""

    def push(self, text: str, final: bool = False) -> tuple[str, str]:
        """New reasoning and new content; what may be the beginning of a marker waits, unless it is `final`."""
        self._held += text
        if not self._opened and not self._closed:
            begin = self._held.lstrip("\n")
            if OPEN.startswith(begin[: len(OPEN)]) and len(begin) < len(OPEN) and not final:
                return "", ""
            self._opened = self._trims = begin.startswith(OPEN)
            self._closed = not self._opened
            if self._opened:
                self._held = begin.removeprefix(OPEN)
        reasoning = ""
        if not self._closed:
            before, found, after = self._held.partition(CLOSE)
            if not found:
                waits = max((n for n in range(1, len(CLOSE)) if before.endswith(CLOSE[:n])), default=0)
                end = len(before) - (0 if final else waits)
                self._held = before[end:]
                return self._trimmed(before[:end]), ""
            reasoning, self._held, self._closed = self._trimmed(before), after, True
            self._trims = True
        content, self._held = self._trimmed(self._held), ""
        return reasoning, content

    def _trimmed(self, text: str) -> str:
        if self._trims:
            text = text.lstrip("\n")
            self._trims = not text
        return text
