"""A conversation as the ids of a prompt."""

from __future__ import annotations

from typing import Any

from nemodiff.runtime.text.codec import TextCodec


def chat_ids(codec: TextCodec, *conversation: Any, **choices: Any) -> list[int]:
    """Ids of a conversation up to the assistant's turn; the arguments are those of `TextCodec.render_chat`."""
    return codec.encode_rendered(codec.render_chat(*conversation, **choices))
