"""What an answer's text consists of: thoughts, content and calls of tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from ..text.reasoning import ReasoningParser
from ..text.thoughts import TAGS, Thoughts
from .definition import Tool
from .json_form import ObjectScan
from .reader import CallReader, partial_end


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that the model makes; `arguments` are JSON text, incomplete where the answer was cut."""

    name: str
    arguments: str

    @property
    def whole(self) -> bool:
        """Whether its arguments come to their end."""
        return ObjectScan().end(self.arguments) is not None


@dataclasses.dataclass(frozen=True)
class Delta:
    """New text of an answer's part. A call begins with its name; `index` is its number, from 0."""

    part: Literal["reasoning", "content", "call", "arguments"]
    text: str
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer's parts."""

    reasoning: str
    content: str
    calls: list[ToolCall]


@dataclasses.dataclass(frozen=True)
class AnswerFormat:
    """How an answer's text is to be read.

    reader: what reads a call, None where text is text. tools: those that are offered, by name, `strict` where calls
    are held to them. several: whether more than one call counts. thoughts: the marks around those that it may begin
    with, None where it cannot.
    """

    reader: type[CallReader] | None = None
    tools: Mapping[str, Tool] = dataclasses.field(default_factory=dict)
    several: bool = True
    thoughts: Thoughts | None = TAGS

    def parse(self, text: str, opened: bool) -> Answer:
        """The parts of a whole answer; `opened`: whether it begins inside a think block."""
        parts = {"reasoning": "", "content": ""}
        names, arguments = list[str](), list[str]()
        for delta in AnswerParser(self, opened).push(text, final=True):
            if delta.part == "call":
                names.append(delta.text)
                arguments.append("")
            elif delta.part == "arguments":
                arguments[delta.index] += delta.text
            else:
                parts[delta.part] += delta.text
        return Answer(**parts, calls=[ToolCall(*call) for call in zip(names, arguments, strict=True)])


PLAIN = AnswerFormat()  # of a chat without tools
RAW = AnswerFormat(thoughts=None)  # of a text that is continued


class AnswerParser:
    """Splits one answer as its text comes; how the text is cut into pieces does not change what the parts add up to.

    Space between content and calls belongs to the calls; content on both sides of a call is two lines.
    """

    def __init__(self, form: AnswerFormat, opened: bool) -> None:
        self._format = form
        self._opens = form.reader.opens if form.reader is not None else ""
        self._closes = form.reader.closes if form.reader is not None else ""
        self._reasoning = ReasoningParser(form.thoughts, opened) if form.thoughts is not None else None
        self._held = ""
        self._reader: CallReader | None = None
        self._opened = ""  # what has opened the call that is being read, and the space before it
        self._begun = False  # whether a call without an opening mark has been looked for
        self._calls = 0
        self._closing = False  # after a call, whose closing marker may follow
        self._trims = False  # after a call, as long as there was but space
        self._said = False  # whether there was content

    def push(self, text: str, final: bool = False) -> list[Delta]:
        """What new text adds; what may belong to a marker or a call is held back, unless it is `final`."""
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.push(text, final)
        deltas = [Delta("reasoning", reasoning)] if reasoning else []
        if self._format.reader is None:
            return [*deltas, Delta("content", content)] if content else deltas
        self._held += content
        while True:
            step = self._read_call(final) if self._reader is not None else self._read_text(final)
            if step is None:
                break
            deltas += step
        return deltas

    def _read_text(self, final: bool) -> list[Delta] | None:
        """Content before the next call; None where more text is needed."""
        if self._closing and not self._skip_close():
            return None
        if self._calls and not self._format.several:
            self._held = ""
            return None
        at = self._held.find(self._opens) if self._opens or not self._begun else -1
        if at >= 0:
            content = self._held[:at].rstrip()
            self._reader = self._format.reader(self._format.tools) if self._format.reader else None
            self._begun = True
            self._opened = self._held[len(content) : at] + self._opens
            self._held = self._held[at + len(self._opens) :]
            return self._content(content)
        safe = len(self._held)
        if not final:
            safe -= partial_end(self._held, self._opens)
            safe = len(self._held[:safe].rstrip())
        if not safe:
            return None
        content, self._held = self._held[:safe], self._held[safe:]
        return self._content(content)

    def _read_call(self, final: bool) -> list[Delta] | None:
        """What of a call there is; None where more text is needed."""
        reader = self._reader
        assert reader is not None
        known = reader.name is not None
        text, self._held = self._held, ""
        new = reader.push(text, final)
        if reader.failed:  # so it was content
            self._reader = None
            self._held = reader.unread
            return self._content(self._opened)
        if reader.name is None:
            return None
        deltas = [] if known else [Delta("call", reader.name, self._calls)]
        if new:
            deltas.append(Delta("arguments", new, self._calls))
        if reader.ended:
            self._reader = reader.following() if self._format.several else None
            self._opened = ""
            self._held = reader.unread
            self._calls += 1
            self._closing = self._trims = True
            return deltas
        return deltas or None

    def _skip_close(self) -> bool:
        """Leave out what closes a call; False while that may yet come, and of an answer that was cut within it."""
        rest = self._held.lstrip()
        if len(rest) < len(self._closes) and self._closes.startswith(rest):
            return False
        self._held = rest.removeprefix(self._closes)
        self._closing = False
        return True

    def _content(self, text: str) -> list[Delta]:
        if self._trims:
            text = text.lstrip()
            if text:
                self._trims = False
                text = "\n" + text if self._said else text
        self._said = self._said or bool(text)
        return [Delta("content", text)] if text else []
