"""The pre-tokenizer of Mistral's tokenizers, which many tokenizer.json hold with another vocabulary's pattern.

Tekken, the vocabulary of the models from Mistral NeMo on, was made with a pattern that cuts words where their case
changes, keeps accents with their letters and takes digits one by one. Conversions wrote the pattern of Llama 3 instead,
which cuts some texts into other tokens. transformers warns about it and mends it with `fix_mistral_regex`.
Source: https://github.com/huggingface/transformers/pull/42131
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WRONG = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
RIGHT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SIGN = b"N}{1,3}"  # as the wrong pattern has it, however JSON spells the rest


def has_wrong_regex(path: Path) -> bool:
    """Whether a tokenizer.json cuts text by the wrong pattern.

    The pattern alone is Llama 3's too, whose vocabulary has numbers of two digits; a Tekken vocabulary has none.
    """
    data = path.read_bytes()
    if _SIGN not in data:  # most files, and parsing a large one takes a second
        return False
    values = json.loads(data)
    vocab = (values.get("model") or {}).get("vocab") or ()
    return _wrong_split(values) is not None and not any(f"{number}" in vocab for number in range(10, 100))


def correct(path: Path) -> None:
    """Put the right pattern into a tokenizer.json that has the wrong one."""
    values = json.loads(path.read_bytes())
    split = _wrong_split(values)
    assert split is not None
    split["pattern"] = {"Regex": RIGHT}
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _wrong_split(values: dict[str, Any]) -> dict[str, Any] | None:
    """The first pre-tokenizer, if it splits by the wrong pattern."""
    first = values.get("pre_tokenizer")
    if isinstance(first, dict) and first.get("type") == "Sequence":
        first = next(iter(first.get("pretokenizers") or ()), None)
    if isinstance(first, dict) and first.get("type") == "Split" and first.get("pattern") == {"Regex": WRONG}:
        return first
    return None
