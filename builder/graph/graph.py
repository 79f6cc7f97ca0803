"""The decoder as one ONNX opset-24 graph, for every backend and every mode.

In: the model's config, the dtype, the adapter's rank, for TensorRT the cache's capacity. Out: the ModelProto with its
bindings as `contract.py` lists them and the custom ops as local functions, and the list of weights with their places in
the external data file; no weight is read here. Nodes carry the names of the checkpoint's modules
(`layers.3.self_attn.q_proj`). The surprising fact: cos and sin are computed from `pos` inside the graph, so no table
bounds the sequence length.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...config import ModelConfig
from ...contract import DOMAIN, Binding, Dtype, cache_names, inputs, outputs
from ...engine_folder import WEIGHTS_FILE
from ...plugins.ops import block_attention, confidence_commit

OPSET = 24
ALIGNMENT = 4096  # bytes; runtimes map external data by page
_TENSOR_TYPE = {
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "i32": TensorProto.INT32,
}
_NUMPY_TYPE: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of the graph and where it comes from: `source` in the checkpoint (or adapter), perhaps transposed."""

    name: str
    source: str
    shape: tuple[int, ...]  # as stored in the engine
    transposed: bool
    scale: float
    offset: int
    nbytes: int
    quantized: bool = False  # e4m3, and behind it the f32 scale of each row


@dataclasses.dataclass(frozen=True)
class Graph:
    """The model and what the weights file must hold."""

    proto: onnx.ModelProto
    weights: tuple[Weight, ...]
    dtype: np.dtype[Any]

    @property
    def weight_bytes(self) -> int:
        """Size of the external data file."""
        return self.weights[-1].offset + self.weights[-1].nbytes


class _Writer:
    """Collects nodes, small constants and weights of one graph; each node is named after the tensor it makes."""

    def __init__(self, dtype: Dtype) -> None:
        self.dtype = _NUMPY_TYPE[dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.weights: list[Weight] = []
        self.end = 0

    def node(self, op: str, args: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, args, [name], name=name, **attributes))
        return name

    def plugin(self, op: str, args: list[str], results: list[str], name: str, **attributes: Any) -> None:
        attributes["plugin_namespace"] = DOMAIN
        self.nodes.append(helper.make_node(op, args, results, name=name, domain=DOMAIN, **attributes))

    def constant(self, name: str, value: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name: str, source: str, shape: tuple[int, ...], transposed: bool, scale: float = 1.0) -> str:
        """Declare an external weight; `shape` is the one stored here, so of (in, out) for a transposed projection."""
        offset = -(-self.end // ALIGNMENT) * ALIGNMENT
        nbytes = int(np.prod(shape)) * self.dtype.itemsize
        self.end = offset + nbytes
        self.weights.append(Weight(name, source, shape, transposed, scale, offset, nbytes))
        tensor = TensorProto(name=name, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(self.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def linear(self, x: str, name: str, source: str, size_in: int, size_out: int) -> str:
        return self.node("MatMul", [x, self.weight(f"{name}.weight", source, (size_in, size_out), True)], name)

    def norm(self, x: str, name: str, source: str, size: int, eps: float) -> str:
        weight = self.weight(f"{name}.weight", source, (size,), False)
        return self.node("RMSNormalization", [x, weight], name, axis=-1, epsilon=eps)

    def compute(self, x: str, name: str) -> str:
        """Cast to the engine's dtype."""
        return self.node("Cast", [x], name, to=helper.np_dtype_to_tensor_dtype(self.dtype))


def build_graph(
    model: ModelConfig,
    dtype: Dtype,
    adapter_rank: int = 0,
    adapter_scale: float = 1.0,
    *,
    capacity: int | None = None,
    logits: bool = True,
) -> Graph:
    """Write the graph. `adapter_rank` 0 means no drafter adapter; `adapter_scale` is folded into its B matrices.

    `capacity` fixes T: TensorRT updates a cache in place only where its length is static. `logits` False leaves that
    output out.
    """
    w = _Writer(dtype)
    ids = w.node("Cast", ["ids"], "ids.index", to=TensorProto.INT64)
    embed = w.weight("embed_tokens.weight", "encoder.embed_tokens.weight", (model.vocab_size, model.hidden_size), False)
    x = w.node("Gather", [embed, ids], "embed_tokens", axis=0)
    _shared(w, model, bool(adapter_rank))
    for layer in range(model.num_layers):
        x = _attention(w, model, layer, x, adapter_rank, adapter_scale)
        x = _mlp(w, model, layer, x)
    _head(w, model, x)
    functions = [block_attention.function(), confidence_commit.function()]
    adapter = bool(adapter_rank)
    sizes = {"V": model.vocab_size} if capacity is None else {"V": model.vocab_size, "T": capacity}
    proto = helper.make_model(
        helper.make_graph(
            w.nodes,
            "nemodiff",
            [_value_info(b, dtype, sizes) for b in inputs(model, adapter)],
            [_value_info(b, dtype, sizes) for b in outputs(model, logits)],
            w.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=11,
        producer_name="nemodiff",
        functions=functions,
    )
    return Graph(proto, tuple(w.weights), w.dtype)


def _value_info(binding: Binding, dtype: Dtype, sizes: dict[str, int]) -> onnx.ValueInfoProto:
    kind = dtype if binding.kind == "compute" else binding.kind
    shape = [sizes.get(d, d) if isinstance(d, str) else d for d in binding.shape]
    return helper.make_tensor_value_info(binding.name, _TENSOR_TYPE[kind], shape)


def _shared(w: _Writer, model: ModelConfig, adapter: bool) -> None:
    """What all layers read: rotation, query scale, cache slots, reshape targets, the adapter's gate."""
    rope = model.rope
    w.constant("axis.last", np.array([2], np.int64))
    w.constant("shape.q", np.array([0, 0, model.num_heads, model.head_dim], np.int64))
    w.constant("shape.kv", np.array([0, 0, model.num_kv_heads, model.head_dim], np.int64))
    w.constant("shape.merged", np.array([0, 0, model.num_heads * model.head_dim], np.int64))
    w.node("Cast", ["write_at"], "write_at.index", to=TensorProto.INT64)

    pos = w.node("Cast", ["pos"], "rope.pos", to=TensorProto.FLOAT)
    w.node("Unsqueeze", [pos, "axis.last"], "rope.pos3")  # (B, S, 1) f32
    w.constant("rope.inv_freq", rope.inv_freq(model.head_dim)[None, None])  # (1, 1, D/2) f32
    angle = w.node("Mul", ["rope.pos3", "rope.inv_freq"], "rope.angle")
    for op, name in (("Cos", "cos"), ("Sin", "sin")):
        value = w.node(op, [angle], f"rope.{name}.f32")
        if rope.attention_factor != 1.0:
            factor = w.constant(f"rope.{name}.factor", np.float32(rope.attention_factor))
            value = w.node("Mul", [value, factor], f"rope.{name}.scaled")
        w.compute(value, f"rope.{name}")

    if rope.llama_4_scaling_beta:  # 1 + beta * ln(1 + floor(pos / L0)), queries only
        w.constant("query_scale.L0", np.float32(rope.original_max_position))
        w.constant("query_scale.beta", np.float32(rope.llama_4_scaling_beta))
        w.constant("query_scale.one", np.float32(1))
        periods = w.node("Floor", [w.node("Div", [pos, "query_scale.L0"], "query_scale.ratio")], "query_scale.periods")
        log = w.node("Log", [w.node("Add", [periods, "query_scale.one"], "query_scale.count")], "query_scale.log")
        scale = w.node("Mul", [log, "query_scale.beta"], "query_scale.gain")
        scale = w.node("Add", [scale, "query_scale.one"], "query_scale.f32")
        w.constant("query_scale.axes", np.array([1, 3], np.int64))
        w.compute(w.node("Unsqueeze", [scale, "query_scale.axes"], "query_scale.4d"), "query_scale")  # (B, 1, S, 1)

    w.constant("slots.zero", np.int32(0))
    w.constant("slots.one", np.int32(1))
    w.constant("slots.axis", np.array([0], np.int64))
    capacity = w.node("Shape", [cache_names(1)[0]], "slots.shape", start=2, end=3)
    capacity = w.node("Squeeze", [capacity, "slots.axis"], "slots.capacity")
    capacity = w.node("Cast", [capacity], "slots.count", to=TensorProto.INT32)
    w.node("Range", ["slots.zero", capacity, "slots.one"], "slots")  # (T,) i32
    if adapter:
        w.compute(w.node("Unsqueeze", ["adapter", "axis.last"], "adapter.3d"), "adapter.gate")  # (B, S, 1)


def _attention(w: _Writer, model: ModelConfig, layer: int, x: str, rank: int, scale: float) -> str:
    """x + o_proj(attention(norm(x))), and the gated drafter branch on o_proj."""
    at, source = f"layers.{layer}", f"encoder.layers.{layer}"
    attn = f"{at}.self_attn"
    q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    normed = w.norm(
        x, f"{at}.input_layernorm", f"{source}.input_layernorm.weight", model.hidden_size, model.rms_norm_eps
    )
    heads: dict[str, str] = {}
    for part, size, shape in (("q", q_size, "shape.q"), ("k", kv_size, "shape.kv"), ("v", kv_size, "shape.kv")):
        name = f"{attn}.{part}_proj"
        flat = w.linear(normed, name, f"{source}.self_attn.{part}_proj.weight", model.hidden_size, size)
        split = w.node("Reshape", [flat, shape], f"{name}.split")
        heads[part] = w.node("Transpose", [split], f"{name}.heads", perm=[0, 2, 1, 3])  # (B, heads, S, D)
    for part in "qk":
        heads[part] = w.node("RotaryEmbedding", [heads[part], "rope.cos", "rope.sin"], f"{attn}.{part}_rope")
    if model.rope.llama_4_scaling_beta:
        heads["q"] = w.node("Mul", [heads["q"], "query_scale"], f"{attn}.q_scaled")
    for part in "kv":
        cache = f"{part}_cache_{layer}"
        w.node("TensorScatter", [cache, heads[part], "write_at.index"], f"{cache}_out", axis=2)
    w.plugin(
        "BlockAttention",
        [heads["q"], f"k_cache_{layer}_out", f"v_cache_{layer}_out", "visible", "slots"],
        [attn],
        attn,
        scale=float(model.head_dim**-0.5),
    )
    merged = w.node("Transpose", [attn], f"{attn}.rows", perm=[0, 2, 1, 3])
    merged = w.node("Reshape", [merged, "shape.merged"], f"{attn}.merged")
    out = w.linear(merged, f"{attn}.o_proj", f"{source}.self_attn.o_proj.weight", q_size, model.hidden_size)
    if rank:
        lora = f"{attn}.o_proj.lora"
        key = f"base_model.model.{source}.self_attn.o_proj"
        a = w.weight(f"{lora}_A.weight", f"{key}.lora_A.weight", (q_size, rank), True)
        b = w.weight(f"{lora}_B.weight", f"{key}.lora_B.weight", (rank, model.hidden_size), True, scale)
        low = w.node("MatMul", [merged, a], f"{lora}_A")
        # The gate is exactly 0 or 1, so a token without the adapter gets exactly the base model's value.
        low = w.node("Mul", [low, "adapter.gate"], f"{lora}.gated")
        out = w.node("Add", [out, w.node("MatMul", [low, b], f"{lora}_B")], f"{lora}.sum")
    return w.node("Add", [x, out], f"{attn}.residual")


def _mlp(w: _Writer, model: ModelConfig, layer: int, x: str) -> str:
    """x + down(silu(gate(norm(x))) * up(norm(x)))."""
    at, source = f"layers.{layer}", f"encoder.layers.{layer}"
    hidden, inner = model.hidden_size, model.intermediate_size
    name = f"{at}.post_attention_layernorm"
    normed = w.norm(x, name, f"{source}.post_attention_layernorm.weight", hidden, model.rms_norm_eps)
    gate = w.linear(normed, f"{at}.mlp.gate_proj", f"{source}.mlp.gate_proj.weight", hidden, inner)
    up = w.linear(normed, f"{at}.mlp.up_proj", f"{source}.mlp.up_proj.weight", hidden, inner)
    silu = w.node("Mul", [gate, w.node("Sigmoid", [gate], f"{at}.mlp.sigmoid")], f"{at}.mlp.silu")
    gated = w.node("Mul", [silu, up], f"{at}.mlp.gated")
    down = w.linear(gated, f"{at}.mlp.down_proj", f"{source}.mlp.down_proj.weight", inner, hidden)
    return w.node("Add", [x, down], f"{at}.mlp.residual")


def _head(w: _Writer, model: ModelConfig, x: str) -> None:
    """Final norm and head on the picked rows only, then the commit rule."""
    rows = w.node("Cast", ["rows"], "rows.index", to=TensorProto.INT64)
    rows = w.node("Unsqueeze", [rows, "axis.last"], "rows.3d")
    picked = w.node("GatherND", [x, rows], "rows.hidden", batch_dims=1)  # (B, R, E)
    ids = w.node("GatherND", ["ids", rows], "rows.ids", batch_dims=1)  # (B, R)
    normed = w.norm(picked, "norm", "encoder.norm.weight", model.hidden_size, model.rms_norm_eps)
    head = w.linear(normed, "diffusion_head", "diffusion_head.weight", model.hidden_size, model.vocab_size)
    w.node("Cast", [head], "logits", to=TensorProto.FLOAT)
    results = ["token", "confidence", "next_ids", "masks_left"]
    w.plugin("ConfidenceCommit", ["logits", ids, "threshold"], results, "commit", mask_id=model.mask_id)
