"""The parts of the decoder: what all layers share, attention, MLP and head, written into a graph."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ...config import ModelConfig
from ...contract import KvBits, cache_names
from ...plugins.ops.kv_cache import LARGEST
from .projection import add_zero, dequantized, int4, int8
from .writer import GraphWriter, Source


def _project(w: GraphWriter, x: str, name: str, source: Source, sizes: tuple[int, int], group: int) -> str:
    """Multiply by a projection of a layer (inputs, outputs) in the engine's bits; `group` is int4's."""
    kind = w.quantization if w.keeps(source) else None
    if kind and w.dequantized:
        return dequantized(w, kind, x, name, source, *sizes, group)
    if kind == "int8":
        return int8(w, x, "tokens.zero", name, source, *sizes)
    if kind == "int4":
        return int4(w, x, name, source, *sizes, group)
    return w.linear(x, name, source, *sizes)


def add_shared(w: GraphWriter, model: ModelConfig, adapter: bool, kv_bits: KvBits | None) -> None:
    """What all layers read: rotation, query scale, cache slots, reshape targets, the adapter's gate."""
    rope = model.rope
    w.constant("axis.last", np.array([2], np.int64))
    heads = {"q": model.num_heads, "kv": model.num_kv_heads}
    if w.packed:
        heads["qkv"] = model.num_heads + 2 * model.num_kv_heads
        w.constant("heads.qkv", np.array([model.num_heads, model.num_kv_heads, model.num_kv_heads], np.int64))
        w.constant("inputs.gate_up", np.array([model.intermediate_size] * 2, np.int64))
    if w.flattened:
        w.constant("tokens.rest", np.array([-1], np.int64))
        w.node("Shape", ["ids"], "ids.shape")  # B, S
        w.node("Concat", ["ids.shape", "tokens.rest"], "tokens.shape", axis=0)  # B, S, -1
    if w.paired or w.paired_mlps:
        w.constant("tokens.first", np.array([0], np.int64))
        w.constant("tokens.axis", np.array([2], np.int64))
        w.constant("tokens.none", np.zeros(6, np.int64))
        w.constant("tokens.pair", np.array([2], np.int64))
        tokens = w.node("ReduceProd", ["ids.shape"], "tokens.count", keepdims=1)
        odd = w.node("Mod", [tokens, "tokens.pair"], "tokens.odd")
        w.node("Concat", ["tokens.none", odd, "tokens.first"], "tokens.pads", axis=0)  # of four axes, before and after
    for part, count in heads.items():
        if w.flattened:
            sizes = w.constant(f"sizes.{part}", np.array([count, model.head_dim], np.int64))
            w.node("Concat", ["ids.shape", sizes], f"shape.{part}", axis=0)
        else:
            w.constant(f"shape.{part}", np.array([0, 0, count, model.head_dim], np.int64))
    w.constant("shape.merged", np.array([0, 0, model.num_heads * model.head_dim], np.int64))
    w.node("Cast", ["write_at"], "write_at.index", to=TensorProto.INT64)

    pos = w.node("Cast", ["pos"], "rope.pos", to=TensorProto.FLOAT)
    # cos and sin are computed from `pos` inside the graph, so no table bounds the sequence length.
    w.node("Unsqueeze", [pos, "axis.last"], "rope.pos3")  # (B, S, 1) f32
    if w.quantization and not w.dequantized:
        w.constant("int8.step", np.float32(1 / 127))
        w.constant("int8.zero", np.uint8(128))
    if w.quantization == "int8" and not w.dequantized:
        add_zero(w, "rope.pos3", "tokens.zero")
    w.constant("rope.inv_freq", rope.inv_freq(model.head_dim)[None, None])  # (1, 1, D/2) f32
    angle = w.node("Mul", ["rope.pos3", "rope.inv_freq"], "rope.angle")
    if rope.llama_4_scaling_beta:  # 1 + beta * ln(1 + floor(pos / L0)), queries only
        w.constant("query_scale.L0", np.float32(rope.original_max_position))
        w.constant("query_scale.beta", np.float32(rope.llama_4_scaling_beta))
        w.constant("query_scale.one", np.float32(1))
        periods = w.node("Floor", [w.node("Div", [pos, "query_scale.L0"], "query_scale.ratio")], "query_scale.periods")
        log = w.node("Log", [w.node("Add", [periods, "query_scale.one"], "query_scale.count")], "query_scale.log")
        scale = w.node("Mul", [log, "query_scale.beta"], "query_scale.gain")
        scale = w.node("Add", [scale, "query_scale.one"], "query_scale.f32")
        w.node("Unsqueeze", [scale, "axis.last"], "query_scale")  # (B, S, 1) f32
    for op, name in (("Cos", "cos"), ("Sin", "sin")):
        value = w.node(op, [angle], f"rope.{name}.f32")
        if rope.attention_factor != 1.0:
            factor = w.constant(f"rope.{name}.factor", np.float32(rope.attention_factor))
            value = w.node("Mul", [value, factor], f"rope.{name}.scaled")
        w.compute(value, f"rope.{name}")
        if rope.llama_4_scaling_beta:  # a rotation by these scales a query too, which saves each layer a product
            w.compute(w.node("Mul", [value, "query_scale"], f"rope.q_{name}.f32"), f"rope.q_{name}")

    if kv_bits:
        w.constant("kv.axis", np.array([3], np.int64))
        w.constant("kv.largest", np.float32(LARGEST[kv_bits]))
        w.constant("kv.least", np.finfo(np.float32).tiny)
    w.constant("slots.zero", np.int32(0))
    w.constant("slots.one", np.int32(1))
    w.constant("slots.axis", np.array([0], np.int64))
    capacity = w.node("Shape", [cache_names(1)[0]], "slots.shape", start=2, end=3)
    capacity = w.node("Squeeze", [capacity, "slots.axis"], "slots.capacity")
    capacity = w.node("Cast", [capacity], "slots.count", to=TensorProto.INT32)
    w.node("Range", ["slots.zero", capacity, "slots.one"], "slots")  # (T,) i32
    if adapter:
        gate = w.node("Unsqueeze", ["adapter", "axis.last"], "adapter.3d")  # (B, S, 1)
        w.compute(w.flat(gate, 1, "adapter.flat") if w.flattened else gate, "adapter.gate")


def add_embeddings(w: GraphWriter, x: str) -> str:
    """The tokens' embeddings (B, S, E), or those that are given in their place."""
    w.constant("embedding.zero", np.int32(0))
    w.constant("embedding.axis", np.array([2], np.int64))
    given = w.node("GreaterOrEqual", ["embedding", "embedding.zero"], "embedding.given")
    given = w.node("Unsqueeze", [given, "embedding.axis"], "embedding.given3")  # (B, S, 1) bool
    index = w.node("Max", ["embedding", "embedding.zero"], "embedding.index")
    own = w.node("Gather", [w.compute("embeddings", "embeddings.compute"), index], "embedding.gathered", axis=0)
    return w.node("Where", [given, own, x], "embedding.chosen")


def add_attention(
    w: GraphWriter,
    model: ModelConfig,
    layer: int,
    x: str,
    rank: int,
    scale: float,
    kv_bits: KvBits | None,
) -> str:
    """x + o_proj(attention(norm(x))), and the gated drafter branch on o_proj."""
    at, source = f"layers.{layer}", f"encoder.layers.{layer}"
    attn = f"{at}.self_attn"
    q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    normed = w.norm(
        x, f"{at}.input_layernorm", f"{source}.input_layernorm.weight", model.hidden_size, model.rms_norm_eps
    )
    names = {part: f"{attn}.{part}_proj" for part in "qkv"}
    outputs = {f"{source}.self_attn.q_proj.weight": q_size}
    outputs |= {f"{source}.self_attn.{part}_proj.weight": kv_size for part in "kv"}
    heads: dict[str, str] = {}
    if w.packs(outputs):
        name, sizes = f"{attn}.qkv_proj", (model.hidden_size, q_size + 2 * kv_size)
        turned = _heads(w, _project(w, normed, name, outputs, sizes, w.group_size), "shape.qkv")
        heads = dict(zip("qkv", w.split(turned, list(names.values()), "heads.qkv", 1), strict=True))
    else:
        for (part, name), (tensor, size) in zip(names.items(), outputs.items(), strict=True):
            flat = _project(w, normed, name, tensor, (model.hidden_size, size), w.group_size)
            heads[part] = _heads(w, flat, "shape.q" if part == "q" else "shape.kv")
    for part in "qk":
        of = "q_" if part == "q" and model.rope.llama_4_scaling_beta else ""
        rotation = [f"rope.{of}cos", f"rope.{of}sin"]
        heads[part] = w.node("RotaryEmbedding", [heads[part], *rotation], f"{attn}.{part}_rope")
    kept = [name for part in "kv" for name in _cached(w, f"{part}_cache_{layer}", heads[part], kv_bits)]
    w.plugin(
        "Int8BlockAttention" if kv_bits else "BlockAttention",
        [heads["q"], *kept, "visible", "slots"],
        [attn],
        attn,
        scale=float(model.head_dim**-0.5),
    )
    merged = w.node("Transpose", [attn], f"{attn}.rows", perm=[0, 2, 1, 3])
    if w.flattened:
        merged = w.flat(merged, q_size, f"{attn}.merged")
    else:
        merged = w.node("Reshape", [merged, "shape.merged"], f"{attn}.merged")
    sizes = q_size, model.hidden_size
    out = _project(w, merged, f"{attn}.o_proj", f"{source}.self_attn.o_proj.weight", sizes, w.group_size)
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


def _cached(w: GraphWriter, cache: str, rows: str, kv_bits: KvBits | None) -> list[str]:
    """Write K or V (B, G, S, D) into a cache, in int8 with the rows' scales beside; the tensors to read then."""
    written = {cache: rows}
    if kv_bits:
        most = w.node(
            "ReduceMax", [w.node("Abs", [rows], f"{cache}.magnitude"), "kv.axis"], f"{cache}.most", keepdims=1
        )
        step = w.node("Max", [w.node("Div", [most, "kv.largest"], f"{cache}.step"), "kv.least"], f"{cache}.steps")
        over = w.node("Round", [w.node("Div", [rows, step], f"{cache}.over")], f"{cache}.rounded")
        written = {cache: w.node("Cast", [over], f"{cache}.int8", to=TensorProto.INT8)}
        written[cache.replace("cache", "scale")] = step  # (B, G, S, 1)
    return [
        w.node("TensorScatter", [name, new, "write_at.index"], f"{name}_out", axis=2) for name, new in written.items()
    ]


def _heads(w: GraphWriter, flat: str, shape: str) -> str:
    """(B, S, heads D) as (B, heads, S, D)."""
    split = w.node("Reshape", [w.unpadded(flat), shape], f"{flat}.split")
    return w.node("Transpose", [split], f"{flat}.heads", perm=[0, 2, 1, 3])


def add_mlp(w: GraphWriter, model: ModelConfig, layer: int, x: str) -> str:
    """x + down(silu(gate(norm(x))) * up(norm(x)))."""
    at, source = f"layers.{layer}", f"encoder.layers.{layer}"
    hidden, inner = model.hidden_size, model.intermediate_size
    norm = f"{at}.post_attention_layernorm"
    normed = w.norm(x, norm, f"{source}.post_attention_layernorm.weight", hidden, model.rms_norm_eps)
    if w.paired_mlps:
        normed = w.even(normed, f"{norm}.even")
    sizes, group = (hidden, inner), w.mlp_group_size
    gate, up = (f"{at}.mlp.{part}_proj" for part in ("gate", "up"))
    outputs = {f"{source}.mlp.{part}_proj.weight": inner for part in ("gate", "up")}
    if w.packs(outputs):
        both = _project(w, normed, f"{at}.mlp.gate_up_proj", outputs, (hidden, 2 * inner), group)
        w.split(both, [gate, up], "inputs.gate_up", -1)
    else:
        for name, tensor in zip((gate, up), outputs, strict=True):
            _project(w, normed, name, tensor, sizes, group)
    silu = w.node("Mul", [gate, w.node("Sigmoid", [gate], f"{at}.mlp.sigmoid")], f"{at}.mlp.silu")
    gated = w.node("Mul", [silu, up], f"{at}.mlp.gated")
    down = _project(w, gated, f"{at}.mlp.down_proj", f"{source}.mlp.down_proj.weight", sizes[::-1], group)
    if w.paired_mlps:
        down = w.real(down)
    return w.node("Add", [x, down], f"{at}.mlp.residual")


def add_head(w: GraphWriter, model: ModelConfig, x: str) -> None:
    """Final norm and head on the picked rows only, then the commit rule."""
    rows = w.node("Cast", ["rows"], "rows.index", to=TensorProto.INT64)
    rows = w.node("Unsqueeze", [rows, "axis.last"], "rows.3d")
    if w.flattened:
        x = w.node("Reshape", [w.unpadded(x), "tokens.shape"], "hidden")
    picked = w.node("GatherND", [x, rows], "rows.hidden", batch_dims=1)  # (B, R, E)
    ids = w.node("GatherND", ["ids", rows], "rows.ids", batch_dims=1)  # (B, R)
    normed = w.norm(picked, "norm", "encoder.norm.weight", model.hidden_size, model.rms_norm_eps)
    sizes = model.hidden_size, model.vocab_size
    # In 4 bits it would decide other tokens, and int8 reads its half as quickly.
    if w.quantization and w.dequantized:
        head = dequantized(w, "int8", normed, "diffusion_head", "diffusion_head.weight", *sizes)
    elif w.quantization:
        zero = add_zero(w, rows, "rows.zero")
        head = int8(w, normed, zero, "diffusion_head", "diffusion_head.weight", *sizes)
    else:
        if w.convolved:
            w.node("Concat", [w.node("Shape", [ids], "rows.shape"), "tokens.rest"], "rows.shape3", axis=0)  # B, R, -1
        head = w.linear(normed, "diffusion_head", "diffusion_head.weight", *sizes, "rows.shape3")
    if w.dtype == np.float32:
        w.nodes[-1].output[0] = "logits"  # a cast from f32 to f32 would copy them
    else:
        w.node("Cast", [head], "logits", to=TensorProto.FLOAT)
    results = ["token", "confidence", "next_ids", "masks_left"]
    w.plugin("ConfidenceCommit", ["logits", ids, "threshold"], results, "commit", mask_id=model.mask_id)
