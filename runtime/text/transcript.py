"""The text of one answer as it grows."""

from __future__ import annotations

from collections.abc import Sequence

from .codec import TextCodec
from .stop_strings import stop_strings


class Transcript:
    """The text of one answer. `push` returns what may be shown for good; `text` is the answer when it is complete."""

    def __init__(self, codec: TextCodec, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()) -> None:
        from tokenizers.decoders import DecodeStream  # takes time to import, as in codec.py

        self.codec = codec
        self._stop = stop_strings(tuple(stop))
        self._state = 0  # of the stop strings, after the text
        self._stop_ids = frozenset(stop_ids)
        self._stream = DecodeStream(skip_special_tokens=False)
        self._seen = 0  # ids consumed
        self._text = ""  # whole characters of them
        self._waiting = list[int]()  # the last ids, which have left a character incomplete
        self._sent = 0  # characters handed out
        self._cut: int | None = None  # where a stop string begins

    def reaches_stop(self, ids: Sequence[int]) -> bool:
        """Take in new ids (all so far are given) and say whether a stop string is complete."""
        self._take(ids)
        if self._cut is None and self._waiting:  # text may stand before the part of a character that is waited with
            before = self.codec.decode(self._waiting).rstrip("\ufffd")
            self._cut = self._stop.scan(before, self._state, len(self._text))[1]
        return self._cut is not None

    def push(self, ids: Sequence[int], final: bool) -> str:
        """New text that is safe to show; all ids so far are given, and `final` releases what was held back."""
        self._take(ids)
        if final:
            text = self.text(ids)
            safe, new = len(text), text[self._sent :]
        else:
            # The end of the text may be the beginning of a stop string.
            safe = len(self._text) - self._stop.depth[self._state] if self._cut is None else self._cut
            new = self._text[self._sent : safe]
        self._sent = max(self._sent, safe)
        return new

    def text(self, ids: Sequence[int], *, cut: bool = True) -> str:
        """The answer's text once all its ids are known, cut before the stop string."""
        text = self.codec.decode([i for i in ids if i not in self._stop_ids])
        return text[: self._stop.scan(text)[1]] if cut else text

    def _take(self, ids: Sequence[int]) -> None:
        for token in self.codec.visible(ids[self._seen :]):
            if token in self._stop_ids:
                continue
            new = self._stream.step(self.codec.tokenizer, token)
            if new is None:
                self._waiting.append(token)
                continue
            self._waiting.clear()
            start, self._text = len(self._text), self._text + new
            if self._cut is None:
                self._state, self._cut = self._stop.scan(new, self._state, start)
        self._seen = len(ids)
