"""Text that comes from standard input and from files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..errors import RequestError
from ..runtime.text.checks import check_text


def read_stdin(missing: str) -> str:
    """All of standard input; `missing` is the refusal where it holds no text or is a terminal."""
    try:  # standard input is None where it was closed
        text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8("standard input", error) from None
    if not text.strip():
        raise click.UsageError(missing)
    return text.removesuffix("\n")


def read_text(path: Path) -> str:
    """A file's text. Raises RequestError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), error) from None


def read_prompts(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the prompt (text or messages) of each line of a JSON-lines file. Raises RequestError."""
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}; give a file of JSON lines") from None
    for number, text in enumerate(lines, 1):
        if text.strip():
            place = f"{path}, line {number}"
            yield place, _parse_prompt(text, place)


def _parse_prompt(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place}: not JSON ({error}); one object per line is allowed") from None
    check_text(json.dumps(value, ensure_ascii=False), place)
    fields = value if isinstance(value, dict) else {}
    prompt = fields.get("prompt")
    messages = fields.get("messages")
    if isinstance(prompt, str):
        return prompt
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return messages
    raise RequestError(
        f'{place}: allowed: an object with "prompt" (text) or "messages" (a list of role and content); fix the line'
    )


def not_utf8(where: str, error: UnicodeDecodeError) -> RequestError:
    """The refusal of bytes that are not text."""
    return RequestError(f"{where}: not UTF-8 at byte {error.start}; convert it first")
