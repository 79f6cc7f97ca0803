"""The front door: generate from an engine, one request or many, whole or as a stream of events.

Servers come through `scheduler.Scheduler`, which adds a thread and a queue to the same `Batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import NemodiffError
from .batching.batch import Batch, kept_prefixes
from .batching.slot import PassResult
from .engines.engine import Engine
from .engines.passes import Pass, Prediction
from .events.events import BlockStarted, Event, Finished, Pieces, Started, Step, Text, answers
from .events.reporter import Reporter
from .loading import LoadedEngine, check_engine, check_rows
from .planning.pass_costs import PassCosts
from .requests.generation import Generation
from .requests.options import make_options
from .requests.prepare import Prompt, prepare
from .requests.sequence import Sequence
from .text.checks import check_list


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
    return next(generate_many(engine, [prompt], prefix_reuse=False, **options))


def generate_many(
    engine: LoadedEngine, prompts: Iterable[Prompt], *, rows: int = 1, prefix_reuse: bool = True, **options: Any
) -> Iterator[Generation]:
    """Generate answers in the order of the prompts, up to `rows` of them at a time.

    `rows` is at most the engine's max_batch_size. `prefix_reuse` copies the K/V of a prompt's beginning from an earlier
    prompt that begins alike. Each answer is what `generate` gives alone. Raises RequestError.
    """
    return answers(events(engine, prompts, rows=rows, prefix_reuse=prefix_reuse, text=False, **options))


def stream(
    engine: LoadedEngine, prompt: Prompt, *, steps: bool = False, **options: Any
) -> Iterator[Started | Pieces | BlockStarted | Step | Text | Generation]:
    """Generate one answer as it grows: `Text` events, with `steps` all others too, at last the `Generation`.

    The texts joined are the generation's text. Raises RequestError as `generate` does, before the first event.
    """
    check_engine(engine)
    sequence = prepare(engine, prompt, make_options(options))

    def chosen() -> Iterator[Started | Pieces | BlockStarted | Step | Text | Generation]:
        for event in sequence_events(engine, [sequence], steps=steps):
            if isinstance(event, Finished):
                yield event.generation
            elif steps or isinstance(event, Text):
                yield event

    return chosen()


def events(
    engine: LoadedEngine,
    prompts: Iterable[Prompt],
    *,
    rows: int = 1,
    prefix_reuse: bool = False,
    steps: bool = False,
    text: bool = True,
    **options: Any,
) -> Iterator[Event]:
    """All events of some requests as they happen; a request's number is its prompt's place, from 0.

    The arguments are those of `generate_many`; `steps` reports every pass, `text` text before a request's end.
    Prompts are taken as rows become free. Raises RequestError.
    """
    check_engine(engine)
    check_list(prompts, "prompts", "prompts; for one there is generate")
    chosen = make_options(options)
    check_rows(engine.info, rows)
    sequences = (prepare(engine, prompt, chosen) for prompt in prompts)
    return sequence_events(engine, sequences, rows=rows, prefix_reuse=prefix_reuse, steps=steps, text=text)


def sequence_events(
    engine: LoadedEngine,
    sequences: Iterable[Sequence],
    *,
    rows: int = 1,
    prefix_reuse: bool = False,
    steps: bool = False,
    text: bool = True,
    failed: Callable[[int, NemodiffError], None] | None = None,
) -> Iterator[Event]:
    """The events of requests that `prepare` has made, as `events` gives those of prompts.

    `failed` is told the number of a request that cannot go on, and why; the others do. Without it they all end.
    """
    reporters: dict[Sequence, Reporter] = {}

    def reported() -> Iterator[Sequence]:
        for number, sequence in enumerate(sequences):
            reporters[sequence] = Reporter(number, sequence, steps=steps, text=text)
            yield sequence

    kept = kept_prefixes(engine.backend) if prefix_reuse else None
    batch = Batch(engine.backend, rows, cost=engine.cost, kept=kept)
    for result in _drive(batch, reported()):
        if result.error is not None:
            number = reporters.pop(result.sequence).number
            if failed is None or not isinstance(result.error, NemodiffError):
                raise result.error
            failed(number, result.error)
            continue
        yield from reporters[result.sequence].passed(result)
        if result.sequence.ended:
            yield from reporters.pop(result.sequence).finished(engine)


def decode(
    engine: Engine, sequences: Iterable[Sequence], rows: int, *, kept: int | None = None, costs: PassCosts | None = None
) -> Iterator[tuple[Sequence, Pass, Prediction]]:
    """Run sequences to their end, up to `rows` at a time; yields after each pass of each sequence.

    The prediction's arrays are overwritten by the next forward. `kept` and `costs` are those of `Batch`; without
    `costs` all rows are in one forward.
    """
    for result in _drive(Batch(engine, rows, kept=kept, cost=costs), iter(sequences)):
        if result.error is not None:
            raise result.error
        yield result.sequence, result.pass_, result.prediction


def _drive(batch: Batch, waiting: Iterator[Sequence]) -> Iterator[PassResult]:
    try:
        while True:
            while (running := len(batch)) < batch.rows and (sequence := next(waiting, None)) is not None:
                batch.add(sequence)
            if not running:
                return
            yield from batch.step()
    finally:
        batch.close()
