"""Forwards in their order: which are under way, and what they give."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ....errors import EngineError
from ..grouping import Arranged
from ..passes import Following, Pass, Prediction, arrange, read_only
from .flat import FlatShape, Source, flat_shape, is_arranged, room
from .step import Step, Steps

if TYPE_CHECKING:
    from torch import Tensor

    from .ranks import Ranks


class Forwards:
    """Starts forwards and waits for them.

    Args:
        folder: of the engine, for messages.
        steps: what runs them; where they are captured, shapes are rounded up.
        ahead: start a forward before the one that feeds it has ended, where that is asked for.
        lock: held by whoever uses the stream or the memory.
    """

    def __init__(self, folder: Path, steps: Steps, ahead: bool, lock: threading.RLock) -> None:
        self.folder = folder
        self.steps = steps
        self.device = steps.device
        self.memory = steps.memory
        self.lock: Any = lock
        self.ahead = ahead
        self._flights: list[TorchFlight] = []  # under way, in their order

    def launch(self, passes: Sequence[Pass], rows: Sequence[int]) -> TorchFlight:
        """Start a forward over rows of the page table, after the one before has ended."""
        with self.lock:
            self.wait()
            with self.device.use(self.folder):
                return self._launched(passes, rows)

    def follow(
        self, flight: TorchFlight, passes: Sequence[Following], rows: Sequence[int], fed: Sequence[int]
    ) -> TorchFlight | None:
        """See `engine.PagedCache.follow`."""
        with self.lock:
            if not self.ahead or self._flights[-1:] != [flight]:
                return None
            self.wait(1 if self.device.is_gpu else 0)  # on a CPU a forward runs when it is waited for
            feeding = Feeding(flight, passes, fed, flight.sources(passes, fed))
            with self.device.use(self.folder):
                return self._launched([following.pass_ for following in passes], rows, feeding)

    def _launched(self, passes: Sequence[Pass], rows: Sequence[int], feeding: Feeding | None = None) -> TorchFlight:
        step = self.steps.of(self.steps.rounded(flat_shape(passes)))
        flight = TorchFlight(self, step, passes, rows, feeding)
        self._flights.append(flight)
        return flight

    def wait(self, but: int = 0) -> None:
        """Wait for the forwards under way, the oldest first, until no more than so many are left."""
        while len(self._flights) > but:
            self._flights[0].land()

    def landing(self, flight: TorchFlight) -> None:
        """Take note that somebody waits for a forward; nobody else need.

        In the midst of it Python may find that a cache is garbage, which waits for all under way in the same thread.
        """
        self._flights.remove(flight)

    def mirror(self, ranks: Ranks) -> None:
        """Run the forwards of rank 0 until it ends.

        One may be under way when the next is heard of. Rank 0 uses no buffer of such a one, so neither does the next.
        """
        mark = before = None
        while (forward := ranks.hear()) is not None:
            with self.device.use(self.folder):
                self.memory.mirror(forward.news)
                step = self.steps.of(forward.shape)
                step.mirror(forward, before)
                self.device.wait(mark)
                mark, before = self.device.mark(), step

    def warm_up(self, shapes: Iterable[FlatShape]) -> dict[int, float]:
        """Compile and capture some shapes; returns the seconds of plain passes by their tokens."""
        seconds = {}
        for shape in shapes:
            with self.lock, self.device.use(self.folder):
                step = self.steps.of(shape)
                step.fill([], [], [])
                known = step.sides[0].inputs.arrays["known"]
                known[:] = 0  # rows of no tokens
                step.sides[0].arranged = len(known)
                step.run(before=step if self.ahead else None)  # eager; what nothing feeds compiles all the same
                step.run()  # captured
                self.device.wait(self.device.mark())
                if shape == FlatShape(shape.tokens, shape.tokens):
                    seconds[shape.tokens] = self.device.seconds(step.run, 1)
        return seconds


class Feeding(NamedTuple):
    """A forward under way that another one follows: by what its passes are fed, and where they find that."""

    flight: TorchFlight
    passes: Sequence[Following]
    fed: Sequence[int]
    sources: list[Source]


class TorchFlight:
    """A forward under way; on a GPU it runs while the host does something else, on a CPU when it is finished."""

    def __init__(
        self, owner: Forwards, step: Step, passes: Sequence[Pass], rows: Sequence[int], feeding: Feeding | None
    ) -> None:
        self.seconds = 0.0
        self.step = step
        self.turn: int = 0 if feeding is None else 1 - feeding.flight.turn
        self._owner = owner
        self._before = None if feeding is None else feeding.flight.step
        self._passes = passes
        self._logits: dict[int, Tensor] = {}
        self._predictions: list[Prediction] | None = None
        self._failure: Exception | None = None
        self._feeding = feeding
        self._arranged: list[Arranged | None] = [None] * len(passes)
        self.room = 0 if feeding is None else room(step.shape, passes, feeding.sources)  # tokens of arranged passes
        self._start: Callable[[], Any] | None = self._started
        self._began: Any = None  # a mark before everything, and one after it
        self._mark: Any = None
        step.fill(passes, rows, None if feeding is None else feeding.sources, self.turn)
        if owner.device.is_gpu:
            self._started()

    def sources(self, passes: Sequence[Following], fed: Sequence[int]) -> list[Source]:
        """Where passes that its passes of these numbers feed find what those give."""
        places = self._places()
        return [
            Source(following.feed, begin, begin + self.step.apart, end - begin)
            for following, (begin, end) in zip(passes, (places[number] for number in fed), strict=True)
        ]

    def arranged(self) -> list[Arranged | None]:
        """See `engine.Flight`."""
        feeding = self._feeding
        if feeding is not None:
            if any(map(is_arranged, feeding.sources)):
                given = feeding.flight.finish()
                self._arranged = arrange(feeding.passes, [given[number] for number in feeding.fed], self.room)
            self._feeding = None  # nor those before it
        return self._arranged

    def _places(self) -> list[tuple[int, int]]:
        """Where each pass's predictions begin and end."""
        made = zip(self._passes, self.arranged(), strict=True)
        counts = [p.predicted.size if each is None else each.grouping.tokens for p, each in made]
        return list(itertools.pairwise(itertools.accumulate(counts, initial=0)))

    def finish(self) -> list[Prediction]:
        """See `engine.Flight`."""
        with self._owner.lock:
            self.land()
        if self._failure is not None:
            raise self._failure
        assert self._predictions is not None
        return self._predictions

    def land(self) -> None:
        """Wait for it, whoever waits; a failure is for the one that finishes it."""
        owner = self._owner
        if self._predictions is not None or self._failure is not None:
            return
        owner.landing(self)
        try:
            if self._start is not None:
                with owner.device.use(owner.folder):
                    self._start()
            with owner.device.watched(owner.folder):
                owner.device.wait(self._mark)
                self.seconds = owner.device.between(self._began, self._mark)
            self._predictions = self._read()
        except Exception as failure:
            self._failure = failure
        except BaseException:  # Ctrl-C, in whichever thread has waited
            self._failure = EngineError(f"{owner.folder}: a pass was interrupted; the request may be sent again")
            raise

    def _started(self) -> None:
        """Put everything into the stream."""
        device, step = self._owner.device, self.step
        self._start = None
        self._began = device.mark()
        self._owner.memory.show_table()
        step.run(self.turn, self._before)
        begin = 0
        for number, p in enumerate(self._passes):  # none that is arranged has logits, and those come last
            end = begin + p.predicted.size
            if p.logits and step.logits is not None:
                self._logits[number] = device.fetch(step.logits[begin:end])
            begin = end
        step.forget_logits()
        self._mark = device.mark()

    def _read(self) -> list[Prediction]:
        """Copies, since the next forward writes into the same buffers."""
        arrays = self.step.sides[self.turn].outputs.arrays
        token, confidence, next_ids = (read_only(arrays[name].copy()) for name in ("token", "confidence", "next_ids"))
        predictions = []
        for number, (begin, end) in enumerate(self._places()):
            logits = read_only(self._logits[number].numpy()) if number in self._logits else None
            predictions.append(Prediction(token[begin:end], confidence[begin:end], next_ids[begin:end], logits))
        return predictions
