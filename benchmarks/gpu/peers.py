"""Measure the step of an autoregressive peer on the same card and shape: transformers, eager and compiled.

The peer is the model class of the exported twin with random weights. A step ends with the new token on the host, as in
a decoding loop.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

from gpu import models as gpu_models
from gpu.plan import Cell, Figures, Lab, RunConfig

STEPS = 24  # that a cache has room for after its context
CHUNK = 8192  # tokens of a prefill forward, over all rows
FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters")  # fmt: skip


def load(shape: str, dtype: str, lab: Lab) -> Any:
    """The peer, its weights made on the device."""
    import transformers

    name = "Ministral3" if hasattr(transformers, "Ministral3ForCausalLM") else "Mistral"
    values = gpu_models.config_values(shape)
    fields = {field: values[field] for field in FIELDS}
    fields["rope_parameters"] = dict(fields["rope_parameters"])  # transformers adds fields to it
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(**fields, **ends, sliding_window=None, attn_implementation="sdpa")
    torch = lab.card.torch
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    torch.set_default_dtype(kind)
    try:
        with torch.device(lab.card.name):
            return getattr(transformers, f"{name}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def step_of(model: Any, compiled: bool, on_gpu: bool) -> Any:
    """One forward, or its compiled form, which is compiled anew for each row count and context."""
    import torch

    if not compiled:
        return model.forward
    torch._dynamo.reset()
    how = {"mode": "reduce-overhead"} if on_gpu else {"backend": "eager"}
    return torch.compile(model.forward, dynamic=False, **how)


def measured(lab: Lab, config: RunConfig, shape: str, rows: int, context: int, compiled: bool) -> Figures:
    """Median seconds of a step, and of the first, which compiles."""
    import torch
    from transformers import DynamicCache, StaticCache

    model = lab.hold(("peer", shape), lambda: load(shape, config.dtype, lab))
    lab.card.start_peak()
    cache: Any = StaticCache(config=model.config, max_cache_len=context + STEPS) if compiled else DynamicCache()
    times: list[float] = []
    with torch.no_grad():  # cudagraphs and inference tensors do not mix
        chunk = max(1, CHUNK // rows)
        for start in range(0, context, chunk):
            ids = torch.full((rows, min(chunk, context - start)), 7, device=model.device)
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        step = step_of(model, compiled, lab.card.is_gpu)
        for _ in range(STEPS if lab.card.is_gpu else 3):
            started = time.perf_counter()
            if compiled and lab.card.is_gpu:
                torch.compiler.cudagraph_mark_step_begin()
            ids = step(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1).clone()
            ids[0].item()
            times.append(time.perf_counter() - started)
    warm = len(times) // 3
    return {
        "peer": type(model).__name__,
        "compiled": compiled,
        "rows": rows,
        "context": context,
        "wall_us": statistics.median(times[warm:]) * 1e6,
        "first_seconds": times[0],
        "peak_bytes": lab.card.peak(),
    }


def cells(config: RunConfig, shape: str, compiled: bool) -> Iterator[Cell]:
    """A step by rows and contexts."""
    work, scale = gpu_models.work(shape, config.dtype), config.scale
    for rows, context in scale.compiled if compiled else itertools.product(scale.rows, scale.contexts):

        def measure(lab: Lab, rows: int = rows, context: int = context) -> Figures:
            return measured(lab, config, shape, rows, context, compiled)

        prefill = rows * context * 2 * work.model.parameters / 4e14
        kind = "compiled" if compiled else "eager"
        # Eager concatenates a grown cache, layer by layer, and a masked attention repeats K and V for every head.
        layer = rows * context * work.model.kv_bytes_per_token(4) // work.model.num_layers
        nbytes = work.memory(rows, context, max(1, CHUNK // rows)) + 4 * layer + 2**31
        estimate = prefill + STEPS * 0.05 + (25 + 2 * work.model.num_layers) * compiled
        yield Cell("peers", shape, f"{kind} rows {rows} context {context}", nbytes, estimate, measure)
