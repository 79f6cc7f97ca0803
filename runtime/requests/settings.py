"""How one request is decoded: its options with every default filled in, checked against the engine and one another."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ...contract import MAX_BLOCK, PREFILL_CHUNK, counted
from ...engine_info import EngineInfo
from ...errors import ContextLengthError, RequestError
from ..engines.passes import ABOVE_ALL
from ..sampling.commit import Policy
from ..sampling.grammar import GUIDES, Grammar
from ..sampling.grammar_cache import GRAMMARS
from ..sampling.sampler import SamplingParams
from ..tools.answer import PLAIN, AnswerFormat
from .options import AUTO, DEFAULT_NEW_TOKENS, OPTIONS, Options
from .tool_use import ToolUse, answer_format, read_tool_use

if TYPE_CHECKING:
    from ..text.codec import TextCodec

_DIFFUSION_THRESHOLD = 0.9  # the published one; drafts of the other modes are filled in one pass, at 0
_SHORT_BLOCK = 16  # the published block length of quadratic self-speculation, and on a CPU the best of drafts
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
    end_think: int | None = None  # the id of what ends the thoughts
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    answer_format: AnswerFormat = PLAIN
    warnings: tuple[str, ...] = ()  # what of the request is ignored, in sentences
    policy: Policy = dataclasses.field(default_factory=Policy)
    merge_commit: bool = False
    confidences: bool = False
    prefill_chunk: int = PREFILL_CHUNK

    @property
    def reported_block_length(self) -> int | str:
        """The block length as a report shows it."""
        return AUTO if self.auto_block else self.block_length


def settle(info: EngineInfo, text: TextCodec, prompt_tokens: int, options: Options) -> Settings:
    """Fill in defaults and check what the engine allows and what goes together. Raises RequestError."""
    o = options
    max_new_tokens = _max_new_tokens(info, prompt_tokens, o)
    block = _block_length(info, o)
    threshold = o.threshold
    if threshold is None:
        threshold = _DIFFUSION_THRESHOLD if o.mode == "diffusion" else 0.0
    _check_template(o)
    _check_ids(info, o)
    if o.min_tokens > max_new_tokens:
        raise RequestError(f"min_tokens is {o.min_tokens}, allowed: 0 to max_new_tokens, which is {max_new_tokens}")
    _check_thinking(text, o)
    _check_diffusion(o)
    use = read_tool_use(text, o)
    grammar, warnings = _grammar(info, text, o, use)
    return Settings(
        mode=o.mode,
        max_new_tokens=max_new_tokens,
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
        prompt_logprobs=o.prompt_logprobs,
        grammar=grammar,
        answer_format=answer_format(text, use, o),
        warnings=warnings,
        policy=Policy(o.policy, min(threshold, ABOVE_ALL), o.per_step or 1, o.entropy_bound or 0.0, o.block_steps),
        merge_commit=o.merge_commit,
        confidences=o.confidences,
        prefill_chunk=o.prefill_chunk,
    )


def _max_new_tokens(info: EngineInfo, prompt_tokens: int, o: Options) -> int:
    if o.max_new_tokens == 0 and o.prompt_logprobs is None:
        raise RequestError("max_new_tokens is 0, allowed: 1 or more, and 0 with prompt_logprobs alone; give a limit")
    limit = info.build.max_seq_len
    room = limit - prompt_tokens
    tokens = o.max_new_tokens if o.max_new_tokens is not None else max(1, min(DEFAULT_NEW_TOKENS, room))
    if o.fit:
        tokens = min(tokens, max(1, room))
    check_prompt(info, prompt_tokens, o)
    if tokens > room:
        raise ContextLengthError(
            f"the prompt has {counted(prompt_tokens, 'token')} and max_new_tokens is {tokens}, together "
            f"{prompt_tokens + tokens}; "
            f"{_length(limit)}: shorten the prompt, ask for at most {counted(room, 'token')} or build with a larger "
            "--max-seq-len"
        )
    return tokens


def check_prompt(info: EngineInfo, tokens: int, options: Options, *, at_least: bool = False) -> None:
    """Refuse a prompt of so many tokens, or of more, that leaves no room for an answer. Raises ContextLengthError."""
    limit = info.build.max_seq_len
    most = limit if options.max_new_tokens == 0 else limit - 1
    if tokens > most:
        raise ContextLengthError(
            f"the prompt is too long: {'at least ' if at_least else ''}{tokens} tokens > {most}, as {_length(limit)}; "
            "shorten the prompt or build with a larger --max-seq-len"
        )


def _length(limit: int) -> str:
    # Clients know these words, and "prompt is too long: N tokens > M".
    return f"this model's maximum context length is {limit} (max_seq_len)"


def _check_template(o: Options) -> None:
    for name in ("system", "chat_template_kwargs"):
        if not o.chat and getattr(o, name) is not None:
            raise RequestError(f"{name} needs the chat template; leave it or chat=False out")


def _check_ids(info: EngineInfo, o: Options) -> None:
    vocab = info.model.vocab_size
    for name, ids in (("stop_token_ids", o.stop_token_ids), ("logit_bias", o.logit_bias or ())):
        for token in ids:
            if not 0 <= token < vocab:
                raise RequestError(f"{name} holds token id {token!r:.60}, allowed: 0 to {vocab - 1}")


def _check_thinking(text: TextCodec, o: Options) -> None:
    if o.thinking_budget is None:
        return
    if not o.thinking:
        raise RequestError(f"thinking_budget is {o.thinking_budget}, but thinking is off; set thinking too")
    if text.end_think is None:
        raise RequestError(
            f"thinking_budget needs a token {text.thoughts.close}, which this tokenizer lacks; leave it out"
        )


def _block_length(info: EngineInfo, o: Options) -> int:
    if AUTO in (o.mode, o.block_length):
        _check_auto(o)
        return info.build.block_length
    every_group = o.mode == "quadratic_spec" and o.groups == "all"
    block = _default_block(info, o.mode, every_group) if o.block_length is None else int(o.block_length)
    if every_group and block * (block + 1) > PREFILL_CHUNK:
        raise RequestError(
            f"block_length is {block}, allowed with all groups: 1 to {_LONGEST_FULL_BLOCK}, because a pass of "
            f"{block * (block + 1)} tokens exceeds {PREFILL_CHUNK}; use a shorter block or groups auto"
        )
    return block


def _default_block(info: EngineInfo, mode: str, every_group: bool) -> int:
    """Where the text does not depend on it, a CPU's default is shorter: it pays for every token of a draft.

    On tiny-chat-2 blocks of 16 are a tenth faster than of 32 (benchmarks/results/auto.md). A length that the engine was
    built with stays.
    """
    block = info.build.block_length
    chosen = block != min(info.model.block_length, MAX_BLOCK)
    drafts = mode in ("linear_spec", "quadratic_spec") and info.manifest.backend == "onnxruntime" and not chosen
    return min(block, _SHORT_BLOCK) if every_group or drafts else block


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


def _check_diffusion(o: Options) -> None:
    """Refuse options of diffusion in another mode, and in diffusion what looks at the tokens before a token.

    Diffusion fills a block in any order, so what depends on earlier tokens needs the policy that decides them first.
    """
    for name, policy in (("per_step", "topk"), ("entropy_bound", "entropy")):
        value = getattr(o, name)
        if (value is not None) != (o.policy == policy):
            raise RequestError(f"{name} is {value}, but policy is {o.policy}; give {name} with policy {policy}")
    if o.threshold is not None and o.policy in ("topk", "entropy"):
        raise RequestError(f"threshold is {o.threshold}, but policy {o.policy} has none; leave one of them out")
    if o.mode != "diffusion":
        for name in ("policy", "block_steps", "merge_commit", "confidences"):
            value = getattr(o, name)
            if value not in (None, False, "threshold"):
                other = "; use logprobs" if name == "confidences" else "; use mode diffusion or leave it out"
                raise RequestError(f"{name} is {value}, but mode {o.mode} has no such choice{other}")
        return
    if o.logprobs is not None:
        raise RequestError(
            f"logprobs is {o.logprobs}, but diffusion does not choose a token by those before it; use confidences"
        )
    if o.policy == "left_to_right":
        return
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "bad_words", *GUIDES):
        if getattr(o, name) != OPTIONS[name].default:
            raise RequestError(
                f"{name} depends on the tokens before, which policy {o.policy} of diffusion may decide later; "
                "use policy left_to_right or another mode"
            )


def _grammar(
    info: EngineInfo, text: TextCodec, o: Options, use: ToolUse | None
) -> tuple[Grammar | None, tuple[str, ...]]:
    """What the answer must follow, and what of that is ignored."""
    guides = [name for name in GUIDES if getattr(o, name) is not None]
    if len(guides) > 1:
        raise RequestError(f"{guides[0]} and {guides[1]} are both given; use one of them")
    calls = None if use is None else use.grammar(text, o.json_schema)
    if calls is not None:
        kind = "tools"
        source = calls.source
        warnings = calls.warnings
        if o.mode == "diffusion" and o.policy != "left_to_right":
            raise RequestError(
                f"tools that are strict or must be called depend on the tokens before, which policy {o.policy} of "
                "diffusion may decide later; use policy left_to_right or another mode"
            )
        if o.strict_schema and warnings:
            raise RequestError(f"{warnings[0]}; change it or leave strict_schema out")
    elif guides:
        kind = guides[0]
        source = getattr(o, kind)
        warnings = ()
    else:
        return None, ()
    if o.bad_words:
        raise RequestError(f"bad_words could leave no way to follow the {kind}; use one of them")
    if o.thinking and text.end_think is None:
        raise RequestError(
            f"the {kind} would begin after the thoughts, whose end, {text.thoughts.close}, is no token of this "
            "tokenizer; leave thinking out"
        )
    grammar = GRAMMARS.get(text.source, info.model.vocab_size, info.model.eos_ids, kind, source, o.strict_schema)
    return grammar, (*warnings, *grammar.warnings)


def _params(text: TextCodec, o: Options) -> SamplingParams:
    spelled = {tuple(text.encode_plain(space + word)) for word in o.bad_words for space in ("", " ")}
    same = {field.name: getattr(o, field.name) for field in dataclasses.fields(SamplingParams)}
    return SamplingParams(
        **same | {"logit_bias": tuple((o.logit_bias or {}).items()), "bad_words": tuple(sorted(spelled))}
    )
