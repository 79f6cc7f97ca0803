"""What the generating routes do with an engine: answer, trace or fill in the middle.

No handler blocks the event loop: what takes time runs in the scheduler's worker or in a thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...contract import MODES
from ...errors import RequestError
from ...runtime.events.events import Event, Finished
from ...runtime.loading import LoadedEngine
from ...runtime.requests.options import AUTO, make_options
from ...runtime.requests.prepare import Prompt, encode, encode_with_images
from ...runtime.requests.spellings import with_seed
from ...runtime.scheduler.scheduler import Scheduler
from ...runtime.text.checks import check_text
from .body import Chat, Completion, Decoding, Detokenize, Tokenize, Watched
from .dialects.dialect import DialectBody
from .dialects.messages_body import Counted, Messages
from .dialects.messages_writer import MessagesWriter
from .dialects.responses_body import Responses
from .dialects.responses_writer import ResponsesWriter
from .error_responses import ModelNotFoundError
from .fim_body import Fim
from .image_urls import image_urls, with_images
from .infill_queue import CancelledError, InfillQueue
from .metrics import ServerMetrics
from .models import describe
from .request_group import DrainingError, RequestGroup, RequestTimeoutError, on_disconnect
from .request_log import record_of
from .responses import ResponseBuilder, trace_lines
from .sse import EventStreamResponse
from .threads import in_thread

_NAMED = (*MODES, AUTO)  # the modes that a model's name may choose


@dataclasses.dataclass(frozen=True)
class Handlers:
    """One engine for the routes.

    name: the model's, for clients. defaults: options that a request does not give. timeout: seconds of one request.
    token_pool: encodes and decodes where that is all that is asked for; else many long texts would take the loop's own
    threads, which chats need. image_pool: fetches images that a request names by http URL, None where that is not
    allowed.
    """

    engine: LoadedEngine
    scheduler: Scheduler
    infill_queue: InfillQueue
    metrics: ServerMetrics
    name: str
    defaults: dict[str, Any]
    timeout: float
    token_pool: concurrent.futures.Executor
    image_pool: concurrent.futures.Executor | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def generate(self, request: Request, body: Chat | Completion) -> Response:
        """Answer a chat or a completion, whole or streamed. Raises NemodiffError."""
        if isinstance(body, Completion) and body.suffix:
            return await self.infill(request, Fim.of(body))
        model, implied = self._model_options(body)
        group = await self._request_group(request, body)
        diffusing, answers = bool(body.diffusing), body.n or 1

        def choices() -> list[tuple[Prompt, dict[str, Any]]]:
            options = with_seed(implied | body.options())
            prompts = self._prompts(body)
            self.scheduler.check_count(len(prompts) * answers)  # before each has options of its own
            return _choices(prompts, options, answers)

        requests = await group.submit(choices, steps=diffusing)
        builder = ResponseBuilder(
            self.engine,
            "chat" if isinstance(body, Chat) else "completion",
            model,
            logprobs="logprobs" in requests[0][1] or (isinstance(body, Completion) and body.logprobs is not None),
            prompt_logprobs=body.prompt_logprobs is not None,
            answers=answers,
            sequences=group.sequences,
            id=body.request_id,
        )
        if isinstance(body, Completion) and body.echo:
            builder.echoes = [
                prompt if isinstance(prompt, str) else self.engine.text.decode(sequence.prompt)
                for (prompt, _), sequence in zip(requests, group.sequences, strict=True)
            ]
        if not body.stream:
            finished = await group.finished(request.receive)
            generations = [event.generation for event in finished]
            # In a thread, since thousands of tokens with their names and neighbours would hold up other clients.
            return await asyncio.to_thread(
                lambda: Response(orjson.dumps(builder.full(generations)), media_type="application/json")
            )
        chunks = builder.chunks(group.events(), len(requests), body.stream_options, diffusing=diffusing)
        return EventStreamResponse(chunks, group.close, lambda: group.more, done=True)

    async def answer(self, request: Request, body: Messages | Responses) -> Response:
        """Answer a request of another API, whole or streamed. Raises NemodiffError."""
        model, implied = self._model_options(body)
        # Such APIs have no limit that is too high: it is a bound, and clients send that of their own model.
        room = {"max_new_tokens": self.engine.info.build.max_seq_len, "fit": True}
        group = await self._request_group(request, body)

        def only() -> list[tuple[Prompt, dict[str, Any]]]:
            options = self._enforceable(with_seed(room | implied | body.options()))
            return [(self._prompts(body)[0], options)]

        ((_, options),) = await group.submit(only)
        codec = self.engine.text if "logprobs" in options else None
        writer = MessagesWriter(model) if isinstance(body, Messages) else ResponsesWriter(model, body=body, codec=codec)
        if not body.stream:
            (finished,) = await group.finished(request.receive)
            return await in_thread(lambda: JSONResponse(writer.full(finished.generation)))
        return EventStreamResponse(
            writer.events(group.events()), group.close, lambda: group.more, done=False, named=True
        )

    async def count(self, body: Counted) -> dict[str, Any]:
        """The number of tokens of a conversation in Anthropic's words. Raises NemodiffError."""
        _, implied = self._model_options(body)

        def counted() -> int:
            given = body.options()
            with body.own_words():
                options = make_options(self._enforceable(implied | given))
                return len(encode_with_images(self.engine, self._prompts(body)[0], options)[0])

        return {"input_tokens": await in_thread(counted, await self._pool(body) or self.token_pool)}

    def _enforceable(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of another API without a budget of thinking that nothing could enforce."""
        if self.engine.text.end_think is None:
            options.pop("thinking_budget", None)
        return options

    async def trace(self, request: Request, body: Watched) -> Response:
        """Stream the events of one request as a trace. Raises NemodiffError."""
        _, implied = self._model_options(body)
        group = await self._request_group(request, body)
        await group.submit(lambda: [(self._prompts(body)[0], with_seed(implied | body.options()))], steps=True)
        lines = trace_lines(self.engine, group.events(), body.request_id)
        return EventStreamResponse(lines, group.close, lambda: group.more, done=False)

    def _prompts(self, body: Chat | Completion | DialectBody) -> list[Prompt]:
        """The prompts with their images, which may have to be fetched. Raises RequestError."""
        return with_images(body.prompts(), self.image_pool is not None)

    async def _pool(self, body: Chat | Completion | DialectBody) -> concurrent.futures.Executor | None:
        """The threads in which a request may wait for hosts of images, if it names some. Raises RequestError."""
        if self.image_pool is None:
            return None
        return self.image_pool if await in_thread(lambda: image_urls(body.prompts())) else None

    async def infill(self, request: Request, body: Fim) -> Response:
        """Fill the hole between a prefix and a suffix. Raises NemodiffError."""
        model, _ = self._model_options(body)
        cancelled = threading.Event()
        future = self.infill_queue.submit(body.prompt, body.suffix, cancelled, **body.options())

        def leave() -> None:
            cancelled.set()
            future.cancel()

        watch = asyncio.create_task(on_disconnect(request.receive, leave))
        try:
            filled = await asyncio.wait_for(asyncio.wrap_future(future), self.timeout)
        except TimeoutError:
            raise RequestTimeoutError(self.timeout) from None
        except (CancelledError, asyncio.CancelledError):
            if self.infill_queue.closed:
                raise DrainingError from None
            if not cancelled.is_set():
                raise
            return Response()  # the client has gone, and nobody reads this
        finally:
            cancelled.set()
            watch.cancel()
        usage = await in_thread(lambda: body.usage(filled, self.engine.text))
        builder = ResponseBuilder(self.engine, "completion", model, id=body.request_id)
        response = builder.infill(body.cut(filled.holes[0]), usage, body.warnings(), stream=bool(body.stream))
        if not body.stream:
            return JSONResponse(response)
        del response["usage"]
        chunks = [response]
        if body.stream_options is not None and body.stream_options.include_usage:
            response["usage"] = usage if body.stream_options.continuous_usage_stats else None
            told = {name: value for name, value in response.items() if name != "warnings"}
            chunks.append({**told, "choices": [], "usage": usage})
        return EventStreamResponse(_each(chunks), cancelled.set, lambda: True, done=True)

    async def tokenize(self, body: Tokenize) -> Response:
        """The tokens of a text or a conversation. Raises RequestError."""
        self._mode(self.name if body.model is None else body.model)
        if (body.messages is None) == (body.prompt is None):
            raise RequestError("messages or prompt: exactly one of them is allowed; give one")
        text = self.engine.text

        def encoded() -> list[int]:
            if body.prompt is not None:
                check_text(body.prompt, "prompt")
                return text.encode_plain(body.prompt) if body.add_special_tokens is False else text.encode(body.prompt)
            messages: list[Mapping[str, Any]] = [message.plain() for message in body.messages or []]
            return encode(self.engine, messages, make_options(body.template_options(body.messages)))

        def answered() -> Response:  # in the thread too, since a text has millions of tokens
            tokens = encoded()
            names = [text.name(token) for token in tokens] if body.return_token_strs else None
            most = self.engine.info.build.max_seq_len
            answer = {"count": len(tokens), "max_model_len": most, "tokens": tokens, "token_strs": names}
            return Response(orjson.dumps(answer), media_type="application/json")

        return await in_thread(answered, self.token_pool)

    async def detokenize(self, body: Detokenize) -> Response:
        """The text of tokens. Raises RequestError."""
        self._mode(self.name if body.model is None else body.model)

        def answered() -> Response:
            vocab = self.engine.info.model.vocab_size
            if (wrong := max(body.tokens, default=0)) >= vocab:
                raise RequestError(f"tokens holds token id {wrong!r:.60}, allowed: 0 to {vocab - 1}")
            text = self.engine.text.decode_all(body.tokens)
            return Response(orjson.dumps({"prompt": text}), media_type="application/json")

        return await in_thread(answered, self.token_pool)

    def models(self) -> dict[str, Any]:
        """The list of models: the one there is, and its names that choose a mode."""
        names = [self.name, *(f"{self.name}:{mode}" for mode in _NAMED)]
        ends = {"has_more": False, "first_id": names[0], "last_id": names[-1]}  # for Anthropic's clients
        return {"object": "list", "data": [self.model(name) for name in names], **ends}

    def model(self, name: str) -> dict[str, Any]:
        """One model by any of its names, in the words of OpenAI, vLLM and Anthropic. Raises ModelNotFoundError."""
        self._mode(name)
        return describe(name, self.created, self.engine.info.build, self.scheduler.statistics.rows)

    async def _request_group(self, request: Request, body: Chat | Completion | DialectBody) -> RequestGroup:
        record = record_of(request)

        def observe(index: int, events: list[Event]) -> None:
            if isinstance(events[-1], Finished):
                self.metrics.observe(events[-1])
            if record is not None:
                record.observe(index, events)

        tells_cut = not isinstance(body, Messages)  # which would take it for one that the model has ended
        pool = await self._pool(body)
        return RequestGroup(self.scheduler, observe, self.timeout, pool, body.own_words, tells_cut)

    def _model_options(self, body: Decoding) -> tuple[str, dict[str, Any]]:
        """The requested model's name, and the options that it implies. Raises ModelNotFoundError."""
        model = body.model if body.model is not None else self.name
        mode = self._mode(model)
        return model, self.defaults | ({} if mode is None else {"mode": mode})

    def _mode(self, model: str) -> str | None:
        """The mode that a model's name chooses, None for its plain name. Raises ModelNotFoundError."""
        if model == self.name:
            return None
        base, _, mode = model.rpartition(":")
        if base == self.name and mode in _NAMED:
            return mode
        raise ModelNotFoundError(f"model {model!r:.60} is not here, allowed: {self.name}; see /v1/models")


def _choices(prompts: list[Prompt], options: dict[str, Any], n: int) -> list[tuple[Prompt, dict[str, Any]]]:
    """Each prompt `n` times; the seed of a further answer is that of the one before plus 1, and 0 after the last."""
    requests = []
    for prompt in prompts:
        for index in range(n):
            further = {"seed": (options["seed"] + index) % 2**64} if index and "seed" in options else {}
            requests.append((prompt, options | further))
    return requests


async def _each(values: Iterable[Any]) -> AsyncIterator[Any]:
    for value in values:
        yield value
