"""Defects that are planted into an engine's graph, each as its maker could have made it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

Change = Callable[[onnx.GraphProto], None]


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(one for one in graph.node if one.name == name)


def becomes(name: str, op: str, *inputs: str, **attributes: object) -> Change:
    """Another op in the place of a node."""

    def change(graph: onnx.GraphProto) -> None:
        old = node(graph, name)
        new = helper.make_node(op, inputs or [old.input[0]], list(old.output), name=name, **attributes)
        old.CopyFrom(new)

    return change


def swapped_inputs(name: str, one: int, other: int) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        inputs = node(graph, name).input
        inputs[one], inputs[other] = inputs[other], inputs[one]

    return change


def swapped_parts(name: str) -> Change:
    """What a node cuts in two goes to each other's users."""

    def change(graph: onnx.GraphProto) -> None:
        outputs = node(graph, name).output
        outputs[0], outputs[1] = outputs[1], outputs[0]

    return change


def attribute(name: str, key: str, change_value: Callable[[float], float]) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        found = next(one for one in node(graph, name).attribute if one.name == key)
        found.f = change_value(found.f)

    return change


def constant(name: str, change_value: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        found = next(one for one in graph.initializer if one.name == name)
        value = numpy_helper.to_array(found)
        found.CopyFrom(numpy_helper.from_array(change_value(value).astype(value.dtype), name))

    return change


def shifted_input(name: str, by: np.ndarray, users: Callable[[onnx.NodeProto], bool] = lambda one: True) -> Change:
    """A constant is added to a tensor before some of its users read it."""

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(by, f"{name}.by"))
        for one in graph.node:
            if users(one):
                for at, given in enumerate(one.input):
                    if given == name:
                        one.input[at] = f"{name}.shifted"
        made = next((at + 1 for at, one in enumerate(graph.node) if name in one.output), 0)
        graph.node.insert(made, helper.make_node("Add", [name, f"{name}.by"], [f"{name}.shifted"], name="shift"))

    return change


def through_f16(name: str) -> Change:
    """A tensor is rounded to f16."""

    def change(graph: onnx.GraphProto) -> None:
        at, place = next((at, list(one.output).index(name)) for at, one in enumerate(graph.node) if name in one.output)
        graph.node[at].output[place] = f"{name}.exact"
        graph.node.insert(at + 1, helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=10))
        graph.node.insert(at + 2, helper.make_node("Cast", [f"{name}.half"], [name], to=1))

    return change


def stuck_gate(graph: onnx.GraphProto) -> None:
    """The gate is exp(x - x), which is 1."""
    at = next(at for at, one in enumerate(graph.node) if one.name == "adapter.gate")
    graph.node[at].input[0] = "stuck"
    graph.node.insert(at, helper.make_node("Exp", ["adapter.none"], ["stuck"], name="stuck"))
    graph.node.insert(at, helper.make_node("Sub", ["adapter.3d", "adapter.3d"], ["adapter.none"], name="none"))


def other_factor(frequencies: np.ndarray) -> np.ndarray:
    """What is stretched is stretched by half as much."""
    return np.where(np.arange(frequencies.size) > frequencies.size // 2, 2 * frequencies, frequencies)


def _one_late(one: onnx.NodeProto) -> bool:
    return one.name == "k_cache_1_out"


ATTENTION = "layers.{}.self_attn".format
# By name: the change, and the first value that strays. "logits" where all layers are right.
GRAPH: dict[str, tuple[Change, str]] = {
    "swapped rotation": (swapped_inputs(f"{ATTENTION(1)}.k_rope", 1, 2), f"{ATTENTION(1)}.k_rope"),
    "query scale dropped": (constant("query_scale.beta", np.zeros_like), f"{ATTENTION(0)}.q_rope"),
    "adapter gate stuck": (stuck_gate, f"{ATTENTION(0)}.o_proj.lora.sum"),
    "a span one slot short": (shifted_input("visible", np.array([0, 0, -1], np.int32)), f"{ATTENTION(0)}"),
    "a query sees the future": (shifted_input("visible", np.array([1, 0, 0], np.int32)), f"{ATTENTION(0)}"),
    "cache written one late": (shifted_input("write_at.index", np.array([1]), _one_late), "k_cache_1"),
    "YaRN factor": (constant("rope.inv_freq", other_factor), f"{ATTENTION(0)}.q_rope"),
    "YaRN attention factor": (constant("rope.cos.factor", np.ones_like), f"{ATTENTION(0)}.q_rope"),
    "positions off by one": (shifted_input("rope.pos", np.array(1, np.float32)), f"{ATTENTION(0)}.q_rope"),
    "head in f16": (through_f16("logits"), "logits"),
    "a projection in f16": (through_f16("layers.1.mlp.up_proj"), "layers.1.mlp.up_proj"),
    "a norm's epsilon": (
        attribute("layers.1.post_attention_layernorm", "epsilon", lambda eps: eps / 10),
        "layers.1.post_attention_layernorm",
    ),
    "last norm's epsilon": (attribute("norm", "epsilon", lambda eps: eps / 10), "logits"),
    "attention's scale": (attribute(ATTENTION(1), "scale", lambda scale: scale * math.sqrt(1.01)), ATTENTION(1)),
    "gate and up swapped": (
        swapped_parts("layers.0.mlp.gate_up_proj.parts"),
        "layers.0.mlp.gate_proj",
    ),
    "a residual dropped": (
        becomes("layers.0.mlp.residual", "Identity", "layers.0.mlp.down_proj"),
        "layers.0.mlp.residual",
    ),
}


def in_body(output: str, op: str, *inputs: str) -> Callable[[onnx.ModelProto], None]:
    """Another op in the body of ConfidenceCommit, with its attributes as they were if it is of the same kind."""

    def change(proto: onnx.ModelProto) -> None:
        body = next(one for one in proto.functions if one.name == "ConfidenceCommit")
        old = next(one for one in body.node if output in one.output)
        kept = list(old.attribute) if op == old.op_type or op.startswith("Arg") else []
        new = helper.make_node(op, inputs or list(old.input), list(old.output))
        new.attribute.extend(kept)
        old.CopyFrom(new)

    return change


# By name: the change, and a word of the finding. No layer strays.
COMMIT: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "mask id a candidate": (in_body("candidates", "Identity", "logits"), "probability is off"),
    "mask id in the sum alone": (in_body("probability", "Softmax", "logits"), "probability is off"),
    "the least sure is committed": (in_body("first", "ArgMin"), "where the rule gives"),
    "nothing but the surest is committed": (in_body("is_sure", "Less", "rank", "closed"), "where the rule gives"),
}
