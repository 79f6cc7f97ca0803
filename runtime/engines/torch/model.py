"""The network in plain PyTorch, with the inputs and outputs of `contract.py` and caches written in place.

With `kernels`, as on a GPU, everything between two matrix products is one of the project's Triton kernels, and so is
the head; otherwise the same steps are plain torch. Nothing reads a value back to the host, so that a forward over fixed
tensors can be captured and replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....engine_folder import TENSORS_FILE, EngineInfo
from ....plugins import SAMPLED
from ....plugins.op import Arg, run
from ....plugins.ops import block_attention, fp8_linear, head_commit, residual_norm, rope_write, swiglu
from .weights import Matrix, Quantized, WeightsFile

if TYPE_CHECKING:
    from torch import Tensor

CacheViews = Sequence[tuple["Tensor", "Tensor"]]  # K and V (B, G, T, D) of each layer, of some rows


@dataclasses.dataclass(frozen=True)
class Turns:
    """What rotates the heads of a pass, the same in every layer."""

    cos: Tensor  # (B, S, D / 2) compute
    sin: Tensor
    scale: Tensor | None  # of queries, (B, S) compute


class TorchModel:
    """The weights on a device, and the forward over them.

    Args:
        folder: the engine folder.
        info: its description.
        device: torch's name of the device.
        kernels: run the project's Triton kernels.

    Raises:
        EngineError: the weights file is not what the description says.
    """

    def __init__(self, folder: Path, info: EngineInfo, device: str, kernels: bool) -> None:
        import torch

        model = info.model
        self.config = model
        self.kernels = kernels
        weights = WeightsFile(folder / TENSORS_FILE, device, info.build, kernels)
        self.dtype = weights.dtype
        self.embed = weights.take("embed_tokens", model.vocab_size, model.hidden_size)
        self.layers = [weights.layer(number, model, info.has_adapter) for number in range(model.num_layers)]
        self.norm = weights.take("norm", model.hidden_size)
        self.head = weights.take("diffusion_head", model.vocab_size, model.hidden_size)
        self._inv_freq = torch.from_numpy(model.rope.inv_freq(model.head_dim)).to(device)  # (D/2,) f32

    def forward(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], caches: CacheViews, end: int, logits: bool
    ) -> Tensor | None:
        """Run one forward.

        Args:
            inputs: the inputs of the contract but the caches, on the device; with those of `SampledCommit`, if a row
                is sampled.
            outputs: token, confidence, next_ids and masks_left, which are written.
            caches: the rows' caches, updated in place.
            end: no query sees this slot or a later one; T where that must not depend on what the inputs hold.
            logits: give the logits too; every token is chosen in the same way with them and without.

        Returns:
            Logits (B, R, V) f32, or None without `logits`.
        """
        import torch
        from torch.nn import functional

        pos = inputs["pos"]
        visible = inputs["visible"]
        cos, sin = self._rotation(pos)
        turns = Turns(cos, sin, self._query_scale(pos))
        gate = inputs["adapter"][:, :, None].to(self.dtype) if "adapter" in inputs else None  # (B, S, 1) compute
        mask = None if self.kernels else self._mask(visible, end)
        total = functional.embedding(inputs["ids"], self.embed)  # (B, S, E) compute
        if "embedding" in inputs:
            total = self._given(inputs["embedding"], inputs["embeddings"], total)
        x = self._normed(total, self.layers[0].input_norm)
        norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        for layer, norm, (k_cache, v_cache) in zip(self.layers, norms, caches, strict=True):
            q = self._rotated(self._projected(x, layer.qkv), turns, inputs["write_at"], k_cache, v_cache)
            if mask is None:
                merged = self._attend_by_kernel(q, k_cache, v_cache, visible)  # (B, S, H D)
            else:
                merged = self._attend(q, k_cache[:, :, :end], v_cache[:, :, :end], mask)
            out = self._projected(merged, layer.o)
            if layer.lora is not None and gate is not None:
                a, b = layer.lora
                out = out + functional.linear(functional.linear(merged, a) * gate, b)  # a gate of 0 adds exactly 0
            x, total = self._added(out, total, layer.post_norm)
            inner = self._activated(self._projected(x, layer.gate_up))
            x, total = self._added(self._projected(inner, layer.down), total, norm)
        predicted = inputs["rows"].long()  # (B, R)
        x = x[torch.arange(len(pos), device=pos.device)[:, None], predicted]  # (B, R, E)
        ids = inputs["ids"].gather(1, predicted)  # (B, R) i32
        choose = self._choose_by_kernel if self.kernels else self._choose
        head_logits = choose(x, ids, inputs, outputs, logits)
        return head_logits if logits else None

    def _given(self, index: Tensor, embeddings: Tensor, own: Tensor) -> Tensor:
        """The tokens' own embeddings (B, S, E), or where `index` is not negative the given one of that number."""
        import torch

        given = embeddings.to(self.dtype)[index.clamp(min=0).long()]
        return torch.where((index >= 0)[:, :, None], given, own)

    def _rotation(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of each position's angles, (B, S, D/2) compute; pos (B, S) i32."""
        angle = pos[:, :, None].float() * self._inv_freq
        factor = self.config.rope.attention_factor
        return (angle.cos() * factor).to(self.dtype), (angle.sin() * factor).to(self.dtype)

    def _query_scale(self, pos: Tensor) -> Tensor | None:
        """1 + beta ln(1 + floor(pos / L0)), (B, S) compute; for a model without it ones for the kernel, else None."""
        import torch

        rope = self.config.rope
        if not rope.llama_4_scaling_beta:
            return torch.ones(pos.shape, dtype=self.dtype, device=pos.device) if self.kernels else None
        periods = (pos.float() / rope.original_max_position).floor()
        return (1 + rope.llama_4_scaling_beta * (1 + periods).log()).to(self.dtype)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last axis."""
        from torch.nn import functional

        return functional.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _projected(self, x: Tensor, weight: Matrix) -> Tensor:
        """x weight^T: (B, S, in) -> (B, S, out) compute."""
        from torch.nn import functional

        if not isinstance(weight, Quantized):
            return functional.linear(x, weight)
        if self.kernels:
            op = fp8_linear.op(_tile(fp8_linear.TILES, x.shape[0] * x.shape[1]))
            (y,) = run(op, self.config, {"x": x, "weight": weight.values, "scale": weight.scale}, self._new(x))
            return y  # type: ignore[no-any-return]
        return (functional.linear(x, weight.values).float() * weight.scale).to(self.dtype)

    def _added(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of a residual sum, and the sum; all (B, S, E) compute but weight (E,)."""
        if self.kernels:
            inputs = {"x": x, "residual": residual, "weight": weight}
            y, total = run(residual_norm.OP, self.config, inputs, self._new(x))
            return y, total
        total = residual + x
        return self._normed(total, weight), total

    def _activated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, (B, S, F) of (B, S, 2 F)."""
        from torch.nn import functional

        if self.kernels:
            (y,) = run(swiglu.OP, self.config, {"gate_up": gate_up}, self._new(gate_up))
            return y  # type: ignore[no-any-return]
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate) * up

    def _rotated(self, qkv: Tensor, turns: Turns, write_at: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """q (B, H, S, D) of qkv (B, S, (H + 2 G) D), rotated and scaled; K, rotated, and V go into the caches."""
        import torch

        if self.kernels:
            inputs = {"qkv": qkv, "cos": turns.cos, "sin": turns.sin, "scale": turns.scale, "write_at": write_at}
            (q,) = run(rope_write.OP, self.config, {**inputs, "k_cache": k_cache, "v_cache": v_cache}, self._new(qkv))
            return q  # type: ignore[no-any-return]
        model = self.config
        rows, size = qkv.shape[:2]
        turned = model.num_heads + model.num_kv_heads
        heads = qkv.view(rows, size, -1, model.head_dim)  # (B, S, H + 2 G, D)
        a, b = heads[:, :, :turned].chunk(2, -1)
        cos = turns.cos[:, :, None]
        sin = turns.sin[:, :, None]
        both = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)  # (B, S, H + G, D)
        row = torch.arange(rows, device=qkv.device)[:, None]  # (B, 1) i64
        slots = write_at[:, None] + torch.arange(size, device=qkv.device)  # (B, S) i64
        k_cache.transpose(1, 2)[row, slots] = both[:, :, model.num_heads :]
        v_cache.transpose(1, 2)[row, slots] = heads[:, :, turned:]
        q = both[:, :, : model.num_heads].transpose(1, 2)
        return q if turns.scale is None else q * turns.scale[:, None, :, None]

    def _mask(self, visible: Tensor, end: int) -> Tensor:
        """Additive mask of the first `end` slots, (B, 1, H / G * S, end) compute; visible (B, S, 3) i32."""
        import torch

        slots = torch.arange(end, device=visible.device)
        prefix_end, begin, span_end = visible[:, None].unbind(-1)  # (B, 1, S) i32
        seen = slots < prefix_end[..., None]
        seen |= (slots >= begin[..., None]) & (slots < span_end[..., None])
        mask = torch.where(seen, 0.0, -torch.inf).to(self.dtype)  # no query sees nothing, so no row is all -inf
        return mask.repeat(1, 1, self.config.num_heads // self.config.num_kv_heads, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention in plain torch: the query heads that share a key/value head are packed with the queries."""
        from torch.nn import functional

        rows, heads, size, width = q.shape
        packed = q.reshape(rows, k.shape[1], -1, width)  # (B, G, H / G * S, D)
        y = functional.scaled_dot_product_attention(packed, k, v, mask, scale=width**-0.5)
        return y.view(rows, heads, size, width).transpose(1, 2).flatten(2)

    def _attend_by_kernel(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """The same by BlockAttention's kernels; K and V are the whole cache."""
        inputs = {"q": q, "k": k, "v": v, "visible": visible}
        (y,) = run(block_attention.OP, self.config, inputs, self._new(q))
        return y.transpose(1, 2).flatten(2)  # type: ignore[no-any-return]

    def _choose(
        self, x: Tensor, ids: Tensor, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], keep: bool
    ) -> Tensor:
        """Head and ConfidenceCommit in plain torch; x (B, R, E) compute -> logits (B, R, V) f32."""
        import torch
        from torch.nn import functional

        mask = self.config.mask_id
        logits = functional.linear(x, self.head).float()
        candidates = logits.clone() if keep else logits
        candidates[:, :, mask] = -1e30
        best, token = candidates.max(-1)  # the first of equals
        confidence = (candidates - best[:, :, None]).exp().sum(-1).reciprocal()
        is_open = ids == mask
        rank = torch.where(is_open, confidence, -1.0)
        chosen = (rank >= inputs["threshold"][:, None]).scatter(1, rank.argmax(1, keepdim=True), True)
        next_ids = torch.where(chosen & is_open, token, ids)
        outputs["token"].copy_(token)
        outputs["confidence"].copy_(confidence)
        outputs["next_ids"].copy_(next_ids)
        outputs["masks_left"].copy_((next_ids == mask).sum(1))
        return logits

    def _choose_by_kernel(
        self, x: Tensor, ids: Tensor, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], keep: bool
    ) -> Tensor:
        """The same by HeadCommit's kernels, which write into `outputs`; logits (B, R, 0) unless kept.

        Where a row is sampled, SampledCommit's kernels take the logits and write anew.
        """
        import torch

        sampled = "seed" in inputs
        shape = (*ids.shape, self.config.vocab_size if keep or sampled else 0)
        logits = torch.empty(shape, dtype=torch.float32, device=x.device)
        new = self._new(x, outputs)
        head = {"x": x, "weight": self.head, "ids": ids, "threshold": inputs["threshold"], "kept": logits}
        run(head_commit.op(_tile(head_commit.TILES, ids.numel())), self.config, head, new)
        if sampled:
            drawing = {"logits": logits, "ids": ids}
            drawing |= {arg.name: inputs[arg.name] for arg in SAMPLED.inputs if arg.name not in drawing}
            run(SAMPLED, self.config, drawing, new)
        return logits

    def _new(self, like: Tensor, known: Mapping[str, Tensor] | None = None) -> Any:
        """A function for `run` that gives the tensors a kernel writes: known ones by name, others new."""
        import torch

        types = {"f32": torch.float32, "i32": torch.int32, "compute": self.dtype}

        def new(arg: Arg, shape: tuple[int, ...]) -> Tensor:
            if known is not None and arg.name in known:
                return known[arg.name]
            return torch.empty(shape, dtype=types[arg.dtype], device=like.device)

        return new


def _tile(sizes: tuple[int, int], count: int) -> int:
    """The tile of an op that has two, for `count` positions: the smaller if it holds them all."""
    few, many = sizes
    return few if count <= few else many
