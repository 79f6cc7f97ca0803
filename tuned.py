"""How a torch engine's kernels run on a card, as `nemodiff tune` has measured it there: a record in the engine folder.

An entry holds for one card and one set of versions. Another card, driver or package may have another fastest way, so
there it is not used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .engine_folder import TUNED_FILE, engine_digest, quoted, write_record
from .errors import EngineError


class Choice(NamedTuple):
    """How kernels run: whether they begin while those before them end, and which products are the project's own."""

    pdl: bool = False
    own_products: frozenset[str] = frozenset()

    def __str__(self) -> str:
        begin = "kernels begin early" if self.pdl else "no kernel begins early"
        return f"{begin}, own products {', '.join(sorted(self.own_products)) or 'none'}"


def named(here: Mapping[str, str]) -> str:
    """A card with its versions, for people."""
    return ", ".join(f"{name} {value}" for name, value in here.items())


class Tuned(NamedTuple):
    """A choice, what it holds for (`TorchDevice.identity`), and the day on which it was measured."""

    choice: Choice
    here: Mapping[str, str]
    date: str


def read_tuned(folder: Path, products: Collection[str] | None = None) -> list[Tuned]:
    """What has been chosen for this build of the engine, an entry for each card; own products are among these.

    Raises EngineError where the record cannot be read: other kernels than it says would round otherwise.
    """
    path = folder / TUNED_FILE
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        entries = [_entry(values) for values in record["choices"]]
        if products is not None and not all(one.choice.own_products <= set(products) for one in entries):
            raise ValueError
        return entries if record["engine"] == engine_digest(folder) else []
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise EngineError(
            f"{path}: not a record of nemodiff tune; remove it, or write it anew: nemodiff tune {quoted(folder)}"
        ) from None


def _entry(values: dict[str, Any]) -> Tuned:
    pdl, own, here, date = (values[name] for name in ("pdl", "own_products", "here", "date"))
    if not (type(pdl) is bool and isinstance(own, list) and isinstance(date, str)):
        raise TypeError
    if not all(isinstance(text, str) for text in (*own, *here.keys(), *here.values())):
        raise TypeError
    return Tuned(Choice(pdl, frozenset(own)), here, date)


def write_tuned(folder: Path, tuned: Tuned, measured: Mapping[str, Any]) -> None:
    """Keep a choice, with what it was made by, in place of the one of the same card. Raises OSError."""
    others: list[dict[str, Any]] = []
    with contextlib.suppress(EngineError):
        if read_tuned(folder):
            kept = json.loads((folder / TUNED_FILE).read_text(encoding="utf-8"))["choices"]
            others = [values for values in kept if values["here"].get("card") != tuned.here.get("card")]
    own = {"here": dict(tuned.here), "date": tuned.date, "pdl": tuned.choice.pdl}
    own |= {"own_products": sorted(tuned.choice.own_products), "measured": dict(measured)}
    write_record(folder, TUNED_FILE, {"choices": [*others, own]})
