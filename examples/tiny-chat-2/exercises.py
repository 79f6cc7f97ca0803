"""Dense exercises for tiny-chat-2: rows of many short questions of one kind, without conversations around them.

A conversation of a hundred tokens holds one sum; a row of exercises holds thirty. What they teach, to copy, to reverse,
to sort and to reckon, is most of what the tasks need. Only answers are learned.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import tasks
from model import CONFIG
from tokenizers import Tokenizer

LENGTH = 250  # tokens of a row
END: int = CONFIG["eos_token_id"]  # after each answer
MERGED = 384  # the first id that is neither a special token nor a byte
VOCABULARY = tasks.WORDS + tasks.NAMES + tasks.ANIMALS + tasks.CITIES + tasks.OBJECTS

Exercise = tuple[str, str]  # question and answer


def _sum(rng: random.Random) -> Exercise:
    """A sum, a difference, a product, or two steps, as the answers write them."""
    kind = rng.random()
    if kind < 0.38:
        largest = 99 if rng.random() < 0.8 else 9
        a, b = rng.randint(0, largest), rng.randint(0, largest)
        return f"{a} + {b} =", f" {a + b}."
    if kind < 0.76:
        a = rng.randint(1, rng.choice([18, 99, 99, 99, 198]))
        b = rng.randint(0, a - 1)
        return f"{a} - {b} =", f" {a - b}."
    if kind < 0.82:
        a, b = rng.randint(2, 20), rng.randint(2, 12)
        return f"{a} * {b} =", f" {a * b}."
    if kind < 0.95:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        return f"{a} + {b} =", f" {a + b}."
    _, thoughts, _ = tasks.two(rng)
    assert thoughts is not None
    return "First", thoughts.removeprefix("First")


def _list(rng: random.Random) -> Exercise:
    """A list to sort, to reverse, to copy, or to write in capitals."""
    kind = rng.random()
    if kind < 0.8 or kind >= 0.9:
        question, _, answer = (tasks.sort if kind < 0.4 else tasks.reverse if kind < 0.8 else tasks.capitals)(rng)
        return f"{question}\n", answer
    words = " ".join(rng.choice([*VOCABULARY, str(rng.randint(0, 999))]) for _ in range(rng.randint(3, 9)))
    return f"Copy: {words}\n", words


def _short(rng: random.Random) -> Exercise:
    """A word to spell, numbers to count, or a story of one step."""
    kind = rng.choice([tasks.spell, None, tasks.times, tasks.gain, tasks.lose])
    if kind is not None:
        question, _, answer = kind(rng)
        return f"{question}\n", answer
    first, more = rng.randint(0, 138), rng.randint(3, 12)
    return f"Count from {first} to {first + more}.\n", ", ".join(map(str, range(first, first + more + 1))) + "."


def _form(rng: random.Random) -> Exercise:
    """Words or letters to write in another form: a word has one token after a space, one without, some in capitals."""
    kind = rng.random()
    if kind < 0.5:
        words = rng.choices([*tasks.NAMES, *tasks.CITIES, *tasks.ANIMALS, *tasks.WORDS], k=rng.randint(3, 8))
        return f"Quote: {' '.join(words)}\n", ", ".join(f'"{word}"' for word in words)
    if kind < 0.8:
        words = rng.sample(tasks.WORDS, rng.randint(2, 7))
        return f"Capitals: {' '.join(words)}\n", " ".join(words).upper()
    letters = rng.sample(tasks.LETTERS, rng.randint(2, 6))
    return f"Arguments: {' '.join(letters)}\n", f"({', '.join(letters)})"


KINDS: list[tuple[Callable[[random.Random], Exercise] | None, float]] = [  # and how often; None repeats tokens
    (_sum, 6),
    (_list, 2.5),
    (_form, 1.5),
    (_short, 1),
    (None, 0.2),
]


def row(tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], list[bool]]:
    """The next LENGTH ids, and which of them are learned."""
    draw = rng.choices([kind for kind, _ in KINDS], [often for _, often in KINDS])[0]
    ids: list[int] = []
    learned: list[bool] = []
    while len(ids) < LENGTH:
        if draw is None:
            pool = _words(tokenizer) if rng.random() < 0.5 else range(MERGED, tokenizer.get_vocab_size())
            given = rng.choices(pool, k=rng.randint(8, 24))
            answer = given * rng.randint(1, 2)
        else:
            question, text = draw(rng)
            given, answer = tokenizer.encode(question).ids, [*tokenizer.encode(text).ids, END]
        ids += given + answer
        learned += [False] * len(given) + [True] * len(answer)
    return ids[:LENGTH], learned[:LENGTH]


@cache
def _words(tokenizer: Tokenizer) -> list[int]:
    """The ids that words and digits are written with."""
    return sorted({id for word in [*VOCABULARY, *"0123456789"] for id in tokenizer.encode(f"{word} {word}").ids})
