"""Filling in: holes of a text are decoded with what stands before and after them.

Two methods share a causal prefix. `block` puts the hole's masks and the text after it into one bidirectional block, the
layout the model was trained with. `search` grows the likeliest fillings token by token and takes the one that, with the
text after it, is likeliest as a whole; all its fillings lie side by side in one row, since a query can see the prefix
and one span of its own.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
import time
from collections.abc import Iterable

from ...contract import MAX_BLOCK
from ...errors import RequestError
from ..engines.passes import PassKind
from ..loading import LoadedEngine, check_engine
from ..requests.options import BLOCK_LENGTH, THRESHOLD, Options
from ..requests.prepare import FAR, Prompt, encode
from ..text.checks import check_list, check_text
from .options import DEFAULT_METHOD, DEFAULT_THRESHOLD, DEFAULT_WIDTH, METHODS
from .row import Row
from .search import search

LONGEST_FREE = 16  # tokens of a hole without a length, unless its user says otherwise
_HOLE = re.compile(r"\{hole(?::(\d+))?\}")

Template = Iterable[str | int | None]  # text, and holes: their length in tokens, or None for a length that fits


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text with its holes filled; `holes` and `token_ids` hold each filling as text and as tokens.

    nfe: passes by kind. total_ms: milliseconds of wall clock.
    """

    text: str
    holes: list[str]
    token_ids: list[list[int]]
    method: str
    nfe: dict[PassKind, int]
    total_ms: float


def infill(
    engine: LoadedEngine,
    prefix: str,
    suffix: str = "",
    *,
    length: int | None = None,
    prompt: Prompt | None = None,
    method: str = DEFAULT_METHOD,
    width: int = DEFAULT_WIDTH,
    threshold: float = DEFAULT_THRESHOLD,
    block_length: int | None = None,
    longest: int = LONGEST_FREE,
) -> Filled:
    """Fill the hole between two texts; see `fill` for the arguments, docs/semantics.md for what is computed."""
    check_text(prefix, "prefix")
    check_text(suffix, "suffix")
    if isinstance(length, str):  # no text of the template
        raise _wrong_length(length)
    return fill(
        engine,
        [prefix, length, suffix],
        prompt=prompt,
        method=method,
        width=width,
        threshold=threshold,
        block_length=block_length,
        longest=longest,
    )


def fill(
    engine: LoadedEngine,
    template: Template,
    *,
    prompt: Prompt | None = None,
    method: str = DEFAULT_METHOD,
    width: int = DEFAULT_WIDTH,
    threshold: float = DEFAULT_THRESHOLD,
    block_length: int | None = None,
    longest: int = LONGEST_FREE,
) -> Filled:
    """Fill the holes of a template from left to right.

    Args:
        engine: from `load`.
        template: text, and holes as their length in tokens, 1..64; None is a hole of 1 to `longest` tokens, for
            `search` only.
        prompt: what the text is an answer to; without it the text stands alone, as a raw prompt does.
        method: `search` or `block`.
        width: fillings that `search` keeps.
        threshold: confidence at which `block` commits a mask.
        block_length: tokens of hole and text after it in a block; default the engine's.
        longest: tokens of a hole without a length, at most, 1..64.

    Returns:
        The text given, unchanged, with the fillings in it.

    Raises:
        RequestError: an argument is out of range or the text does not fit.
    """
    started = time.perf_counter()
    check_engine(engine)
    limit = engine.info.build.max_seq_len
    check_list(template, "template", "texts and holes, each its length in tokens or None")
    template = list(template)
    parts = _parts(engine, template, method)
    window = engine.info.build.block_length if block_length is None else block_length
    for name, value in (("width", width), ("longest", longest), ("block_length", window)):
        BLOCK_LENGTH.check(name, value, numbers.Integral)
    THRESHOLD.check("threshold", threshold)
    context = engine.text.encode("") if prompt is None else encode(engine, prompt, Options())
    need = len(context) + sum(len(p) if isinstance(p, list) else p or longest for p in parts)
    if need > limit:
        raise _too_long(f"prompt, text and holes have up to {need}", limit)
    if not context and not (isinstance(parts[0], list) and parts[0]):
        raise RequestError("nothing stands before the first hole in the template; give a prefix or a prompt")
    fillings: list[list[int]] = []
    with Row(engine.backend, context) as row:
        for part, after in zip(parts, [*parts[1:], []], strict=True):
            if isinstance(part, list):
                row.tokens += part
                continue
            suffix = after if isinstance(after, list) else []
            row.commit(len(row.tokens))
            if method == "block":
                size = part or 0
                filling = row.denoise([row.mask_id] * size + suffix[: max(0, window - size)], threshold)[:size]
            else:
                filling = search(row, part, longest, suffix, width, engine.info.model.eos_ids)
            row.tokens += filling
            fillings.append(filling)
        nfe = row.nfe
    texts = [engine.text.decode(filling) for filling in fillings]
    turns = list(reversed(texts))
    text = "".join(part if isinstance(part, str) else turns.pop() for part in template)
    return Filled(text, texts, fillings, method, nfe, (time.perf_counter() - started) * 1e3)


def parse_template(text: str) -> Template:
    """Text with `{hole}` and `{hole:12}` as a template; every other brace is text. Raises RequestError."""
    pieces = _HOLE.split(text)  # text, length or None, text, ..
    template: list[str | int | None] = [pieces[0]]
    for digits, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        try:
            template += [None if digits is None else int(digits), piece]
        except ValueError:  # more digits than Python reads
            raise _wrong_length(digits) from None
    if len(pieces) == 1:
        raise RequestError("the template has no hole; write {hole} or {hole:12} where text is missing")
    return template


def _parts(engine: LoadedEngine, template: Template, method: str) -> list[list[int] | int | None]:
    """The template with its texts encoded, empty ones left out."""
    if method not in METHODS:
        raise RequestError(f"method is {method!r}, allowed: {', '.join(METHODS)}")
    parts: list[list[int] | int | None] = []
    for part in template:
        if isinstance(part, str):
            check_text(part, "template")
            most = engine.info.build.max_seq_len
            if len(part) > FAR and (least := engine.text.fewest(part, rendered=False)) > most:
                raise _too_long(f"the text has at least {least}", most)
            ids = engine.text.encode_plain(part)
            if ids and parts and isinstance(parts[-1], list):
                parts[-1] += ids
            elif ids:
                parts.append(ids)
        elif part is None or (isinstance(part, int) and not isinstance(part, bool) and 1 <= part <= MAX_BLOCK):
            parts.append(part)
        else:
            raise _wrong_length(part)
    if all(isinstance(one, list) for one in parts):
        raise RequestError("the template has no hole; give one as its length in tokens, or None")
    for one, after in zip(parts, [*parts[1:], []], strict=True):
        if one is None and (method == "block" or not isinstance(after, list) or not after):
            raise RequestError(
                "a hole without a length needs method search and text after it; give its length in tokens"
            )
    return parts


def _too_long(tokens: str, limit: int) -> RequestError:
    return RequestError(
        f"{tokens} tokens, the engine's max_seq_len is {limit}; shorten the text or build with a larger --max-seq-len"
    )


def _wrong_length(length: object) -> RequestError:
    return RequestError(
        f"length of a hole is {length!r:.60}, allowed: 1 to {MAX_BLOCK} tokens; make several holes of it"
    )
