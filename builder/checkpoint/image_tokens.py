"""The tokens of which an image consists in a prompt, as a checkpoint's tokenizer has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...engine_folder import CONFIG_FILE, IMAGE_TOKENS, TOKENIZER_FILE
from ...errors import CheckpointError


def check_image_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that lacks one of them as a special token. Raises CheckpointError."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for text in IMAGE_TOKENS:
        if text not in special:
            raise CheckpointError(
                f"{folder / TOKENIZER_FILE}: special token {text} is missing, with which a prompt of this model holds "
                "images; download the checkpoint again"
            )


def image_token_notes(config: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Where config.json names another token for an image's content than the tokenizer has."""
    pad = tokenizer.token_to_id(IMAGE_TOKENS.pad)
    given = {name: config.get(name) for name in ("image_token_id", "image_token_index")}
    return [
        f"{CONFIG_FILE} has {name} {value!r:.30}, {TOKENIZER_FILE} {pad} for {IMAGE_TOKENS.pad}: the tokenizer decides"
        for name, value in given.items()
        if value is not None and value != pad
    ]
