"""The front door: load an engine, generate from it, stream from it.

In: an engine folder, prompts and options. Out: `Generation`, or a stream of events that ends with one. The command line
and the tests come through here; servers through `scheduler.Scheduler`, which adds a thread and a queue to the same
`Batch`. The surprising fact: one request and many are the same code.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..contract import EngineInfo, read_engine
from ..errors import RequestError
from .batching.batch import KEPT_PREFIXES, Batch, Served
from .engines.drafter import check_gate
from .engines.engine import Engine, Pass, Prediction
from .events.events import BlockStarted, Event, Finished, Pieces, Reporter, Started, Step, Text, answers
from .planning.cost import CostCurve, measure
from .planning.draft_planner import Record
from .requests.options import make_options
from .requests.prepare import Generation, Prompt, prepare
from .requests.sequence import Sequence
from .text.codec import TextCodec


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

    @functools.cached_property
    def record(self) -> Record:
        """What drafts have brought so far, over all requests that plan by it."""
        return Record()


def load(path: str | Path, *, threads: int | None = None, device: int | str | None = None) -> LoadedEngine:
    """Load an engine folder.

    Args:
        path: a folder made by `nemodiff build`.
        threads: CPU threads of an ONNX Runtime or torch engine; None takes one per physical core.
        device: "cpu", "cuda", or a GPU by CUDA's number, as 1 or "cuda:1"; None is what the engine was built for, and
            for a torch engine a GPU if there is one.

    Raises:
        EngineError: with the command that fixes it.
        RequestError: threads or device is out of range.
    """
    started = time.perf_counter()
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise RequestError(f"threads is {threads!r}, allowed: 1 or more, or None for one per core")
    folder = Path(path)
    info = read_engine(folder)
    chosen = check_device(device, info.manifest.backend)
    text = TextCodec(folder)
    backend: Engine
    if info.manifest.backend == "onnxruntime":
        from .engines.onnxruntime import OnnxRuntimeEngine

        backend = OnnxRuntimeEngine(folder, info, threads)
    elif info.manifest.backend == "torch":
        from .engines.torch.engine import TorchEngine

        backend = TorchEngine(folder, info, chosen, threads)
    else:
        from .engines.tensorrt.engine import TensorRTEngine

        backend = TensorRTEngine(folder, info, 0 if chosen is None else chosen)
    if info.has_adapter:
        check_gate(backend, folder)
    return LoadedEngine(folder, backend, text, (time.perf_counter() - started) * 1e3)


def check_device(device: object, backend: str) -> Any:
    """A GPU's number, "cpu", or None for the backend's own choice. Raises RequestError."""
    if device is None:
        return None
    allowed = {"onnxruntime": ("cpu",), "torch": ("cpu", "cuda", "cuda:N")}.get(backend, ("cuda", "cuda:N"))
    found = None if isinstance(device, bool) else re.fullmatch(r"(cpu)|cuda|(?:cuda:)?(\d{1,9})", str(device))
    if found is None or ("cpu" if found[1] else "cuda") not in allowed:
        raise RequestError(f"device is {device!r}, allowed on {backend}: {', '.join(allowed)}; choose one of them")
    return "cpu" if found[1] else int(found[2] or 0)


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
    told = events(engine, prompts, rows=rows, prefix_reuse=prefix_reuse, text=False, **options)
    return answers(told)


def stream(
    engine: LoadedEngine, prompt: Prompt, *, steps: bool = False, **options: Any
) -> Iterator[Started | Pieces | BlockStarted | Step | Text | Generation]:
    """Generate one answer as it grows: `Text` events, with `steps` all others too, at last the `Generation`.

    The texts joined are the generation's text. Raises RequestError as `generate` does, before the first event.
    """
    told = events(engine, [prepare(engine, prompt, make_options(options)).prompt], steps=steps, **options)

    def chosen() -> Iterator[Started | Pieces | BlockStarted | Step | Text | Generation]:
        for event in told:
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

    The arguments are those of `generate_many`; `steps` tells of every pass, `text` of text before a request's end.
    Prompts are taken as rows become free. Raises RequestError.
    """
    chosen = make_options(options)
    check_rows(engine, rows)
    reporters: dict[Sequence, Reporter] = {}

    def sequences() -> Iterator[Sequence]:
        for number, prompt in enumerate(prompts):
            sequence = prepare(engine, prompt, chosen)
            reporters[sequence] = Reporter(number, sequence, steps=steps, text=text)
            yield sequence

    batch = Batch(engine.backend, rows, cost=lambda: engine.cost, kept=KEPT_PREFIXES if prefix_reuse else None)
    for served in _drive(batch, sequences()):
        yield from reporters[served.sequence].passed(served)
        if served.sequence.ended:
            yield from reporters.pop(served.sequence).finished(engine)


def check_rows(engine: LoadedEngine, rows: object) -> None:
    """Refuse a number of rows that the engine was not built for. Raises RequestError."""
    limit = engine.info.build.max_batch_size
    if not isinstance(rows, int) or not 1 <= rows <= limit:
        raise RequestError(f"rows is {rows!r}, allowed: 1 to {limit}; build the engine with a larger --max-batch-size")


def decode(engine: Engine, sequences: Iterable[Sequence], rows: int) -> Iterator[tuple[Sequence, Pass, Prediction]]:
    """Run sequences to their end, up to `rows` at a time; yields after each pass of each sequence.

    The prediction's arrays are overwritten by the next forward.
    """
    for served in _drive(Batch(engine, rows), iter(sequences)):
        yield served.sequence, served.asked, served.prediction


def _drive(batch: Batch, waiting: Iterator[Sequence]) -> Iterator[Served]:
    try:
        while True:
            while len(batch) < batch.rows and (sequence := next(waiting, None)) is not None:
                batch.add(sequence)
            if not len(batch):
                return
            for served in batch.step():
                if served.error is not None:
                    raise served.error
                yield served
    finally:
        batch.close()
