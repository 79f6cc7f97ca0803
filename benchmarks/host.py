"""Measure what the host takes beside the passes of a GPU, on a CPU, where many requests decode together.

The torch engine runs as on a GPU, with graphs and forwards begun ahead, and its model is a script that takes no time of
what is measured. *Gap* is CPU time from the end of a forward to the start of the next while none is under way: so long
the card stands still. *Beside* is the rest, in which the next forward runs. Entering a device's context and launching,
which CUDA adds, are not in it. *Tokens per second* are those of a card whose forwards take what `CURVE` says, with the
host's CPU time between and beside them: what plans would bring there. Writes `results/host.json`.
"""

from __future__ import annotations

import argparse
import itertools
import operator
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import record
from gpu import script
from gpu.serve import WAYS, prompt_of

from nemodiff.builder.build import Builder
from nemodiff.engine_info import read_engine
from nemodiff.runtime.engines.layout import Layout
from nemodiff.runtime.engines.torch import plain
from nemodiff.runtime.engines.torch.device import Buffer, Graph, TorchDevice
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.events.events import Finished, Text
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.runtime.planning.cost import CostCurve
from nemodiff.runtime.scheduler.scheduler import Scheduler
from nemodiff.runtime.text.codec import TextCodec

ROWS = (1, 16, 64)
PROMPT, NEW_TOKENS = 64, 512
PAGES = 1024
# What forwards take by their tokens, about as of an 8B shape on an H200 (results/gpu_h200.md).
CURVE = CostCurve((1, 64, 256, 512), (0.0049, 0.006, 0.0087, 0.013))
PACKAGES = ("nemodiff", "numpy", "torch")


class Spent(NamedTuple):
    """Seconds of the host before a forward of some rows: while none was under way, and while one was."""

    gap: float
    beside: float
    rows: int


class Run(NamedTuple):
    """A round of requests: forwards in which all of them decode, and the tokens of all by the card's time."""

    forwards: list[Spent]
    tokens_per_second: float


class Card:
    """A GPU to the engine's forwards: a device of the CPU that notes when they run, and adds their time to the host's.

    Args:
        cpu: what holds the buffers.
        mask: the id of masks.
    """

    is_gpu = True

    def __init__(self, cpu: TorchDevice, mask: int) -> None:
        self.forwards: list[Spent] = []
        self._cpu = cpu
        self._mask = mask
        self._inputs: Buffer | None = None
        self._results: Any = None  # of the last forward
        self._ended = 0  # forwards
        self._since: float | None = None  # when the host's time began; None while a forward is started
        self._gap = self._beside = 0.0
        self._times = [(0.0, 0.0)]  # when forwards began and ended, by `now`; one that never was comes first
        self._launched = 0.0  # when a forward was started, by this thread's time
        self._waited = 0.0  # seconds, less those of the script

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cpu, name)

    def restart(self) -> None:
        """Forget the forwards so far, which have all ended."""
        self.forwards, self._ended, self._since, self._gap, self._beside = [], 0, None, 0.0, 0.0
        del self._times[1:]

    def now(self) -> float:
        """Seconds of this thread without the script's, and of its waits for forwards."""
        return time.thread_time() + self._waited

    def buffer(self, layout: Layout, there: Any, host: Any) -> Buffer:
        """One of its own, since what runs next shall not write over what has not been read."""
        return self._cpu.buffer(layout, self._cpu.bytes(layout.nbytes), host)

    def capture(self, work: Callable[[], None], pool: Any) -> Graph:
        """The work itself, done again by a replay, as eager work is."""
        return Work(work)

    def upload(self, buffer: Buffer) -> None:
        """A forward begins."""
        self.note()
        self._launched = time.thread_time()
        self._inputs = buffer

    def download(self, buffer: Buffer) -> None:
        """It has what the script says."""
        assert self._inputs is not None
        inputs, outputs = self._inputs.arrays, buffer.arrays
        ids, position = inputs["ids"][inputs["index"]], inputs["pos"][inputs["index"]]
        told = script.said(ids, position, self._mask, inputs["threshold"], inputs["span"][:, 0])
        for name, values in zip(("token", "confidence", "next_ids"), told, strict=True):
            outputs[name][:] = values
        self._results = buffer.there
        rows = np.count_nonzero(np.unique(inputs["row"]))  # row 0 is that of padding
        self.forwards.append(Spent(self._gap, self._beside, rows))
        self._waited -= time.thread_time() - self._launched
        began = max(self.now(), self._times[-1][1])
        self._times.append((began, began + CURVE.seconds(len(inputs["ids"]))))
        self._gap = self._beside = 0.0
        self._since = time.thread_time()

    def advance(self, inputs: Any, results: Any, table: Any) -> None:
        """A forward that was begun ahead gets what the one before has given, wherever that lies."""
        plain.advance(inputs, self._results.view(results.dtype), table)

    def arrange(self, inputs: Any, rows: int, results: Any, table: Any) -> None:
        """Likewise where its passes are arranged."""
        plain.arrange(inputs, inputs["known"][:rows], self._results.view(results.dtype), table, self._mask)

    def mark(self) -> int:
        """The number of forwards so far."""
        return len(self.forwards)

    def wait(self, mark: int) -> None:
        """So many forwards have ended."""
        self.note()
        self._ended = max(self._ended, mark)
        self._waited += max(self._times[mark][1] - self.now(), 0.0)
        self._since = time.thread_time()

    def between(self, begin: int, end: int) -> float:
        """What the forwards from one number to another took."""
        return self._times[end][1] - self._times[begin + 1][0]

    def note(self) -> None:
        """Add the host's time up to now to what it is, as the card begins a forward or has ended one."""
        if self._since is None:
            return
        seconds = time.thread_time() - self._since
        self._since = None
        if len(self.forwards) == self._ended:
            self._gap += seconds
        else:
            self._beside += seconds


class Work(NamedTuple):
    """A forward's network that a card can run again."""

    work: Callable[[], None]

    def replay(self) -> None:
        """See `device.Graph`."""
        self.work()


def engine_of(folder: Path) -> tuple[LoadedEngine, Card]:
    """An engine without a model, and what its forwards run on."""
    backend = TorchEngine(folder, read_engine(folder), "cpu", kernels=True, graphs=True, ahead=True, pages=PAGES)
    card = Card(backend.device, backend.info.model.mask_id)
    backend.steps.device = backend.forwards.device = card  # type: ignore[assignment]
    backend.model.forward = lambda *_: None  # type: ignore[method-assign]
    backend.model.advance = card.advance  # type: ignore[method-assign]
    backend.model.arrange = card.arrange  # type: ignore[method-assign]
    engine = LoadedEngine(folder, backend, TextCodec(folder), 0.0)
    engine.cost.clock = card.now
    engine.cost.begin(CURVE)
    return engine, card


def measured(engine: LoadedEngine, card: Card, way: str, rows: int, new_tokens: int) -> Run:
    """All rows decode from the last first token to the first end; tokens are counted from the first to the last."""
    begun = dict[int, tuple[int, float]]()  # when a request has its first text: forwards so far, and the card's time
    ended = list[tuple[int, float]]()

    def listen(number: int, outcome: Any) -> None:
        for event in outcome:
            if isinstance(event, Text):
                begun.setdefault(number, (len(card.forwards), card.now()))
            elif isinstance(event, Finished):
                ended.append((len(card.forwards), card.now()))

    card.restart()
    options = [{"max_new_tokens": new_tokens, **WAYS[way][number % len(WAYS[way])]} for number in range(rows)]
    requests = [(prompt_of(number, PROMPT), options[number]) for number in range(rows)]
    with Scheduler(engine, rows=rows, prefix_reuse=False) as scheduler:
        for handle in scheduler.submit_many(requests, listener=listen):
            handle.result()
    seconds = ended[-1][1] - min(begun.values())[1]
    return Run(card.forwards[max(begun.values())[0] : ended[0][0]], rows * new_tokens / seconds)


def least(engine: LoadedEngine, card: Card, way: str, rows: int, rounds: int, new_tokens: int) -> dict[str, Any]:
    """Microseconds of a forward, the least of several rounds: other work on the machine only adds. The median rate."""
    rounds_of = [measured(engine, card, way, rows, new_tokens) for _ in range(rounds + 1)][1:]
    rate = statistics.median(run.tokens_per_second for run in rounds_of)
    runs = [run.forwards for run in rounds_of]
    result: dict[str, Any] = {"mode": way, "rows": rows, "tokens_per_second": round(rate)}
    for name, pick in (("gap", operator.attrgetter("gap")), ("beside", operator.attrgetter("beside"))):
        sums = [(sum(map(pick, run)), len(run), sum(forward.rows for forward in run)) for run in runs]
        result[f"{name}_us"] = round(1e6 * min(seconds / forwards for seconds, forwards, _ in sums), 1)
        result[f"{name}_us_per_row"] = round(1e6 * min(seconds / served for seconds, _, served in sums), 1)
    return result


def line(result: dict[str, Any]) -> str:
    """A result as a line of the table."""
    figures = (f"{result[name]:10.1f}" for name in ("gap_us", "gap_us_per_row", "beside_us", "beside_us_per_row"))
    return f"{result['mode']:16}{result['rows']:5}{''.join(figures)}{result['tokens_per_second']:10}"


def measure(work: Path, ways: list[str], rows: list[int], rounds: int, new_tokens: int) -> list[dict[str, Any]]:
    """All figures, shown as they come; the engine is built in `work`."""
    print(f"{'us of a forward':16}{'rows':>5}{'gap':>10}{'per row':>10}{'beside':>10}{'per row':>10}{'tokens/s':>10}")
    builder = Builder(record.MODEL, work / "engine", backend="torch", dtype="f32", max_batch_size=max(rows))
    engine, card = engine_of(builder.run())
    results = []
    for way, count in itertools.product(ways, rows):
        if count == 1 and len(WAYS[way]) > 1:
            continue
        results.append(least(engine, card, way, count, rounds, new_tokens))
        print(line(results[-1]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the host takes beside the passes of a GPU, on a CPU.")
    parser.add_argument("--modes", nargs="+", choices=WAYS, default=list(WAYS), help="default all, and a mix of them")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="requests at once, default 1 16 64")
    parser.add_argument("--rounds", type=int, default=10, help="measured rounds, default 10; one before is excluded")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help=f"of a request, default {NEW_TOKENS}")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, 1)
    with tempfile.TemporaryDirectory(prefix="nemodiff-host-") as work:
        results = measure(Path(work), arguments.modes, arguments.rows, arguments.rounds, arguments.new_tokens)
    figures = {"prompt": PROMPT, "new_tokens": arguments.new_tokens, "rounds": arguments.rounds, "results": results}
    record.write("host", origin, [], figures)


if __name__ == "__main__":
    main()
