"""The decoder as one ONNX opset-24 graph, for every backend and every mode.

Its bindings are those that `contract.py` lists, the custom ops are local functions, and nodes carry the names of the
checkpoint's modules (`layers.3.self_attn.q_proj`). No weight is read here: the graph lists them with their places in
the external data file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ...config import ModelConfig
from ...contract import (
    CONVOLVED,
    DOMAIN,
    GROUP_SIZE,
    MEMORY_PATTERN,
    Binding,
    Dtype,
    KvBits,
    Quantization,
    inputs,
    outputs,
)
from ...plugins.ops import block_attention, confidence_commit
from .layers import add_attention, add_embeddings, add_head, add_mlp, add_shared
from .projection import CONTRIB
from .writer import GraphWriter, Weight

OPSET = 24
_TENSOR_TYPE = {
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "i32": TensorProto.INT32,
    "i8": TensorProto.INT8,
}


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


def build_graph(
    model: ModelConfig,
    dtype: Dtype,
    adapter_rank: int = 0,
    adapter_scale: float = 1.0,
    *,
    capacity: int | None = None,
    logits: bool = True,
    quantization: Quantization | None = None,
    group_size: int = GROUP_SIZE,
    mlp_group_size: int = GROUP_SIZE,
    kept: Mapping[str, bool] | None = None,
    packed: bool = False,
    convolved: bool = False,
    kv_bits: KvBits | None = None,
) -> Graph:
    """Write the graph.

    Args:
        model: gives the sizes and constants.
        dtype: of the weights, the cache and the arithmetic.
        adapter_rank: of the drafter adapter, 0 without one.
        adapter_scale: folded into the adapter's B matrices.
        capacity: fixes T for TensorRT, which updates a cache in place only where its length is static.
        logits: False leaves that output out.
        quantization: `int8` or `int4` projections, for ONNX Runtime and TensorRT.
        group_size: inputs of an int4 weight that share a scale, of which every projection's are a multiple.
        mlp_group_size: likewise in the MLPs.
        kept: names the tensors that a checkpoint has in these bits already, and whether around 0; then no other
            projection of the layers is quantized.
        kv_bits: `int8` keeps K and V in 8 bits, for ONNX Runtime.
        packed: make one product of projections that share an input, for ONNX Runtime.
        convolved: make products that are not of few bits convolutions, for ONNX Runtime on x86.
    """
    w = GraphWriter(
        dtype,
        packed=packed,
        dequantized=capacity is not None,
        convolved=convolved,
        quantization=quantization,
        group_size=group_size,
        mlp_group_size=mlp_group_size,
        kept=kept,
    )
    embed = w.weight("embed_tokens.weight", "encoder.embed_tokens.weight", (model.vocab_size, model.hidden_size), False)
    x = w.node("Gather", [embed, "ids"], "embed_tokens", axis=0)
    if model.vision:
        x = add_embeddings(w, x)
    add_shared(w, model, bool(adapter_rank), kv_bits)
    if w.flattened:
        x = w.flat(x, model.hidden_size, "embeddings.flat")
    for layer in range(model.num_layers):
        x = add_attention(w, model, layer, x, adapter_rank, adapter_scale, kv_bits)
        x = add_mlp(w, model, layer, x)
    add_head(w, model, x)
    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    if kv_bits:
        attention = block_attention.int8_function(heads)
    elif capacity is None:
        attention = block_attention.function(heads=heads)
    else:
        attention = block_attention.function(block_attention.FINITE[dtype])
    functions = [attention, confidence_commit.function(model.vocab_size if packed else None)]
    adapter = bool(adapter_rank)
    sizes = {"V": model.vocab_size} if capacity is None else {"V": model.vocab_size, "T": capacity}
    given = inputs(model, adapter, kv_bits) + ([MEMORY_PATTERN] if capacity is None else [])
    graph = make_graph(w, "nemodiff", dtype, sizes, given, outputs(model, logits, kv_bits), functions)
    if convolved:
        helper.set_model_props(graph.proto, {CONVOLVED: "x86"})
    return graph


def make_graph(
    w: GraphWriter,
    name: str,
    dtype: Dtype,
    sizes: dict[str, int],
    inputs: list[Binding],
    outputs: list[Binding],
    functions: list[onnx.FunctionProto],
) -> Graph:
    """What a writer has collected as a model; `sizes` gives letters of the bindings' shapes a number."""
    versions = {"": OPSET, DOMAIN: 1}
    if any(node.domain == CONTRIB for node in w.nodes):
        versions[CONTRIB] = 1
    proto = helper.make_model(
        helper.make_graph(
            w.nodes,
            name,
            [_value_info(b, dtype, sizes) for b in inputs],
            [_value_info(b, dtype, sizes) for b in outputs],
            w.initializers,
        ),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in versions.items()],
        ir_version=11,
        producer_name="nemodiff",
        functions=functions,
    )
    return Graph(proto, tuple(w.weights), w.dtype)


def _value_info(binding: Binding, dtype: Dtype, sizes: dict[str, int]) -> onnx.ValueInfoProto:
    kind = dtype if binding.kind == "compute" else binding.kind
    shape = [sizes.get(d, d) if isinstance(d, str) else d for d in binding.shape]
    return helper.make_tensor_value_info(binding.name, _TENSOR_TYPE[kind], shape)
