"""What is to be said of files that an engine carries: lines of the plan and of inspect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engine_folder import GENERATION_FILE, PROPOSED, TOKENIZER_FILE
from .mistral_regex import has_wrong_regex


def sampling_notes(generation: Mapping[str, Any]) -> list[str]:
    """The sampling that the checkpoint proposes; an engine is greedy unless it is asked."""
    given = [f"{name} {generation[name]!r:.30}" for name in PROPOSED if generation.get(name) is not None]
    unless = "not used unless given as options or by --generation-config auto"
    return [f"{', '.join(given)} of {GENERATION_FILE}: {unless}"] if given else []


def regex_notes(folder: Path, remedy: str) -> list[str]:
    """That the tokenizer is one of those with a wrong pattern; `remedy` ends the sentence."""
    if not has_wrong_regex(folder / TOKENIZER_FILE):
        return []
    return [
        f"{TOKENIZER_FILE} splits words by a pattern that is wrong for its vocabulary, as in many conversions of "
        f"Mistral's tokenizer (fix_mistral_regex of transformers); {remedy}"
    ]
