"""The images of a conversation: taken out of its messages, and put as tokens where the chat template wants them."""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...contract import counted
from ...engine_folder import IMAGE_TOKENS
from ...errors import RequestError
from ..images.decode import decode
from ..images.image import Image, make_image
from ..images.sight import Placed, PromptImages
from ..loading import LoadedEngine
from ..text.messages import Message

MOST_PIXELS = 2**28  # of the images of a prompt: 22 photos, or so many seconds of decoding
_ALLOWED = 'text, {"type": "image", "image": PATH, bytes or a Pillow image} or {"type": "image_url"} with a data URL'


def plain_messages(messages: Sequence[Message]) -> tuple[list[Message], list[Any]]:
    """The messages with `{"type": "image"}` in the place of each image, and what the images are given as, in order.

    Parts of text alone become one text. Templates have places for a user's images only, so those that a tool has given
    stand before what the user says next, or are what he says. Thoughts among an assistant's parts are its
    `reasoning_content`; in a system message the template has to place them. Raises RequestError.
    """
    sources: list[Any] = []
    plain: list[Message] = []
    given: list[dict[str, Any]] = []  # images of tools that wait for a user's message
    for message in messages:
        role, content = message.get("role"), message.get("content")
        parts = [_part(part, sources) for part in content] if isinstance(content, (list, tuple)) else None
        if given and role == "user" and (parts or isinstance(content, str)):
            plain.append({**message, "content": [*given, *(parts or [{"type": "text", "text": content}])]})
            given = []
            continue
        if given and role != "tool":
            plain.append({"role": "user", "content": given})
            given = []
        images = [part for part in parts or () if part["type"] == "image"]
        thoughts = "".join(part.get("thinking", "") for part in parts or ())
        if thoughts and role == "assistant":
            message = {**message, "reasoning_content": message.get("reasoning_content") or thoughts}
        elif thoughts and role != "system":
            raise RequestError(
                f"thoughts are in a message of role {role!r:.20}, allowed: assistant and system; leave them out"
            )
        if parts is None:
            plain.append(message)
        elif (images and role == "user") or (thoughts and role == "system" and not images):
            plain.append({**message, "content": parts})
        elif not images or role == "tool":
            plain.append({**message, "content": "".join(part.get("text", "") for part in parts)})
            given += images
        else:
            raise RequestError(
                f"an image is in a message of role {role!r:.20}, allowed: user and tool; move it to a user's"
            )
    return [*plain, *([{"role": "user", "content": given}] if given else [])], sources


def _part(part: Any, sources: list[Any]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "thinking" and isinstance(part.get("thinking"), str):
        return {"type": "thinking", "thinking": part["thinking"]}
    if kind not in ("image", "image_url"):
        raise RequestError(f"a part of a message is {part!r:.80}, allowed: {_ALLOWED}")
    name = f"image {len(sources) + 1}"
    source = part.get(kind)
    if kind == "image_url":
        source = _from_data_url(source.get("url") if isinstance(source, Mapping) else source, name)
    if not isinstance(source, (str, bytes, Path)) and not _is_picture(source):
        raise RequestError(f"{name} is {source!r:.80}, allowed: {_ALLOWED}")
    sources.append(source)
    return {"type": "image"}


def _is_picture(source: Any) -> bool:
    """Whether something is a Pillow image; where Pillow was not imported, nothing is."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(source, pillow.Image)


def read_images(engine: LoadedEngine, sources: Sequence[Any]) -> list[Image]:
    """The images as the engine sees them. Raises RequestError."""
    vision = engine.info.model.vision
    if vision is None:
        raise RequestError("the prompt has an image, which this model cannot see; use an engine of a model that sees")
    build = engine.info.build
    images: list[Image] = []
    tokens = pixels = 0
    for number, source in enumerate(sources, 1):
        picture = decode(source, f"image {number}")
        height, width = picture.shape[:2]
        tokens += vision.tokens(width, height, build.max_image_size)
        pixels += width * height
        # Both here, before it is made any larger and before any number of further ones is decoded.
        if pixels > MOST_PIXELS:
            raise RequestError(
                f"image {number} brings the prompt to {pixels:,} pixels, allowed of all its images: up to "
                f"{MOST_PIXELS:,}; send fewer or smaller images"
            )
        if tokens > build.max_seq_len:
            raise RequestError(
                f"image {number} brings the prompt to {tokens} tokens or more, allowed: the engine's max_seq_len, "
                f"{build.max_seq_len}; send fewer or smaller images"
            )
        images.append(make_image(picture, vision, build.max_image_size))
    return images


def _from_data_url(url: Any, name: str) -> bytes:
    """The bytes of a `data:` URL in base64. Raises RequestError."""
    if not isinstance(url, str) or not url.startswith("data:"):
        raise RequestError(f"{name}: the URL is {url!r:.60}, allowed: data:image/png;base64,..; send the image itself")
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RequestError(f"{name}: the URL is {url!r:.40}, allowed: data:image/png;base64,..; encode it so")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"{name}: the URL is no base64 ({error}), allowed: A-Z a-z 0-9 + / =; encode it anew"
        ) from None


def place_images(engine: LoadedEngine, ids: list[int], images: Sequence[Image]) -> tuple[list[int], PromptImages]:
    """Put each image's tokens where the template has its start. Raises RequestError."""
    special = engine.text.special_tokens
    start, pad, row_break, end = (special[text] for text in IMAGE_TOKENS)
    if ids.count(start) != len(images):
        raise RequestError(
            f"the chat template has made {ids.count(start)} places for {counted(len(images), 'image')}; give another "
            "template"
        )
    placed: list[int] = []
    found: list[Placed] = []
    for token in ids:
        if token != start:
            placed.append(token)
            continue
        image = images[len(found)]
        layout = np.array(image.layout(start, pad, row_break, end))
        found.append(Placed(image, np.flatnonzero(layout == pad) + len(placed)))
        placed += layout.tolist()
    return placed, PromptImages(found, engine.sight)
