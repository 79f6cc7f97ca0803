"""Pictures of 32 x 32 pixels with two shapes and a digit, and questions whose answer the picture holds.

A picture has four quarters: one holds a digit, two hold a coloured shape each, one is empty. `example` draws a picture
and a question about it from one `random.Random`; every call is part of the recipe.
"""
# ruff: noqa: SIM905  (a list of words is easier to read as words)

from __future__ import annotations

import random
from typing import NamedTuple

from PIL import Image, ImageDraw

SIZE = 32  # pixels
QUARTER = SIZE // 2
TASKS = ["colour", "place", "what", "digit", "describe"]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
SHAPES = "circle square triangle cross".split()
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 40),
    "purple": (150, 60, 180),
    "orange": (240, 140, 30),
}
DIGITS = [str(digit) for digit in range(10)]
NOTHING = "."  # what is said of a quarter that holds no more
# Seven rows of five pixels each.
_DIGITS = """
.###. ..#.. .###. .###. ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# #...# ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ..##. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# ..#.. #...# ...#.
.###. .###. ##### .###. ...#. .###. .###. ..#.. .###. .##..
"""
_ROWS = [line.split() for line in _DIGITS.strip().splitlines()]


class Scene(NamedTuple):
    """What a picture holds: `things` are (shape, colour, place)."""

    things: tuple[tuple[str, str, str], tuple[str, str, str]]
    digit: int
    digit_place: str


def draw_scene(rng: random.Random) -> Scene:
    """Two different shapes of different colours and a digit, each in a quarter of its own."""
    places = rng.sample(PLACES, 3)
    shapes, colours = rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2)
    first, second = ((shapes[i], colours[i], places[i]) for i in range(2))
    return Scene((first, second), rng.randrange(10), places[2])


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene on a light ground, each thing a little out of its middle."""
    ground = tuple(rng.randint(225, 255) for _ in range(3))
    picture = Image.new("RGB", (SIZE, SIZE), ground)
    draw = ImageDraw.Draw(picture)
    for shape, colour, place in scene.things:
        x, y = _corner(place, rng)
        ink = tuple(max(0, min(255, value + rng.randint(-15, 15))) for value in COLOURS[colour])
        if shape == "circle":
            draw.ellipse((x, y, x + 11, y + 11), fill=ink)
        elif shape == "square":
            draw.rectangle((x, y, x + 11, y + 11), fill=ink)
        elif shape == "triangle":
            draw.polygon([(x + 5, y), (x, y + 11), (x + 11, y + 11)], fill=ink)
        else:
            draw.rectangle((x + 4, y, x + 7, y + 11), fill=ink)
            draw.rectangle((x, y + 4, x + 11, y + 7), fill=ink)
    x, y = _corner(scene.digit_place, rng)
    for row, line in enumerate(_ROWS):
        for column, mark in enumerate(line[scene.digit]):
            if mark == "#":
                draw.point((x + 3 + column, y + 2 + row), fill=(0, 0, 0))
    return picture


def quarters(scene: Scene) -> list[tuple[str, str]]:
    """What each quarter holds in two words, in the order of PLACES: a colour and a shape, a digit, or nothing."""
    found = dict.fromkeys(PLACES, (NOTHING, NOTHING))
    found |= {place: (colour, shape) for shape, colour, place in scene.things}
    found[scene.digit_place] = (str(scene.digit), NOTHING)
    return [found[place] for place in PLACES]


def _corner(place: str, rng: random.Random) -> tuple[int, int]:
    x = QUARTER * ("right" in place) + 2 + rng.randint(-1, 1)
    y = QUARTER * ("bottom" in place) + 2 + rng.randint(-1, 1)
    return x, y


def ask(scene: Scene, rng: random.Random, task: str) -> tuple[str, str]:
    """A question about the scene, and its answer."""
    shape, colour, place = rng.choice(scene.things)
    if task == "colour":
        return f"What colour is the {shape}?", f"The {shape} is {colour}."
    if task == "place":
        return f"Where is the {shape}?", f"The {shape} is at the {place}."
    if task == "what":
        return f"What is at the {place}?", f"A {colour} {shape} is at the {place}."
    if task == "digit":
        return "Which digit is shown?", f"The digit is {scene.digit}."
    ordered = sorted(scene.things, key=lambda thing: PLACES.index(thing[2]))
    told = " ".join(f"A {colour} {shape} is at the {place}." for shape, colour, place in ordered)
    return "Describe the picture.", f"{told} The digit is {scene.digit}."


def example(rng: random.Random, task: str) -> tuple[Image.Image, str, str]:
    """A picture, a question of a task and its answer."""
    scene = draw_scene(rng)
    return paint(scene, rng), *ask(scene, rng, task)
