"""Finished requests and their events as OpenAI's objects.

In: generations, or events with the place of their request. Out: JSON objects of a chat or a completion, whole or in
chunks. The surprising fact: nothing here decides what a client sees of a text; events are final, and whole characters.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from ...runtime.events.events import Event, Finished, Step, Text
from ...runtime.loading import LoadedEngine
from ...runtime.requests.generation import Generation, tokens_per_pass
from ...runtime.requests.selection import TokenLogprobs
from .reasoning import Splitter

Kind = Literal["chat", "completion"]


@dataclasses.dataclass
class Form:
    """What all objects of one HTTP request share.

    thinking: whether the text begins inside a think block. logprobs: whether they are told.
    """

    engine: LoadedEngine
    kind: Kind
    model: str
    thinking: bool = False
    logprobs: bool = False
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choices = [self._choice(index, generation) for index, generation in enumerate(generations)]
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head(name), "choices": choices, "usage": usage(generations)}

    def filling(self, text: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request for a filling; a hole has been filled when it is as long as was asked for."""
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        return {**self._head("text_completion"), "choices": [choice], "usage": usage}

    async def chunks(
        self, events: AsyncIterator[tuple[int, Event]], count: int, *, with_usage: bool, diffusing: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The same in pieces, as the text comes."""
        splitters = [Splitter(self.thinking) for _ in range(count)]
        ends: dict[int, Generation] = {}
        if self.kind == "chat":
            for index in range(count):
                yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, event in events:
            if isinstance(event, Text):
                for delta in self._deltas(splitters[index], event.text):
                    yield self._chunk(index, delta)
            elif isinstance(event, Step):
                if diffusing and event.kind in ("denoise", "draft"):
                    yield {**self._chunk(index, {}), "diffusing": self._frame(event)}
            elif isinstance(event, Finished):
                ends[index] = event.generation
                for delta in self._deltas(splitters[index], "", final=True):
                    yield self._chunk(index, delta)
                yield self._chunk(index, {}, event.generation)
        if with_usage:
            told = usage([ends[index] for index in sorted(ends)])
            yield {**self._head(self._chunk_name), "choices": [], "usage": told}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _head(self, name: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}

    def _choice(self, index: int, generation: Generation) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": generation.finish_reason}
        if self.kind == "chat":
            reasoning, content = Splitter(self.thinking).push(generation.text, final=True)
            choice["message"] = {"role": "assistant", "content": content, "refusal": None}
            if reasoning:
                choice["message"]["reasoning_content"] = reasoning
        else:
            choice["text"] = generation.text
        return {**choice, **self._measured(generation)}

    def _chunk(self, index: int, delta: dict[str, Any], generation: Generation | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": None if generation is None else generation.finish_reason,
        }
        if self.kind == "chat":
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        told = {"logprobs": None} if generation is None else self._measured(generation)
        return {**self._head(self._chunk_name), "choices": [{**choice, **told}]}

    def _deltas(self, splitter: Splitter, text: str, final: bool = False) -> list[dict[str, Any]]:
        if self.kind == "completion":
            return [{"content": text}] if text else []
        reasoning, content = splitter.push(text, final)
        told = {"reasoning_content": reasoning, "content": content}
        return [{name: value} for name, value in told.items() if value]

    def _frame(self, step: Step) -> dict[str, Any]:
        """A block as a pass left it: provisional, null where it is still masked."""
        mask, piece = self.engine.info.model.mask_id, self.engine.text.piece
        return {
            "kind": step.kind,
            "position": step.start,
            "tokens": [None if token == mask else token for token in step.after],
            "text": [None if token == mask else piece(token) for token in step.after],
            "confidence": [round(value, 4) for value in step.confidence],
        }

    def _measured(self, generation: Generation) -> dict[str, Any]:
        """What was measured of each token."""
        values, told = generation.logprobs, dict[str, Any](logprobs=None)
        if self.logprobs and values is not None:
            pairs = list(zip(generation.token_ids, values, strict=True))
            told["logprobs"] = self._chat_logprobs(pairs) if self.kind == "chat" else self._text_logprobs(pairs)
        if generation.confidences is not None:
            told["confidences"] = generation.confidences
        return told

    def _chat_logprobs(self, pairs: list[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        return {
            "content": [
                {**self._logprob(token, at.logprob), "top_logprobs": [self._logprob(*one) for one in at.top]}
                for token, at in pairs
            ],
            "refusal": None,
        }

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self.engine.text.piece(token)
        return {"token": piece, "logprob": logprob, "bytes": None if "\ufffd" in piece else list(piece.encode())}

    def _text_logprobs(self, pairs: list[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        piece = self.engine.text.piece
        pieces = [piece(token) for token, _ in pairs]
        offsets = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
        return {
            "tokens": pieces,
            "token_logprobs": [at.logprob for _, at in pairs],
            "top_logprobs": [{piece(token): logprob for token, logprob in at.top} for _, at in pairs],
            "text_offset": offsets,
        }


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """What a request took, over all its answers; docs/semantics.md defines the counts."""
    first = generations[0]
    emitted = sum(len(g.token_ids) for g in generations)
    nfe = {kind: sum(g.nfe[kind] for g in generations) for kind in first.nfe}
    lengths = [length for g in generations for length in g.acceptance.lengths]
    decode_tpf, e2e_tpf = tokens_per_pass(emitted, nfe)
    prompt = sum(g.prompt_tokens for g in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": emitted,
        "total_tokens": prompt + emitted,
        "prompt_tokens_details": {"cached_tokens": sum(g.reused_tokens for g in generations)},
        "mode": first.mode,
        "block_length": first.block_length,
        "threshold": first.threshold,
        "nfe": nfe,
        "acceptance": {"mean": sum(lengths) / len(lengths) if lengths else None, "lengths": lengths},
        "decode_tpf": decode_tpf,
        "e2e_tpf": e2e_tpf,
        "timings_ms": {k: max(g.timings_ms[k] for g in generations) for k in ("queued", "prefill", "decode", "total")},
    }
