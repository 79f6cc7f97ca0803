"""What a request may choose.

In: keyword arguments of the front door. Out: `Options`, as the user said it, each value as its plain type. Ranges, and
what goes together, are checked by `settings.settle`, which knows the engine. A wrong value is one `RequestError` that
names what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import numbers
from collections.abc import Mapping
from typing import Any

from ...contract import PREFILL_CHUNK
from ...errors import RequestError
from ..text.checks import check_text

DEFAULT_NEW_TOKENS = 512
AUTO = "auto"  # a mode or block length by measured cost


@dataclasses.dataclass(frozen=True)
class Options:
    """What a request may choose; None means the engine's or the mode's default.

    mode: ar, diffusion, linear_spec or quadratic_spec, or `auto`: at each time the fastest of the exact ones, by the
    measured cost of a pass and by what drafts have brought. max_new_tokens: limit, default 512 or what fits.
    block_length: tokens, 1..64, or `auto`: the fastest in the same sense, not in diffusion. groups: of quadratic_spec,
    `auto` (those that pay by the measured cost of a pass) or `all`.
    threshold: confidence at which a mask is committed, 0 or more (over 1: one token per pass).

    temperature: 0 is greedy. top_k: ids that may be drawn, 0 for all. top_p: share of the probability that may be
    drawn, over 0 to 1. min_p: least probability that may be drawn, as a share of the highest, 0 to 1.
    repetition_penalty: over 1 makes ids of the prompt and the answer less likely. presence_penalty, frequency_penalty:
    taken off the logit of an id that has been emitted, once and per time, -2 to 2. seed: of the sampling noise.
    logit_bias: added to the logits of some ids, -100 to 100. bad_words: texts whose tokens are never completed.
    min_tokens: before as many no EOS and no stop id is emitted.

    stop: strings that end the answer. stop_token_ids: ids that do. chat: apply the chat template. system: system text.
    thinking: let the template open a think block. thinking_budget: tokens after which `</think>` is forced. logprobs:
    report the model's log-probability of each token and of this many likeliest ones. json_schema: text or object that
    the answer must follow. regex: pattern that the whole answer must match.

    Of diffusion alone: policy: `threshold`, `topk`, `entropy` or `left_to_right`. per_step: masks that topk commits per
    pass. entropy_bound: nats up to which entropy commits. block_steps: most passes per block. merge_commit: the pass
    that commits a block also denoises the next. confidences: report the confidence of each token.

    prefill_chunk: tokens per prefill pass.
    """

    mode: str = "linear_spec"
    max_new_tokens: int | None = None
    block_length: int | str | None = None
    groups: str = "auto"
    threshold: float | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] | None = None
    bad_words: tuple[str, ...] = ()
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    chat: bool = True
    system: str | None = None
    thinking: bool = False
    thinking_budget: int | None = None
    logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    policy: str = "threshold"
    per_step: int | None = None
    entropy_bound: float | None = None
    block_steps: int | None = None
    merge_commit: bool = False
    confidences: bool = False
    prefill_chunk: int = PREFILL_CHUNK


_FIELDS = {f.name: f for f in dataclasses.fields(Options)}


def make_options(values: dict[str, Any]) -> Options:
    """Options from keyword arguments; an unknown name or a wrong type is a RequestError."""
    for name in values:
        if name not in _FIELDS:
            raise RequestError(f"unknown option {name!r}; allowed: {', '.join(_FIELDS)}")
    return Options(**{name: _typed(name, value) for name, value in values.items()})


def _typed(name: str, value: Any) -> Any:
    """The value as its option's plain type, numbers of numpy included. Raises RequestError."""

    def require(right: bool, allowed: str) -> None:
        if not right:
            raise RequestError(f"{name} is {value!r:.60}, allowed: {allowed}")

    if value is None and _FIELDS[name].default is None:
        return None
    if name == "block_length":
        require(_is_integer(value) or value == AUTO, "an integer or auto")
        return value if value == AUTO else int(value)
    if name == "logit_bias":
        require(isinstance(value, Mapping), "an object of token ids and numbers")
        return {_token_id(name, key): _typed("temperature", bias) for key, bias in value.items()}
    if name == "json_schema":
        require(isinstance(value, (str, Mapping, bool)), "a JSON schema, as text or as an object")
        return value if isinstance(value, str) else _as_json(value)
    kind = str(_FIELDS[name].type).removesuffix(" | None")
    if kind == "int":
        require(_is_integer(value), "an integer")
        return int(value)
    if kind == "float":
        require(_is_number(value), "a number")
        return float(value)
    if kind == "bool":
        require(isinstance(value, bool), "True or False")
    if kind == "tuple[str, ...]":
        texts = (value,) if isinstance(value, str) else value
        right = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
        require(right, "text or a list of texts")
        check_text("".join(texts), name)
        return tuple(texts)
    if kind == "tuple[int, ...]":
        require(isinstance(value, (list, tuple)) and all(map(_is_integer, value)), "a list of token ids")
        return tuple(map(int, value))
    if kind == "str" and _FIELDS[name].default is None:  # the others are checked against a list, by `settle`
        require(isinstance(value, str), "text")
        check_text(value, name)
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _token_id(name: str, key: Any) -> int:
    """A token id, which JSON can only spell as text where it is a key."""
    if _is_integer(key) or (isinstance(key, str) and key.isascii() and key.isdigit()):
        return int(key)
    raise RequestError(f"{name} holds {key!r:.60}, allowed: token ids")


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json_schema is not JSON ({error}); give text or an object of plain values") from None
