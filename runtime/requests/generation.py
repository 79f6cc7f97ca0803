"""A finished request: its text, its tokens and what they took."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..engines.passes import PassKind
from ..loading import LoadedEngine
from ..tools.answer import ToolCall
from .sequence import FinishReason, Sequence
from .token_logprobs import TokenLogprobs


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Tokens emitted by each verify pass, bonus included; `mean` is None without a verify pass.

    verified: tokens that each of them looked at, the last emitted one included.
    """

    mean: float | None
    lengths: list[int]
    verified: list[int]


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished request. Times are milliseconds of wall clock; docs/semantics.md defines the counts.

    text, token_ids: the answer. prompt_tokens: of the whole prompt. mode, block_length, threshold: as they were used.
    nfe: passes by kind. decode_tpf, e2e_tpf: tokens per pass, prefill left out and all; None without a pass.
    adapter_tokens: those forwarded with the drafter adapter. timings_ms: load, queued, prefill, decode and total.
    reused_tokens: of the prompt, those whose K/V were copied from an earlier request. finish_reason: `stop`, `length`,
    or `cancelled`, and then the text is what had been decided by then. logprobs, confidences: one per token, None
    unless requested. prompt_logprobs: one per token of the prompt, None for the first, which nothing stands before.
    warnings: sentences about what of the request was ignored. reasoning, content, tool_calls: what the
    text consists of. reasoning_tokens: those of the thoughts, their end included. stop_text: what ended it.
    image_tokens: of the prompt, those of each image.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    reused_tokens: int
    finish_reason: FinishReason
    mode: str
    block_length: int | str
    threshold: float
    nfe: dict[PassKind, int]
    decode_tpf: float | None
    e2e_tpf: float | None
    acceptance: Acceptance
    adapter_tokens: int
    timings_ms: dict[str, float]
    logprobs: list[TokenLogprobs] | None = None
    confidences: list[float | None] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = dataclasses.field(default_factory=list)
    reasoning_tokens: int = 0
    stop_text: str | None = None
    image_tokens: list[int] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As one JSON object; what was not requested is left out, and warnings where there are none."""
        values = dataclasses.asdict(self)
        nothings: dict[str, Any] = {
            "logprobs": None, "confidences": None, "prompt_logprobs": None, "warnings": [], "reasoning": "",
            "tool_calls": [], "content": self.text, "reasoning_tokens": 0, "stop_text": None,
            "image_tokens": [],
        }  # fmt: skip
        for name, nothing in nothings.items():
            if values[name] == nothing:
                del values[name]
        return values

    def as_message(self) -> dict[str, Any]:
        """As the assistant's turn of a conversation that goes on."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in self.tool_calls]
            message["tool_calls"] = [
                {"id": f"call_{i}", "type": "function", "function": function} for i, function in enumerate(functions)
            ]
        return message


def tokens_per_pass(emitted: int, nfe: Mapping[PassKind, int]) -> tuple[float | None, float | None]:
    """Of all passes but prefill, and of all; None where there is no such pass."""
    passes = sum(nfe.values())
    decoding = passes - nfe["prefill"]
    return emitted / decoding if decoding else None, emitted / passes if passes else None


def finished_generation(engine: LoadedEngine, sequence: Sequence) -> Generation:
    """The finished request with its figures."""
    assert sequence.finish is not None
    decode_tpf, e2e_tpf = tokens_per_pass(len(sequence.tokens), sequence.nfe)
    lengths = sequence.accepted
    scores = sequence.prompt_scores
    first = sequence.first_token if sequence.tokens else sequence.ended
    text = sequence.transcript.text(sequence.tokens)
    answer = sequence.settings.answer_format.parse(text, sequence.opened)
    return Generation(
        text=text,
        token_ids=sequence.tokens,
        prompt_tokens=len(sequence.prompt),
        reused_tokens=sequence.reused,
        finish_reason=sequence.finish,
        mode=sequence.settings.mode,
        block_length=sequence.settings.reported_block_length,
        threshold=sequence.settings.threshold,
        nfe=sequence.nfe,
        decode_tpf=decode_tpf,
        e2e_tpf=e2e_tpf,
        acceptance=Acceptance(sum(lengths) / len(lengths) if lengths else None, lengths, sequence.verified),
        adapter_tokens=sequence.adapter_tokens,
        timings_ms={
            "load": engine.load_ms,
            "queued": (sequence.started - sequence.submitted) * 1e3,
            "prefill": (first - sequence.started) * 1e3,
            "decode": (sequence.ended - first) * 1e3,
            "total": (sequence.ended - sequence.started) * 1e3,
        },
        logprobs=None if sequence.settings.logprobs is None else sequence.selector.logprobs,
        confidences=sequence.confidences[: len(sequence.tokens)] if sequence.settings.confidences else None,
        prompt_logprobs=None if scores is None else scores.by_token,
        warnings=list(sequence.settings.warnings),
        reasoning=answer.reasoning,
        content=answer.content,
        tool_calls=answer.calls,
        reasoning_tokens=_reasoning_tokens(sequence) if answer.reasoning else 0,
        stop_text=_stop_text(sequence, text),
        image_tokens=[] if sequence.images is None else sequence.images.tokens,
    )


def _reasoning_tokens(sequence: Sequence) -> int:
    end = sequence.settings.end_think
    return sequence.tokens.index(end) + 1 if end in sequence.tokens else len(sequence.tokens)


def _stop_text(sequence: Sequence, text: str) -> str | None:
    if not sequence.settings.stop:
        return None
    whole = sequence.transcript.text(sequence.tokens, cut=False)
    return max((s for s in sequence.settings.stop if whole.startswith(s, len(text))), key=len, default=None)
