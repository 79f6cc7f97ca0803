"""What runs inside a Triton server: requests go into a `Scheduler`, its events come back as responses.

In: Triton's requests. Out: responses, one at the end or one per piece of text, the last with the figures. `execute`
reads a request and submits it; one thread, the responder, sends what the scheduler tells of it and looks for requests
whose client has gone. A stream's first text goes out at once, later text at most every `stream_interval_ms`, because a
response costs as much as a small model's token. The surprising fact: a client may only ever see a sentence. An
exception that leaves `execute` would put a traceback into the body, so everything becomes a `TritonError`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BusyError, NemodiffError, RequestError
from ...runtime.events.events import Event, Finished, Text
from ..metrics import Now
from .outputs import NUMPY, OUTPUTS
from .parameters import INPUTS, Asked, model_parameters, read

if TYPE_CHECKING:
    from ...runtime.loading import LoadedEngine
    from ...runtime.scheduler import Handle

_LOOK = 0.01  # seconds between two looks for clients that have gone; they take at most a tenth of the time
_COUNT = 0.2  # seconds between two updates of the counters on the metrics port


@dataclasses.dataclass(eq=False)
class _Live:
    """A request that has not ended.

    told: what the scheduler has told of it and the responder has not read. awaited: whether the next text is to wake
    the responder. text: what is not sent yet; due: when a stream's next text may be sent. Only `told` and `awaited` are
    seen by two threads.
    """

    sender: Any
    asked: Asked
    handle: Handle | None = None
    told: collections.deque[list[Event] | NemodiffError] = dataclasses.field(default_factory=collections.deque)
    awaited: bool = False
    text: str = ""
    due: float = 0.0

    def __post_init__(self) -> None:
        self.awaited = self.asked.stream


class TritonPythonModel:
    """The interface that Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine. A problem is one line in the server's log."""
        import triton_python_backend_utils as pb

        self._pb, self._name = pb, args["model_name"]
        config = json.loads(args["model_config"])
        self._batched = config.get("max_batch_size", 0) > 0
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        try:
            self._start(args, given)
        except NemodiffError as error:
            raise pb.TritonModelException(str(error)) from None

    def _start(self, args: dict[str, str], given: dict[str, str]) -> None:
        from ...runtime.scheduler import Scheduler
        from .metrics import TritonMetrics

        self._parameters = p = model_parameters(given)
        engine = self.load(Path(args["model_repository"]) / args["model_version"] / p.engine)
        self._scheduler = Scheduler(
            engine, rows=p.rows, waiting=p.waiting, prefix_reuse=p.prefix_reuse, prefill_tokens=p.prefill_tokens
        )
        self._refused = dict.fromkeys((400, 500, 503), 0)
        self._metrics = TritonMetrics(self._pb, {"model": self._name, "version": args["model_version"]})
        self._count()
        self._live: set[_Live] = set()
        self._paced: set[_Live] = set()  # streams to be looked at when their next text is due
        self._lock = threading.Lock()  # of _refused
        self._interval = p.stream_interval_ms / 1e3
        self._woken: queue.SimpleQueue[_Live | None] = queue.SimpleQueue()
        self._responder = threading.Thread(target=self._respond, name="nemodiff-responder", daemon=True)
        self._responder.start()
        self._pb.Logger.log_info(f"{self._name}: {engine.folder} is loaded in {engine.load_ms:.0f} ms")

    def load(self, folder: Path) -> LoadedEngine:
        """Load the engine; tests put others in its place."""
        from ...runtime.loading import load

        return load(folder, threads=self._parameters.threads, device=self._parameters.device)

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit each request; its responses are sent by the responder."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                asked = read(self._tensors(request), json.loads(request.parameters() or "{}"), self._parameters.values)
                self._submit(_Live(sender, asked))
            except Exception as error:
                self._refuse(sender, error)

    def is_ready(self) -> bool:
        """What newer servers ask at `v2/models/NAME/ready`."""
        return self._responder.is_alive()

    def finalize(self) -> None:
        """Cancel what still runs, answer it and give the engine back."""
        self._scheduler.close(drain=False)
        self._woken.put(None)
        self._responder.join()

    def _submit(self, live: _Live) -> None:
        self._live.add(live)
        try:
            live.handle = self._scheduler.submit(
                live.asked.prompt, listener=lambda outcome: self._hear(live, outcome), **live.asked.options
            )
        except BaseException:
            self._live.discard(live)
            raise

    def _tensors(self, request: Any) -> dict[str, list[Any]]:
        """Elements of the inputs that are there, by name. Raises RequestError."""
        found: dict[str, list[Any]] = {}
        for declared in INPUTS:
            tensor = self._pb.get_input_tensor_by_name(request, declared.name)
            if tensor is not None:
                values = tensor.as_numpy().reshape(-1)
                found[declared.name] = [_plain(declared.name, value) for value in values]
        return found

    def _hear(self, live: _Live, outcome: list[Event] | NemodiffError) -> None:
        """In the scheduler's thread: note what has happened, and wake the responder only if it can do something."""
        live.told.append(outcome)
        if live.awaited or isinstance(outcome, NemodiffError) or isinstance(outcome[-1], Finished):
            live.awaited = False
            self._woken.put(live)

    def _respond(self) -> None:
        """Send what happens to requests until the end, and look around now and then."""
        looked = counted = time.perf_counter()
        pause = _LOOK
        while True:
            wake = min([looked + pause, *(live.due for live in self._paced)])
            try:
                woken = self._woken.get(timeout=max(0.0, wake - time.perf_counter()))
                if woken is None:
                    return
                self._serve(woken)
            except queue.Empty:
                pass
            now = time.perf_counter()
            for live in [live for live in self._paced if live.due <= now]:
                self._serve(live)
            if (now := time.perf_counter()) > looked + pause:
                self._look()
                looked = time.perf_counter()
                pause = max(_LOOK, 10 * (looked - now))
                if looked > counted + _COUNT:
                    self._count()
                    counted = looked

    def _count(self) -> None:
        self._metrics.update(Now(self._scheduler.statistics, self._refused))

    def _look(self) -> None:
        """Cancel requests whose client has gone."""
        for live in list(self._live):
            if live.handle is not None and live.sender.is_cancelled():
                live.handle.cancel()

    def _serve(self, live: _Live) -> None:
        """Read what has been told of a request; send its end, or a stream's text if that is due."""
        try:
            while True:
                while live.told:
                    if self._ends(live, live.told.popleft()):
                        return
                if live not in self._live:  # woken once more than there was to tell
                    return
                if live.asked.stream and live.due > time.perf_counter():
                    self._paced.add(live)
                    return
                if live.asked.stream and live.text:
                    self._send_text(live)
                    continue
                self._paced.discard(live)
                live.awaited = live.asked.stream
                if not live.told:  # else it was told just before, and nobody has been woken
                    return
        except Exception as error:
            self._forget(live)
            self._refuse(live.sender, error)

    def _ends(self, live: _Live, outcome: list[Event] | NemodiffError) -> bool:
        """Keep a request's new text; at its end answer it and return True. Raises NemodiffError if it has failed."""
        if isinstance(outcome, NemodiffError):
            if live.asked.stream and live.text:
                self._send_text(live)
            raise outcome
        for event in outcome:
            if isinstance(event, Text):
                live.text += event.text
            elif isinstance(event, Finished):
                self._finish(live, event)
                return True
        return False

    def _send_text(self, live: _Live) -> None:
        text, live.text = self._echo(live) + live.text, ""
        live.sender.send(self._response({"text_output": text}))
        live.due = time.perf_counter() + self._interval

    def _echo(self, live: _Live) -> str:
        """The prompt, if it is to stand before the answer and nothing has been sent yet."""
        return live.asked.prompt if live.asked.echo and not live.due else ""

    def _finish(self, live: _Live, event: Finished) -> None:
        self._forget(live)
        if event.generation.finish_reason == "cancelled":
            self._send_error(live.sender, "the request was cancelled", self._pb.TritonError.CANCELLED)
        else:
            values = {o.name: o.value(event) for o in OUTPUTS if o.value is not None}
            final = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            live.sender.send(self._response({"text_output": self._echo(live) + live.text, **values}), flags=final)
        self._metrics.observe(event)  # behind the answer, since each figure is a call to the server's process

    def _forget(self, live: _Live) -> None:
        self._live.discard(live)
        self._paced.discard(live)

    def _response(self, values: dict[str, Any]) -> Any:
        """A response with the outputs that have a value."""
        tensors = []
        for output in OUTPUTS:
            value = values.get(output.name)
            if value is not None:
                array = np.array(value, NUMPY[output.type]).reshape((1, -1) if self._batched else (-1,))
                tensors.append(self._pb.Tensor(output.name, array))
        return self._pb.InferenceResponse(output_tensors=tensors)

    def _refuse(self, sender: Any, error: Exception) -> None:
        """End a request with one sentence and the status that belongs to it."""
        kinds = self._pb.TritonError
        kind, status = kinds.INTERNAL, 500
        if isinstance(error, RequestError):
            kind, status = kinds.INVALID_ARG, 400
        elif isinstance(error, BusyError):
            kind, status = kinds.UNAVAILABLE, 503
        with self._lock:  # the server's thread and the responder refuse
            self._refused[status] += 1
        if isinstance(error, NemodiffError):
            self._send_error(sender, str(error), kind)
            return
        self._pb.Logger.log_error(f"{self._name}: {type(error).__name__}: {error}")  # a defect of nemodiff itself
        self._send_error(sender, "the request failed inside the model; the server's log says why", kinds.INTERNAL)

    def _send_error(self, sender: Any, text: str, kind: Any) -> None:
        response = self._pb.InferenceResponse(error=self._pb.TritonError(text, kind))
        sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _plain(name: str, value: Any) -> Any:
    """An element of a tensor as a plain value; f32 as the number somebody wrote, 0.7 and not 0.69999998."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{name}: not UTF-8 at byte {error.start}; convert it first") from None
    return float(str(value)) if isinstance(value, np.floating) else value.item()
