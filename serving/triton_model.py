"""What runs inside a Triton server: requests go into a `Scheduler`, its events come back as responses.

In: Triton's requests. Out: responses, one at the end or one per piece of text, the last with the figures. `execute`
reads a request and submits it; a thread per request sends what happens to it; one more thread looks for requests whose
client has gone. The surprising fact: a client may only ever see a sentence. An exception that leaves `execute` would put
a traceback into the body, so everything becomes a `TritonError`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BusyError, NemodiffError, RequestError
from .triton_outputs import NUMPY, OUTPUTS
from .triton_parameters import INPUTS, Asked, model_parameters, read

if TYPE_CHECKING:
    from ..runtime.events import Finished
    from ..runtime.generate import LoadedEngine
    from ..runtime.scheduler import Handle

_LOOK = 0.005  # seconds between two looks for clients that have gone


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
        from ..runtime.scheduler import Scheduler
        from .triton_metrics import Metrics

        self._parameters = p = model_parameters(given)
        engine = self.load(Path(args["model_repository"]) / args["model_version"] / p.engine)
        self._scheduler = Scheduler(
            engine, rows=p.rows, waiting=p.waiting, prefix_reuse=p.prefix_reuse, prefill_tokens=p.prefill_tokens
        )
        self._metrics = Metrics(self._pb, {"model": self._name, "version": args["model_version"]}, engine)
        self._running: dict[Handle, Any] = {}  # with their senders
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="nemodiff-watcher", daemon=True)
        self._watcher.start()
        self._pb.Logger.log_info(f"{self._name}: {engine.folder.name} is loaded in {engine.load_ms:.0f} ms")

    def load(self, folder: Path) -> LoadedEngine:
        """Load the engine; tests put others in its place."""
        from ..runtime.generate import load

        return load(folder, threads=self._parameters.threads, device=self._parameters.device)

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit each request; its responses are sent from elsewhere."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                asked = read(self._tensors(request), json.loads(request.parameters() or "{}"), self._parameters.values)
                handle = self._scheduler.submit(asked.prompt, **asked.options)
            except Exception as error:
                self._refuse(sender, error)
                continue
            self._running[handle] = sender
            threading.Thread(target=self._answer, args=(handle, sender, asked), daemon=True).start()

    def finalize(self) -> None:
        """Cancel what still runs and give the engine back."""
        self._scheduler.close(drain=False)
        self._closed.set()
        self._watcher.join()

    def _tensors(self, request: Any) -> dict[str, list[Any]]:
        """Elements of the inputs that are there, by name. Raises RequestError."""
        found: dict[str, list[Any]] = {}
        for declared in INPUTS:
            tensor = self._pb.get_input_tensor_by_name(request, declared.name)
            if tensor is not None:
                values = tensor.as_numpy().reshape(-1)
                found[declared.name] = [_plain(declared.name, value) for value in values]
        return found

    def _answer(self, handle: Handle, sender: Any, asked: Asked) -> None:
        """Send what happens to a request until its end."""
        from ..runtime.events import Finished, Text

        prefix = asked.prompt if asked.echo else ""
        try:
            for event in handle:
                if isinstance(event, Text) and asked.stream:
                    sender.send(self._response({"text_output": prefix + event.text}))
                    prefix = ""
                elif isinstance(event, Finished):
                    self._metrics.finished(event)
                    self._finish(sender, event, prefix + ("" if asked.stream else event.generation.text))
        except Exception as error:
            self._refuse(sender, error)
        finally:
            self._running.pop(handle, None)
            self._metrics.update(self._scheduler.statistics)

    def _finish(self, sender: Any, event: Finished, text: str) -> None:
        if event.generation.finish_reason == "cancelled":
            self._send_error(sender, "the request was cancelled", self._pb.TritonError.CANCELLED)
            return
        values = {o.name: o.value(event) for o in OUTPUTS if o.value is not None}
        final = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        sender.send(self._response({"text_output": text, **values}), flags=final)

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
        if isinstance(error, NemodiffError):
            kind = kinds.INTERNAL
            if isinstance(error, RequestError):
                kind = kinds.INVALID_ARG
            elif isinstance(error, BusyError):
                kind = kinds.UNAVAILABLE
            self._send_error(sender, str(error), kind)
            return
        self._pb.Logger.log_error(f"{self._name}: {type(error).__name__}: {error}")  # a defect of nemodiff itself
        self._send_error(sender, "the request failed inside the model; the server's log says why", kinds.INTERNAL)

    def _send_error(self, sender: Any, text: str, kind: Any) -> None:
        response = self._pb.InferenceResponse(error=self._pb.TritonError(text, kind))
        sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _watch(self) -> None:
        """Cancel requests whose client has gone; asking for it takes at most a tenth of the time."""
        pause = _LOOK
        while not self._closed.wait(pause):
            began = time.perf_counter()
            for handle, sender in list(self._running.items()):
                if sender.is_cancelled():
                    handle.cancel()
            self._metrics.update(self._scheduler.statistics)
            pause = max(_LOOK, 10 * (time.perf_counter() - began))


def _plain(name: str, value: Any) -> Any:
    """An element of a tensor as a plain value; f32 as the number somebody wrote, 0.7 and not 0.69999998."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{name}: not UTF-8 at byte {error.start}; convert it first") from None
    return float(str(value)) if isinstance(value, np.floating) else value.item()
