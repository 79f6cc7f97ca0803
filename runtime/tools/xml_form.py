"""Calls as Nemotron 3 and Qwen3-Coder write them: a function with parameters, each a tag around its plain value."""

from __future__ import annotations

import json
import re
from typing import Any

from ..text.messages import CALL_CLOSE
from .definition import json_type
from .json_form import ObjectScan
from .reader import CallReader, may_begin, partial_end

FUNCTION = "<function="
PARAMETER = "<parameter="
END_PARAMETER = "</parameter>"
END_FUNCTION = "</function>"
_FOLLOWING = (PARAMETER, END_FUNCTION, CALL_CLOSE)  # one of them stands after the tag that closes a value
_NAME = re.compile(r"\s*<function=([^>\n]*)>")
_STEP = re.compile("<parameter=|</function>|</tool_call>")
_KEY = re.compile("([^<>\n]*)>")
_MARK = re.compile("</parameter>|(?<=\n)<parameter=|</function>|</tool_call>")  # what may end a value
_LONGEST_MARK = 12
_BEGUN = "|".join(CALL_CLOSE[:n] for n in range(len(CALL_CLOSE), 0, -1))
_LAST = re.compile(rf"(?:</function>\s*(?:(?:{_BEGUN})\s*)?|</tool_call>\s*)\Z")  # an end without the value's own
_HELD = re.compile(r"(?:</function>\s*)?(?:</tool_call>\s*)?(?:<[/a-z_=]{0,11})?\Z")
_PYTHON = {"True": True, "False": False, "None": None}
_LONGEST_NAME = 1000


class XmlReader(CallReader):
    """Reads `<function=NAME>`, `<parameter=KEY>` with a value up to `</parameter>`, and `</function>`.

    A value that can only be text comes as it grows, any other once it is complete. The line ends around a value belong
    to the tags. A value may spell a closing tag: inside of quotation marks of JSON, and in text where nothing follows
    that stands between values. One without its closing tag ends before an argument that is still missing, or with the
    call; of one that is cut within such a tag nothing of that is left.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._key: str | None = None  # of the parameter whose value is being read
        self._seen = set[str]()  # and of those before it
        self._types = set[str]()  # that the schema of the former allows; empty where it leaves that open
        self._looked = 0  # how far its value, as far as it is unread, has been searched for its end
        self._doubtful: int | None = None  # where a closing tag stands in it after which it seems to go on
        self._scan = ObjectScan()

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
        for step in _STEP.finditer(self.unread):
            if step[0] != PARAMETER:
                self.unread = self.unread[step.start() :].removeprefix(END_FUNCTION)
                self.ended = True
                return "}" if self._seen else "{}"
            tag = self._tag(step.end())
            if tag is None and "\n" not in self.unread[step.end() :] and not final:
                return ""
            if tag is not None:
                return self._open(*tag, final)
        return ""

    def _open(self, key: str, end: int, final: bool) -> str:
        """Begin the value of this parameter, whose opening tag ends here."""
        if end == len(self.unread) and not final:  # a line end may follow
            return ""
        self.unread = self.unread[end:].removeprefix("\n")
        self._key = key
        self._types = self._types_of(key)
        self._looked = 0
        self._doubtful = None
        self._scan = ObjectScan()
        opening = '"' if self._plain else ""
        begin = ", " if self._seen else "{"
        self._seen.add(key)
        return f"{begin}{json.dumps(key, ensure_ascii=False)}: {opening}"

    def _tag(self, at: int) -> tuple[str, int] | None:
        """The name that begins here, and where its tag ends; None while it does not, or if this is no tag."""
        rest = self.unread[at:]
        offered = [name for name in self._offered if may_begin(rest, f"{name}>")]
        name = max(offered, key=len, default="")
        if offered:  # a name may hold what ends others
            return (name, at + len(name) + 1) if len(name) < len(rest) else None
        match = _KEY.match(rest)
        return (match[1].strip(), at + match.end()) if match else None

    def _inside(self, final: bool) -> str:
        """A part of a value, or its end."""
        at, ended = self._end(final)
        plain = self._plain
        if ended:
            text = self.unread[:at].removesuffix("\n")
            self.unread = self.unread[at:].removeprefix(END_PARAMETER)
            self._key = None
            return _escaped(text) + '"' if plain else self._typed(text)
        if not plain:
            return ""
        text, self.unread = self.unread[:at], self.unread[at:]
        self._looked = max(self._looked - at, 0)
        if self._doubtful is not None:
            self._doubtful = max(self._doubtful - at, 0)
        return _escaped(text)

    def _end(self, final: bool) -> tuple[int, bool]:
        """Where the value ends, and true; or how much of what is unread belongs to it for certain, and false."""
        ends: bool | None = False
        while mark := _MARK.search(self.unread, self._looked):
            ends = self._ends(mark[0], mark.start(), mark.end(), final)
            if ends:
                return mark.start(), True
            if ends is None:
                break
            if mark[0] == END_PARAMETER and self._doubtful is None:
                self._doubtful = mark.start()
            self._looked = mark.end()
        if final:
            if last := _LAST.search(self.unread):
                return last.start() if self._doubtful is None else self._doubtful, True
            begun = max(partial_end(self.unread, tag) for tag in (END_PARAMETER, END_FUNCTION, CALL_CLOSE))
            open_at = len(self.unread) - begun
        elif not self._plain:  # which comes as a whole
            self._looked = mark.start() if mark else max(self._looked, len(self.unread) - _LONGEST_MARK)
            return 0, False
        elif self._doubtful is not None:
            open_at = self._doubtful
        elif mark is not None:
            open_at = mark.start()
        else:
            self._looked = max(self._looked, len(self.unread) - _LONGEST_MARK)
            held = _HELD.search(self.unread)
            assert held is not None  # nothing at the end at least
            open_at = held.start()
        return open_at - self.unread.endswith("\n", 0, open_at), False

    def _ends(self, mark: str, start: int, end: int, final: bool) -> bool | None:
        """Whether a mark in a value ends it; None while that cannot be said."""
        if not self._plain and self.unread.lstrip()[:1] in ("{", "["):
            if self._scan.closed or self._scan.end(self.unread[:start]) is not None:
                return True
            if self._scan.quoted and not self.unread[:start].endswith("\n"):  # JSON has no line ends in quotes
                return False
        if self._types and "string" not in self._types:
            return True
        rest = self.unread[end:]
        if mark == END_PARAMETER:
            rest = rest.lstrip(" \t\r\n")
            if any(map(rest.startswith, _FOLLOWING)):
                return True
            return (final or None) if any(tag.startswith(rest) for tag in _FOLLOWING) else False
        if mark == PARAMETER:
            tool = self.tools.get(self.name or "")
            held = tool is not None and tool.strict  # to a grammar, so no tag is missing
            missing = [f"{name}>" for name in self._offered if name not in self._seen and not held]
            if any(map(rest.startswith, missing)):
                return True
            return None if not final and any(name.startswith(rest) for name in missing) else False
        return False

    @property
    def _offered(self) -> list[str]:
        """The names of the parameters that the function has."""
        tool = self.tools.get(self.name or "")
        return [] if tool is None else tool.arguments

    @property
    def _plain(self) -> bool:
        """Whether the value can only be text."""
        return self._key is not None and self._types == {"string"}

    def _types_of(self, key: str) -> set[str]:
        tool = self.tools.get(self.name or "")
        if tool is None or not tool.properties:
            return set()
        return tool.types(key)

    def _typed(self, text: str) -> str:
        """A value as JSON, by the types that its schema allows; text that is no such value stays text."""
        types = self._types
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
