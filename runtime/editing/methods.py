"""The names of the ways to fill in, which the command line needs before it needs arrays."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["search", "block"]
METHODS: tuple[str, ...] = get_args(Method)
