"""Finished requests and their events as JSON objects: OpenAI's chats and completions, and the lines of a trace."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from ...runtime.events.events import Event, Finished, Step, Text, as_dict
from ...runtime.events.trace import header
from ...runtime.loading import LoadedEngine
from ...runtime.requests.generation import Generation, tokens_per_pass
from ...runtime.requests.token_logprobs import TokenLogprobs
from ...runtime.text.reasoning import ReasoningParser

Kind = Literal["chat", "completion"]


@dataclasses.dataclass
class ResponseBuilder:
    """Builds all objects of one HTTP request, which share an id and a time.

    thinking: whether the text begins inside a think block. logprobs: whether they are part of the answer. answers: to
    each prompt.
    """

    engine: LoadedEngine
    kind: Kind
    model: str
    thinking: bool = False
    logprobs: bool = False
    answers: int = 1
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def full(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choices = [self._choice(index, generation) for index, generation in enumerate(generations)]
        object_name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {
            **self._head(object_name),
            "choices": choices,
            "usage": usage(generations, self.answers),
            **_warnings(generations),
        }

    def infill(self, text: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer to a fill-in-the-middle request; its finish reason is always that the hole is full."""
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        return {**self._head("text_completion"), "choices": [choice], "usage": usage}

    async def chunks(
        self, events: AsyncIterator[tuple[int, Event]], count: int, *, with_usage: bool, diffusing: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The answer to a streamed request, in pieces as its text comes.

        with_usage: a last chunk has the usage, and those before it say that it is yet to come.
        """
        pending = {"usage": None} if with_usage else {}
        parsers = [ReasoningParser(self.thinking) for _ in range(count)]
        generations: dict[int, Generation] = {}
        if self.kind == "chat":
            for index in range(count):
                yield {**self._chunk(index, {"role": "assistant", "content": ""}), **pending}
        async for index, event in events:
            if isinstance(event, Text):
                for delta in self._deltas(parsers[index], event.text):
                    yield {**self._chunk(index, delta), **pending}
            elif isinstance(event, Step):
                if diffusing and event.kind in ("denoise", "draft"):
                    yield {**self._chunk(index, {}), "diffusing": self._block(event), **pending}
            elif isinstance(event, Finished):
                generations[index] = event.generation
                for delta in self._deltas(parsers[index], "", final=True):
                    yield {**self._chunk(index, delta), **pending}
                yield {**self._chunk(index, {}, event.generation), **pending}
        if with_usage:
            total = usage([generations[index] for index in sorted(generations)], self.answers)
            yield {**self._head(self._chunk_name), "choices": [], "usage": total}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _head(self, object_name: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": object_name, "created": self.created, "model": self.model}

    def _choice(self, index: int, generation: Generation) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": generation.finish_reason}
        if self.kind == "chat":
            reasoning, content = ReasoningParser(self.thinking).push(generation.text, final=True)
            choice["message"] = {"role": "assistant", "content": content, "refusal": None}
            if reasoning:
                choice["message"]["reasoning_content"] = reasoning
        else:
            choice["text"] = generation.text
        return {**choice, **self._token_values(generation)}

    def _chunk(self, index: int, delta: dict[str, Any], generation: Generation | None = None) -> dict[str, Any]:
        """One chunk; the last one of a choice has its `generation`."""
        choice: dict[str, Any] = {"index": index, "finish_reason": None}
        if self.kind == "chat":
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        if generation is None:
            choice["logprobs"] = None
        else:
            choice["finish_reason"] = generation.finish_reason
            choice |= self._token_values(generation)
        warnings = {} if generation is None else _warnings([generation])
        return {**self._head(self._chunk_name), "choices": [choice], **warnings}

    def _deltas(self, parser: ReasoningParser, text: str, final: bool = False) -> list[dict[str, Any]]:
        if self.kind == "completion":
            return [{"content": text}] if text else []
        reasoning, content = parser.push(text, final)
        parts = {"reasoning_content": reasoning, "content": content}
        return [{name: value} for name, value in parts.items() if value]

    def _block(self, step: Step) -> dict[str, Any]:
        """A block as a pass left it: provisional, and null where it is still masked."""
        mask = self.engine.info.model.mask_id
        piece = self.engine.text.piece
        return {
            "kind": step.kind,
            "position": step.start,
            "tokens": [None if token == mask else token for token in step.after],
            "text": [None if token == mask else piece(token) for token in step.after],
            "confidence": [round(value, 4) for value in step.confidence],
        }

    def _token_values(self, generation: Generation) -> dict[str, Any]:
        """Log-probabilities and confidences of the tokens, where they were requested."""
        values: dict[str, Any] = {"logprobs": None}
        if self.logprobs and generation.logprobs is not None:
            pairs = list(zip(generation.token_ids, generation.logprobs, strict=True))
            values["logprobs"] = (
                self._chat_logprobs(pairs) if self.kind == "chat" else self._text_logprobs(generation, pairs)
            )
        if generation.confidences is not None:
            values["confidences"] = generation.confidences
        return values

    def _chat_logprobs(self, pairs: list[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        content = []
        for token, logprobs in pairs:
            top = [self._logprob(*candidate) for candidate in logprobs.top]
            content.append({**self._logprob(token, logprobs.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.engine.text
        return {"token": text.name(token), "logprob": logprob, "bytes": list(text.token_bytes(token))}

    def _text_logprobs(self, generation: Generation, pairs: list[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        name = self.engine.text.name
        offsets = self.engine.text.offsets(generation.token_ids)
        return {
            "tokens": [name(token) for token, _ in pairs],
            "token_logprobs": [logprobs.logprob for _, logprobs in pairs],
            "top_logprobs": [{name(token): value for token, value in logprobs.top} for _, logprobs in pairs],
            # A token of the stop string lies behind the text.
            "text_offset": [min(offset, len(generation.text)) for offset in offsets],
        }


def usage(generations: Sequence[Generation], answers: int = 1) -> dict[str, Any]:
    """What a request took, over all its answers; docs/semantics.md defines the counts.

    Of the `answers` to the same prompt, which stand side by side, the first one counts the prompt.
    """
    first = generations[0]
    emitted = sum(len(g.token_ids) for g in generations)
    nfe = {kind: sum(g.nfe[kind] for g in generations) for kind in first.nfe}
    lengths = [length for g in generations for length in g.acceptance.lengths]
    decode_tpf, e2e_tpf = tokens_per_pass(emitted, nfe)
    prompts = generations[::answers]
    prompt = sum(g.prompt_tokens for g in prompts)
    timings = {name: max(g.timings_ms[name] for g in generations) for name in ("queued", "prefill", "decode", "total")}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": emitted,
        "total_tokens": prompt + emitted,
        "prompt_tokens_details": {"cached_tokens": sum(g.reused_tokens for g in prompts)},
        "mode": first.mode,
        "block_length": first.block_length,
        "threshold": first.threshold,
        "nfe": nfe,
        "acceptance": {"mean": sum(lengths) / len(lengths) if lengths else None, "lengths": lengths},
        "decode_tpf": decode_tpf,
        "e2e_tpf": e2e_tpf,
        "timings_ms": timings,
    }


def _warnings(generations: Sequence[Generation]) -> dict[str, list[str]]:
    """The field `warnings`, each one once; without any there is no such field."""
    warnings = dict.fromkeys(warning for generation in generations for warning in generation.warnings)
    return {"warnings": list(warnings)} if warnings else {}


async def trace_lines(engine: LoadedEngine, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[dict[str, Any]]:
    """The events of one request as the lines of a trace: the header, then every event."""
    has_header = False
    async for _, event in events:
        if not has_header:
            has_header = True
            yield header(engine, event)
        yield as_dict(event)
