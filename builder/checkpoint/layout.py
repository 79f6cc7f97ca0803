"""Which of the checkpoint's tensors the graph wants, and where each lies in a safetensors file for torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...contract import Quantization
from ...errors import CheckpointError
from ..graph.graph import Graph
from ..graph.writer import ALIGNMENT, Weight
from .quantized import QuantizedTensor
from .safetensors_file import CODES, Entry, Tensor, header_bytes


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
    graph: Graph, quantization: Quantization | None = None, kept: Mapping[str, bool] | None = None
) -> tuple[Graph, bytes]:
    """Lay the graph's weights out as one safetensors file, and write the header that stands before them.

    Projections are (out, in), as in the checkpoint. Quantized, those of the layers are e4m3, each followed by its
    `NAME_scale`. `kept` names those that a checkpoint has in these bits already, and then no other is quantized.
    """
    entries: dict[str, Entry] = {}
    weights: list[Weight] = []
    end = 0
    for weight in graph.weights:
        begin = end
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        chosen = weight.source in kept if kept is not None else weight.name.endswith("_proj.weight")
        kind = quantization if chosen else None
        if kind:
            middle = begin + int(np.prod(shape))
            end = middle + 4 * shape[0]  # an f32 scale per row
            entries[weight.name] = Entry("F8_E4M3", shape, begin, middle)
            entries[f"{weight.name}_scale"] = Entry("F32", shape[:1], middle, end)
        else:
            end = begin + weight.nbytes
            entries[weight.name] = Entry(CODES[graph.dtype], shape, begin, end)
        weights.append(
            dataclasses.replace(
                weight, shape=shape, transposed=False, offset=begin, nbytes=end - begin, quantization=kind
            )
        )
    header = header_bytes(entries, alignment=ALIGNMENT)
    placed = [dataclasses.replace(weight, offset=len(header) + weight.offset) for weight in weights]
    return dataclasses.replace(graph, weights=tuple(placed)), header
