"""Which of the checkpoint's tensors the graph wants, and where each lies in a safetensors file for torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...contract import GROUP_SIZE, Quantization
from ...errors import CheckpointError
from ..graph.graph import Graph
from ..graph.writer import ALIGNMENT, Weight
from .quantized import QuantizedTensor
from .safetensors_file import CODES, Entry, Tensor, header_bytes

HEAD = "diffusion_head.weight"
_ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


def match(graphs: Sequence[Graph], tensors: Mapping[str, Tensor | QuantizedTensor], config_file: Path) -> None:
    """Check that the graphs and the checkpoint name the same tensors with the same shapes. Raises CheckpointError."""
    shapes = {name: shape for graph in graphs for w in graph.weights for name, shape in w.shapes().items()}
    again = f"check that {config_file} belongs to these weights, or download the checkpoint again"
    somewhere = next((t.file for t in tensors.values()), config_file)
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{somewhere}: tensor {name} of shape {list(shape)} is missing; {again}")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}, "
                f"allowed: {list(shape)}; {again}"
            )
    for name, tensor in tensors.items():
        if name not in shapes:
            raise CheckpointError(f"{tensor.file}: tensor {name} is not part of this architecture; {again}")


def as_safetensors(
    graph: Graph,
    quantization: Quantization | None = None,
    *,
    groups: tuple[int, int] = (GROUP_SIZE, GROUP_SIZE),
    kept: Mapping[str, bool] | None = None,
) -> tuple[Graph, bytes]:
    """Lay the graph's weights out as one safetensors file, and write the header that stands before them.

    Projections are (out, in), as in the checkpoint. Quantized, those of the layers have the numbers that an engine of
    ONNX Runtime would have, each followed by its `NAME_scale`; so has the head, in int8, unless they are fp8. `groups`
    are those of int4, and of its MLPs; a wider one than the kernel's is stored as several with one scale. `kept` names
    the projections that a checkpoint has in these bits already, with True where they are around 0, and then no other is
    quantized.
    """
    entries: dict[str, Entry] = {}
    weights: list[Weight] = []
    end = 0
    for weight in graph.weights:
        begin = end
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        kind = _kind(weight, quantization, kept)
        around_zero = kept is None or kept.get(weight.source, True)
        for part, code, part_shape in _parts(shape, kind, around_zero) if kind else [("", CODES[graph.dtype], shape)]:
            middle = end
            end = middle + int(np.prod(part_shape)) * _ITEMSIZE[code]
            entries[f"{weight.name}{part}"] = Entry(code, part_shape, middle, end)
        placed = dataclasses.replace(weight, shape=shape, transposed=False, offset=begin, nbytes=end - begin)
        group = groups[".mlp." in weight.name]
        copies = group // GROUP_SIZE
        weights.append(dataclasses.replace(placed, quantization=kind, group_size=group, scale_copies=copies))
    header = header_bytes(entries, alignment=ALIGNMENT)
    moved = [dataclasses.replace(weight, offset=len(header) + weight.offset) for weight in weights]
    return dataclasses.replace(graph, weights=tuple(moved)), header


def _kind(weight: Weight, quantization: Quantization | None, kept: Mapping[str, bool] | None) -> Quantization | None:
    """How a weight is stored."""
    if weight.name == HEAD:
        return "int8" if quantization in ("int8", "int4") else None
    chosen = weight.source in kept if kept is not None else weight.name.endswith("_proj.weight")
    return quantization if chosen else None


def _parts(shape: tuple[int, ...], kind: Quantization, around_zero: bool) -> list[tuple[str, str, tuple[int, ...]]]:
    """A quantized projection's tensors: what is added to its name, dtype and shape."""
    outputs, inputs = shape
    if kind != "int4":  # a scale per row
        return [("", "I8" if kind == "int8" else "F8_E4M3", shape), ("_scale", "F32", (outputs,))]
    groups = inputs // GROUP_SIZE
    parts: list[tuple[str, str, tuple[int, ...]]] = [
        ("", "U8", (outputs, inputs // 2)),
        ("_scale", "F32", (outputs, groups)),
    ]
    return parts if around_zero else [*parts, ("_zero", "U8", (outputs, -(-groups // 2)))]
