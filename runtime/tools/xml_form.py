"""Calls as Nemotron 3 and Qwen3-Coder write them: a function with parameters, each a tag around its plain value."""

from __future__ import annotations

import json
import re
from typing import Any

from .definition import json_type
from .reader import CallReader, may_begin, partial_end

FUNCTION = "<function="
PARAMETER = "<parameter="
END_PARAMETER = "</parameter>"
END_FUNCTION = "</function>"
_NAME = re.compile(r"\s*<function=([^>\n]*)>")
_KEY = re.compile(r"<parameter=([^>\n]*)>\n?")
_PYTHON = {"True": True, "False": False, "None": None}
_LONGEST_NAME = 1000


class XmlReader(CallReader):
    """Reads `<function=NAME>`, `<parameter=KEY>` with a value up to `</parameter>`, and `</function>`.

    A value that can only be text comes as it grows, any other once it is complete. The line ends around a value belong
    to the tags.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._key: str | None = None  # of the parameter whose value is being read
        self._count = 0
        self._value = ""  # what of the value has come, while it is not given out

    def _begin(self, final: bool) -> None:
        match = _NAME.match(self.unread)
        if match and match[1].strip():
            self.name = match[1].strip()
            self.unread = self.unread[match.end() :]
            return
        begin = self.unread.lstrip()
        open_name = may_begin(begin, FUNCTION) and not match and len(begin) < _LONGEST_NAME
        self.failed = final or not open_name or "\n" in begin

    def _arguments(self, final: bool) -> str:
        new = ""
        while not self.ended:
            before = (len(self.unread), self._key)
            new += self._between(final) if self._key is None else self._inside(final)
            if (len(self.unread), self._key) == before:
                break
        return new

    def _between(self, final: bool) -> str:
        """Text between parameters, which means nothing."""
        match = _KEY.search(self.unread)
        end = self.unread.find(END_FUNCTION)
        closing = self.unread.find("</tool_call>")  # without the end of the function
        ends = [at for at in (end, closing) if at >= 0]
        if ends and (match is None or min(ends) < match.start()):
            self.unread = self.unread[min(ends) :].removeprefix(END_FUNCTION)
            self.ended = True
            return "}" if self._count else "{}"
        if match is None or (match.end() == len(self.unread) and not match[0].endswith("\n") and not final):
            return ""
        self.unread = self.unread[match.end() :]
        self._key = match[1].strip()
        self._value = ""
        self._count += 1
        key = json.dumps(self._key, ensure_ascii=False)
        opening = '"' if self._plain else ""
        return f"{', ' if self._count > 1 else '{'}{key}: {opening}"

    def _inside(self, final: bool) -> str:
        """A part of a value, or its end."""
        at = self.unread.find(END_PARAMETER)
        if at < 0:
            if not self._plain:
                return ""
            held = partial_end(self.unread, "\n" + END_PARAMETER) or partial_end(self.unread, END_PARAMETER)
            safe = len(self.unread) - (0 if final else held)
            text, self.unread = self.unread[:safe], self.unread[safe:]
            return _escaped(text)
        text = self.unread[:at].removesuffix("\n")
        self.unread = self.unread[at + len(END_PARAMETER) :]
        plain, key = self._plain, self._key
        assert key is not None
        self._key = None
        return _escaped(text) + '"' if plain else self._typed(key, text)

    @property
    def _plain(self) -> bool:
        """Whether the value can only be text."""
        return self._key is not None and self._types(self._key) == {"string"}

    def _types(self, key: str) -> set[str]:
        tool = self.tools.get(self.name or "")
        if tool is None or not tool.properties:
            return set()
        return tool.types(key)

    def _typed(self, key: str, text: str) -> str:
        """A value as JSON, by the types that its schema allows; text that is no such value stays text."""
        types = self._types(key)
        try:
            value = _PYTHON[text.strip()] if text.strip() in _PYTHON else json.loads(text)
            if isinstance(value, float) and value.is_integer() and types == {"integer"}:
                value = int(value)
            written = json.dumps(value, ensure_ascii=False, allow_nan=False)
            written.encode()
        except (ValueError, RecursionError):  # half a character among them, which JSON can spell
            return json.dumps(text, ensure_ascii=False)
        kind = json_type(value)
        fits = kind != "string" and (not types or kind in types or (kind == "integer" and "number" in types))
        return written if fits else json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """Text as it stands inside of quotation marks of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
