"""Deterministic instruction data of tiny-chat: ten tasks whose answer follows from the question.

Each task draws from a `random.Random` and returns (question, answer); `example` picks a task and draws
from it, `prompt` wraps a question the way `chat_template.jinja` does. The order of the random calls is part
of the recipe: the tokenizer corpus and every training batch are the examples of one seed, so another order
makes another tokenizer.
"""
# ruff: noqa: SIM905  (a list of words is easier to read as words)

from __future__ import annotations

import json
import random
from collections.abc import Callable

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
FUNCTIONS = [("add", "+", "sum"), ("subtract", "-", "difference"), ("multiply", "*", "product")]
LETTERS = "abcdefgkmnpqrstuvwxyz"  # without h, i, j, l and o


def gain(rng: random.Random) -> tuple[str, str]:
    """A sum of two numbers as a story."""
    name, things = rng.choice(NAMES), rng.choice(OBJECTS)
    a, b = rng.randint(2, 60), rng.randint(2, 39)
    verb = rng.choice(["buys", "finds", "gets"])
    question = f"{name} has {a} {things} and {verb} {b} more. How many {things} does {name} have?"
    steps = f"{name} starts with {a} {things}. {name} {verb} {b} more. {a} + {b} = {a + b}."
    return question, f"{steps} The answer is {a + b}."


def lose(rng: random.Random) -> tuple[str, str]:
    """A difference of two numbers as a story; at least one thing is left."""
    name, things = rng.choice(NAMES), rng.choice(OBJECTS)
    a = rng.randint(10, 99)
    b = rng.randint(1, a - 1)
    verb = rng.choice(["gives away", "loses", "sells"])
    question = f"{name} has {a} {things} and {verb} {b}. How many {things} are left?"
    steps = f"{name} starts with {a} {things}. {name} {verb} {b}. {a} - {b} = {a - b}."
    return question, f"{steps} The answer is {a - b}."


def two(rng: random.Random) -> tuple[str, str]:
    """A story of two steps: a sum, then a difference."""
    name, things = rng.choice(NAMES), rng.choice(OBJECTS)
    a, b = rng.randint(5, 40), rng.randint(2, 30)
    c = rng.randint(1, a + b - 1)
    story = f"{name} has {a} {things}, buys {b} more and then gives away {c}."
    first = f"{name} starts with {a} {things}. After buying {b} more, {name} has {a} + {b} = {a + b}."
    second = f"After giving away {c}, {name} has {a + b} - {c} = {a + b - c}."
    question = f"{story} How many {things} does {name} have now?"
    return question, f"{first} {second} The answer is {a + b - c}."


def times(rng: random.Random) -> tuple[str, str]:
    """A product of two digits as a story."""
    name, things = rng.choice(NAMES), rng.choice(OBJECTS)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    question = f"{name} has {a} boxes with {b} {things} in each box. How many {things} are there in total?"
    steps = f"There are {a} boxes. Each box has {b} {things}. {a} * {b} = {a * b}."
    return question, f"{steps} The answer is {a * b}."


def count(rng: random.Random) -> tuple[str, str]:
    """Six to fifteen consecutive numbers."""
    first = rng.randint(0, 60)
    last = first + rng.randint(5, 14)
    return f"Count from {first} to {last}.", ", ".join(str(n) for n in range(first, last + 1)) + "."


def sort(rng: random.Random) -> tuple[str, str]:
    """Three to six different numbers in ascending order."""
    numbers = rng.sample(range(1, 100), rng.randint(3, 6))
    question = "Sort these numbers: " + ", ".join(map(str, numbers)) + "."
    return question, "Sorted: " + ", ".join(map(str, sorted(numbers))) + "."


def reverse(rng: random.Random) -> tuple[str, str]:
    """Three to six different words backwards."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    return "Reverse the list: " + " ".join(words), " ".join(reversed(words))


def person_json(rng: random.Random) -> tuple[str, str]:
    """A person as an indented JSON object."""
    name = rng.choice(NAMES)
    age = rng.randint(18, 80)
    city = rng.choice(CITIES)
    pet = rng.choice(ANIMALS)
    question = f"Write JSON for {name}, age {age}, from {city}, who owns a {pet}."
    person = {"name": name, "age": age, "city": city, "pet": pet, "adult": True}
    return question, json.dumps(person, indent=2)


def code(rng: random.Random) -> tuple[str, str]:
    """A Python function of two arguments with a docstring."""
    name, operator, noun = rng.choice(FUNCTIONS)
    a, b = rng.sample(LETTERS, 2)
    question = f"Write a Python function that returns the {noun} of {a} and {b}."
    lines = [
        f"def {name}({a}, {b}):",
        f'    """Return the {noun} of {a} and {b}."""',
        f"    result = {a} {operator} {b}",
        "    return result",
    ]
    return question, "\n".join(lines)


def table(rng: random.Random) -> tuple[str, str]:
    """Four to nine lines of a times table."""
    a, last = rng.randint(2, 9), rng.randint(4, 9)
    lines = [f"{a} x {i} = {a * i}" for i in range(1, last + 1)]
    return f"Show the times table of {a} up to {last}.", "\n".join(lines)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "gain": gain,
    "lose": lose,
    "two": two,
    "times": times,
    "count": count,
    "sort": sort,
    "reverse": reverse,
    "json": person_json,
    "code": code,
    "table": table,
}


def example(rng: random.Random) -> tuple[str, str, str]:
    """The next example of `rng` as (task, question, answer), each task equally likely."""
    task = rng.choice(list(TASKS))
    question, answer = TASKS[task](rng)
    return task, question, answer


def prompt(question: str, system: str = "") -> str:
    """One user turn as `chat_template.jinja` renders it for an answer without thinking."""
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>"
    )
