"""Stop strings, looked for in a text as it grows."""

from __future__ import annotations

import functools
from collections.abc import Iterable


class StopStrings:
    """An automaton (Aho and Corasick's) that looks for all stop strings at once, one character after the other.

    A state is the longest end of the text that begins a stop string, and 0 is the empty one; `depth` is its length.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self._found = [0]  # length of the longest stop string that ends in a state
        for string in strings:
            state = 0
            for c in string:
                following = self._next[state].get(c)
                if following is None:
                    following = self._next[state][c] = len(self.depth)
                    self._next.append({})
                    self.depth.append(self.depth[state] + 1)
                    self._found.append(0)
                state = following
            self._found[state] = len(string)
        self._shorter = [0] * len(self.depth)  # the next shorter end that begins a stop string
        level = [0]
        while level:
            level = [self._link(state, c, child) for state in level for c, child in self._next[state].items()]

    def _link(self, state: int, c: str, child: int) -> int:
        """Find out what a state falls back to; all shorter states know it."""
        self._shorter[child] = shorter = self._step(self._shorter[state], c) if state else 0
        self._found[child] = max(self._found[child], self._found[shorter])
        return child

    def _step(self, state: int, c: str) -> int:
        while (following := self._next[state].get(c)) is None and state:
            state = self._shorter[state]
        return following or 0

    def scan(self, text: str, state: int = 0, start: int = 0) -> tuple[int, int | None]:
        """Go on with text that begins at character `start`: the new state, and where a stop string begins, if any.

        Of several, the one that begins first.
        """
        if not self._next[0]:
            return 0, None
        first = None
        for end, c in enumerate(text, start + 1):
            state = self._step(state, c)
            if (length := self._found[state]) and (first is None or end - length < first):
                first = end - length
        return state, first


@functools.lru_cache(maxsize=16)
def stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """The automaton of these strings, shared by all answers that end at them."""
    return StopStrings(strings)
