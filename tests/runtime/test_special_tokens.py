"""Special tokens in rendered text: the longest is meant, what merely spells one stays text, many cost no more time."""

from __future__ import annotations

import time
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from nemodiff.runtime.text.special_tokens import SpecialTokens

TEXTS = ("<s>", "</s>", "<s>>", "<|a|>", "<|a|", "[A]", "[A]B", "-]", "^", "a.c", "\U0010ffff", "\U0010fffd", "s")
PIECES = st.sampled_from((*TEXTS, *"<>s[]AB|-^.", "abc", "<s", "[A", "\n", "\U0010fffe", "\U0010fff0", "\U0010ffee"))


def special(texts: Collection[str]) -> SpecialTokens:
    return SpecialTokens({i: AddedToken(text, special=True) for i, text in enumerate(texts)})


def found(text: str, texts: Collection[str]) -> list[str | int]:
    """Text between special tokens, and these by their numbers, the slow way."""
    parts: list[str | int] = [""]
    while text:
        token = max((t for t in texts if text.startswith(t)), key=len, default=None)
        if token is None:
            assert isinstance(parts[-1], str)
            parts[-1] += text[0]
            text = text[1:]
        else:
            parts += [list(texts).index(token), ""]
            text = text[len(token) :]
    return parts


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:4], ()])
@given(pieces=st.lists(PIECES))
def test_the_longest_token_is_meant_and_what_is_quoted_stays_text(texts: tuple[str, ...], pieces: list[str]) -> None:
    tokens = special(texts)
    text = "".join(pieces)
    quoted = tokens.quote(text)
    assert not any(token in quoted for token in texts)
    assert tokens.split(quoted) == [text]
    if max(text, default="") < "\U0010ff00":  # else it may hold marks, which a template never does
        assert tokens.split(text) == found(text, texts)
        assert tokens.split(tokens.quote(text, keep=texts)) == found(text, texts)


def test_a_thousand_tokens_take_no_longer_to_look_for_than_ten() -> None:
    """While a text is searched no other thread runs, and a conversation has millions of characters."""

    def seconds(tokens: SpecialTokens) -> float:
        times = []
        for _ in range(3):
            begun = time.thread_time()
            assert tokens.split(tokens.quote(text)) == [text]
            times.append(time.thread_time() - begun)
        return min(times)

    text = "Count from 3 to 9 \u4f60 and say if 2 < 3 or a[7] is 8, then go on with what there is left. " * 1000
    few, many = (special([f"<SPECIAL_{i}>" for i in range(count)]) for count in (10, 1000))
    assert seconds(many) < 5 * seconds(few)
