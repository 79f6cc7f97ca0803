"""Finished requests and their events as JSON objects: OpenAI's chats and completions, and the lines of a trace."""

from __future__ import annotations

import collections
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal, TypeVar

import orjson

from ...runtime.events.events import Event, Finished, Step, Text, as_dict
from ...runtime.events.trace import header
from ...runtime.loading import LoadedEngine
from ...runtime.requests.generation import Generation, tokens_per_pass
from ...runtime.requests.sequence import Sequence as RunningSequence
from ...runtime.tools.answer import Delta
from ..logprobs import logprobs_by_id
from .body_parts import StreamOptions
from .threads import in_thread
from .token_values import TokenValues

Made = TypeVar("Made")
Kind = Literal["chat", "completion"]
_THOUGHTS = ("reasoning", "reasoning_content")  # newer clients of vLLM read the first, those of DeepSeek the second


@dataclasses.dataclass
class ResponseBuilder:
    """Builds all objects of one HTTP request, which share an id and a time.

    logprobs, prompt_logprobs: whether they are part of the answer. answers: to each prompt. sequences: the runtime's,
    one per answer; they are known once the request is submitted. echoes: the prompt's text per answer, where it is
    repeated before it. id: the client's, if it gives one.
    """

    engine: LoadedEngine
    kind: Kind
    model: str
    logprobs: bool = False
    prompt_logprobs: bool = False
    answers: int = 1
    sequences: Sequence[RunningSequence] = ()
    echoes: Sequence[str] = ()
    id: str | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.id or secrets.token_hex(12)
        self._told = list[int](), list[orjson.Fragment]()  # a prompt, and what is told of its tokens

    def full(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The answer to a request that is not streamed, for orjson."""
        choices = [self._choice(index, generation) for index, generation in enumerate(generations)]
        object_name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {
            **self._head(object_name),
            "choices": choices,
            "usage": usage(generations, self.answers),
            **(self._of_prompt(0, generations[0]) if self.kind == "chat" else {}),
            **_warnings(generations),
        }

    def infill(self, text: str, usage: dict[str, Any], warnings: list[str], *, stream: bool) -> dict[str, Any]:
        """The answer to a fill-in-the-middle request; its finish reason is always that the hole is full.

        Mistral's clients look for a message, as in a chat, and OpenAI's for a text.
        """
        said = {"role": "assistant", "content": text}
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        choice |= {"delta" if stream else "message": said}
        head = self._head("text_completion")
        return {**head, "choices": [choice], "usage": usage, **({"warnings": warnings} if warnings else {})}

    async def chunks(
        self, events: AsyncIterator[tuple[int, Event]], count: int, options: StreamOptions | None, *, diffusing: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The answer to a streamed request, in pieces as its text comes.

        options: whether a last chunk has the usage, and those before it the tokens of their answer so far, or null.
        """
        with_usage = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        emitted = collections.Counter[int]()

        def so_far(index: int) -> dict[str, Any]:
            if not with_usage:
                return {}
            return {"usage": _counts(len(self.sequences[index].prompt), emitted[index]) if continuous else None}

        generations: dict[int, Generation] = {}
        values: dict[int, TokenValues] = {}
        if self.kind == "chat":
            for index in range(count):
                yield {**self._chunk(index, {"role": "assistant", "content": ""}), **so_far(index)}
        async for index, event in events:
            if index not in values and isinstance(event, Text | Finished):
                values[index] = begun = await self._apart(self._begin, index)  # now the prompt's are complete
                if echo := self._echo(index):
                    chunk = await self._apart(self._chunk, index, {"content": echo}, begun)
                    yield {**chunk, **so_far(index)}
            if isinstance(event, Text):
                emitted[index] += len(event.token_ids)
                values[index].tell(event.token_ids, event.logprobs, event.confidences)
                for delta in self._deltas(event):
                    yield {**self._chunk(index, delta, values[index]), **so_far(index)}
            elif isinstance(event, Step):
                if diffusing and event.kind in ("denoise", "draft"):
                    yield {**self._chunk(index, {}), "diffusing": self._block(event), **so_far(index)}
            elif isinstance(event, Finished):
                generations[index] = event.generation
                emitted[index] = len(event.generation.token_ids)
                last = await self._apart(self._last_chunk, index, event.generation, values[index])
                yield {**last, **so_far(index)}
        if with_usage:
            total = usage([generations[index] for index in sorted(generations)], self.answers)
            yield {**self._head(self._chunk_name), "choices": [], "usage": total}

    async def _apart(self, make: Callable[..., Made], *arguments: Any) -> Made:
        """What a function makes; where that tells of a whole prompt, which may take a second, in a thread."""
        whole = self.prompt_logprobs or self.echoes
        return await in_thread(lambda: make(*arguments)) if whole else make(*arguments)

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _head(self, object_name: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": object_name, "created": self.created, "model": self.model}

    def _choice(self, index: int, generation: Generation) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": finish_reason(generation)}
        if self.kind == "chat":
            calls = [
                {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in generation.tool_calls
            ]
            content = generation.content or (None if calls else "")
            choice["message"] = {"role": "assistant", "content": content, "refusal": None}
            if generation.reasoning:
                choice["message"] |= dict.fromkeys(_THOUGHTS, generation.reasoning)
            if calls:
                choice["message"]["tool_calls"] = calls
        else:
            choice["text"] = self._echo(index) + generation.text
        return {**choice, **self._token_values(index, generation, self._begin(index))}

    def _chunk(self, index: int, delta: dict[str, Any], values: TokenValues | None = None) -> dict[str, Any]:
        """One chunk with its tokens' log-probabilities."""
        choice: dict[str, Any] = {"index": index, "finish_reason": None}
        if self.kind == "chat":
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        choice |= {"logprobs": None} if values is None else values.take()
        return {**self._head(self._chunk_name), "choices": [choice]}

    def _last_chunk(self, index: int, generation: Generation, values: TokenValues) -> dict[str, Any]:
        """The chunk that ends an answer."""
        chunk = self._chunk(index, {})
        chunk["choices"][0] |= {"finish_reason": finish_reason(generation)}
        chunk["choices"][0] |= self._token_values(index, generation, values)
        if self.kind == "chat":
            chunk |= self._of_prompt(index, generation)
        return chunk | _warnings([generation])

    def _deltas(self, event: Text) -> list[dict[str, Any]]:
        if self.kind == "completion":
            return [{"content": event.text}] if event.text else []
        return [_delta(part) for part in event.parts]

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

    def _begin(self, index: int) -> TokenValues:
        """What collects the log-probabilities of one answer, its echoed prompt first."""
        values = TokenValues(self.engine.text, chat=self.kind == "chat")
        scores = self.sequences[index].prompt_scores
        if self.echoes and self.logprobs and scores is not None:
            values.echo(self.sequences[index].prompt, scores.by_token)
        return values

    def _echo(self, index: int) -> str:
        return self.echoes[index] if self.echoes else ""

    def _token_values(self, index: int, generation: Generation, values: TokenValues) -> dict[str, Any]:
        """Log-probabilities and confidences of the tokens that were not sent yet, where they were requested."""
        values.finish(generation)
        fields = values.take(end=len(self._echo(index)) + len(generation.text))
        if self.kind == "completion":
            fields |= self._of_prompt(index, generation)
        return fields

    def _of_prompt(self, index: int, generation: Generation) -> dict[str, Any]:
        """The field `prompt_logprobs`, where it was requested."""
        if not self.prompt_logprobs or generation.prompt_logprobs is None:
            return {}
        prompt = self.sequences[index].prompt
        if self._told[0] is not prompt:  # else the answer before was to the same one, and the two share what is told
            told = logprobs_by_id(self.engine.text, prompt, generation.prompt_logprobs)
            # One by one, since a token's objects take four times its text, and copied, since orjson's buffers do too.
            self._told = prompt, [orjson.Fragment(memoryview(orjson.dumps(one)).tobytes()) for one in told]
        return {"prompt_logprobs": self._told[1]}


def finish_reason(generation: Generation) -> str:
    """Why an answer ends, in OpenAI's words: for calls, unless a limit or a stop text has cut the last of them."""
    calls = generation.tool_calls
    if not calls or generation.finish_reason != "stop" or (generation.stop_text is not None and not calls[-1].whole):
        return generation.finish_reason
    return "tool_calls"


def call_id() -> str:
    """A name for a call, which its result comes back with."""
    return f"call_{secrets.token_hex(12)}"


def _delta(part: Delta) -> dict[str, Any]:
    if part.part == "call":
        function = {"name": part.text, "arguments": ""}
        return {"tool_calls": [{"index": part.index, "id": call_id(), "type": "function", "function": function}]}
    if part.part == "arguments":
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
    return dict.fromkeys(_THOUGHTS if part.part == "reasoning" else ("content",), part.text)


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
        **_counts(prompt, emitted),
        "prompt_tokens_details": {"cached_tokens": sum(g.reused_tokens for g in prompts)}
        | ({"image_tokens": sum(sum(g.image_tokens) for g in prompts)} if first.image_tokens else {}),
        "completion_tokens_details": {"reasoning_tokens": sum(g.reasoning_tokens for g in generations)},
        "mode": first.mode,
        "block_length": first.block_length,
        "threshold": first.threshold,
        "nfe": nfe,
        "acceptance": {"mean": sum(lengths) / len(lengths) if lengths else None, "lengths": lengths},
        "decode_tpf": decode_tpf,
        "e2e_tpf": e2e_tpf,
        "timings_ms": timings,
    }


def _counts(prompt: int, emitted: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": emitted, "total_tokens": prompt + emitted}


def _warnings(generations: Sequence[Generation]) -> dict[str, list[str]]:
    """The field `warnings`, each one once; without any there is no such field."""
    warnings = dict.fromkeys(warning for generation in generations for warning in generation.warnings)
    return {"warnings": list(warnings)} if warnings else {}


async def trace_lines(
    engine: LoadedEngine, events: AsyncIterator[tuple[int, Event]], request_id: str | None
) -> AsyncIterator[dict[str, Any]]:
    """The events of one request as the lines of a trace: the header, with the client's id if it gives one, then all."""
    has_header = False
    async for _, event in events:
        if not has_header:
            has_header = True
            yield header(engine, event) | ({} if request_id is None else {"request_id": request_id})
        yield as_dict(event)
