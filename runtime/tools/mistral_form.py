"""Calls as Mistral's newer models write them, Ministral 3 among them: a name, and its arguments as a JSON object."""

from __future__ import annotations

import re
from typing import Any

from ..text.messages import MISTRAL_ARGUMENTS, MISTRAL_CALL
from .json_form import ObjectScan
from .reader import CallReader, may_begin

_NAME = re.compile(r"\s*([A-Za-z0-9_.:/-]{0,256})")


class MistralReader(CallReader):
    """Reads `NAME[ARGS]{...}`; the arguments come as they grow, and the call ends with them."""

    opens = MISTRAL_CALL
    closes = ""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._scan = ObjectScan()

    def _begin(self, final: bool) -> None:
        match = _NAME.match(self.unread)
        assert match is not None
        rest = self.unread[match.end() :]
        body = rest.removeprefix(MISTRAL_ARGUMENTS).lstrip()
        marked = rest.startswith(MISTRAL_ARGUMENTS)
        if match[1] and marked and body.startswith("{"):
            self.name = match[1]
            self.unread = body
            return
        open_name = (match[1] or not rest) and may_begin(rest, MISTRAL_ARGUMENTS) and not (marked and body)
        self.failed = final or not open_name

    def _arguments(self, final: bool) -> str:
        end = self._scan.end(self.unread, 0)
        new = self.unread if end is None else self.unread[:end]
        self.unread = self.unread[len(new) :]
        self._scan.read = 0
        self.ended = end is not None
        return new
