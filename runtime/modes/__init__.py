"""Decoding modes: each is a loop that yields passes and is sent their predictions."""

from __future__ import annotations

from collections.abc import Callable

from ..requests.sequence import Sequence
from .ar import Loop, ar
from .auto import auto
from .diffusion import diffusion
from .linear_spec import linear_spec
from .quadratic_spec import quadratic_spec

LOOPS: dict[str, Callable[[Sequence], Loop]] = {
    "ar": ar,
    "diffusion": diffusion,
    "linear_spec": linear_spec,
    "quadratic_spec": quadratic_spec,
    "auto": auto,
}
