"""The options of a request, each declared once.

Checks, flags of the command line, fields of HTTP bodies, inputs of Triton Inference Server and the table in
docs/serving.md are derived from this table. What depends on the engine or on several options is checked in settings.py.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from ...contract import MAX_BLOCK, PREFILL_CHUNK, Mode
from ...errors import RequestError
from ..sampling.policies import PolicyName
from .option_types import Help, Most, NotEmpty, Range, describe, json_text, plain_biases

DEFAULT_NEW_TOKENS = 512
AUTO = "auto"  # a mode or block length by measured cost
BLOCK_LENGTH = Range(1, MAX_BLOCK)
MOST_LOGPROBS = 100
LOGPROBS = Range(0, MOST_LOGPROBS)
THRESHOLD = Range(0, text="0 or more (over 1 commits one token per pass)")
_COLDEST = 1e-30  # least temperature over 0; a logit over it still is a number, also in f32
_TEMPERATURE = Range(_COLDEST, sys.float_info.max, or_zero=True, text=f"0 or {_COLDEST} and more")
# Every token of an answer is held against these, while all other requests wait.
_MOST_TEXTS = Most(1024, 16384)
_MOST_IDS = Most(1024)


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Options:
    """What a request may choose; None leaves the choice to the engine or the mode. Raises RequestError."""

    mode: Annotated[
        Mode | Literal["auto"], Help("Decode in this mode; auto picks the fastest of those that give ar's tokens.")
    ] = "linear_spec"
    max_new_tokens: Annotated[
        int | None,
        Range(0, text="1 or more, or 0 to score the prompt alone"),
        Help("Stop after this many new tokens.", default=f"{DEFAULT_NEW_TOKENS} or what fits"),
    ] = None
    fit: Annotated[bool, Help("Stop after fewer new tokens where the engine has no room for all.")] = False
    block_length: Annotated[
        int | Literal["auto"] | None,
        BLOCK_LENGTH,
        Help(
            "Decode blocks of this many tokens; auto picks the fastest length.",
            default="the engine's, 16 for drafts on a CPU",
        ),
    ] = None
    groups: Annotated[
        Literal["auto", "all"],
        Help("Verify all draft groups of quadratic_spec, or with auto those that pay off."),
    ] = "auto"
    threshold: Annotated[
        float | None,
        THRESHOLD,
        Help("Commit a masked token at this confidence or more.", default="0.9 in mode diffusion, else 0"),
    ] = None

    temperature: Annotated[float, _TEMPERATURE, Help("Sample at this temperature, or greedily at 0.")] = 0.0
    top_k: Annotated[
        int,
        Range(0, text="0 (all ids) or more"),
        Help("Sample from this many of the most likely tokens, or from all of them at 0."),
    ] = 0
    top_p: Annotated[
        float, Range(0, 1, over=True), Help("Sample from the most likely tokens up to this share of the probability.")
    ] = 1.0
    min_p: Annotated[
        float, Range(0, 1), Help("Drop tokens whose probability is below this share of the highest one.")
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Range(0.001, 1000, text="0.001 to 1000 (1 changes nothing)"),
        Help("Make tokens of the prompt and the answer less likely by this factor."),
    ] = 1.0
    presence_penalty: Annotated[
        float, Range(-2, 2), Help("Subtract this from the logit of every token already generated.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Range(-2, 2), Help("Subtract this from the logit of a token for each time it was generated.")
    ] = 0.0
    seed: Annotated[
        int, Range(0, 2**64 - 1, text="0 to 2**64 - 1"), Help("Seed the random draws of sampling with this number.")
    ] = 0
    logit_bias: Annotated[
        Mapping[int, float] | None,
        BeforeValidator(plain_biases),
        _MOST_IDS,
        Help(
            "Add a number from -100 to 100 to the logit of a token id.",
            default="none",
            allowed="an object of token ids and numbers",
        ),
    ] = None
    bad_words: Annotated[tuple[str, ...], NotEmpty("a bad word"), _MOST_TEXTS, Help("Never complete this text.")] = ()
    min_tokens: Annotated[
        int,
        Range(0, text="0 to max_new_tokens"),
        Help("Do not end the answer by an EOS or a stop token id before this many tokens."),
    ] = 0

    stop: Annotated[tuple[str, ...], NotEmpty("a stop string"), _MOST_TEXTS, Help("End the answer at this text.")] = ()
    stop_in_thinking: Annotated[bool, Help("End the answer at a stop text in its thoughts too.")] = False
    stop_token_ids: Annotated[tuple[int, ...], _MOST_IDS, Help("End the answer at this token id.")] = ()
    chat: Annotated[bool, Help("Put the prompt through the chat template.")] = True
    continue_final_message: Annotated[
        bool, Help("Continue the last message, an assistant's, instead of beginning an answer.")
    ] = False
    system: Annotated[str | None, Help("Begin the conversation with this system text.", default="none")] = None
    thinking: Annotated[bool, Help("Let the model think before it answers.")] = False
    thinking_budget: Annotated[
        int | None, Range(0), Help("End the thinking after this many tokens.", default="no limit")
    ] = None
    tools: Annotated[
        str | None,
        BeforeValidator(json_text("tools")),
        Help(
            "Offer these tools to the model.",
            default="none",
            allowed="a list of tools in OpenAI's form, as JSON text or as a list",
        ),
    ] = None
    tool_choice: Annotated[
        str,
        NotEmpty("tool_choice"),
        Help(
            "Let the model call tools as it likes (auto), not at all (none), some (required), or the one named.",
            allowed="auto, none, required, or the name of a tool",
        ),
    ] = "auto"
    parallel_tool_calls: Annotated[bool, Help("Let an answer call more than one tool.")] = True
    chat_template_kwargs: Annotated[
        str | None,
        BeforeValidator(json_text("chat_template_kwargs")),
        Help(
            "Give the chat template these variables of its own.",
            default="none",
            allowed="a JSON object, as text or as an object",
        ),
    ] = None
    logprobs: Annotated[
        int | None,
        LOGPROBS,
        Help("Report the log-probabilities of each token and of this many likeliest ones.", default="none"),
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        LOGPROBS,
        Help(
            "Report the log-probabilities of each token of the prompt and of this many likeliest ones.", default="none"
        ),
    ] = None
    json_schema: Annotated[
        str | None,
        BeforeValidator(json_text("json_schema")),
        Help(
            "Make the answer follow this JSON schema.",
            default="none",
            allowed="a JSON schema, as text or as an object",
        ),
    ] = None
    strict_schema: Annotated[
        bool, Help("Refuse a JSON schema with an unknown format or uniqueItems instead of ignoring these.")
    ] = False
    regex: Annotated[str | None, Help("Make the whole answer match this pattern.", default="none")] = None
    grammar: Annotated[
        str | None, Help("Make the answer follow this grammar, in Lark's notation or llama.cpp's.", default="none")
    ] = None

    policy: Annotated[PolicyName, Help("Choose by this rule which masked tokens a pass of mode diffusion commits.")] = (
        "threshold"
    )
    per_step: Annotated[
        int | None, Range(1), Help("Commit this many masked tokens per pass under policy topk.", default="none")
    ] = None
    entropy_bound: Annotated[
        float | None,
        Range(0),
        Help("Commit masked tokens of at most this entropy, in nats, under policy entropy.", default="none"),
    ] = None
    block_steps: Annotated[
        int | None, Range(1), Help("Finish a block of mode diffusion in at most this many passes.", default="no limit")
    ] = None
    merge_commit: Annotated[bool, Help("Commit a block of mode diffusion in the pass that begins the next one.")] = (
        False
    )
    confidences: Annotated[bool, Help("Report the confidence of each token of mode diffusion.")] = False

    prefill_chunk: Annotated[int, Range(1), Help("Read the prompt in passes of this many tokens.")] = PREFILL_CHUNK

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: ArgsKwargs) -> ArgsKwargs:
        for name in values.kwargs or ():
            if name not in OPTIONS:
                near = difflib.get_close_matches(name, OPTIONS, 1)
                remedy = f"is {near[0]} meant?" if near else f"allowed: {', '.join(OPTIONS)}"
                raise RequestError(f"unknown option {name!r:.60}; {remedy}")
        return values

    @field_validator("*", mode="wrap")
    @classmethod
    def _check(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return OPTIONS[info.field_name].check(value, validate)


OPTIONS = describe(Options)
FLAGS = {"block_steps": "--steps"}  # of the command line, where they are not the option's name


def make_options(values: Mapping[str, Any]) -> Options:
    """Options from keyword arguments. Raises RequestError."""
    return Options(**values)
