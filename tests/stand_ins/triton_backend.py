"""What the Python backend of Triton Inference Server gives a model, played in this process without a server.

`python3.12 tests/stand_ins/triton_backend.py REPOSITORY/nemodiff` answers one question from an exported folder.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import queue
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name = name
        self._array = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError(Exception):
    INTERNAL = "internal"
    INVALID_ARG = "invalid"
    UNAVAILABLE = "unavailable"
    CANCELLED = "cancelled"

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclasses.dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = dataclasses.field(default_factory=list)
    error: TritonError | None = None

    def outputs(self) -> dict[str, Any]:
        return {t.name(): t.as_numpy().reshape(-1).tolist()[0] for t in self.output_tensors}


class Request:
    """A request, and the sender of its responses; `sent` gets each with whether it is the last."""

    def __init__(self, values: dict[str, Any], parameters: dict[str, Any] | None = None) -> None:
        self._tensors = []
        for name, value in values.items():
            array = np.array([value.encode()], object) if isinstance(value, str) else np.array([value])
            self._tensors.append(Tensor(name, array))
        self._parameters = json.dumps(parameters or {})
        self.cancelled = False
        self.sent: queue.SimpleQueue[tuple[InferenceResponse, bool]] = queue.SimpleQueue()

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def parameters(self) -> str:
        return self._parameters

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        self.sent.put((response, bool(flags)))

    def is_cancelled(self) -> bool:
        return self.cancelled

    def responses(self, patience: float = 120.0) -> list[InferenceResponse]:
        """All responses, once the last has come."""
        responses = []
        while True:
            response, final = self.sent.get(timeout=patience)
            responses.append(response)
            if final:
                return responses


class _Metric:
    """One series; its value is in `values` of its family."""

    def __init__(self, values: dict[Any, float], key: Any) -> None:
        self._values = values
        self._key = key
        values.setdefault(key, 0.0)

    def set(self, value: float) -> None:
        self._values[self._key] = value

    def increment(self, value: float) -> None:
        self._values[self._key] += value

    def observe(self, value: float) -> None:
        self._values[self._key] += 1


class MetricFamily:
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    values: ClassVar[dict[Any, float]] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        self._name = name

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> _Metric:
        return _Metric(self.values, (self._name, *(v for k, v in labels.items() if k not in ("model", "version"))))


class Logger:
    log_info = log_error = staticmethod(lambda text: None)


def module() -> types.ModuleType:
    """Make the module that belongs into `sys.modules` as `triton_python_backend_utils`."""
    made = types.ModuleType("triton_python_backend_utils")
    made.__dict__.update(
        Tensor=Tensor,
        TritonError=TritonError,
        TritonModelException=type("TritonModelException", (Exception,), {}),
        InferenceResponse=InferenceResponse,
        MetricFamily=type("MetricFamily", (MetricFamily,), {"values": {}}),
        Logger=Logger,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    return made


def run(folder: Path, values: dict[str, Any]) -> list[InferenceResponse]:
    """Answer one request from an exported folder as it is, without its parameters."""
    sys.modules["triton_python_backend_utils"] = module()
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    model_file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model_file)
    model = model_file.TritonPythonModel()
    place = {"model_repository": str(folder), "model_version": "1", "model_name": folder.name}
    model.initialize({**place, "model_instance_name": f"{folder.name}_0_0", "model_config": "{}"})
    request = Request(values)
    model.execute([request])
    responses = request.responses()
    model.finalize()
    return responses


if __name__ == "__main__":
    responses = run(Path(sys.argv[1]), {"text_input": "Count from 3 to 9.", "max_tokens": 40})
    sys.stdout.write("".join(response.outputs()["text_output"] for response in responses) + "\n")
