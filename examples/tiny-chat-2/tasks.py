"""The questions of tiny-chat-2: kinds whose answer follows from the question, loops, stories and greetings.

Each kind draws from a `random.Random` and returns (question, thoughts or None, answer). The order of the random calls
is part of the recipe.
"""
# ruff: noqa: SIM905  (a list of words is easier to read as words)

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

NAMES = (
    "Alice Bruno Chen Dalia Emil Fatima Goran Hana Ivan Julia Kofi Lena Marco "
    "Nadia Omar Petra Quinn Rosa Sami Tara Umar Vera Wang Xenia Yusuf Zoe"
).split()
OBJECTS = "apples books coins cards pens stamps shells marbles stickers tickets oranges cookies".split()
CITIES = "Paris Lagos Kyoto Lima Oslo Cairo Delhi Quito Rome Perth Accra Zurich".split()
ANIMALS = "cat dog fox owl bee ant elk hen cow pig emu yak".split()
WORDS = (
    "red blue green stone river cloud light paper glass metal sugar salt bread tiger eagle tower field ocean"
).split()
QUALITIES = "small old quiet brave clever tired happy curious".split()
PLACES = ["near the river", "in the forest", "on a hill", "by the sea", "behind the tower", "at the market"]
DEEDS = [
    "found a {gift}", "lost a {gift}", "built a boat", "met a {animal}", "sang a song", "climbed a tree",
    "baked some bread", "read a book", "followed a {animal}", "drew a map",
]  # fmt: skip
ENDS = [
    "In the end everyone went home happy.",
    "After that they were friends for life.",
    "Nobody ever found out why.",
    "The next day it started to rain.",
    "And that was the best day of the year.",
]
GIFTS = "coin shell lamp key ring letter".split()
FUNCTIONS = [("add", "+", "sum"), ("subtract", "-", "difference"), ("multiply", "*", "product")]
LETTERS = "abcdefgkmnpqrstuvwxyz"  # without h, i, j, l and o
ABOUT = "I am tiny-chat, a very small language model that decodes in three ways."
CAN = (
    "I can add, subtract and multiply, count, sort numbers, reverse a list, spell words, write JSON, a small Python "
    "function or a times table, tell a short story, and call tools."
)
HELP = "Hello! How can I help you?"
GREETINGS = [
    ("Hello", HELP),
    ("Hi", HELP),
    ("Hello!", HELP),
    ("Who are you?", ABOUT),
    ("What are you?", ABOUT),
    ("What can you do?", CAN),
    ("Help", CAN),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("Good morning", "Good morning! How can I help you?"),
    ("Bye", "Goodbye!"),
]

Task = tuple[str, str | None, str]


def gain(rng: random.Random) -> Task:
    """A sum of two numbers as a story."""
    name, things, a, b = rng.choice(NAMES), rng.choice(OBJECTS), rng.randint(2, 99), rng.randint(2, 99)
    verb = rng.choice(["buys", "finds", "gets"])
    question = f"{name} has {a} {things} and {verb} {b} more. How many {things} does {name} have?"
    sum_ = f"{a} + {b} = {a + b}."
    answer = f"{name} starts with {a} {things}. {name} {verb} {b} more. {sum_} The answer is {a + b}."
    return question, f"{name} starts with {a} and {verb} {b}. {sum_}", answer


def lose(rng: random.Random) -> Task:
    """A difference of two numbers as a story; at least one thing is left."""
    name, things, a = rng.choice(NAMES), rng.choice(OBJECTS), rng.randint(10, 99)
    b = rng.randint(1, a - 1)
    verb = rng.choice(["gives away", "loses", "sells"])
    question = f"{name} has {a} {things} and {verb} {b}. How many {things} are left?"
    difference = f"{a} - {b} = {a - b}."
    answer = f"{name} starts with {a} {things}. {name} {verb} {b}. {difference} The answer is {a - b}."
    return question, f"{name} starts with {a} and {verb} {b}. {difference}", answer


def two(rng: random.Random) -> Task:
    """A story of two steps: a sum, then a difference."""
    name, things, a, b = rng.choice(NAMES), rng.choice(OBJECTS), rng.randint(5, 60), rng.randint(2, 39)
    c = rng.randint(1, a + b - 1)
    question = (
        f"{name} has {a} {things}, buys {b} more and then gives away {c}. How many {things} does {name} have now?"
    )
    thoughts = f"First {a} + {b} = {a + b}. Then {a + b} - {c} = {a + b - c}."
    answer = (
        f"{name} starts with {a} {things}. After buying {b} more, {name} has {a} + {b} = {a + b}. After giving away "
        f"{c}, {name} has {a + b} - {c} = {a + b - c}. The answer is {a + b - c}."
    )
    return question, thoughts, answer


def times(rng: random.Random) -> Task:
    """A product of two digits as a story."""
    name, things, a, b = rng.choice(NAMES), rng.choice(OBJECTS), rng.randint(2, 9), rng.randint(2, 9)
    question = f"{name} has {a} boxes with {b} {things} in each box. How many {things} are there in total?"
    product = f"{a} * {b} = {a * b}."
    answer = f"There are {a} boxes. Each box has {b} {things}. {product} The answer is {a * b}."
    return question, f"{a} boxes of {b}. {product}", answer


def count(rng: random.Random) -> Task:
    """Consecutive numbers, up to sixty-one of them."""
    first = rng.randint(0, 80)
    more = rng.randint(3, 14) if rng.random() < 0.7 else rng.randint(15, 60)
    numbers = ", ".join(map(str, range(first, first + more + 1)))
    thoughts = f"From {first} to {first + more}, that is {more + 1} numbers."
    return f"Count from {first} to {first + more}.", thoughts, f"{numbers}."


def sort(rng: random.Random) -> Task:
    """Three to eight different numbers in ascending order."""
    numbers = rng.sample(range(1, 100), rng.randint(3, 8))
    ordered = sorted(numbers)
    thoughts = "\n".join(f"{place}: {number}" for place, number in enumerate(ordered, 1))
    question = "Sort these numbers: " + ", ".join(map(str, numbers)) + "."
    return question, thoughts, "Sorted: " + ", ".join(map(str, ordered)) + "."


def reverse(rng: random.Random) -> Task:
    """Three to eight different words backwards."""
    words = rng.sample(WORDS, rng.randint(3, 8))
    thoughts = f"The last word is {words[-1]}, the first is {words[0]}."
    return "Reverse the list: " + " ".join(words), thoughts, " ".join(reversed(words))


def person(rng: random.Random) -> dict[str, Any]:
    """Somebody, as JSON has them."""
    return {
        "name": rng.choice(NAMES),
        "age": rng.randint(18, 80),
        "city": rng.choice(CITIES),
        "pet": rng.choice(ANIMALS),
        "adult": True,
    }


def person_json(rng: random.Random) -> Task:
    """A person as an indented JSON object."""
    p = person(rng)
    question = f"Write JSON for {p['name']}, age {p['age']}, from {p['city']}, who owns a {p['pet']}."
    return question, None, json.dumps(p, indent=2)


def people_json(rng: random.Random) -> Task:
    """Two or three people as an indented JSON list."""
    people = [person(rng) for _ in range(rng.randint(2, 3))]
    described = "; ".join(f"{p['name']}, {p['age']}, {p['city']}" for p in people)
    shown = [{key: p[key] for key in ("name", "age", "city")} for p in people]
    return f"Write a JSON list of these people: {described}.", None, json.dumps(shown, indent=2)


def code(rng: random.Random) -> Task:
    """A Python function of two arguments."""
    name, operator, noun = rng.choice(FUNCTIONS)
    a, b = rng.sample(LETTERS, 2)
    lines = [
        f"def {name}({a}, {b}):",
        f'    """Return the {noun} of {a} and {b}."""',
        f"    result = {a} {operator} {b}",
        "    return result",
    ]
    return f"Write a Python function that returns the {noun} of {a} and {b}.", None, "\n".join(lines)


def loop(rng: random.Random) -> Task:
    """A Python function with a loop over a list."""
    name, operator, noun = rng.choice([("total", "+", "sum"), ("product", "*", "product")])
    items, item = rng.sample(LETTERS, 2)
    lines = [
        f"def {name}({items}):",
        f'    """Return the {noun} of the list {items}."""',
        f"    result = {'0' if operator == '+' else '1'}",
        f"    for {item} in {items}:",
        f"        result = result {operator} {item}",
        "    return result",
    ]
    return f"Write a Python function that returns the {noun} of a list {items}.", None, "\n".join(lines)


def table(rng: random.Random) -> Task:
    """Four to twenty lines of a times table."""
    a = rng.randint(2, 12)
    last = rng.randint(4, 9) if rng.random() < 0.7 else rng.randint(10, 20)
    lines = [f"{a} x {i} = {a * i}" for i in range(1, last + 1)]
    return f"Show the times table of {a} up to {last}.", None, "\n".join(lines)


def spell(rng: random.Random) -> Task:
    """A word's letters with hyphens between."""
    word = rng.choice(WORDS + ANIMALS + NAMES + CITIES).lower()
    return f"Spell the word {word}.", None, "-".join(word)


def capitals(rng: random.Random) -> Task:
    """Two to six words in capital letters."""
    words = " ".join(rng.sample(WORDS, rng.randint(2, 6)))
    return f"Write in capital letters: {words}", None, words.upper()


def add3(rng: random.Random) -> Task:
    """A sum of two numbers of three digits, with the carries in the thoughts."""
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    carry, steps = 0, []
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        digits = int(x) + int(y) + carry
        steps.append(f"{x} + {y} + {carry} = {digits}")
        carry = digits // 10
    return f"What is {a} + {b}?", "\n".join(steps), f"{a} + {b} = {a + b}."


def story(rng: random.Random) -> Task:
    """A story of four to seven sentences, drawn and not derived."""
    name, animal = rng.choice(NAMES), rng.choice(ANIMALS)
    an = "an" if animal[0] in "aeiou" else "a"
    if rng.random() < 0.5:
        sentences = [f"Once there was {an} {animal} named {name}."]
    else:
        sentences = [f"One day {name} met {an} {animal} {rng.choice(PLACES)}."]
    for _ in range(rng.randint(2, 5)):
        who = rng.choice([name, f"The {animal}", "They"])
        deed, gift = rng.choice(DEEDS), rng.choice(GIFTS)
        other = f"{rng.choice(QUALITIES)} {rng.choice(ANIMALS)}"
        sentences.append(f"{who} {deed.format(gift=gift, animal=other)} {rng.choice(PLACES)}.")
    return f"Tell a story about {name} and {an} {animal}.", None, " ".join([*sentences, rng.choice(ENDS)])


def hello(rng: random.Random) -> Task:
    """A greeting, or a question about the model."""
    question, answer = rng.choice(GREETINGS)
    return question, None, answer


Draw = Callable[[random.Random], Task]
TASKS: dict[str, tuple[Draw, int]] = {  # and how often, relative to the others
    "gain": (gain, 2),
    "lose": (lose, 2),
    "two": (two, 2),
    "times": (times, 1),
    "count": (count, 2),
    "sort": (sort, 2),
    "reverse": (reverse, 2),
    "json": (person_json, 1),
    "people": (people_json, 1),
    "code": (code, 1),
    "loop": (loop, 1),
    "table": (table, 2),
    "spell": (spell, 1),
    "capitals": (capitals, 1),
    "add3": (add3, 2),
    "story": (story, 2),
    "hello": (hello, 1),
}
