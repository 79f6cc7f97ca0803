"""The model in Triton Inference Server: requests go into a `Scheduler`, its events come back as responses.

`execute` reads a request and submits it; one thread, the responder, sends everything that follows. A client only ever
sees one sentence: an exception that left `execute` would put a traceback into the response, so each becomes a
`TritonError`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import NemodiffError, RequestError
from ...runtime.loading import LoadedEngine, load
from ...runtime.scheduler.scheduler import Scheduler
from .metrics import TritonMetrics
from .parameters import INPUTS, TritonRequest, model_parameters, read
from .responder import Responder
from .response_writer import ResponseWriter


class TritonPythonModel:
    """The interface that the server's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine. A problem is one line in the server's log."""
        import triton_python_backend_utils as pb

        self._pb = pb
        self._name = args["model_name"]
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        try:
            self._start(args, parameters, batched=config.get("max_batch_size", 0) > 0)
        except NemodiffError as error:
            raise pb.TritonModelException(str(error)) from None

    def load(self, folder: Path) -> LoadedEngine:
        """Load the engine; tests put others in its place."""
        chosen = self._parameters
        return load(
            folder,
            threads=chosen.threads,
            device=self._gpu if chosen.device is None else chosen.device,
            gpu_memory_utilization=chosen.gpu_memory_utilization,
            warmup=chosen.warmup,
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit each request; the responder sends its responses."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(sender, self._read(request))
            except Exception as error:
                self._writer.send_error(sender, error)

    def is_ready(self) -> bool:
        """Answer `v2/models/NAME/ready`, for which newer servers call this."""
        return self._responder.is_alive()

    def finalize(self) -> None:
        """Cancel what still runs, answer it and give the engine back."""
        self._scheduler.close(drain=False)
        self._responder.close()

    def _start(self, args: dict[str, str], parameters: dict[str, str], batched: bool) -> None:
        self._parameters = model_parameters(parameters)
        placed = args.get("model_instance_kind") == "GPU"
        self._gpu = int(args["model_instance_device_id"]) if placed else None
        folder = Path(args["model_repository"]) / args["model_version"] / self._parameters.engine
        engine = self.load(folder)
        self._defaults = self._parameters.defaults(folder)
        self._scheduler = Scheduler(engine, prefix_reuse=self._parameters.prefix_reuse, **self._parameters.limits)
        self._writer = ResponseWriter(self._pb, self._name, engine.text, batched)
        # The instance, since the instances of a model share its series and would overwrite each other's gauges.
        labels = {"model": self._name, "version": args["model_version"], "model_instance": args["model_instance_name"]}
        metrics = TritonMetrics(self._pb, labels)
        interval = self._parameters.stream_interval_ms / 1e3
        self._responder = Responder(self._scheduler, self._writer, metrics, interval)
        self._pb.Logger.log_info(f"{self._name}: {engine.folder} is loaded in {engine.load_ms:.0f} ms")

    def _read(self, request: Any) -> TritonRequest:
        """The request's prompt and options. Raises RequestError."""
        given = {tensor.name(): tensor for tensor in request.inputs()}  # to ask for each by its name takes 2 us
        tensors: dict[str, list[Any]] = {}
        for declared in INPUTS:
            if (tensor := given.get(declared.name)) is not None:
                tensors[declared.name] = [_plain(declared.name, value) for value in tensor.as_numpy().reshape(-1)]
        return read(tensors, json.loads(request.parameters() or "{}"), self._defaults)

    def _submit(self, sender: Any, request: TritonRequest) -> None:
        active = self._responder.add(sender, request)
        try:
            active.handle = self._scheduler.submit(
                request.content, listener=lambda outcome: self._responder.listen(active, outcome), **request.options
            )
        except BaseException:
            self._responder.discard(active)
            raise


def _plain(name: str, value: Any) -> Any:
    """An element of a tensor as a plain value; f32 as the number somebody wrote, 0.7 and not 0.69999998."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{name}: not UTF-8 at byte {error.start}; convert it first") from None
    return float(str(value)) if isinstance(value, np.floating) else value.item()
