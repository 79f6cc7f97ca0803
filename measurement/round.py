"""One round of requests, served as `nemodiff run` would serve them, and what each of them took."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Sequence as Prompts
from typing import NamedTuple

from ..runtime.batching.batch import Batch
from ..runtime.batching.slot import PassResult
from ..runtime.loading import LoadedEngine
from ..runtime.requests.options import Options
from ..runtime.requests.prepare import Prompt, prepare
from ..runtime.requests.sequence import Sequence
from .machine import PeakMemory


class Request(NamedTuple):
    """A prompt and how it is answered."""

    prompt: Prompt
    options: Options


@dataclasses.dataclass
class Answer:
    """An answered request. Times are seconds; `submitted` and `outputs` are points in time.

    outputs: when passes emitted tokens. drafted, kept: tokens of drafts that verifies looked at, and kept.
    """

    sequence: Sequence
    submitted: float
    outputs: list[float] = dataclasses.field(default_factory=list)
    drafted: int = 0
    kept: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens

    @property
    def ttft(self) -> float:
        """Time to first token: from submission until the first output."""
        return self.outputs[0] - self.submitted

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None below two."""
        later = len(self.tokens) - 1
        return (self.outputs[-1] - self.outputs[0]) / later if later > 0 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the times between outputs, each of which may be several tokens."""
        return [after - before for before, after in zip(self.outputs, self.outputs[1:], strict=False)]

    @property
    def e2el(self) -> float:
        """End-to-end latency: from submission until the last output."""
        return self.outputs[-1] - self.submitted

    def take(self, result: PassResult, emitted: int) -> None:
        """Note a pass; before it the answer had `emitted` tokens."""
        if len(self.tokens) > emitted:
            self.outputs.append(time.perf_counter())
        if result.pass_.kind == "verify":
            self.kept += result.outcome.kept or 0
            self.drafted += (result.outcome.kept or 0) + len(result.outcome.refused)


@dataclasses.dataclass
class Round:
    """All requests of a round, in their order."""

    seconds: float
    answers: list[Answer]
    peak_memory: dict[str, int | None]

    @property
    def output_throughput(self) -> float:
        """Output tokens of all answers per second of the round."""
        return sum(len(answer.tokens) for answer in self.answers) / self.seconds

    @property
    def input_throughput(self) -> float:
        """Prompt tokens per second of the round."""
        return sum(len(answer.sequence.prompt) for answer in self.answers) / self.seconds


def serve(engine: LoadedEngine, requests: Prompts[Request], concurrency: int) -> Round:
    """Answer requests, up to `concurrency` at a time; the next is submitted when one of them has ended.

    Raises RequestError.
    """
    peak, started = PeakMemory(), time.perf_counter()
    waiting = collections.deque(requests)
    answers: dict[Sequence, Answer] = {}
    emitted: dict[Sequence, int] = {}
    batch = Batch(engine.backend, concurrency, cost=engine.cost)
    try:
        while waiting or len(batch):
            while waiting and len(batch) < concurrency:
                request, now = waiting.popleft(), time.perf_counter()
                sequence = prepare(engine, request.prompt, request.options)
                answers[sequence], emitted[sequence] = Answer(sequence, now), 0
                batch.add(sequence)
            for result in batch.step():
                if result.error is not None:
                    raise result.error
                answers[result.sequence].take(result, emitted[result.sequence])
                emitted[result.sequence] = len(result.sequence.tokens)
    finally:
        batch.close()
    return Round(time.perf_counter() - started, list(answers.values()), peak.read())
