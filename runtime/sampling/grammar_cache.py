"""Compiled grammars, kept for the requests that ask for them again."""

from __future__ import annotations

import collections
import threading

from .grammar import Grammar

_Key = tuple[str, int, tuple[int, ...], str, str, bool]


class GrammarCache:
    """The grammars that were asked for last, as many as fit; any thread may use it.

    Args:
        capacity: bytes, by the grammars' own estimates.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._grammars: collections.OrderedDict[_Key, Grammar] = collections.OrderedDict()
        self._memory = 0

    @property
    def memory(self) -> int:
        """Bytes of all that is kept."""
        return self._memory

    def get(
        self, tokenizer: str, vocab: int, eos: tuple[int, ...], kind: str, source: str, strict: bool = False
    ) -> Grammar:
        """The grammar of these arguments of `Grammar`. Raises RequestError."""
        key = (tokenizer, vocab, eos, kind, source, strict)
        with self._lock:
            kept = self._grammars.get(key)
            if kept is not None:
                self._grammars.move_to_end(key)
                return kept
        grammar = Grammar(*key)  # outside of the lock, since it may take a second
        with self._lock:
            if key not in self._grammars:
                self._grammars[key] = grammar
                self._memory += grammar.memory
            while self._memory > self._capacity:
                self._memory -= self._grammars.popitem(last=False)[1].memory
        return grammar


GRAMMARS = GrammarCache(128 << 20)
