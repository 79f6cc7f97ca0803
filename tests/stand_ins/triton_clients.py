"""Clients of Triton Inference Server: HTTP by the standard library, gRPC by messages declared here.

The messages have only the few fields that are used. The official client package is not, because its requirements
conflict with nemodiff's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import queue
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

TIMEOUT = 120.0
FORMATS = {"BOOL": "?", "INT32": "<i", "UINT32": "<I", "UINT64": "<Q", "FP32": "<f"}
_MESSAGES = {
    "Parameter": "bool_param:1:bool int64_param:2:int64 string_param:3:string",
    "Entry": "key:1:string value:2:Parameter",
    "Tensor": "name:1:string datatype:2:string shape:3:*int64 parameters:4:*Entry",
    "Request": "model_name:1:string id:3:string parameters:4:*Entry inputs:5:*Tensor raw:7:*bytes",
    "Response": "id:3:string parameters:4:*Entry outputs:5:*Tensor raw:6:*bytes",
    "StreamResponse": "error_message:1:string infer_response:2:Response",
}


def _declare() -> dict[str, Any]:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="kserve_subset.proto", package="subset", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields.split():
            label, number, kind = field.split(":")
            added = message.field.add(name=label, number=int(number))
            added.label = kinds.LABEL_REPEATED if kind.startswith("*") else kinds.LABEL_OPTIONAL
            plain = kind.removeprefix("*")
            if plain in _MESSAGES:
                added.type = kinds.TYPE_MESSAGE
                added.type_name = f".subset.{plain}"
            else:
                added.type = getattr(kinds, f"TYPE_{plain.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {n: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"subset.{n}")) for n in _MESSAGES}


MESSAGES = _declare()


@dataclasses.dataclass(frozen=True)
class StreamResponse:
    """A response on a gRPC stream; `final` is the server's flag, and a failed request has an `error`."""

    id: str
    error: str
    outputs: dict[str, Any]
    final: bool


def post(address: str, path: str, body: Any) -> tuple[int, str]:
    """Status and body of a POST; a body that is not bytes is sent as JSON."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=TIMEOUT)) as connection:
        data = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()


def get(address: str, path: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection(address, timeout=TIMEOUT)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def server_sent(address: str, model: str, body: Any) -> Iterator[dict[str, Any]]:
    """The events of `generate_stream`; leaving the iteration closes the connection."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(body))
        response = connection.getresponse()
        for line in response:
            if line.strip():
                assert line.startswith((b"data: ", b"{")), line
                yield {"status": response.status, **json.loads(line.removeprefix(b"data: "))}
    finally:
        connection.close()


def tensor(name: str, values: list[Any], datatype: str | None = None, shape: list[int] | None = None) -> Any:
    """An input tensor and its bytes; the type follows from the first value."""
    guessed = {bool: "BOOL", int: "INT32", float: "FP32", str: "BYTES", bytes: "BYTES"}
    kind = datatype or guessed[type(values[0])]
    if kind == "BYTES":
        encoded = [v.encode() if isinstance(v, str) else v for v in values]
        raw = b"".join(struct.pack("<I", len(v)) + v for v in encoded)
    else:
        raw = b"".join(struct.pack(FORMATS[kind], v) for v in values)
    return MESSAGES["Tensor"](name=name, datatype=kind, shape=shape or [len(values)]), raw


class GrpcStream:
    """One bidirectional stream: many requests go in, their responses come out interleaved."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        method = self._channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=MESSAGES["StreamResponse"].FromString,
        )
        self._call = method(iter(self._requests.get, None), timeout=TIMEOUT)

    def send(self, model: str, id: str, tensors: list[Any], parameters: Mapping[str, str] | None = None) -> None:
        entry = MESSAGES["Entry"]
        parameter = MESSAGES["Parameter"]
        entries = [entry(key=k, value=parameter(string_param=v)) for k, v in (parameters or {}).items()]
        entries.append(entry(key="triton_enable_empty_final_response", value=parameter(bool_param=True)))
        inputs = [tensor for tensor, _ in tensors]
        raw = [values for _, values in tensors]
        self._requests.put(MESSAGES["Request"](model_name=model, id=id, parameters=entries, inputs=inputs, raw=raw))

    def ask(self, model: str, id: str, text: str, **options: Any) -> None:
        self.send(model, id, [tensor("text_input", [text]), *(tensor(k, [v]) for k, v in options.items())])

    def __iter__(self) -> Iterator[StreamResponse]:
        for message in self._call:
            response = message.infer_response
            flags = {e.key: e.value.bool_param for e in response.parameters}
            outputs = {}
            for output, raw in zip(response.outputs, response.raw, strict=True):
                outputs[output.name] = _value(output.datatype, raw)
            yield StreamResponse(response.id, message.error_message, outputs, flags.get("triton_final_response", False))

    def end(self) -> None:
        """Send no more requests."""
        self._requests.put(None)

    def cancel(self) -> None:
        self._call.cancel()
        self._requests.put(None)

    def __enter__(self) -> GrpcStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()
        self._channel.close()


def _value(datatype: str, raw: bytes) -> Any:
    return raw[4:].decode() if datatype == "BYTES" else struct.unpack(FORMATS[datatype], raw)[0]
