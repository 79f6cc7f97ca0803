"""Responses of the Triton model: text, the final outputs, or an error."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np

from ...errors import BusyError, NemodiffError, RequestError
from ...runtime.events.events import Finished
from ...runtime.requests.generation import Generation
from ...runtime.text.codec import TextCodec
from ..logprobs import logprobs_by_id
from .outputs import NUMPY, OUTPUTS


class ResponseWriter:
    """Sends responses through the senders of requests; any thread may use it.

    Args:
        pb: the server's module `triton_python_backend_utils`.
        name: of the model, for the server's log.
        codec: the engine's, which spells tokens.
        batched: whether tensors have a leading batch dimension of 1.
    """

    def __init__(self, pb: Any, name: str, codec: TextCodec, batched: bool) -> None:
        self._pb = pb
        self._name = name
        self._codec = codec
        self._batched = batched
        self._lock = threading.Lock()
        self.refused = dict.fromkeys((400, 500, 503), 0)  # requests that ended in an error, by HTTP status

    def send_text(self, sender: Any, text: str) -> None:
        """Send a piece of a stream."""
        sender.send(self._response({"text_output": text}))

    def send_final(self, sender: Any, text: str, event: Finished) -> None:
        """Send the last response, which holds all outputs."""
        outputs = {output.name: output.value(event) for output in OUTPUTS if output.value is not None}
        response = self._response({"text_output": text, "logprobs": self._logprobs(event.generation), **outputs})
        sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def send_cancelled(self, sender: Any) -> None:
        """End a request that was cancelled."""
        self._send_error(sender, "the request was cancelled", self._pb.TritonError.CANCELLED)

    def send_error(self, sender: Any, error: Exception) -> None:
        """End a request with one sentence and the status that belongs to it, and count it."""
        code = self._pb.TritonError.INTERNAL
        status = 500
        if isinstance(error, RequestError):
            code = self._pb.TritonError.INVALID_ARG
            status = 400
        elif isinstance(error, BusyError):
            code = self._pb.TritonError.UNAVAILABLE
            status = 503
        with self._lock:
            self.refused[status] += 1
        message = str(error)
        if not isinstance(error, NemodiffError):  # a defect of nemodiff itself
            self.report(error)
            message = "the request failed inside the model; the server's log says why"
        self._send_error(sender, message, code)

    def report(self, error: Exception) -> None:
        """Write what has failed into the server's log."""
        self._pb.Logger.log_error(f"{self._name}: {type(error).__name__}: {error}")

    def _logprobs(self, generation: Generation) -> str | None:
        """The log-probabilities by token ids, as JSON, where they were requested."""
        if generation.logprobs is None:
            return None
        return json.dumps([*logprobs_by_id(self._codec, generation.token_ids, generation.logprobs)])

    def _send_error(self, sender: Any, message: str, code: Any) -> None:
        response = self._pb.InferenceResponse(error=self._pb.TritonError(message, code))
        sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _response(self, values: dict[str, Any]) -> Any:
        """A response; the server passes it on as it is, so an output without a value is left out."""
        shape = (1, -1) if self._batched else (-1,)
        tensors = []
        for output in OUTPUTS:
            value = values.get(output.name)
            if value is not None:
                array = np.array(value, NUMPY[output.type]).reshape(shape)
                tensors.append(self._pb.Tensor(output.name, array))
        return self._pb.InferenceResponse(output_tensors=tensors)
