"""The vision tower and the projector after it as a second ONNX graph: from patches to embeddings of image tokens.

A Pixtral tower is a bidirectional transformer whose positions are rows and columns. An image's patches see one another
and no other image's, which is what `visible` says of spans, so the decoder's attention op serves here too. On ONNX
Runtime, which holds all scores of an attention at once, the heads come one after the other.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto, helper

from ...config import ModelConfig
from ...contract import Dtype, vision_inputs, vision_outputs
from ...engine_folder import VISION_WEIGHTS_FILE
from ...plugins.ops import block_attention
from ...vision import CHANNELS, NORM_EPS, VisionConfig
from .graph import Graph, make_graph
from .writer import GraphWriter

_TOWER = "encoder.vision_tower"
_PROJECTOR = "encoder.multi_modal_projector"


def build_vision_graph(model: ModelConfig, dtype: Dtype, *, fused: bool = False) -> Graph:
    """Write the graph.

    Args:
        model: one that sees images.
        dtype: of the weights and the arithmetic.
        fused: take the decoder's attention op with all heads at once, for TensorRT.
    """
    vision = model.vision
    assert vision is not None
    w = GraphWriter(dtype, VISION_WEIGHTS_FILE)
    x = _add_patches(w, vision)
    _add_rotation(w, vision)
    if not fused:
        _add_mask(w)
    for layer in range(vision.num_layers):
        x = _add_attention(w, vision, layer, x, fused)
        x = _add_mlp(w, vision, layer, x)
    _add_projector(w, model, vision, x)
    functions = [block_attention.function(block_attention.FINITE[dtype])] if fused else []
    return make_graph(w, "nemodiff_vision", dtype, {}, vision_inputs(vision), vision_outputs(model), functions)


def _add_patches(w: GraphWriter, vision: VisionConfig) -> str:
    """The embedding of each patch, (1, N, E): a convolution whose stride is its width."""
    side = vision.patch_size
    kernel = w.weight(
        "patch_conv.weight", f"{_TOWER}.patch_conv.weight", (vision.hidden_size, CHANNELS, side, side), False
    )
    w.constant("patch_conv.shape", np.array([vision.hidden_size, -1], np.int64))
    flat = w.node("Reshape", [kernel, "patch_conv.shape"], "patch_conv.rows")
    flat = w.node("Transpose", [flat], "patch_conv.columns", perm=[1, 0])
    w.constant("rows.axis", np.array([0], np.int64))
    patches = w.node("Unsqueeze", [w.compute("patches", "patches.compute"), "rows.axis"], "patches.3d")
    x = w.node("MatMul", [patches, flat], "patch_conv")
    return w.norm(x, "ln_pre", f"{_TOWER}.ln_pre.weight", vision.hidden_size, NORM_EPS)


def _add_rotation(w: GraphWriter, vision: VisionConfig) -> None:
    """What all layers read: the angles, (1, N, D/2), reshape targets, and the numbers of the patches."""
    w.constant("rope.turns", vision.inv_freq())
    positions = w.node("Cast", ["positions"], "rope.positions", to=TensorProto.FLOAT)
    # A pair turns by its row or by its column, so one product of the two numbers with a matrix gives all angles. Each
    # is one number times its frequency plus zero, so nothing is rounded that the released code does not round.
    angle = w.node("MatMul", [positions, "rope.turns"], "rope.angle")
    angle = w.node("Unsqueeze", [angle, "rows.axis"], "rope.angle3")
    for op, name in (("Cos", "cos"), ("Sin", "sin")):
        w.compute(w.node(op, [angle], f"rope.{name}.f32"), f"rope.{name}")
    w.constant("shape.heads", np.array([0, 0, vision.num_heads, vision.head_dim], np.int64))
    w.constant("shape.merged", np.array([0, 0, vision.hidden_size], np.int64))
    w.constant("slots.zero", np.int32(0))
    w.constant("slots.one", np.int32(1))
    count = w.node("Shape", ["positions"], "slots.shape", start=0, end=1)
    count = w.node("Squeeze", [count, "rows.axis"], "slots.total")
    count = w.node("Cast", [count], "slots.count", to=TensorProto.INT32)
    w.node("Range", ["slots.zero", count, "slots.one"], "slots")  # (N,) i32


def _add_mask(w: GraphWriter) -> None:
    """What hides the patches of other images, (N, N)."""
    visible = w.node("Squeeze", ["visible", "rows.axis"], "mask.visible")
    for at, name in ((1, "begin"), (2, "end")):
        w.constant(f"mask.{name}.at", np.array([at], np.int64))
        w.node("Gather", [visible, f"mask.{name}.at"], f"mask.{name}", axis=1)  # (N, 1)
    begun = w.node("GreaterOrEqual", ["slots", "mask.begin"], "mask.begun")
    seen = w.node("And", [begun, w.node("Less", ["slots", "mask.end"], "mask.before_end")], "mask.seen")
    nothing = w.constant("mask.nothing", np.zeros((), w.dtype))
    hidden = w.constant("mask.hidden", np.full((), -math.inf, w.dtype))
    w.node("Where", [seen, nothing, hidden], "mask")


def _scan_heads(w: GraphWriter, heads: list[str], name: str, scale: float) -> None:
    """Attention head by head: q, k and v (1, H, N, D), the result is named `name`.

    At 10,000 patches the scores of one head are 400 MB.
    """
    kind = helper.np_dtype_to_tensor_dtype(w.dtype)
    q, k, v, y = (helper.make_tensor_value_info(f"{name}.head.{part}", kind, [1, "N", "D"]) for part in "qkvy")
    inputs = [q.name, k.name, v.name, "mask"]
    node = helper.make_node("Attention", inputs, [y.name], scale=scale, q_num_heads=1, kv_num_heads=1)
    body = helper.make_graph([node], f"{name}.heads", [q, k, v], [y])
    axes = {"scan_input_axes": [1, 1, 1], "scan_output_axes": [1], "num_scan_inputs": 3}
    w.node("Scan", heads, name, body=body, **axes)


def _add_attention(w: GraphWriter, vision: VisionConfig, layer: int, x: str, fused: bool) -> str:
    """x + o_proj(attention(norm(x)))."""
    at, source = f"layers.{layer}", f"{_TOWER}.transformer.layers.{layer}"
    size = vision.hidden_size
    normed = w.norm(x, f"{at}.attention_norm", f"{source}.attention_norm.weight", size, NORM_EPS)
    heads = {}
    for part in "qkv":
        name = f"{at}.attention.{part}_proj"
        flat = w.linear(normed, name, f"{source}.attention.{part}_proj.weight", size, size)
        split = w.node("Reshape", [flat, "shape.heads"], f"{name}.split")
        heads[part] = w.node("Transpose", [split], f"{name}.heads", perm=[0, 2, 1, 3])  # (1, H, N, D)
    for part in "qk":
        inputs = [heads[part], "rope.cos", "rope.sin"]
        heads[part] = w.node("RotaryEmbedding", inputs, f"{at}.attention.{part}_rope")
    name = f"{at}.attention"
    scale = float(vision.head_dim**-0.5)
    if fused:
        inputs = [heads["q"], heads["k"], heads["v"], "visible", "slots"]
        w.plugin("BlockAttention", inputs, [name], name, scale=scale)
    else:
        _scan_heads(w, [heads[part] for part in "qkv"], name, scale)
    merged = w.node("Transpose", [name], f"{name}.rows", perm=[0, 2, 1, 3])
    merged = w.node("Reshape", [merged, "shape.merged"], f"{name}.merged")
    out = w.linear(merged, f"{name}.o_proj", f"{source}.attention.o_proj.weight", size, size)
    return w.node("Add", [x, out], f"{name}.residual")


def _add_mlp(w: GraphWriter, vision: VisionConfig, layer: int, x: str) -> str:
    """x + down(act(gate(norm(x))) * up(norm(x)))."""
    at, source = f"layers.{layer}", f"{_TOWER}.transformer.layers.{layer}"
    size, inner = vision.hidden_size, vision.intermediate_size
    normed = w.norm(x, f"{at}.ffn_norm", f"{source}.ffn_norm.weight", size, NORM_EPS)
    at, source = f"{at}.feed_forward", f"{source}.feed_forward"
    gate = w.linear(normed, f"{at}.gate_proj", f"{source}.gate_proj.weight", size, inner)
    up = w.linear(normed, f"{at}.up_proj", f"{source}.up_proj.weight", size, inner)
    if vision.hidden_act == "gelu":
        act = w.node("Gelu", [gate], f"{at}.gelu")
    else:
        act = w.node("Mul", [gate, w.node("Sigmoid", [gate], f"{at}.sigmoid")], f"{at}.silu")
    gated = w.node("Mul", [act, up], f"{at}.gated")
    down = w.linear(gated, f"{at}.down_proj", f"{source}.down_proj.weight", inner, size)
    return w.node("Add", [x, down], f"{at}.residual")


def _add_projector(w: GraphWriter, model: ModelConfig, vision: VisionConfig, x: str) -> None:
    """Norm, one vector of the patches of a token, and two projections into the decoder's embeddings."""
    size, merge = vision.hidden_size, vision.merge
    x = w.norm(x, "projector.norm", f"{_PROJECTOR}.norm.weight", size, model.rms_norm_eps)
    # The patches of a token are neighbours. The merger's inputs are ordered by channel and then by patch.
    w.constant("merge.groups", np.array([-1, merge * merge, size], np.int64))
    w.constant("merge.flat", np.array([-1, merge * merge * size], np.int64))
    groups = w.node("Reshape", [x, "merge.groups"], "projector.patches")
    groups = w.node("Transpose", [groups], "projector.channels", perm=[0, 2, 1])
    groups = w.node("Reshape", [groups, "merge.flat"], "projector.merged")
    source = f"{_PROJECTOR}.patch_merger.merging_layer.weight"
    x = w.linear(groups, "projector.patch_merger.merging_layer", source, merge * merge * size, size)
    x = w.linear(x, "projector.linear_1", f"{_PROJECTOR}.linear_1.weight", size, model.hidden_size)
    x = w.node("Gelu", [x], "projector.gelu")
    x = w.linear(x, "projector.linear_2", f"{_PROJECTOR}.linear_2.weight", model.hidden_size, model.hidden_size)
    w.node("Cast", [x], "features", to=TensorProto.FLOAT)
