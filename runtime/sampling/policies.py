"""The names of the commit policies, which the command line needs before it needs arrays."""

from __future__ import annotations

from typing import Literal, get_args

PolicyName = Literal["threshold", "topk", "entropy", "left_to_right"]
POLICIES: tuple[str, ...] = get_args(PolicyName)
