"""Typed fields of a JSON file, each wrong one refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError

_LARGEST = (2 - 2**-23) * 2.0**127  # of f32
_SMALLEST = 1e-30


class Fields:
    """Reads typed fields of one JSON object, remembers which were read, and names the file in every message."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values
        self.read: set[str] = set()

    def fail(self, key: str, got: object, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {key} is {got!r:.100}, allowed: {allowed}; fix the file or use another checkpoint"
        )

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return self.values.get(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:  # a field written as null is a field left out
            value = default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise self.fail(key, value if key in self.values else "missing", "a finite f32 number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value < _SMALLEST:  # a smaller divisor would overflow
            raise self.fail(key, value, f"{_SMALLEST:g} or more")
        return value

    def integer(self, key: str, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, value if key in self.values else "missing", f"an integer from {low} to {high}")
        return value

    def one_of(self, key: str, allowed: tuple[object, ...], default: object) -> Any:
        value = self.get(key, default)
        if value not in allowed:
            raise self.fail(key, value, " or ".join(map(repr, allowed)))
        return value
