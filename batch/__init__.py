"""Files of prompts: their lines as requests, answered here or by many machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> object:
    """`Predictor`, imported with the engine's runtime when it is first used."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    from .predictor import Predictor

    return Predictor
