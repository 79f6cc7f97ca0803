"""Rewrites each op's node into a chain of nodes, one per kernel launch, for the full TensorRT.

In: the graph, and per op the chain of its stages. Out: the graph with the chains in the ops' places and without the
functions. The surprising fact: a quick plugin of TensorRT 11 has one kernel and no workspace, so what one stage hands
to the next has to be a tensor of the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx
from onnx import helper

from ..contract import DOMAIN


@dataclasses.dataclass(frozen=True)
class Part:
    """One stage as a plugin; its tensors are inputs and outputs of the op, or scratch that only the chain knows."""

    plugin: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Chain:
    """An op's arguments in the node's order, and its parts in launch order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parts: tuple[Part, ...]


def split(proto: onnx.ModelProto, chains: Mapping[str, Chain]) -> onnx.ModelProto:
    """A copy of the graph with chains for nodes. A part is named `NODE.PLUGIN` and has the node's attributes."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    del made.functions[:], made.graph.node[:]
    for node in proto.graph.node:
        if node.domain != DOMAIN:
            made.graph.node.append(node)
            continue
        chain = chains[node.op_type]
        names = dict(zip(chain.inputs, node.input, strict=True)) | dict(zip(chain.outputs, node.output, strict=True))
        for part in chain.parts:
            given, result = ([names.get(t, f"{node.name}.{t}") for t in side] for side in (part.inputs, part.outputs))
            added = helper.make_node(part.plugin, given, result, name=f"{node.name}.{part.plugin}", domain=DOMAIN)
            added.attribute.extend(node.attribute)
            # Kernels are in the engine, so it runs without Python; TensorRT asks for it by this attribute.
            added.attribute.append(helper.make_attribute("aot", 1))
            made.graph.node.append(added)
    return made
