"""What a checkpoint's own files say against each other, and weights that are not read: lines of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...config import ModelConfig
from ...engine_folder import CONFIG_FILE, GENERATION_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from .folder import INDEX, WEIGHTS
from .safetensors_file import Tensor
from .shards import is_stray


def end_notes(
    model: ModelConfig,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    tokenizer: Tokenizer,
    tokenizer_config: Mapping[str, Any],
) -> list[str]:
    """Where two files name other ends of a text, and the ends that the tokenizer does not call one."""
    notes = []
    ours, theirs = config.get("eos_token_id"), generation.get("eos_token_id")
    if ours is not None and theirs is not None and _set(ours) != _set(theirs):
        notes.append(
            f"{CONFIG_FILE} ends a text at {ours!r:.100}, {GENERATION_FILE} at {theirs!r:.100}: "
            f"each of {', '.join(map(str, model.eos_ids))} ends it"
        )
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    plain = [id for id in model.eos_ids if id not in special]
    if plain:
        notes.append(f"{_named(plain, tokenizer)} ends a text, but is no special token of {TOKENIZER_FILE}")
    name = tokenizer_config.get("eos_token")
    name = name.get("content") if isinstance(name, dict) else name
    end = tokenizer.token_to_id(name) if isinstance(name, str) else None
    unlike = [id for id in model.eos_ids if id in special and id != end]
    if end is not None and unlike:
        notes.append(
            f"{_named(unlike, tokenizer)} ends a text, but the eos_token of {TOKENIZER_CONFIG_FILE} is "
            f"{_named([end], tokenizer)}"
        )
    return notes


def weight_notes(folder: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Weights that lie there and are not read."""
    stray = f"{WEIGHTS} lies beside {INDEX}: the index decides, and {WEIGHTS} is not read"
    return [stray] if is_stray(folder, tensors) else []


def _set(value: object) -> set[str]:
    return set(map(repr, value if isinstance(value, list) else [value]))


def _named(ids: list[int], tokenizer: Tokenizer) -> str:
    """`11 ('<|im_end|>')`, and so on."""
    return ", ".join(f"{id} ({tokenizer.id_to_token(id)!r:.60})" for id in ids)
