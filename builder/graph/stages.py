"""Rewrites each op's node into a chain of nodes, one per kernel launch, for the full TensorRT.

In: the graph and the ops. Out: the graph with the chains in the ops' places and without the functions. The surprising
fact: a quick plugin of TensorRT 11 has one kernel and no workspace, so what one stage hands to the next has to be a
tensor of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper

from ...contract import DOMAIN
from ...plugins.op import Op


def split(proto: onnx.ModelProto, ops: Sequence[Op]) -> onnx.ModelProto:
    """A copy of the graph with chains for nodes. A part is named `NODE.STAGE` and has the node's attributes."""
    by_name = {op.name: op for op in ops}
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    del made.functions[:], made.graph.node[:]
    for node in proto.graph.node:
        if node.domain != DOMAIN:
            made.graph.node.append(node)
            continue
        op = by_name[node.op_type]
        names = dict(zip((arg.name for arg in op.inputs), node.input, strict=True))
        names |= dict(zip((arg.name for arg in op.outputs), node.output, strict=True))
        for stage in op.stages:
            outputs = [arg.name for arg in stage.outputs]
            given, result = ([names.get(t, f"{node.name}.{t}") for t in side] for side in (stage.inputs, outputs))
            added = helper.make_node(stage.name, given, result, name=f"{node.name}.{stage.name}", domain=DOMAIN)
            added.attribute.extend(node.attribute)
            # Kernels are in the engine, so it runs without Python; TensorRT asks for it by this attribute.
            added.attribute.append(helper.make_attribute("aot", 1))
            made.graph.node.append(added)
    return made
