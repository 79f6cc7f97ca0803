"""The graph over the checkpoint's own files, for a compiler that reads each weight once.

In: the graph, where the checkpoint's tensors lie, and an empty folder. Out: links to those files in the folder, and a
graph whose weights are read through them: nothing is copied but what has to be converted. The surprising fact: TensorRT
reads external data through a link beside the ONNX file but refuses a path that leads out of its folder; and it turns
projections to (in, out) itself, in a fraction of the time that writing the turned ones takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import helper

from ..contract import WEIGHTS_FILE
from .checkpoint import Tensor
from .graph import Graph, Weight, aligned


def linkable(graph: Graph, tensors: Mapping[str, Tensor]) -> tuple[Weight, ...]:
    """The weights that the checkpoint holds as the engine needs them, but for the order of a projection's axes."""
    return tuple(w for w in graph.weights if w.scale == 1.0 and tensors[w.source].dtype == graph.dtype)


def over_checkpoint(graph: Graph, linked: tuple[Weight, ...], tensors: Mapping[str, Tensor], folder: Path) -> Graph:
    """Link the files of the `linked` weights into `folder`; the graph that reads them, and what is left to write."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    entries = {entry.name: entry for entry in proto.graph.initializer}
    links: dict[Path, str] = {}
    turns: list[onnx.NodeProto] = []
    for w in linked:
        tensor, entry = tensors[w.source], entries[w.name]
        if tensor.file not in links:  # two files may have one name, so they are numbered
            links[tensor.file] = f"{len(links)}.safetensors"
            (folder / links[tensor.file]).symlink_to(tensor.file.resolve())
        if w.transposed:
            entry.name = f"{w.name}.stored"
            entry.dims[:] = tensor.shape
            turns.append(helper.make_node("Transpose", [entry.name], [w.name], name=f"{w.name}.turn", perm=[1, 0]))
        _place(entry, links[tensor.file], tensor.offset)
    nodes = [*turns, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    left, end = list[Weight](), 0
    for w in graph.weights:
        if w not in linked:
            left.append(dataclasses.replace(w, offset=aligned(end)))
            end = left[-1].offset + w.nbytes
            _place(entries[w.name], WEIGHTS_FILE, left[-1].offset)
    return Graph(proto, tuple(left), graph.dtype)


def _place(entry: onnx.TensorProto, location: str, offset: int) -> None:
    for item in entry.external_data:
        if item.key != "length":
            item.value = location if item.key == "location" else str(offset)
