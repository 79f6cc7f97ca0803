"""The front door: load an engine, generate from it, stream from it.

In: an engine folder, prompts and options. Out: `Generation`, or a stream of events that ends with one. CLI, servers and
tests all come through here. The surprising fact: one request and many are the same code; `decode` keeps as many rows
busy as it is given, and a finished row's place is taken by the last row, then by the next request.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..contract import EngineInfo, read_engine
from ..errors import EngineError, RequestError
from .ar import Loop, ar
from .chooser import TokenLogprobs
from .cost import CostCurve, measure
from .diffusion import diffusion
from .engine import Cache, Engine, Pass, PassKind, Prediction
from .options import Options, check_text, make_options
from .quadratic import quadratic_spec
from .self_spec import linear_spec
from .sequence import FinishReason, Sequence
from .settings import settle
from .text import Message, TextCodec

Prompt = str | list[int] | list[Message]

LOOPS: dict[str, Callable[[Sequence], Loop]] = {
    "ar": ar,
    "diffusion": diffusion,
    "linear_spec": linear_spec,
    "quadratic_spec": quadratic_spec,
}


@dataclasses.dataclass(frozen=True)
class LoadedEngine:
    """An engine with its tokenizer, ready to generate; made by `load`."""

    folder: Path
    backend: Engine
    text: TextCodec
    load_ms: float

    @property
    def info(self) -> EngineInfo:
        """The engine's description: model, build choices, manifest."""
        return self.backend.info

    @functools.cached_property
    def cost(self) -> CostCurve:
        """Seconds of a forward by its tokens, measured at the first use."""
        return measure(self.backend)


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Tokens emitted by each verify pass, bonus included; `mean` is None without a verify pass."""

    mean: float | None
    lengths: list[int]


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished request. Times are milliseconds of wall clock; docs/semantics.md defines the counts.

    logprobs, confidences: one per token, None unless asked for.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    mode: str
    block_length: int
    threshold: float
    nfe: dict[PassKind, int]
    decode_tpf: float | None
    e2e_tpf: float | None
    acceptance: Acceptance
    timings_ms: dict[str, float]
    logprobs: list[TokenLogprobs] | None = None
    confidences: list[float | None] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As one JSON object; what was not asked for is left out."""
        unasked = [name for name in ("logprobs", "confidences") if getattr(self, name) is None]
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unasked}


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass of the request, for displays: the ids before and after it, and the confidence of each prediction."""

    kind: PassKind
    start: int
    before: list[int]
    after: list[int]
    confidence: list[float]


@dataclasses.dataclass(frozen=True)
class Text:
    """New text of the answer; it is never taken back."""

    text: str


def load(path: str | Path, *, threads: int | None = None) -> LoadedEngine:
    """Load an engine folder.

    Args:
        path: a folder made by `nemodiff build`.
        threads: CPU threads; None takes one per physical core.

    Raises:
        EngineError: with the command that fixes it.
        RequestError: threads is out of range.
    """
    started = time.perf_counter()
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise RequestError(f"threads is {threads!r}, allowed: 1 or more, or None for one per core")
    folder = Path(path)
    info = read_engine(folder)
    text = TextCodec(folder)
    if info.manifest.backend != "onnxruntime":
        raise EngineError(
            f"{folder}: built for backend {info.manifest.backend!r}, this nemodiff runs 'onnxruntime'; build it again: "
            f"nemodiff build CHECKPOINT -o {folder}"
        )
    from .onnxruntime_engine import OnnxRuntimeEngine

    backend = OnnxRuntimeEngine(folder, info, threads)
    return LoadedEngine(folder, backend, text, (time.perf_counter() - started) * 1e3)


def generate(engine: LoadedEngine, prompt: Prompt, **options: Any) -> Generation:
    """Generate one answer.

    Args:
        engine: from `load`.
        prompt: a user's text, a conversation (list of role/content messages), or token ids taken as they are.
        options: fields of `Options`.

    Returns:
        The answer with its counts and times.

    Raises:
        RequestError: an option is out of range or the prompt does not fit.
    """
    return next(iter(generate_many(engine, [prompt], **options)))


def generate_many(
    engine: LoadedEngine, prompts: Iterable[Prompt], *, rows: int = 1, **options: Any
) -> Iterator[Generation]:
    """Generate answers in the order of the prompts, up to `rows` of them sharing each forward.

    `rows` is at most the engine's max_batch_size. Each answer is what `generate` gives alone. Raises RequestError.
    """
    chosen = make_options(options)
    limit = engine.info.build.max_batch_size
    if not isinstance(rows, int) or not 1 <= rows <= limit:
        raise RequestError(f"rows is {rows!r}, allowed: 1 to {limit}; build the engine with a larger --max-batch-size")
    pending: collections.deque[Sequence] = collections.deque()

    def sequences() -> Iterator[Sequence]:
        for prompt in prompts:
            pending.append(prepare(engine, prompt, chosen))
            yield pending[-1]

    for _ in decode(engine.backend, sequences(), rows):
        while pending and pending[0].ended:
            yield result(engine, pending.popleft())


def stream(
    engine: LoadedEngine, prompt: Prompt, *, steps: bool = False, **options: Any
) -> Iterator[Text | Step | Generation]:
    """Generate one answer as it grows: `Text` events, with `steps` a `Step` after each pass, at last the `Generation`.

    The texts joined are the generation's text. Raises RequestError as `generate` does, before the first event.
    """
    sequence = prepare(engine, prompt, make_options(options))

    def events() -> Iterator[Text | Step | Generation]:
        for _, asked, prediction in decode(engine.backend, [sequence], 1):
            if steps:
                yield _step(asked, prediction)
            new = sequence.transcript.push(sequence.tokens, final=sequence.finish is not None)
            if new:
                yield Text(new)
        yield result(engine, sequence)

    return events()


def decode(engine: Engine, sequences: Iterable[Sequence], rows: int) -> Iterator[tuple[Sequence, Pass, Prediction]]:
    """Run sequences to their end, up to `rows` at a time; yields after each pass of each sequence.

    The prediction's arrays are overwritten by the next forward.
    """
    cache = engine.open(rows)
    try:
        yield from _decode(cache, iter(sequences), rows)
    finally:
        cache.close()


def _decode(cache: Cache, waiting: Iterator[Sequence], rows: int) -> Iterator[tuple[Sequence, Pass, Prediction]]:
    active: list[tuple[Sequence, Loop, Pass]] = []
    while True:
        while len(active) < rows and (sequence := next(waiting, None)) is not None:
            sequence.started = time.perf_counter()
            loop = LOOPS[sequence.settings.mode](sequence)
            active.append((sequence, loop, next(loop)))
        if not active:
            return
        served = active.copy()
        predictions = cache.forward([asked for _, _, asked in served])
        for row in range(len(served) - 1, -1, -1):
            sequence, loop, asked = served[row]
            sequence.nfe[asked.kind] += 1
            try:
                active[row] = (sequence, loop, loop.send(predictions[row]))
            except StopIteration:
                sequence.ended = time.perf_counter()
                last = active.pop()
                if row < len(active):
                    cache.move(len(active), row)
                    active[row] = last
        for row, prediction in enumerate(predictions):
            yield served[row][0], served[row][2], prediction


def prepare(engine: LoadedEngine, prompt: Prompt, options: Options) -> Sequence:
    """Encode a prompt and check every option against the engine. Raises RequestError."""
    ids = encode(engine, prompt, options)
    settings = settle(engine.info, engine.text, len(ids), options)
    budgeted = settings.mode == "quadratic_spec" and settings.groups == "auto"
    transcript = engine.text.transcript(settings.stop, settings.stop_token_ids)
    return Sequence(engine.info.model, ids, settings, transcript, engine.cost if budgeted else None)


def encode(engine: LoadedEngine, prompt: Prompt, options: Options) -> list[int]:
    """The prompt's token ids. Raises RequestError."""
    if isinstance(prompt, str):
        check_text(prompt, "prompt")
        if not options.chat:
            return _not_empty(engine.text.encode(prompt))
        messages: list[Message] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        vocab = engine.info.model.vocab_size
        ids = [i for i in prompt if isinstance(i, int)]
        wrong = next((i for i in ids if not 0 <= i < vocab), None)
        if wrong is not None:
            raise RequestError(f"prompt holds token id {wrong}, allowed: 0 to {vocab - 1}")
        return _not_empty(ids)
    elif isinstance(prompt, list) and all(isinstance(m, Mapping) for m in prompt):
        messages = [m for m in prompt if isinstance(m, Mapping)]
    else:
        raise RequestError(
            f"prompt is {prompt!r:.60}, allowed: text, a list of messages (role and content), or a list of token ids"
        )
    if options.system is not None:
        if messages and messages[0].get("role") == "system":
            raise RequestError("system text is given as an option and as the first message too; give it once")
        messages = [{"role": "system", "content": options.system}, *messages]
    return _not_empty(engine.text.encode_chat(messages, options.thinking))


def _not_empty(ids: list[int]) -> list[int]:
    if not ids:
        raise RequestError("the prompt is empty; give at least one token")
    return ids


def result(engine: LoadedEngine, sequence: Sequence) -> Generation:
    """The finished request with its figures."""
    assert sequence.finish is not None
    emitted, passes = len(sequence.tokens), sum(sequence.nfe.values())
    decoding = passes - sequence.nfe["prefill"]
    lengths = sequence.accepted
    return Generation(
        text=sequence.transcript.text(sequence.tokens),
        token_ids=sequence.tokens,
        prompt_tokens=len(sequence.prompt),
        finish_reason=sequence.finish,
        mode=sequence.settings.mode,
        block_length=sequence.settings.block_length,
        threshold=sequence.settings.threshold,
        nfe=sequence.nfe,
        decode_tpf=emitted / decoding if decoding else None,
        e2e_tpf=emitted / passes if passes else None,
        acceptance=Acceptance(sum(lengths) / len(lengths) if lengths else None, lengths),
        timings_ms={
            "load": engine.load_ms,
            "prefill": (sequence.first_token - sequence.started) * 1e3,
            "decode": (sequence.ended - sequence.first_token) * 1e3,
            "total": (sequence.ended - sequence.started) * 1e3,
        },
        logprobs=None if sequence.settings.logprobs is None else sequence.chooser.logprobs,
        confidences=sequence.confidences[:emitted] if sequence.settings.confidences else None,
    )


def _step(asked: Pass, prediction: Prediction) -> Step:
    after = prediction.next_ids if asked.kind in ("denoise", "draft") else prediction.token
    return Step(asked.kind, asked.write_at, asked.ids.tolist(), after.tolist(), prediction.confidence.tolist())
