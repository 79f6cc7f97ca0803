"""What clients of servers and files of prompts spell alike, and the runtime spells otherwise."""

from __future__ import annotations

import re
import secrets
from typing import Any

from ...errors import RequestError

ANY_OBJECT = {"type": "object"}  # the schema of an answer that is to be JSON and no more is said
# vLLM's words for what an answer must follow, and the option that each sets; then its older names of the same.
STRUCTURES = {
    "json": "json_schema", "json_object": "json_schema", "regex": "regex", "choice": "regex", "grammar": "grammar",
}  # fmt: skip
GUIDED = {f"guided_{word}": word for word in STRUCTURES if word != "json_object"}
# Words beside them that change nothing: there is one way to set JSON, and one library.
STRUCTURES_WITHOUT_EFFECT = ("disable_any_whitespace", "disable_fallback")
_OPEN = ("max_new_tokens", "seed")  # options that clients leave open by -1 too


def left_open(option: str, value: Any) -> bool:
    """Whether a value is how clients say that they do not choose: -1 for no limit, and for any seed."""
    return option in _OPEN and value == -1


def resolve(options: dict[str, Any], *, ignore_eos: bool) -> dict[str, Any]:
    """The options in the runtime's spelling, with an ignored end resolved. Raises RequestError."""
    chosen = {name: value for name, value in options.items() if not left_open(name, value)}
    if chosen.get("top_k") == -1:
        del chosen["top_k"]
    if chosen.get("top_p") == 0 and chosen["top_p"] is not False:  # the likeliest token alone
        del chosen["top_p"]
        chosen["temperature"] = 0.0
    seed = chosen.get("seed")
    if isinstance(seed, int) and -(2**63) <= seed < 0:
        chosen["seed"] = seed % 2**64
    if ignore_eos:
        if "max_new_tokens" not in chosen:
            raise RequestError("ignore_eos needs a limit; give max_tokens")
        chosen["min_tokens"] = chosen["max_new_tokens"]
    return chosen


def check_best_of(best_of: object, n: object) -> None:
    """Refuse to choose among more answers than are given; clients spell out that they do not. Raises RequestError."""
    if best_of != n:
        raise RequestError(f"best_of is {best_of!r:.60}, allowed: as many as n, the answers; leave it out")


def structure_value(word: str, value: Any) -> Any:
    """What a word of `STRUCTURES` sets its option to; None for nothing. A choice is a list of texts."""
    if word == "json_object":
        return ANY_OBJECT if value else None
    if word == "choice" and value is not None:
        return "|".join(re.escape(text) for text in value)
    return value


def with_seed(options: dict[str, Any]) -> dict[str, Any]:
    """All options of a request, defaults included, with a seed.

    A client that samples without one expects another answer each time; the runtime's default seed is fixed.
    """
    return (
        {**options, "seed": secrets.randbits(32)} if options.get("temperature") and "seed" not in options else options
    )
