"""Conversations of one message."""

from __future__ import annotations

from typing import Any


def user(text: str) -> list[dict[str, Any]]:
    """A text."""
    return [{"role": "user", "content": text}]


def asked(*images: Any, text: str = "What is this?") -> list[dict[str, Any]]:
    """A question about images."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
