"""What may be chosen of filling in and revising, which the command line needs before it needs arrays."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["search", "block"]
METHODS: tuple[str, ...] = get_args(Method)
DEFAULT_METHOD: Method = "search"
DEFAULT_WIDTH = 8
DEFAULT_THRESHOLD = 0.9
DEFAULT_KEEP = 0.05
DEFAULT_ROUNDS = 4
# Help for what the command line and HTTP bodies share.
HELP = {
    "prefix": "Put this text before the hole.",
    "suffix": "Put this text after the hole.",
    "method": "Fill by search, which is better, or by block, which is faster.",
    "width": "Keep this many candidate fillings in a search.",
}
