"""What reads one call of a tool as its text comes: the interface, and what all forms share."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

from ..text.messages import CALL_CLOSE, CALL_OPEN
from .definition import Tool


class CallReader(abc.ABC):
    """Reads one call, after the text that `opens` it; `closes` is what may stand after it, empty where nothing does.

    Where nothing opens calls either, an answer begins with them or has none.

    name: of the function, None until it is known. failed: the text is no call, which shows before a name is known.
    ended: the call is complete. unread: text that is not used yet; all of it, until a name is known.

    Args:
        tools: those that are offered, by name.
    """

    opens: ClassVar[str] = CALL_OPEN
    closes: ClassVar[str] = CALL_CLOSE

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self.tools = tools
        self.name: str | None = None
        self.failed = False
        self.ended = False
        self.unread = ""

    def push(self, text: str, final: bool) -> str:
        """New text of the call; returns new text of its arguments, which are JSON once the call has ended.

        `final`: no more text will come.
        """
        self.unread += text
        if self.name is None:
            self._begin(final)
        return "" if self.name is None else self._arguments(final)

    def following(self) -> CallReader | None:
        """What reads the next call, where that stands right after this one, which has ended."""
        return None

    @abc.abstractmethod
    def _begin(self, final: bool) -> None:
        """Find the name, or that there is none."""

    @abc.abstractmethod
    def _arguments(self, final: bool) -> str:
        """New text of the arguments."""


def partial_end(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    return max((n for n in range(1, min(len(marker), len(text) + 1)) if text.endswith(marker[:n])), default=0)


def may_begin(text: str, marker: str) -> bool:
    """Whether a text is the beginning of a marker, or begins with it."""
    return marker.startswith(text) or text.startswith(marker)
