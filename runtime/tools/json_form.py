"""Calls as a JSON object with the name and the arguments, as Hermes and Qwen write them, and several in a row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from .reader import CallReader

_STRING = r'"(?:[^"\\]|\\.)*"'
_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)')

_LONGEST_HEAD = 1000  # characters in which the name is looked for, again with each new text


class JsonReader(CallReader):
    """Reads `{"name": ..., "arguments": {...}}`; in that order the arguments come as they grow, else once complete."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._scan = ObjectScan()
        self._whole: str | None = None  # the arguments, where they were known before the name

    def _begin(self, final: bool) -> None:
        match = _HEAD.match(self.unread[:_LONGEST_HEAD])
        if match and (name := _loaded(match[1])) and isinstance(name, str):
            self.name = name
            self.unread = self.unread[match.end() :]
            self._scan = ObjectScan()
            return
        start = len(self.unread) - len(self.unread.lstrip())
        if start == len(self.unread):
            self.failed = final
            return
        end = self._scan.end(self.unread) if self.unread[start] == "{" else None
        if end is None:
            self.failed = final or self.unread[start] != "{"
            return
        call = _loaded(self.unread[start:end])
        name = call.get("name") if isinstance(call, dict) else None
        arguments = _arguments(call) if isinstance(call, dict) else None
        if not isinstance(name, str) or not name or arguments is None:
            self.failed = True
            return
        self.name = name
        self._whole = arguments
        self.unread = self.unread[end:]

    def _arguments(self, final: bool) -> str:
        if self._whole is not None:
            self.ended = True
            return self._whole
        if self._scan.closed:
            return self._close(final)
        end = self._scan.end(self.unread)
        new = self.unread[:end]
        self.unread = self.unread[len(new) :]
        self._scan.read = 0
        return new if end is None else new + self._close(final)

    def _close(self, final: bool) -> str:
        """Take in the end of the object around the arguments, and what else stands before it."""
        rest = self.unread.lstrip()
        at = rest.find("}")
        marker = rest.find("</tool_call>")
        if at >= 0 and (marker < 0 or at < marker):
            self.unread = rest[at + 1 :]
            self.ended = True
        elif marker >= 0 or final:
            self.unread = rest[marker:] if marker >= 0 else "" if rest.startswith(",") else rest
            self.ended = True
        return ""


class JsonListReader(JsonReader):
    """Reads calls in a row: `begins` stands before the first, `separator` before each other, `ends` after the last."""

    begins: ClassVar[str] = ""
    separator: ClassVar[str]
    ends: ClassVar[str] = ""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._first = True
        self._object_ended = False
        self._more = False

    def following(self) -> Self | None:
        """See CallReader.following."""
        if not self._more:
            return None
        reader = type(self)(self.tools)
        reader._first = False
        return reader

    def _begin(self, final: bool) -> None:
        whole = self.unread
        if self._first:
            rest = whole.lstrip()
            if not rest.startswith(self.begins):
                self.failed = final or bool(rest)
                return
            self.unread = rest.removeprefix(self.begins)
        super()._begin(final)
        if self.name is None:
            self.unread = whole

    def _arguments(self, final: bool) -> str:
        """New text of the arguments; the call ends with what stands behind its object."""
        new = ""
        if not self._object_ended:
            new = super()._arguments(final)
            self._object_ended = self.ended
        if self._object_ended:
            rest = self.unread.lstrip()
            self.ended = final or bool(rest)
            self._more = rest.startswith(self.separator)
            self.unread = rest.removeprefix(self.separator if self._more else self.ends)
        return new


class ObjectScan:
    """Looks for the end of a JSON object in a text that grows.

    read: how many characters it has seen. closed: whether the end was among them. quoted: whether they end inside of
    quotation marks.
    """

    def __init__(self) -> None:
        self.read = 0
        self.closed = False
        self._depth = 0
        self.quoted = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """Where the object ends, before which there may be space; None while it does not."""
        for at in range(self.read, len(text)):
            c = text[at]
            if self._escaped:
                self._escaped = False
            elif self.quoted:
                self._escaped = c == "\\"
                self.quoted = c != '"'
            elif c == '"':
                self.quoted = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if not self._depth:
                    self.closed = True
                    return at + 1
        self.read = len(text)
        return None


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _arguments(call: Mapping[str, Any]) -> str | None:
    """The arguments of a whole call as JSON, None where they are none; some models write them as text of JSON."""
    value = call.get("arguments", call.get("parameters", {}))
    if isinstance(value, str):
        value = _loaded(value)
    return json.dumps(value) if isinstance(value, dict) else None
