"""How one request is decoded: its options with every default filled in and every range checked.

In: `Options`, the engine's description and its tokenizer. Out: `Settings`, or one `RequestError` that names what is
allowed. The surprising fact: what a token depends on decides what diffusion can do. It fills a block in any order, so
rules that look at the tokens before a token need the policy that decides them first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Literal, get_args

from ...contract import MAX_BLOCK, MODES, PREFILL_CHUNK
from ...engine_folder import EngineInfo
from ...errors import RequestError
from ..sampling.commit import POLICIES, Policy
from ..sampling.grammar import Grammar
from ..sampling.sampler import SamplingParams
from .options import AUTO, DEFAULT_NEW_TOKENS, Options

if TYPE_CHECKING:
    from ..text.codec import TextCodec

THRESHOLDS = {
    "ar": 0.0,
    "diffusion": 0.9,
    "linear_spec": 0.0,
    "quadratic_spec": 0.0,
    "auto": 0.0,
}  # defaults, the published ones
Groups = Literal["auto", "all"]
GROUPS: tuple[str, ...] = get_args(Groups)
MOST_LOGPROBS = 100  # likeliest tokens reported
_COLDEST = 1e-30  # least temperature over 0; a logit over it still is a number, also in f32
_FULL_BLOCK = 16  # the published block length of quadratic self-speculation
_LONGEST_FULL_BLOCK = max(n for n in range(1, MAX_BLOCK) if n * (n + 1) <= PREFILL_CHUNK)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one request is decoded; made and checked by `settle`."""

    mode: str
    max_new_tokens: int
    block_length: int
    threshold: float
    auto_block: bool = False  # block_length is only where it begins
    groups: str = "auto"
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    thinking: bool = False
    thinking_budget: int | None = None
    end_think: int | None = None  # the id of `</think>`
    logprobs: int | None = None
    grammar: Grammar | None = None
    policy: Policy = dataclasses.field(default_factory=Policy)
    merge_commit: bool = False
    confidences: bool = False
    prefill_chunk: int = PREFILL_CHUNK

    @property
    def asked_block(self) -> int | str:
        """The block length as a report shows it."""
        return AUTO if self.auto_block else self.block_length


def settle(info: EngineInfo, text: TextCodec, prompt_tokens: int, options: Options) -> Settings:
    """Fill in defaults and check ranges. Raises RequestError."""
    o = options
    _one_of("mode", o.mode, (*MODES, AUTO))
    wanted = _new_tokens(info, prompt_tokens, o.max_new_tokens)
    _one_of("groups", o.groups, GROUPS)
    block = _block_length(info, o)
    threshold = o.threshold if o.threshold is not None else THRESHOLDS[o.mode]
    if not threshold >= 0:
        raise RequestError(f"threshold is {threshold}, allowed: 0 or more (over 1 commits one token per pass)")
    _check_sampling(o)
    _at_least("prefill_chunk", o.prefill_chunk, 1)
    for name, texts in (("a stop string", o.stop), ("a bad word", o.bad_words)):
        if not all(texts):
            raise RequestError(f"{name} is empty; give at least one character")
    vocab = info.model.vocab_size
    for name, ids in (("stop_token_ids", o.stop_token_ids), ("logit_bias", tuple(o.logit_bias or ()))):
        wrong = next((i for i in ids if not 0 <= i < vocab), None)
        if wrong is not None:
            raise RequestError(f"{name} holds token id {wrong}, allowed: 0 to {vocab - 1}")
    if not 0 <= o.min_tokens <= wanted:
        raise RequestError(f"min_tokens is {o.min_tokens}, allowed: 0 to max_new_tokens, which is {wanted}")
    if o.thinking_budget is not None:
        _at_least("thinking_budget", o.thinking_budget, 0)
        if not o.thinking:
            raise RequestError(f"thinking_budget is {o.thinking_budget}, but thinking is off; use it with --thinking")
        if text.end_think is None:
            raise RequestError("thinking_budget needs a token </think>, which this tokenizer lacks; leave it out")
    if o.logprobs is not None and not 0 <= o.logprobs <= MOST_LOGPROBS:
        raise RequestError(f"logprobs is {o.logprobs}, allowed: 0 to {MOST_LOGPROBS}")
    _check_diffusion(o)
    grammar = _grammar(info, text, o)
    return Settings(
        mode=o.mode,
        max_new_tokens=wanted,
        block_length=block,
        threshold=threshold,
        auto_block=AUTO in (o.mode, o.block_length),
        groups=o.groups,
        params=_params(text, o),
        stop=o.stop,
        stop_token_ids=o.stop_token_ids,
        thinking=o.thinking,
        thinking_budget=o.thinking_budget,
        end_think=text.end_think,
        logprobs=o.logprobs,
        grammar=grammar,
        policy=Policy(o.policy, threshold, o.per_step or 1, o.entropy_bound or 0.0, o.block_steps),
        merge_commit=o.merge_commit,
        confidences=o.confidences,
        prefill_chunk=o.prefill_chunk,
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{name} is {value!r}, allowed: {', '.join(allowed)}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise RequestError(f"{name} is {value}, allowed: {least} or more")


def _new_tokens(info: EngineInfo, prompt_tokens: int, asked: int | None) -> int:
    limit = info.build.max_seq_len
    room = limit - prompt_tokens
    wanted = asked if asked is not None else max(1, min(DEFAULT_NEW_TOKENS, room))
    _at_least("max_new_tokens", wanted, 1)
    if wanted > room:
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens and max_new_tokens is {wanted}, together {prompt_tokens + wanted}; "
            f"the engine's max_seq_len is {limit}: shorten the prompt"
            + (f", ask for at most {room} tokens" if room > 0 else "")
            + " or build with a larger --max-seq-len"
        )
    return wanted


def _block_length(info: EngineInfo, o: Options) -> int:
    every_group = o.mode == "quadratic_spec" and o.groups == "all"
    default = info.build.block_length if not every_group else min(info.build.block_length, _FULL_BLOCK)
    if AUTO in (o.mode, o.block_length):
        _check_auto(o)
        return info.build.block_length
    block = default if o.block_length is None else int(o.block_length)
    if every_group and block * (block + 1) > PREFILL_CHUNK:
        raise RequestError(
            f"block_length is {block}, allowed with all groups: 1 to {_LONGEST_FULL_BLOCK}, because a pass of "
            f"{block * (block + 1)} tokens exceeds {PREFILL_CHUNK}; use a shorter block or groups auto"
        )
    if not 1 <= block <= MAX_BLOCK:
        raise RequestError(f"block_length is {block}, allowed: 1 to {MAX_BLOCK}")
    return block


def _check_auto(o: Options) -> None:
    """Refuse what a plan would make worse or could not change."""
    if o.mode == "diffusion":
        raise RequestError(
            "block_length is 'auto', but diffusion's text would then depend on timings; give a number or another mode"
        )
    if o.mode == AUTO and o.block_length not in (None, AUTO):
        raise RequestError(f"block_length is {o.block_length}, but mode auto chooses it; leave it out or give a mode")
    if o.threshold:
        raise RequestError(
            f"threshold is {o.threshold}, but a planned draft takes one pass; leave threshold or auto out"
        )
    if o.groups == "all":
        raise RequestError("groups is 'all', but auto takes what pays; leave one of them out")


def _check_sampling(o: Options) -> None:
    for name, right, allowed in (
        ("temperature", o.temperature == 0 or _COLDEST <= o.temperature < math.inf, f"0 or {_COLDEST} and more"),
        ("top_k", o.top_k >= 0, "0 (all ids) or more"),
        ("top_p", 0 < o.top_p <= 1, "over 0 to 1"),
        ("min_p", 0 <= o.min_p <= 1, "0 to 1"),
        ("repetition_penalty", 0.001 <= o.repetition_penalty <= 1000, "0.001 to 1000 (1 changes nothing)"),
        ("presence_penalty", -2 <= o.presence_penalty <= 2, "-2 to 2"),
        ("frequency_penalty", -2 <= o.frequency_penalty <= 2, "-2 to 2"),
        ("seed", 0 <= o.seed < 2**64, "0 to 2**64 - 1"),
    ):
        if not right:
            raise RequestError(f"{name} is {getattr(o, name)}, allowed: {allowed}")
    for token, bias in (o.logit_bias or {}).items():
        if not -100 <= bias <= 100:
            raise RequestError(f"logit_bias of token id {token} is {bias}, allowed: -100 to 100")


def _check_diffusion(o: Options) -> None:
    """What only diffusion knows, and what it cannot do."""
    _one_of("policy", o.policy, POLICIES)
    for name, policy, least in (("per_step", "topk", 1), ("entropy_bound", "entropy", 0)):
        value = getattr(o, name)
        if (value is not None) != (o.policy == policy):
            raise RequestError(f"{name} is {value}, but policy is {o.policy}; give {name} with policy {policy}")
        if value is not None and not value >= least:
            raise RequestError(f"{name} is {value}, allowed: {least} or more")
    if o.threshold is not None and o.policy in ("topk", "entropy"):
        raise RequestError(f"threshold is {o.threshold}, but policy {o.policy} has none; leave one of them out")
    if o.block_steps is not None:
        _at_least("block_steps", o.block_steps, 1)
    if o.mode != "diffusion":
        for name in ("policy", "block_steps", "merge_commit", "confidences"):
            value = getattr(o, name)
            if value not in (None, False, "threshold"):
                other = "; use logprobs" if name == "confidences" else "; use --mode diffusion or leave it out"
                raise RequestError(f"{name} is {value}, but mode {o.mode} has no such choice{other}")
        return
    if o.logprobs is not None:
        raise RequestError(
            f"logprobs is {o.logprobs}, but diffusion does not choose a token by those before it; use confidences"
        )
    if o.policy == "left_to_right":
        return
    looks_back = [
        name
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "bad_words", "json_schema", "regex")
        if getattr(o, name) != getattr(Options, name)
    ]
    if looks_back:
        raise RequestError(
            f"{looks_back[0]} depends on the tokens before, which policy {o.policy} of diffusion may decide later; "
            "use policy left_to_right or another mode"
        )


def _grammar(info: EngineInfo, text: TextCodec, o: Options) -> Grammar | None:
    asked = [(name, source) for name in ("json_schema", "regex") if (source := getattr(o, name)) is not None]
    if not asked:
        return None
    if len(asked) > 1:
        raise RequestError("json_schema and regex are both given; use one of them")
    for name in ("bad_words", "min_tokens", "stop_token_ids", "stop"):
        if getattr(o, name):
            raise RequestError(f"{name} could leave no way to follow the {asked[0][0]}; use one of them")
    return _compiled(text.source, info.model.vocab_size, info.model.eos_ids, *asked[0])


@functools.lru_cache(maxsize=64)
def _compiled(tokenizer: str, vocab: int, eos: tuple[int, ...], kind: str, source: str) -> Grammar:
    return Grammar(tokenizer, vocab, eos, kind, source)


def _params(text: TextCodec, o: Options) -> SamplingParams:
    spelled = {tuple(text.encode_plain(space + word)) for word in o.bad_words for space in ("", " ")}
    same = {field.name: getattr(o, field.name) for field in dataclasses.fields(SamplingParams)}
    return SamplingParams(
        **same | {"logit_bias": tuple((o.logit_bias or {}).items()), "bad_words": tuple(sorted(spelled))}
    )
