"""Calls as Llama 3 writes them: the answer is a JSON object with the name and the parameters, and nothing else."""

from __future__ import annotations

import re

from .json_form import JsonListReader

_KEY = re.compile(r'\s*\{\s*"([^"\\]*)("?)')
_KEYS = ("name", "parameters", "arguments", "type", "id")


class LlamaReader(JsonListReader):
    """Reads `{"name": ..., "parameters": {...}}` at the beginning of an answer, and more after semicolons."""

    opens = ""
    closes = ""
    separator = ";"

    def _begin(self, final: bool) -> None:
        key = _KEY.match(self.unread)
        if key and not any(name == key[1] or (not key[2] and name.startswith(key[1])) for name in _KEYS):
            self.failed = True  # JSON that is an answer is shown as it comes
            return
        super()._begin(final)
