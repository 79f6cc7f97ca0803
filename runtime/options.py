"""What a request may choose, and what it gets.

In: keyword arguments of the front door. Out: `Options`, as the user said it, and `Settings`, with every default
filled in and every range checked against the engine. A wrong value is one `RequestError` that names what is allowed.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from ..contract import MAX_BLOCK, MODES, PREFILL_CHUNK, EngineInfo
from ..errors import RequestError

THRESHOLDS = {"ar": 0.0, "diffusion": 0.9, "linear_spec": 0.0, "quadratic_spec": 0.0}  # defaults, the published ones
DEFAULT_NEW_TOKENS = 512
GROUPS = ("auto", "all")
_FULL_BLOCK = 16  # the published block length of quadratic self-speculation
_LONGEST_FULL_BLOCK = max(n for n in range(1, MAX_BLOCK) if n * (n + 1) <= PREFILL_CHUNK)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a request may choose; None means the engine's or the mode's default.

    mode: ar, diffusion, linear_spec or quadratic_spec. max_new_tokens: limit, default 512 or what fits. block_length:
    tokens, 1..64. groups: of quadratic_spec, `auto` (those that pay by the measured cost of a pass) or `all`.
    threshold: confidence at which a mask is committed, 0 or more (over 1: one token per pass). temperature: 0 is
    greedy; more is for `ar` only. seed: of the sampling noise. stop: strings that end the answer. chat: apply the chat
    template. system: system text. thinking: let the template open a think block. prefill_chunk: tokens per prefill
    pass.
    """

    mode: str = "linear_spec"
    max_new_tokens: int | None = None
    block_length: int | None = None
    groups: str = "auto"
    threshold: float | None = None
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    chat: bool = True
    system: str | None = None
    thinking: bool = False
    prefill_chunk: int = PREFILL_CHUNK


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one request is decoded; made and checked by `settle`."""

    mode: str
    max_new_tokens: int
    block_length: int
    threshold: float
    groups: str = "auto"
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    prefill_chunk: int = PREFILL_CHUNK


def make_options(values: dict[str, Any]) -> Options:
    """Options from keyword arguments; an unknown name or a wrong type is a RequestError."""
    names = [f.name for f in dataclasses.fields(Options)]
    for name in values:
        if name not in names:
            raise RequestError(f"unknown option {name!r}; allowed: {', '.join(names)}")
    return Options(**{name: _typed(name, value) for name, value in values.items()})


def _typed(name: str, value: Any) -> Any:
    """The value as its option's plain type, numbers of numpy included. Raises RequestError."""

    def require(right: bool, allowed: str) -> None:
        if not right:
            raise RequestError(f"{name} is {value!r}, allowed: {allowed}")

    if value is None and name in ("max_new_tokens", "block_length", "threshold", "system"):
        return None
    if name in ("max_new_tokens", "block_length", "seed", "prefill_chunk"):
        require(isinstance(value, numbers.Integral) and not isinstance(value, bool), "an integer")
        return int(value)
    if name in ("threshold", "temperature"):
        require(isinstance(value, numbers.Real) and not isinstance(value, bool), "a number")
        return float(value)
    if name in ("chat", "thinking"):
        require(isinstance(value, bool), "True or False")
    if name == "stop":
        texts = (value,) if isinstance(value, str) else value
        right = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
        require(right, "text or a list of texts")
        check_text("".join(texts), name)
        return tuple(texts)
    if name == "system":
        require(isinstance(value, str), "text")
        check_text(value, name)
    return value


def check_text(text: str, where: str) -> None:
    """Refuse halves of surrogate pairs: JSON spells them and a shell passes them on, but no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: not UTF-8 text at character {error.start}; convert it first") from None


def settle(info: EngineInfo, prompt_tokens: int, options: Options) -> Settings:
    """Fill in defaults and check ranges. Raises RequestError."""
    o, limit = options, info.build.max_seq_len
    if o.mode not in MODES:
        raise RequestError(f"mode is {o.mode!r}, allowed: {', '.join(MODES)}")
    room = limit - prompt_tokens
    wanted = o.max_new_tokens if o.max_new_tokens is not None else max(1, min(DEFAULT_NEW_TOKENS, room))
    if wanted < 1:
        raise RequestError(f"max_new_tokens is {wanted}, allowed: 1 or more")
    if wanted > room:
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens and max_new_tokens is {wanted}, together {prompt_tokens + wanted}; "
            f"the engine's max_seq_len is {limit}: shorten the prompt"
            + (f", ask for at most {room} tokens" if room > 0 else "")
            + " or build with a larger --max-seq-len"
        )
    if o.groups not in GROUPS:
        raise RequestError(f"groups is {o.groups!r}, allowed: {', '.join(GROUPS)}")
    every_group = o.mode == "quadratic_spec" and o.groups == "all"
    default = info.build.block_length if not every_group else min(info.build.block_length, _FULL_BLOCK)
    block = o.block_length if o.block_length is not None else default
    if every_group and block * (block + 1) > PREFILL_CHUNK:
        raise RequestError(
            f"block_length is {block}, allowed with all groups: 1 to {_LONGEST_FULL_BLOCK}, because a pass of "
            f"{block * (block + 1)} tokens exceeds {PREFILL_CHUNK}; use a shorter block or groups auto"
        )
    if not 1 <= block <= MAX_BLOCK:
        raise RequestError(f"block_length is {block}, allowed: 1 to {MAX_BLOCK}")
    threshold = o.threshold if o.threshold is not None else THRESHOLDS[o.mode]
    if not threshold >= 0:
        raise RequestError(f"threshold is {threshold}, allowed: 0 or more (over 1 commits one token per pass)")
    if not 0 <= o.temperature < float("inf"):
        raise RequestError(f"temperature is {o.temperature}, allowed: 0 or more")
    if o.temperature > 0 and o.mode != "ar":
        raise RequestError(f"temperature is {o.temperature}, but mode {o.mode} is greedy so far; use 0 or --mode ar")
    if not 0 <= o.seed < 2**64:
        raise RequestError(f"seed is {o.seed}, allowed: 0 to 2**64 - 1")
    if o.prefill_chunk < 1:
        raise RequestError(f"prefill_chunk is {o.prefill_chunk}, allowed: 1 or more")
    if any(not s for s in o.stop):
        raise RequestError("a stop string is empty; give at least one character")
    return Settings(o.mode, wanted, block, threshold, o.groups, o.temperature, o.seed, o.stop, o.prefill_chunk)
