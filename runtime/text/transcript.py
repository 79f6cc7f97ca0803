"""The text of one answer as it grows."""

from __future__ import annotations

from collections.abc import Sequence

from .codec import TextCodec
from .stop_strings import stop_strings
from .thoughts import Thoughts


class Transcript:
    """The text of one answer. `push` returns what may be shown for good; `text` is the answer when it is complete.

    Args:
        codec: the engine's.
        stop: texts that end the answer.
        stop_ids: ids that end it and are not part of its text.
        thoughts: the marks around those that the text may begin with, in which no stop string is looked for.
        opened: whether it begins inside a think block, because the prompt has opened it.
    """

    def __init__(
        self,
        codec: TextCodec,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        *,
        thoughts: Thoughts | None = None,
        opened: bool = False,
    ) -> None:
        from tokenizers.decoders import DecodeStream  # takes time to import, as in codec.py

        self.codec = codec
        self._stop = stop_strings(tuple(stop))
        self._state = 0  # of the stop strings, after the text
        self._opened = opened
        self._thoughts = thoughts
        self._answering = thoughts is None  # whether a character of the answer is there
        self._stop_ids = frozenset(stop_ids)
        self._stream = DecodeStream(skip_special_tokens=False)
        self._seen = 0  # ids consumed
        self._text = ""  # whole characters of them
        self._waiting = list[int]()  # the last ids, which have left a character incomplete
        self._sent = 0  # characters handed out
        self._ends = list[int]()  # of the ids in order, where the text ends that has all of each; unknown for the last
        self.handed_out = 0  # ids whose text has been handed out as a whole
        self._cut: int | None = None  # where a stop string begins

    def reaches_stop(self, ids: Sequence[int]) -> bool:
        """Take in new ids (all so far are given) and say whether a stop string is complete."""
        self._take(ids)
        if self._cut is None and self._waiting:  # text may stand before the part of a character that is waited with
            before = self.codec.decode(self._waiting).rstrip("\ufffd")
            self._cut = self._scan(before)[1]
        return self._cut is not None

    def push(self, ids: Sequence[int], final: bool) -> str:
        """New text that is safe to show; all ids so far are given, and `final` releases what was held back.

        It is final where `reaches_stop` has said so.
        """
        self._take(ids)
        if final:
            text = self.text(ids)
            safe, new = len(text), text[self._sent :]
            self.handed_out = len(ids)
        else:
            safe = self._safe()
            new = self._text[self._sent : safe]
        self._sent = max(self._sent, safe)
        while self.handed_out < len(self._ends) and self._ends[self.handed_out] <= self._sent:
            self.handed_out += 1
        return new

    def text(self, ids: Sequence[int], *, cut: bool = True) -> str:
        """The answer's text once all its ids are known, cut before the stop string and an unfinished character."""
        text = self.codec.decode_whole([i for i in ids if i not in self._stop_ids])
        return text[: self._stop_in(text)] if cut else text

    def _safe(self) -> int:
        """How many characters no stop string can cut any more."""
        if not self._answering and not self._opened and self._may_begin(self._text):
            return 0
        # The end of the text may be the beginning of a stop string.
        return len(self._text) - self._stop.depth[self._state]

    def _stop_in(self, text: str) -> int | None:
        """Where a stop string begins in the whole text."""
        start: int | None = 0
        if self._thoughts is not None and (self._opened or not self._may_begin(text)):
            start = self._answer_start(text)
        return None if start is None else self._stop.scan(text[start:], 0, start)[1]

    def _scan(self, new: str) -> tuple[int, int | None]:
        """The stop strings' state after the text and `new`, and where one of them begins, if any."""
        if self._answering:
            return self._stop.scan(new, self._state, len(self._text))
        text = self._text + new
        start = self._answer_start(text)
        return (0, None) if start is None else self._stop.scan(text[start:], 0, start)

    def _may_begin(self, text: str) -> bool:
        return self._thoughts is not None and self._thoughts.may_begin(text)

    def _answer_start(self, text: str) -> int | None:
        return 0 if self._thoughts is None else self._thoughts.answer_start(text, self._opened)

    def _take(self, ids: Sequence[int]) -> None:
        for count, token in enumerate(ids[self._seen :], self._seen + 1):
            if token in self._stop_ids or not self.codec.visible([token]):
                if not self._waiting:
                    self._ends.append(len(self._text))
                continue
            new = self._stream.step(self.codec.tokenizer, token)
            if new is None:
                self._waiting.append(token)
                continue
            self._waiting.clear()
            if self._cut is None:
                self._state, self._cut = self._scan(new)
            self._text += new
            self._ends += [len(self._text)] * (count - len(self._ends))
            self._answering = self._answering or self._answer_start(self._text) is not None
        self._seen = len(ids)
