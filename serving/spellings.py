"""What clients of every server here spell alike, and the runtime spells otherwise."""

from __future__ import annotations

import secrets
from typing import Any

from ..errors import RequestError


def resolve(options: dict[str, Any], *, ignore_eos: bool) -> dict[str, Any]:
    """The options with -1 for all ids, an ignored end and a missing seed resolved. Raises RequestError."""
    chosen = dict(options)
    if chosen.get("top_k") == -1:
        del chosen["top_k"]
    if ignore_eos:
        if "max_new_tokens" not in chosen:
            raise RequestError("ignore_eos needs a limit; give max_tokens")
        chosen["min_tokens"] = chosen["max_new_tokens"]
    # A client that samples without a seed expects another answer each time; the runtime's default seed is fixed.
    if chosen.get("temperature") and "seed" not in chosen:
        chosen["seed"] = secrets.randbits(32)
    return chosen
