"""Streams a checkpoint's tensors into the engine's weights file: external data of the graph, or safetensors for torch.

In: the checkpoint's tensors (maps of their files) and the graph's list of weights. Out: one file in the graph's order,
each weight converted, for ONNX projections transposed to (in, out), with the file's sha256. Works in pieces of at most
`PIECE` bytes, so memory stays flat whatever the model's size. The surprising fact: transposing is done by gathering a
band of columns from the map, which is why a large head is read through the page cache several times; bf16 to bf16 is
copied as bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from ...contract import Quantization
from ...errors import BuildError, CheckpointError
from ...plugins.ops.fp8_linear import quantise
from ..graph.graph import ALIGNMENT, Graph, Weight
from .checkpoint import DTYPES, Tensor

PIECE = 128 * 2**20  # bytes of f32 per step; about four times this is held at once
BITS_PIECE = (
    16 * 2**20
)  # bytes of bf16 per step; larger arrays are mapped anew each time, which costs more than copying
_Item = TypeVar("_Item")
_BF16 = np.dtype(ml_dtypes.bfloat16)
_BLOCK = 32  # columns per step of a transposition: 1.2 GB/s where numpy's own copy makes 0.4 (2026-11-24)
_TOO_LARGE: dict[np.dtype[Any], tuple[str, str]] = {
    np.dtype(np.float16): ("f16", "build with --dtype f32 (bf16 on a GPU)"),
    _BF16: ("bf16", "use other weights"),
}
_LARGEST = {"f32": float(np.finfo(np.float32).max), "f16": 65504.0, "bf16": 3.3895313892515355e38}


def match(graph: Graph, tensors: Mapping[str, Tensor], config_file: Path) -> None:
    """Check that graph and checkpoint name the same tensors with the same shapes. Raises CheckpointError."""
    wanted = {w.source: w.shape[::-1] if w.transposed else w.shape for w in graph.weights}
    again = f"check that {config_file} belongs to these weights, or download the checkpoint again"
    somewhere = next((t.file for t in tensors.values()), config_file)
    for name, shape in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{somewhere}: tensor {name} of shape {list(shape)} is missing; {again}")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}, "
                f"allowed: {list(shape)}; {again}"
            )
    for name, tensor in tensors.items():
        if name not in wanted:
            raise CheckpointError(f"{tensor.file}: tensor {name} is not part of this architecture; {again}")


def as_safetensors(graph: Graph, quantization: Quantization | None = None) -> tuple[Graph, bytes]:
    """The graph's weights as one safetensors file would hold them, and the header that stands before them.

    Projections are (out, in), as in the checkpoint; nothing lies between two tensors, as the format demands. Quantized,
    those of the layers are e4m3, each followed by its `NAME_scale`.
    """
    plain = next(name for name, dtype in DTYPES.items() if dtype == graph.dtype)
    entries, weights, end = dict[str, Any](), list[Weight](), 0
    for w in graph.weights:
        shape, quantized = w.shape[::-1] if w.transposed else w.shape, False
        parts = [(w.name, plain, shape, w.nbytes)]
        if quantization is not None and w.name.endswith("_proj.weight"):
            quantized, count = True, int(np.prod(shape))
            parts = [(w.name, "F8_E4M3", shape, count), (f"{w.name}_scale", "F32", shape[:1], 4 * shape[0])]
        start = end
        for name, kind, size, nbytes in parts:
            entries[name] = {"dtype": kind, "shape": list(size), "data_offsets": [end, end + nbytes]}
            end += nbytes
        placed = dataclasses.replace(w, offset=start, nbytes=end - start, quantized=quantized)
        weights.append(dataclasses.replace(placed, shape=shape, transposed=False))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    moved = tuple(dataclasses.replace(w, offset=len(header) + w.offset) for w in weights)
    return dataclasses.replace(graph, weights=moved), header


def write_weights(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    path: Path,
    advance: Callable[[int], object],
    hashed: bool = True,
    header: bytes = b"",
    once: bool = False,
) -> str:
    """Write the weights file and return its sha256 (empty unless `hashed`: a file that is compiled and removed).

    `advance` is called with each number of bytes of weights written; `header` comes first; with `once` a tensor's
    memory is given back as soon as it has been read.
    """
    digest = hashlib.sha256(header)

    def pieces() -> Iterator[tuple[Weight, np.ndarray]]:
        for weight in graph.weights:
            for piece in _pieces(weight, tensors[weight.source], graph.dtype):
                yield weight, piece
            if once:
                tensors[weight.source].forget()

    with path.open("wb") as out:
        out.write(header)
        for weight, piece in _ahead(pieces()):
            view = piece.reshape(-1).view(np.uint8).data
            for part in (bytes(max(0, weight.offset - out.tell())), view):
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


def _pieces(weight: Weight, tensor: Tensor, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The weight as it is stored, in bands of its first axis, and its scales if it is quantized."""
    source, scales = tensor.array(), list[np.ndarray]()
    if weight.transposed:
        source = source.T
    as_bits = tensor.dtype == dtype == _BF16 and weight.scale == 1.0 and not weight.quantized
    step = max(1, (BITS_PIECE // 2 if as_bits else PIECE // 4) // max(1, int(np.prod(weight.shape[1:]))))
    for start in range(0, weight.shape[0], step):
        band = _contiguous(source[start : start + step])
        if as_bits and _all_finite(band):
            yield band
            continue
        values = _to_f32(band)
        if not np.isfinite(values).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} holds {values[at]} near {[start + at[0], *at[1:]]}, allowed: "
                "finite numbers; download the file again or use another checkpoint"
            )
        if weight.quantized:
            stored, scale = quantise(values)
            scales.append(scale)
            yield stored
            continue
        with np.errstate(over="ignore"):
            if weight.scale != 1.0:
                values = values * np.float32(weight.scale)
            stored = values.astype(dtype, copy=False)
        if not np.isfinite(stored).all():
            name, remedy = _TOO_LARGE.get(dtype, ("f32", "use another adapter"))
            raise BuildError(
                f"{tensor.file}: tensor {tensor.name} holds {np.abs(values).max():.6g}, {name} allowed: "
                f"up to {_LARGEST[name]:.6g}; {remedy}"
            )
        yield stored
    if scales:
        yield np.concatenate(scales)


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
