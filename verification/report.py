"""What a verification has found: for people, as JSON, and in the engine folder."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from ..contract import counted
from .rounding import LARGEST
from .verdict import Tally

_SHOWN = 12  # findings
_KEPT = 200


@dataclasses.dataclass
class Report:
    """Verdicts of one verification. `precision` is what the reference computed in.

    other_weights: what says that the reference has others than the engine, if anything is wrong.
    """

    prompts: int
    precision: str
    modes: collections.defaultdict[str, Tally] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Tally)
    )
    passes: collections.defaultdict[str, Tally] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Tally)
    )
    findings: list[str] = dataclasses.field(default_factory=list)
    layers: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # name, deviation, bound; empty: not asked
    blame: str | None = None  # what the first stray tensor tells
    other_weights: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings and all(t.ok for t in (*self.modes.values(), *self.passes.values())) and not self.stray

    @property
    def stray(self) -> str | None:
        """The first tensor that is farther off than rounding takes it."""
        return next((layer["name"] for layer in self.layers if not layer["deviation"] <= layer["bound"]), None)

    def as_dict(self) -> dict[str, Any]:
        """As one JSON object."""
        return {
            "ok": self.ok,
            "prompts": self.prompts,
            "precision": self.precision,
            "modes": {name: dataclasses.asdict(tally) for name, tally in self.modes.items()},
            "passes": {name: dataclasses.asdict(tally) | {"usual": tally.usual} for name, tally in self.passes.items()},
            "findings": self.findings[:_KEPT],
            "findings_in_all": len(self.findings),
            "layers": self.layers,
            "first_stray": self.stray,
            "blame": self.blame,
            "other_weights": self.other_weights,
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [_line("mode", name, tally, "ar's") for name, tally in self.modes.items()]
        lines += [_line("pass", name, tally, "right") for name, tally in self.passes.items()]
        worst = max((tally.largest for tally in self.passes.values()), default=0.0)
        lines.append(f"rounding     logits are off by up to {worst:.2g} times what it does, allowed: {LARGEST:g} times")
        if self.layers:
            found = next((layer for layer in self.layers if layer["name"] == self.stray), None)
            lines.append(
                f"layers       all {counted(len(self.layers), 'tensor')} within rounding"
                if found is None
                else f"layers       {found['name']} strays first, off by {found['deviation']:.3g}, allowed: "
                f"{found['bound']:.3g}; look at {self.blame}"
            )
        lines += [f"wrong        {finding}" for finding in self.findings[:_SHOWN]]
        if len(self.findings) > _SHOWN:
            lines.append(f"             and {len(self.findings) - _SHOWN} more")
        if self.other_weights:
            lines.append(f"note         {self.other_weights}")
        return lines


def _line(word: str, name: str, tally: Tally, right: str) -> str:
    parts = [
        f"{counted(tally.equal, 'token')} {right}",
        counted(tally.near_ties, "near tie"),
        f"{tally.wrong} wrong",
    ]
    if tally.strays:
        parts.append(f"{tally.strays} farther off than rounding")
    if tally.drifts:
        parts.append(f"on average off by {tally.usual:.3g} times what rounding does")
    return f"{word:12} {name}: {', '.join(parts)}"
