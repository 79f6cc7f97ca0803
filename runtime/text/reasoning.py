"""Splitting an answer's text into reasoning and content.

A think block stands at the beginning of an answer or nowhere: everything after it, or all of an answer without one, is
content as it is.
"""

from __future__ import annotations

from .thoughts import Thoughts


class ReasoningParser:
    """Splits one answer as its text comes.

    Args:
        thoughts: the marks around them.
        thinking: whether the text begins inside a think block, because the chat template has opened it.
    """

    def __init__(self, thoughts: Thoughts, thinking: bool) -> None:
        self._marks = thoughts
        self._opened = thinking
        self._closed = False
        self._trims = thinking  # line ends after a marker belong to the marker
        self._held = ""

    def push(self, text: str, final: bool = False) -> tuple[str, str]:
        """New reasoning and new content; what may be the beginning of a marker is held back, unless it is `final`."""
        self._held += text
        if not self._opened and not self._closed and not self._open(final):
            return "", ""
        reasoning = ""
        if not self._closed:
            if self._marks.close not in self._held:
                return self._unclosed_reasoning(final), ""
            before, _, self._held = self._held.partition(self._marks.close)
            reasoning = self._trimmed(before)
            self._closed = True
            self._trims = True
        content = self._trimmed(self._held)
        self._held = ""
        return reasoning, content

    def _open(self, final: bool) -> bool:
        """Find out whether the text begins with a think block; False while that cannot be said yet."""
        begin = self._held.lstrip("\n")
        mark = self._marks.open
        if len(begin) < len(mark) and mark.startswith(begin) and not final:
            return False
        self._opened = begin.startswith(mark)
        self._trims = self._opened
        self._closed = not self._opened
        if self._opened:
            self._held = begin.removeprefix(mark)
        return True

    def _unclosed_reasoning(self, final: bool) -> str:
        """What is certain to be reasoning while the block is open; the rest is held back."""
        partial_marker = 0
        if not final:
            close = self._marks.close
            partial_marker = max((n for n in range(1, len(close)) if self._held.endswith(close[:n])), default=0)
        end = len(self._held) - partial_marker
        reasoning = self._held[:end]
        self._held = self._held[end:]
        return self._trimmed(reasoning)

    def _trimmed(self, text: str) -> str:
        if self._trims:
            text = text.lstrip("\n")
            self._trims = not text
        return text
