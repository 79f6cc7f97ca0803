"""The text of one answer as it grows."""

from __future__ import annotations

from collections.abc import Sequence

from .codec import TextCodec


class Transcript:
    """The text of one answer. `push` returns what may be shown for good; `text` is the answer when it is complete."""

    def __init__(self, codec: TextCodec, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()) -> None:
        from tokenizers.decoders import DecodeStream  # takes time to import, as in codec.py

        self.codec = codec
        self._stop = tuple(stop)
        self._stop_ids = frozenset(stop_ids)
        self._stream = DecodeStream(skip_special_tokens=False)
        self._seen = 0  # ids consumed
        self._text = ""  # whole characters of them
        self._waiting = False  # whether the last id has left a character incomplete
        self._sent = 0  # characters handed out
        self._cut: int | None = None  # where a stop string begins

    def reaches_stop(self, ids: Sequence[int]) -> bool:
        """Take in new ids (all so far are given) and say whether a stop string is complete."""
        self._take(ids)
        if self._cut is None and self._waiting:  # text may stand before the part of a character that is waited with
            text = self.text(ids, cut=False).rstrip("\ufffd")
            self._cut = self._first_stop(text, len(self._text))
        return self._cut is not None

    def push(self, ids: Sequence[int], final: bool) -> str:
        """New text that is safe to show; all ids so far are given, and `final` releases what was held back."""
        self._take(ids)
        if final:
            text = self.text(ids)
            safe, new = len(text), text[self._sent :]
        else:
            safe = len(self._text) if self._cut is None else self._cut
            safe -= self._held_back()
            new = self._text[self._sent : safe]
        self._sent = max(self._sent, safe)
        return new

    def text(self, ids: Sequence[int], *, cut: bool = True) -> str:
        """The answer's text once all its ids are known, cut before the stop string."""
        text = self.codec.decode([i for i in ids if i not in self._stop_ids])
        return text[: self._first_stop(text, 0)] if cut else text

    def _take(self, ids: Sequence[int]) -> None:
        for token in self.codec.visible(ids[self._seen :]):
            if token in self._stop_ids:
                continue
            new = self._stream.step(self.codec.tokenizer, token)
            self._waiting = new is None
            if new is None:
                continue
            before, self._text = len(self._text), self._text + new
            if self._cut is None:
                self._cut = self._first_stop(self._text, before)
        self._seen = len(ids)

    def _first_stop(self, text: str, known: int) -> int | None:
        """Where the first stop string begins, if one ends after the `known` characters; the others hold none."""
        start = max(0, known - max(map(len, self._stop), default=0))
        return min((at for at in (text.find(s, start) for s in self._stop) if at >= 0), default=None)

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if self._cut is not None:
            return 0
        return max(
            (
                n
                for s in self._stop
                for n in range(min(len(s) - 1, len(self._text)), 0, -1)
                if self._text.endswith(s[:n])
            ),
            default=0,
        )
