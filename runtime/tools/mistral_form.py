"""Calls as Mistral's models write them: a name and a JSON object (Ministral 3), or a JSON list (older ones)."""

from __future__ import annotations

import re
from typing import Any

from ..text.messages import MISTRAL_ARGUMENTS, MISTRAL_CALL, MISTRAL_ID
from .json_form import JsonListReader, ObjectScan
from .reader import CallReader, may_begin

_NAME = re.compile(r"\s*([A-Za-z0-9_.:/-]{0,256})")
_ID = re.compile(r"[A-Za-z0-9]{0,64}")


class MistralReader(CallReader):
    """Reads `NAME[ARGS]{...}` and `NAME[CALL_ID]ID[ARGS]{...}`; the arguments come as they grow and end the call."""

    opens = MISTRAL_CALL
    closes = ""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._scan = ObjectScan()

    def _begin(self, final: bool) -> None:
        match = _NAME.match(self.unread)
        assert match is not None
        rest = self.unread[match.end() :]
        if match[1] and rest.startswith(MISTRAL_ID):
            rest = rest.removeprefix(MISTRAL_ID)
            found = _ID.match(rest)
            assert found is not None
            rest = rest[found.end() :]
        elif match[1] and len(rest) < len(MISTRAL_ID) and MISTRAL_ID.startswith(rest) and not final:
            return
        body = rest.removeprefix(MISTRAL_ARGUMENTS).lstrip()
        marked = rest.startswith(MISTRAL_ARGUMENTS)
        if match[1] and marked and body.startswith("{"):
            self.name = match[1]
            self.unread = body
            return
        open_name = (match[1] or not rest) and may_begin(rest, MISTRAL_ARGUMENTS) and not (marked and body)
        self.failed = final or not open_name

    def _arguments(self, final: bool) -> str:
        end = self._scan.end(self.unread)
        new = self.unread[:end]
        self.unread = self.unread[len(new) :]
        self._scan.read = 0
        self.ended = end is not None
        return new


class MistralListReader(JsonListReader):
    """Reads `[{"name": ..., "arguments": {...}}, ...]`."""

    opens = MISTRAL_CALL
    closes = ""
    begins = "["
    separator = ","
    ends = "]"
