"""The block filling in, as lines for a terminal: one line per pass.

Tokens decided in a pass are coloured by confidence, masks are shaded, and after a verify the drafts it kept and refused
can be told apart without colour too.
"""

from __future__ import annotations

import click

from ...contract import counted
from ..loading import LoadedEngine
from .events import Step

MASK, END = "░", "■"


def line(engine: LoadedEngine, step: Step) -> str:
    """One pass as one line, with ANSI colours (`click.echo` removes them where there is no terminal)."""
    if step.kind in ("denoise", "draft"):
        body = _filling(engine, step)
    elif step.kind == "verify":
        body = _verdict(engine, step)
    else:
        body = click.style(_causal(engine, step), dim=True)
    return f"{step.kind:>8} {step.start:>5} | {body}"


def _filling(engine: LoadedEngine, step: Step) -> str:
    mask, parts = engine.info.model.mask_id, []
    for before, after, confidence in zip(step.before, step.after, step.confidence, strict=True):
        if after == mask:
            parts.append(click.style(MASK, dim=True))
        elif before == mask:
            colour = "green" if confidence >= 0.9 else "yellow" if confidence >= 0.5 else "red"
            parts.append(click.style(_shown(engine, after), fg=colour, bold=True))
        else:
            parts.append(_shown(engine, after))
    return "".join(parts)


def _causal(engine: LoadedEngine, step: Step) -> str:
    """How many tokens went in and the one that came out; after a commit perhaps the next block as it begins."""
    given = sum(token != engine.info.model.mask_id for token in step.before)
    first = step.start + given
    masks = len(step.before) - given if step.kind == "commit" else 0
    shown = {first: _shown(engine, step.after[0])} | {c.position: _shown(engine, c.token) for c in step.committed}
    return f"{counted(given, 'token')} -> {''.join(shown.get(p, MASK) for p in range(first, first + max(1, masks)))!r}"


def _verdict(engine: LoadedEngine, step: Step) -> str:
    """The drafts the verify kept, its own next token in brackets, and after an x the drafts it refused."""
    kept = step.kept or 0
    parts = [_shown(engine, step.before[0])]
    parts += [click.style(_shown(engine, token), fg="green") for token in step.before[1 : kept + 1]]
    if kept == len(step.committed):  # the answer ends here; what follows was never checked
        return "".join(parts)
    parts.append(click.style(f"[{_shown(engine, step.after[kept])}]", fg="cyan", bold=True))
    refused = "".join(_shown(engine, token) for token in step.refused)
    return "".join(parts) + (click.style(f" x {refused}", fg="red", dim=True) if refused else "")


def _shown(engine: LoadedEngine, token: int) -> str:
    """A token on one line."""
    if token in engine.info.model.eos_ids:
        return END
    return engine.text.piece(token).replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
