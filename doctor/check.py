"""One line of a diagnosis."""

from __future__ import annotations

import dataclasses
from typing import Literal

State = Literal["ok", "missing", "wrong"]


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that is as it should be, not here though something needs it, or here and of no use.

    remedy: the command or the step that mends it; empty where it is ok.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def judged(name: str, fine: bool, found: str, remedy: str) -> Check:
    """A line that is ok or wrong; `remedy` is for the latter."""
    return Check(name, "ok", found) if fine else Check(name, "wrong", found, remedy)
