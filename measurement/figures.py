"""The figures of a benchmark's rounds: medians with their spread, under the names of vllm bench and llama-bench."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from .round import Round


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of one figure over the rounds."""

    median: float
    min: float
    max: float
    stddev: float
    rounds: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.median(values), min(values), max(values), spread, list(values))


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """Milliseconds over all requests, or all outputs, of all rounds."""

    mean: float
    median: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles | None:
        if not seconds:
            return None
        ordered = sorted(1e3 * value for value in seconds)
        p99 = ordered[round(0.99 * (len(ordered) - 1))]
        return cls(statistics.fmean(ordered), statistics.median(ordered), p99, ordered[-1])


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one test of one engine gave; docs/bench.md defines each figure.

    test: `pp` and a number of prompt tokens, or a mode. throughput: tokens per second, of the prompt in a `pp` test and
    of the output in the others. different_from_ar: answers with other tokens than ar's.
    """

    test: str
    concurrency: int
    throughput: Spread
    output_tokens: int
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2el_ms: Percentiles | None
    tokens_per_pass: float | None
    acceptance_length: float | None
    acceptance_rate: float | None
    passes: dict[str, int]
    peak_memory_bytes: dict[str, int | None]
    different_from_ar: int | None


def figures(test: str, concurrency: int, rounds: Sequence[Round], ar: Round | None) -> Figures:
    """The figures of a test; `ar` is a round of the same requests in mode ar."""
    prefill = test.startswith("pp")
    answers = [answer for one in rounds for answer in one.answers]
    last = rounds[-1].answers
    passes: dict[str, int] = {}
    for answer in answers:
        for kind, count in answer.sequence.nfe.items():
            passes[kind] = passes.get(kind, 0) + count
    decoding = sum(passes.values()) - passes["prefill"]
    tokens = sum(len(answer.tokens) for answer in answers)
    lengths = [length for answer in answers for length in answer.sequence.accepted]
    drafted = sum(answer.drafted for answer in answers)
    return Figures(
        test=test,
        concurrency=concurrency,
        throughput=Spread.of([one.input_throughput if prefill else one.output_throughput for one in rounds]),
        output_tokens=sum(len(answer.tokens) for answer in last),
        ttft_ms=Percentiles.of([answer.ttft for answer in answers]),
        tpot_ms=Percentiles.of([value for answer in answers if (value := answer.tpot) is not None]),
        itl_ms=Percentiles.of([gap for answer in answers for gap in answer.itl]),
        e2el_ms=Percentiles.of([answer.e2el for answer in answers]),
        tokens_per_pass=tokens / decoding if decoding and not prefill else None,
        acceptance_length=statistics.fmean(lengths) if lengths else None,
        acceptance_rate=sum(answer.kept for answer in answers) / drafted if drafted else None,
        passes={kind: count for kind, count in passes.items() if count},
        peak_memory_bytes={kind: _most([one.peak_memory[kind] for one in rounds]) for kind in rounds[0].peak_memory},
        different_from_ar=None
        if ar is None or prefill
        else sum(one.tokens != other.tokens for one, other in zip(last, ar.answers, strict=True)),
    )


def ratios(own: Figures, other: Figures) -> Spread:
    """The throughput of one engine over that of the other, round by round."""
    pairs = zip(own.throughput.rounds, other.throughput.rounds, strict=True)
    return Spread.of([mine / theirs for mine, theirs in pairs])


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
