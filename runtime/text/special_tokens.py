"""Special tokens by their text, and text that spells one without being one."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import AddedToken

_HIGHEST = 0x10FFFF


class SpecialTokens:
    """The special tokens of a tokenizer, found in rendered text.

    What a message spells must stay text. `quote` puts one character, a mark, in the place of each spelling, and `split`
    puts the spelling back once the real tokens are found. A message may hold any character: one that is a mark is
    quoted too.

    Args:
        added: the tokenizer's added tokens by id.
        template: text that will stand around quoted text; no mark is in it.
    """

    def __init__(self, added: Mapping[int, AddedToken], template: str = "") -> None:
        self._tokens = {token.content: token for token in added.values() if token.special}
        self.ids = {token.content: i for i, token in added.items() if token.special}
        texts = [*self.ids]
        marks = _free({*template, *"".join(texts)}, len(texts) + 1)
        self._escape = marks[0]  # before a mark that a message holds itself
        self._mark = dict(zip(texts, marks[1:], strict=True))
        self._spelling = {mark: text for text, mark in self._mark.items()}
        escape, any_mark = re.escape(self._escape), f"{marks[0]}-{marks[-1]}"
        self._any = re.compile(f"({_any_of(texts)})")
        self._to_quote = re.compile(_any_of(texts, any_mark))
        self._quoted = re.compile(f"[{any_mark}](?:(?<={escape})([{any_mark}]))?")
        self._not_ascii = re.compile(rf"{escape}([{any_mark}])|[^\x00-\x7e]")

    def quote(self, text: str, keep: Collection[str] = ()) -> str:
        """The text with a mark for each special token that it spells, except for those to `keep`."""

        def quoted(match: re.Match[str]) -> str:
            spelled = match[0]
            return spelled if spelled in keep else self._mark.get(spelled, self._escape + spelled)

        return self._to_quote.sub(quoted, text)

    def to_ascii(self, quoted: str) -> str:
        """Quoted text of JSON with every character outside ASCII spelled, marks left as they are."""

        def spelled(match: re.Match[str]) -> str:
            c = match[1] or match[0]
            if match[1] is None and (c in self._spelling or c == self._escape):
                return c
            units = c.encode("utf-16-be").hex()
            return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))

        return self._not_ascii.sub(spelled, quoted)

    def split(self, text: str) -> list[str | int]:
        """Rendered text as its special tokens by id and the text between them, with all spellings put back."""
        parts: list[str | int] = []
        pieces = self._any.split(text)  # text, special, text, ..
        for i, piece in enumerate(pieces):
            if i % 2:
                parts.append(self.ids[piece])
                continue
            if i and self._tokens[pieces[i - 1]].rstrip:  # such a token takes in the space beside it
                piece = piece.lstrip()
            if i + 1 < len(pieces) and self._tokens[pieces[i + 1]].lstrip:
                piece = piece.rstrip()
            parts.append(self._quoted.sub(lambda match: match[1] or self._spelling.get(match[0], ""), piece))
        return parts


def _free(taken: Collection[str], count: int) -> list[str]:
    """The highest characters in a row of which none is taken."""
    blocks = ([chr(first + i) for i in range(count)] for first in range(_HIGHEST + 1 - count, 0x7F, -1))
    return next(block for block in blocks if not any(c in taken or "\ud800" <= c <= "\udfff" for c in block))


def _any_of(texts: Collection[str], more: str = "") -> str:
    """A pattern of any of the texts, the longest where several fit, or of a character in the range `more`.

    It is a set of characters, and what may stand after each: `re` passes quickly over those that are not in a set at
    the beginning of a pattern. Of alternatives it would try one after the other at every character.
    """
    firsts = sorted({text[0] for text in texts})
    ends = [f"(?<={re.escape(c)}){_tree([text[1:] for text in texts if text[0] == c])}" for c in firsts]
    ends += [f"(?<=[{more}])"] if more else []
    return f"[{''.join(map(re.escape, firsts))}{more}](?:{'|'.join(ends)})" if ends else "(?!)"


def _tree(texts: Sequence[str]) -> str:
    """A pattern of any of the texts, the longest where several fit, that looks at each character once."""
    shared = os.path.commonprefix(texts)  # noqa: RUF071  (characters are meant)
    rests = sorted(text.removeprefix(shared) for text in texts)
    branches = [_tree([*group]) for _, group in itertools.groupby(filter(None, rests), lambda rest: rest[0])]
    any_rest = f"(?:{'|'.join(branches)}){'' if rests[0] else '?'}" if branches else ""
    return re.escape(shared) + any_rest
