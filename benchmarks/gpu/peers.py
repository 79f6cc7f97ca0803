"""Measure the step of an autoregressive peer: the same shape in plain torch, its layers compiled by inductor.

The whole step, from the token's id to the next one, is one CUDA graph over a static cache, so nothing of the host's is
in it. It has random weights and no project code; what it computes is a Ministral-3 decoder.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

from gpu import models as gpu_models
from gpu.plan import Cell, Figures, Lab, RunConfig
from nemodiff.config import ModelConfig


class Peer:
    """A decoder of one token for each row, after `context - 1` others.

    Args:
        model: its sizes.
        lab: where it is.
        dtype: of weights and cache.
    """

    def __init__(self, model: ModelConfig, lab: Lab, dtype: str) -> None:
        torch = lab.card.torch
        self._torch = torch
        self._model = model
        kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        self._new = {"dtype": kind, "device": lab.card.name}
        self._embed = self._matrix(model.vocab_size, model.hidden_size)
        self._head = self._matrix(model.vocab_size, model.hidden_size)
        heads = model.num_heads * model.head_dim
        kv = 2 * model.num_kv_heads * model.head_dim
        inner = model.intermediate_size
        hidden = model.hidden_size
        sizes = ((heads + kv, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner))
        self._layers = [[self._matrix(*size) for size in sizes] for _ in range(model.num_layers)]
        how = {} if lab.card.is_gpu else {"backend": "eager"}
        torch._dynamo.reset()
        self._layer = torch.compile(self._one_layer, dynamic=False, fullgraph=True, **how)

    def _matrix(self, out: int, size_in: int) -> Any:
        return self._torch.empty(out, size_in, **self._new).normal_(0, 0.02)

    def open(self, rows: int, context: int) -> None:
        """A cache of so many rows and slots, its last slot to be written."""
        torch, model = self._torch, self._model
        size = (model.num_layers, 2, rows, model.num_kv_heads, context, model.head_dim)
        self._cache = torch.empty(size, **self._new).normal_()
        angle = (context - 1) * torch.from_numpy(model.rope.inv_freq(model.head_dim))
        self._turn = tuple(f(angle).to(self._new["dtype"]).to(self._new["device"]) for f in (torch.cos, torch.sin))
        self.ids = torch.full((rows,), 7, device=self._new["device"])

    def step(self) -> None:
        """One token for every row, which becomes the next one's id."""
        functional = self._torch.nn.functional
        x = functional.embedding(self.ids, self._embed)
        for weights, (k, v) in zip(self._layers, self._cache, strict=True):
            x = self._layer(x, *weights, k, v, *self._turn)
        x = functional.rms_norm(x, (x.shape[-1],))
        self.ids.copy_(functional.linear(x, self._head).argmax(-1))

    def _one_layer(
        self, x: Any, qkv: Any, o: Any, gate_up: Any, down: Any, k_cache: Any, v_cache: Any, cos: Any, sin: Any
    ) -> Any:
        torch, model = self._torch, self._model
        functional = torch.nn.functional
        rows, hidden = x.shape
        normed = functional.rms_norm(x, (hidden,))
        heads = functional.linear(normed, qkv).view(rows, -1, model.head_dim)
        turned, v = heads.split([model.num_heads + model.num_kv_heads, model.num_kv_heads], 1)
        a, b = turned.chunk(2, -1)
        q, k = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).split([model.num_heads, model.num_kv_heads], 1)
        k_cache[:, :, -1] = k
        v_cache[:, :, -1] = v
        packed = q.reshape(rows, model.num_kv_heads, -1, model.head_dim)  # heads of a key/value head as its queries
        y = functional.scaled_dot_product_attention(packed, k_cache, v_cache)
        x = x + functional.linear(y.reshape(rows, -1), o)
        gate, up = functional.linear(functional.rms_norm(x, (hidden,)), gate_up).chunk(2, -1)
        return x + functional.linear(functional.silu(gate) * up, down)


def measured(lab: Lab, config: RunConfig, shape: str, rows: int, context: int) -> Figures:
    """Median seconds of a step, and of the first, which compiles."""
    model = gpu_models.work(shape, config.dtype).model
    peer = lab.hold(("peer", shape), lambda: Peer(model, lab, config.dtype))
    card = lab.card
    card.start_peak()
    with card.use(gpu_models.CARRIED):  # as all launches are timed, or each size would be compiled twice
        peer.open(rows, context)
        started = time.perf_counter()
        peer.step()
        peer.ids[0].item()
        first = time.perf_counter() - started
        device = card.per_launch([peer.step])
        walls = []
        for _ in card.rounds():
            started = time.perf_counter()
            peer.step()
            peer.ids[0].item()
            walls.append(time.perf_counter() - started)
    return {
        "peer": "plain torch, compiled",
        "rows": rows,
        "context": context,
        "device_us": device * 1e6,
        "wall_us_without_graph": statistics.median(walls) * 1e6,
        "first_seconds": first,
        "peak_bytes": card.peak(),
    }


def cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """A step by rows and contexts."""
    work = gpu_models.work(shape, config.dtype)
    for rows, context in config.scale.compiled:

        def measure(lab: Lab, rows: int = rows, context: int = context) -> Figures:
            return measured(lab, config, shape, rows, context)

        nbytes = work.memory(rows, context, 1) + 2**31
        yield Cell("peers", shape, f"rows {rows} context {context}", nbytes, 20.0, measure)
