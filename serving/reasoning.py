"""Thinking told apart from the answer.

In: an answer's text as it comes. Out: what is reasoning and what is content; the markers are in neither. The surprising
fact: a template may open the think block itself, so the text begins inside it and only the closing marker is seen.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class Splitter:
    """Splits one answer. `thinking`: whether it begins inside a think block."""

    def __init__(self, thinking: bool) -> None:
        self._thinking, self._held, self._begun = thinking, "", not thinking

    def push(self, text: str, final: bool = False) -> tuple[str, str]:
        """New reasoning and new content; what may be the beginning of a marker waits, unless it is `final`."""
        self._held += text
        said = {True: "", False: ""}
        while True:
            marker = CLOSE if self._thinking else OPEN
            before, found, after = self._held.partition(marker)
            if not found:
                break
            said[self._thinking] += self._trimmed(before)
            self._thinking, self._held, self._begun = not self._thinking, after, False
        waits = 0 if final else max((n for n in range(1, len(marker)) if self._held.endswith(marker[:n])), default=0)
        end = len(self._held) - waits
        ready, self._held = self._held[:end], self._held[end:]
        said[self._thinking] += self._trimmed(ready)
        return said[True], said[False]

    def _trimmed(self, text: str) -> str:
        """Without the line ends that stand behind a marker."""
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        return text
