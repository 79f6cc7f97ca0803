"""Streams a checkpoint's tensors into the engine's weights file: external data of the graph, or safetensors for torch.

Each weight is converted, for ONNX projections transposed to (in, out), in pieces of at most `PIECE` bytes, so memory
stays flat whatever the model's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from ...errors import BuildError, CheckpointError
from ...plugins.ops.linear import quantise
from ..graph.graph import Graph
from ..graph.writer import Weight
from .joined import JoinedTensor, Part
from .low_bits import int8_scale, packed_int4, quantise_int4, quantise_int8, quantise_rows
from .quantized import QuantizedTensor
from .safetensors_file import Tensor

PIECE = 128 * 2**20  # bytes of f32 per step; about four times this is held at once
# Bytes of bf16 per step; larger arrays are mapped anew each time, which costs more than copying.
BITS_PIECE = 16 * 2**20
_BLOCK = 32  # columns per step of a transposition: 1.2 GB/s where numpy's own copy makes 0.4 (2026-11-24)
_BF16 = np.dtype(ml_dtypes.bfloat16)
_TOO_LARGE: dict[np.dtype[Any], tuple[str, str]] = {
    np.dtype(np.float16): ("f16", "build with --dtype f32 (bf16 on a GPU)"),
    _BF16: ("bf16", "use other weights"),
}
_LARGEST = {"f32": float(np.finfo(np.float32).max), "f16": 65504.0, "bf16": 3.3895313892515355e38}
_QUANTISE = {"fp8": quantise, "int8": quantise_rows}  # of a band of rows, each with one scale
_Item = TypeVar("_Item")


def write_weights(
    graph: Graph,
    tensors: Mapping[str, Tensor | QuantizedTensor],
    path: Path,
    advance: Callable[[int], object],
    hashed: bool = True,
    header: bytes = b"",
    once: bool = False,
) -> str:
    """Write the weights file in the graph's order and return its sha256.

    Args:
        graph: lists the weights and their places.
        tensors: the checkpoint's and the adapter's.
        path: of the file to write.
        advance: gets each number of bytes of weights written.
        hashed: False returns an empty sha256, for a file that is compiled and removed.
        header: comes before the weights.
        once: gives back a tensor's memory as soon as it has been read.

    Raises:
        CheckpointError: a tensor holds NaN or Inf.
        BuildError: a number does not fit the engine's dtype.
    """
    digest = hashlib.sha256(header)

    def pieces() -> Iterator[tuple[Weight, np.ndarray]]:
        for weight in graph.weights:
            parts = tuple(tensors[name] for name in weight.sources)
            tensor = parts[0] if len(parts) == 1 else JoinedTensor(parts)
            for piece in _pieces(weight, tensor, graph.dtype):
                yield weight, piece
            if once:
                tensor.forget()

    with path.open("wb") as out:
        out.write(header)
        for weight, piece in _ahead(pieces()):
            view = piece.reshape(-1).view(np.uint8).data
            padding = bytes(max(0, weight.offset - out.tell()))
            for part in (padding, view):
                out.write(part)
                if hashed:
                    digest.update(part)
            advance(len(view))
    return digest.hexdigest() if hashed else ""


def _ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The items, each made in another thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _pieces(weight: Weight, tensor: Part | JoinedTensor, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The weight as it is stored, in bands of its first axis, and its scales if it is quantized."""
    if not isinstance(tensor, Tensor):
        tensor.check()
        if tensor.exact and tensor.kind == weight.quantization and (tensor.scheme.symmetric or not weight.signed):
            yield from _kept_pieces(weight, tensor)
            return
    if weight.quantization == "int8" and weight.transposed:
        yield from _int8_pieces(tensor)
        return
    # A transposed weight is gathered from the map band by band, so a large head is read from the page cache several
    # times.
    scales: list[np.ndarray] = []
    as_bits = (
        isinstance(tensor, Tensor)
        and tensor.dtype == dtype == _BF16
        and weight.scale == 1.0
        and weight.quantization is None
    )
    elements = BITS_PIECE // 2 if as_bits else PIECE // 4
    step = max(1, elements // max(1, int(np.prod(weight.shape[1:]))))
    for start in range(0, weight.shape[0], step):
        band = _band(tensor, start, min(start + step, weight.shape[0]), weight.transposed)
        if as_bits and _all_finite(band):
            yield band
            continue
        values = _to_f32(band)
        _check_finite(values, tensor, start)
        if weight.quantization is not None:
            if weight.quantization == "int4":
                stored, scale = quantise_int4(values, weight.group_size)
                scale = scale.repeat(weight.scale_copies, axis=1)
            else:
                stored, scale = _QUANTISE[weight.quantization](values)
            scales.append(scale)
            yield _halves(weight, stored)
        else:
            yield _stored(values, weight, tensor, dtype)
    if scales:
        yield np.concatenate(scales)


def _band(tensor: Part | JoinedTensor, start: int, stop: int, transposed: bool) -> np.ndarray:
    """Rows of a tensor or of its transpose, in C order."""
    if isinstance(tensor, JoinedTensor):
        if transposed:
            return np.concatenate([_finite_band(part, start, stop, True) for part in tensor.parts], axis=1)
        spans = tensor.spans(start, stop)
        return np.concatenate([_finite_band(tensor.parts[at], *rows, False) for at, rows in spans])
    if isinstance(tensor, QuantizedTensor):
        return tensor.columns(start, stop) if transposed else tensor.rows(start, stop)
    source = tensor.array().T if transposed else tensor.array()
    return _contiguous(source[start:stop])


def _finite_band(tensor: Part, start: int, stop: int, transposed: bool) -> np.ndarray:
    """A band in f32. Raises CheckpointError where it holds NaN or Inf."""
    values = _to_f32(_band(tensor, start, stop, transposed))
    _check_finite(values, tensor, start)
    return values


def _kept_pieces(weight: Weight, tensor: QuantizedTensor | JoinedTensor) -> Iterator[np.ndarray]:
    """A projection in the bits that it has in the checkpoint: its numbers, scales, and zero points if they count."""
    outputs, inputs = tensor.shape
    step = max(1, PIECE // 4 // inputs)
    bands = [(start, min(start + step, outputs)) for start in range(0, outputs, step)]
    scales = np.concatenate([tensor.scales(*band) for band in bands])
    if not np.isfinite(scales).all():
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} has a scale that is not finite; download the file again or use another "
            "checkpoint"
        )
    if weight.transposed:
        numbers = np.concatenate([tensor.numbers(*band) for band in bands])  # a byte for each weight
        yield _contiguous(numbers.T)
        yield scales[:, 0]
        return
    for band in bands:
        numbers = tensor.numbers(*band)
        yield _halves(weight, packed_int4(numbers)) if weight.quantization == "int4" else numbers
    if weight.quantization != "int4":
        yield scales[:, 0]
        return
    repeats = tensor.group // weight.group_size * weight.scale_copies
    yield scales.repeat(repeats, axis=1)
    if not tensor.scheme.symmetric:
        zeros = [tensor.zeros(*band) for band in bands]
        yield packed_int4(np.concatenate([z.repeat(repeats, axis=1) for z in zeros if z is not None]))


def _halves(weight: Weight, stored: np.ndarray) -> np.ndarray:
    """Numbers as they are stored: where they are signed, a half of a byte is the number and not that plus 8."""
    return stored ^ np.uint8(0x88) if weight.signed else stored


def _int8_pieces(tensor: Part | JoinedTensor) -> Iterator[np.ndarray]:
    """An int8 projection (in, out) and its scales, for which the tensor is read once more, before."""
    outputs, inputs = tensor.shape
    step = max(1, PIECE // 4 // inputs)
    scales = []
    for start in range(0, outputs, step):
        values = _to_f32(_band(tensor, start, min(start + step, outputs), transposed=False))
        _check_finite(values, tensor, start)
        scales.append(int8_scale(values))
    scale = np.concatenate(scales)
    step = max(1, PIECE // 4 // outputs)
    for start in range(0, inputs, step):
        yield quantise_int8(_to_f32(_band(tensor, start, min(start + step, inputs), transposed=True)), scale)
    yield scale


def _check_finite(values: np.ndarray, tensor: Part | JoinedTensor, start: int) -> None:
    """Refuse a band that begins at row `start` and holds NaN or Inf."""
    if np.isfinite(values).all():
        return
    at = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
    raise CheckpointError(
        f"{tensor.file}: tensor {tensor.name} holds {values[at]} near {[start + at[0], *at[1:]]}, allowed: "
        "finite numbers; download the file again or use another checkpoint"
    )


def _stored(values: np.ndarray, weight: Weight, tensor: Part | JoinedTensor, dtype: np.dtype[Any]) -> np.ndarray:
    """Finite f32 values scaled and rounded to the engine's dtype."""
    with np.errstate(over="ignore"):
        if weight.scale != 1.0:
            values = values * np.float32(weight.scale)
        stored = values.astype(dtype, copy=False)
    if not np.isfinite(stored).all():
        name, remedy = _TOO_LARGE.get(dtype, ("f32", "use another adapter"))
        parts = tensor.parts if isinstance(tensor, JoinedTensor) else (tensor,)
        largest, part = max(((_largest(part, weight.scale), part) for part in parts), key=lambda found: found[0])
        raise BuildError(
            f"{part.file}: tensor {part.name} holds {largest:.6g}, {name} allowed: up to {_LARGEST[name]:.6g}; {remedy}"
        )
    return stored


def _largest(part: Part, scale: float) -> float:
    """The largest absolute value of a tensor times a scale."""
    values = _to_f32(_band(part, 0, part.shape[0], transposed=False))
    with np.errstate(over="ignore"):
        return float(np.abs(values * np.float32(scale)).max())


def _contiguous(band: np.ndarray) -> np.ndarray:
    """A copy in C order, any dtype; of a transposed map in blocks that the processor's cache holds."""
    if band.ndim != 2 or band.flags.c_contiguous:
        return np.array(band, order="C")
    copy = np.empty(band.shape, band.dtype)
    for start in range(0, band.shape[1], _BLOCK):
        copy[:, start : start + _BLOCK] = band[:, start : start + _BLOCK]
    return copy


def _all_finite(values: np.ndarray) -> bool:
    """Whether no bf16 has an exponent of ones; in steps that the processor's cache holds."""
    bits, step = values.reshape(-1).view(np.uint16), 2**17
    return all(int((bits[i : i + step] & 0x7FFF).max()) < 0x7F80 for i in range(0, bits.size, step))


def _to_f32(values: np.ndarray) -> np.ndarray:
    """Exact f32 copy; bf16 by a shift, which is several times faster than ml_dtypes' cast."""
    if values.dtype == _BF16:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)
