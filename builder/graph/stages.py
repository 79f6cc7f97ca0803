"""Rewrites each op's node into a chain of nodes, one per kernel launch, for the full TensorRT."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper

from ...contract import DOMAIN
from ...plugins.op import Op


def split(proto: onnx.ModelProto, ops: Sequence[Op]) -> onnx.ModelProto:
    """Copy the graph with a chain in the place of each op's node, and without the functions.

    A part is named `NODE.STAGE` and has the node's attributes.
    """
    by_name = {op.name: op for op in ops}
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    del result.functions[:], result.graph.node[:]
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            result.graph.node.extend(_chain(node, by_name[node.op_type]))
        else:
            result.graph.node.append(node)
    return result


def _chain(node: onnx.NodeProto, op: Op) -> list[onnx.NodeProto]:
    """The nodes of the op's stages in order."""
    tensors: dict[str, str] = dict(zip((arg.name for arg in op.inputs), node.input, strict=True))
    tensors |= dict(zip((arg.name for arg in op.outputs), node.output, strict=True))

    def tensor(name: str) -> str:
        # A quick plugin of TensorRT 11 has one kernel and no workspace, so what one stage hands to the next has to be
        # a tensor of the graph.
        return tensors.get(name, f"{node.name}.{name}")

    parts = []
    for stage in op.stages:
        inputs = [tensor(name) for name in stage.inputs]
        outputs = [tensor(arg.name) for arg in stage.outputs]
        part = helper.make_node(stage.name, inputs, outputs, name=f"{node.name}.{stage.name}", domain=DOMAIN)
        part.attribute.extend(node.attribute)
        # Kernels are in the engine, so it runs without Python; TensorRT asks for it by this attribute.
        part.attribute.append(helper.make_attribute("aot", 1))
        parts.append(part)
    return parts
