"""The CPU cache's memory: what rows hold survives every change of the capacity, which follows the rows in use."""

from __future__ import annotations

import random

import numpy as np

from nemodiff.runtime.engines.onnxruntime.memory import STEP, Memory

HEADS, WIDTH = 3, 2


class Checked:
    """A `Memory` beside a plain record of what each row must hold."""

    def __init__(self, rows: int) -> None:
        self.memory = Memory(dict.fromkeys("kv", (WIDTH, np.float32)), rows, HEADS)
        self.expected: list[np.ndarray] = [np.zeros((HEADS, 0, WIDTH), np.float32)] * rows
        self._written = 0

    def write(self, first: int, begins: list[int], sizes: list[int]) -> None:
        """A forward: each row writes numbers of its own from where it begins, and padding after them."""
        ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
        slots = max(begins) + max(sizes)
        self.memory.use(first, begins, ends, slots)
        assert self.memory.capacity >= slots
        for name, view in self.memory.views(first, len(begins)).items():
            for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
                view[row, :, begin : begin + max(sizes)] = -1
                shape = (HEADS, end - begin, WIDTH)
                new = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + self._written
                view[row, :, begin:end] = new if name == "k" else -new
                if name == "k":
                    kept = self.expected[first + row][:, :begin]
                    self.expected[first + row] = np.concatenate([kept, new], axis=1)
        self._written += 1000

    def copy(self, source: int, target: int, slots: int) -> None:
        self.memory.move(source, target, slots)
        self.expected[target] = self.expected[source][:, :slots]

    def check(self, first: int, count: int) -> None:
        views = self.memory.views(first, count)
        for row in range(count):
            held = self.expected[first + row]
            np.testing.assert_array_equal(views["k"][row, :, : held.shape[1]], held)
            np.testing.assert_array_equal(views["v"][row, :, : held.shape[1]], -held)


def test_random_forwards_copies_and_ends() -> None:
    rng = random.Random(3)
    for _ in range(20):
        checked = Checked(4)
        capacities = set()
        for _ in range(40):
            kind = rng.choice(["write", "write", "write", "copy", "free"])
            if kind == "write":
                first = rng.randrange(4)
                count = rng.randint(1, 4 - first)
                begins = [rng.choice([0, e.shape[1]]) for e in checked.expected[first : first + count]]
                checked.write(first, begins, [rng.choice([1, 7, 90, 300]) for _ in begins])
                checked.check(first, count)
                capacities.add(checked.memory.capacity)
            elif kind == "copy":
                source, target = rng.sample(range(4), 2)
                checked.copy(source, target, rng.randint(0, checked.expected[source].shape[1]))
            else:
                row = rng.randrange(4)
                checked.memory.free(row)
                checked.expected[row] = checked.expected[row][:, :0]
        assert len(capacities) > 3


def test_the_capacity_follows_the_rows_in_use() -> None:
    checked = Checked(3)
    for length in (1, STEP, STEP + 1, 1000, 5000, 20000):
        checked.memory.use(0, [0], [length], length)
        assert length <= checked.memory.capacity <= max(length + STEP - 1, length * 33 // 32)
    checked.write(1, [0], [10])
    assert checked.memory.capacity >= 20000  # row 0 may still go on
    checked.memory.free(0)
    checked.write(1, [10], [10])
    assert checked.memory.capacity == STEP
    checked.check(1, 1)


def test_a_kept_row_slows_nobody_down() -> None:
    checked = Checked(3)
    checked.write(0, [0], [3000])
    checked.copy(0, 2, 3000)
    checked.write(0, [0], [5])
    assert checked.memory.capacity == STEP
    checked.copy(2, 0, 2000)
    checked.write(0, [2000], [1])
    assert 2001 <= checked.memory.capacity < 2001 + STEP
    checked.check(0, 1)
