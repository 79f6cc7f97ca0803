"""The network in plain PyTorch, with the inputs and outputs of `contract.py` and caches written in place.

In: an engine folder's weights, and per pass the small bindings on the device and views of the caches' rows. Out: the
small results, written where the caller says, and the head's logits. Attention and the commit rule are the project's
Triton kernels where asked for (on a GPU) and plain torch elsewhere; everything else is the same code. The surprising
fact: nothing here reads a value back to the host, so a pass over fixed tensors can be captured and replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contract import TENSORS_FILE, EngineInfo
from ..errors import EngineError
from ..plugins import block_attention, confidence_commit
from ..plugins.op import Arg, run

if TYPE_CHECKING:
    from torch import Tensor

CacheViews = Sequence[tuple["Tensor", "Tensor"]]  # K and V (B, G, T, D) of each layer, of some rows


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's weights; projections are (out, in), those that share their input are stacked."""

    input_norm: Tensor  # (E,)
    qkv: Tensor  # ((H + 2 G) D, E)
    o: Tensor  # (E, H D)
    lora: tuple[Tensor, Tensor] | None  # (rank, H D), (E, rank) with the scale in it
    post_norm: Tensor  # (E,)
    gate_up: Tensor  # (2 F, E)
    down: Tensor  # (E, F)


class TorchModel:
    """The weights on a device, and the forward over them.

    Args:
        folder: the engine folder.
        info: its description.
        device: torch's name of the device.
        kernels: run attention and the commit rule as Triton kernels.

    Raises:
        EngineError: the weights file is not what the description says.
    """

    def __init__(self, folder: Path, info: EngineInfo, device: str, kernels: bool) -> None:
        import torch

        model = self.config = info.model
        self.kernels = kernels
        self.dtype: torch.dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[info.build.dtype]
        tensors = _Tensors(folder / TENSORS_FILE, device, self.dtype)
        hidden, inner = model.hidden_size, model.intermediate_size
        q, kv = (count * model.head_dim for count in (model.num_heads, model.num_kv_heads))
        heads = (("q", q), ("k", kv), ("v", kv))
        self.embed = tensors.take("embed_tokens", model.vocab_size, hidden)
        self.layers = [
            Layer(
                tensors.take(f"{at}.input_layernorm", hidden),
                tensors.stack((f"{at}.self_attn.{part}_proj", size, hidden) for part, size in heads),
                tensors.take(f"{at}.self_attn.o_proj", hidden, q),
                tensors.lora(f"{at}.self_attn.o_proj", hidden, q) if info.has_adapter else None,
                tensors.take(f"{at}.post_attention_layernorm", hidden),
                tensors.stack((f"{at}.mlp.{part}_proj", inner, hidden) for part in ("gate", "up")),
                tensors.take(f"{at}.mlp.down_proj", hidden, inner),
            )
            for at in (f"layers.{number}" for number in range(model.num_layers))
        ]
        self.norm = tensors.take("norm", hidden)
        self.head = tensors.take("diffusion_head", model.vocab_size, hidden)
        self._inv_freq = torch.from_numpy(model.rope.inv_freq(model.head_dim)).to(device)  # (D/2,) f32

    def forward(self, given: Mapping[str, Tensor], taken: Mapping[str, Tensor], caches: CacheViews, end: int) -> Tensor:
        """One pass.

        Args:
            given: the inputs of the contract but the caches, on the device; with those of `SampledCommit`, if a row
                is sampled.
            taken: token, confidence, next_ids and masks_left, to be written.
            caches: the rows' caches, updated in place.
            end: no query sees a slot from here on; T where that must not depend on what the inputs hold.

        Returns:
            Logits (B, R, V) in the head's dtype.
        """
        import torch
        from torch.nn import functional

        pos, visible = given["pos"], given["visible"]
        rows, size = pos.shape
        row = torch.arange(rows, device=pos.device)[:, None]  # (B, 1) i64
        slots = given["write_at"][:, None] + torch.arange(size, device=pos.device)  # (B, S) i64
        cos, sin = self._rotation(pos)
        scale = self._query_scale(pos)
        gate = given["adapter"][:, :, None].to(self.dtype) if "adapter" in given else None  # (B, S, 1) compute
        mask = None if self.kernels else self._mask(visible, end)
        x = functional.embedding(given["ids"], self.embed)  # (B, S, E) compute
        for layer, (k_cache, v_cache) in zip(self.layers, caches, strict=True):
            q, k, v = self._heads(layer, x, cos, sin)
            if scale is not None:
                q = q * scale
            k_cache.transpose(1, 2)[row, slots] = k
            v_cache.transpose(1, 2)[row, slots] = v
            merged = (
                self._attend(q, k_cache[:, :, :end], v_cache[:, :, :end], mask)
                if mask is not None
                else self._attend_by_kernel(q, k_cache, v_cache, visible)
            )  # (B, S, H D)
            out = functional.linear(merged, layer.o)
            if layer.lora is not None and gate is not None:  # a gate of 0 adds exactly 0
                out = out + functional.linear(functional.linear(merged, layer.lora[0]) * gate, layer.lora[1])
            x = x + out
            gated, up = functional.linear(self._normed(x, layer.post_norm), layer.gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gated) * up, layer.down)
        picked = given["rows"].long()  # (B, R)
        logits = functional.linear(self._normed(x[row, picked], self.norm), self.head)  # (B, R, V)
        ids = given["ids"].gather(1, picked)  # (B, R) i32
        if self.kernels:
            self._commit_by_kernel(logits, ids, given, taken)
        else:
            self._commit(logits, ids, given["threshold"], taken)
        return logits

    def _rotation(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of each position's angles, (B, S, 1, D/2) compute; pos (B, S) i32."""
        angle = (pos[:, :, None].float() * self._inv_freq)[:, :, None]
        factor = self.config.rope.attention_factor
        return (angle.cos() * factor).to(self.dtype), (angle.sin() * factor).to(self.dtype)

    def _query_scale(self, pos: Tensor) -> Tensor | None:
        """1 + beta ln(1 + floor(pos / L0)), (B, S, 1, 1) compute, or None where the model has none."""
        rope = self.config.rope
        if not rope.llama_4_scaling_beta:
            return None
        periods = (pos.float() / rope.original_max_position).floor()
        return (1 + rope.llama_4_scaling_beta * (1 + periods).log()).to(self.dtype)[:, :, None, None]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last axis."""
        from torch.nn import functional

        return functional.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _heads(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, S, H, D), k and v (B, S, G, D) of x (B, S, E), q and k rotated."""
        import torch
        from torch.nn import functional

        model = self.config
        rotated = model.num_heads + model.num_kv_heads
        flat = functional.linear(self._normed(x, layer.input_norm), layer.qkv)
        heads = flat.view(*flat.shape[:2], -1, model.head_dim)  # (B, S, H + 2 G, D)
        a, b = heads[:, :, :rotated].chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)  # (B, S, H + G, D)
        return turned[:, :, : model.num_heads], turned[:, :, model.num_heads :], heads[:, :, rotated:]

    def _mask(self, visible: Tensor, end: int) -> Tensor:
        """Additive mask of the first `end` slots, (B, 1, H / G * S, end) compute; visible (B, S, 3) i32."""
        import torch

        slots = torch.arange(end, device=visible.device)
        prefix_end, begin, span_end = visible[:, None].unbind(-1)  # (B, 1, S) i32
        seen = slots < prefix_end[..., None]
        seen |= (slots >= begin[..., None]) & (slots < span_end[..., None])
        mask = torch.where(seen, 0.0, -30000.0).to(self.dtype)
        return mask.repeat(1, 1, self.config.num_heads // self.config.num_kv_heads, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention in plain torch: the query heads that share a key/value head are packed with the queries."""
        from torch.nn import functional

        rows, size, heads, width = q.shape
        shape = (rows, size, k.shape[1], -1, width)
        packed = q.reshape(shape).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, G, H / G * S, D)
        y = functional.scaled_dot_product_attention(packed, k, v, mask, scale=width**-0.5)
        apart = y.view(rows, k.shape[1], -1, size, width)
        return apart.permute(0, 3, 1, 2, 4).reshape(rows, size, heads * width)

    def _attend_by_kernel(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """The same by BlockAttention's kernels; K and V are the whole cache."""
        inputs = {"q": q.transpose(1, 2).contiguous(), "k": k, "v": v, "visible": visible}
        (y,) = run(block_attention.OP, self.config, inputs, self._new(q))
        return y.transpose(1, 2).flatten(2)  # type: ignore[no-any-return]

    def _commit(self, logits: Tensor, ids: Tensor, threshold: Tensor, taken: Mapping[str, Tensor]) -> None:
        """ConfidenceCommit in plain torch; shapes as `plugins/confidence_commit.py` has them."""
        import torch

        mask = self.config.mask_id
        candidates = logits.float().clone()
        candidates[:, :, mask] = -1e30
        best, token = candidates.max(-1)  # the first of equals
        confidence = (candidates - best[:, :, None]).exp().sum(-1).reciprocal()
        is_open = ids == mask
        rank = torch.where(is_open, confidence, -1.0)
        chosen = (rank >= threshold[:, None]).scatter(1, rank.argmax(1, keepdim=True), True)
        next_ids = torch.where(chosen & is_open, token, ids)
        results = {"token": token, "confidence": confidence, "next_ids": next_ids}
        for name, value in {**results, "masks_left": (next_ids == mask).sum(1)}.items():
            taken[name].copy_(value)

    def _commit_by_kernel(
        self, logits: Tensor, ids: Tensor, given: Mapping[str, Tensor], taken: Mapping[str, Tensor]
    ) -> None:
        """The same by ConfidenceCommit's kernels, which write where the results are wanted and draw where asked to."""
        op = confidence_commit.SAMPLED if "seed" in given else confidence_commit.OP
        inputs = {"logits": logits, "ids": ids}
        inputs |= {arg.name: given[arg.name] for arg in op.inputs if arg.name not in inputs}
        run(op, self.config, inputs, self._new(logits, taken))

    def _new(self, like: Tensor, known: Mapping[str, Tensor] | None = None) -> Any:
        """Makes the tensors that a kernel writes: known ones by name, else new on the same device."""
        import torch

        types = {"f32": torch.float32, "i32": torch.int32, "compute": self.dtype}

        def new(arg: Arg, shape: tuple[int, ...]) -> Tensor:
            if known is not None and arg.name in known:
                return known[arg.name]
            return torch.empty(shape, dtype=types[arg.dtype], device=like.device)

        return new


class _Tensors:
    """The weights file, read tensor by tensor. Raises EngineError where one is not as expected."""

    def __init__(self, path: Path, device: str, dtype: Any) -> None:
        from safetensors import SafetensorError, safe_open

        self._path, self._dtype = path, dtype
        self._errors = (SafetensorError, OSError, ValueError)
        try:
            self._file: Any = safe_open(path, framework="pt", device=device)
        except self._errors as error:
            raise self._broken(str(error)) from None

    def take(self, name: str, *shape: int) -> Tensor:
        """One weight, by its name in the graph."""
        try:
            tensor: Tensor = self._file.get_tensor(f"{name}.weight")
        except self._errors as error:
            raise self._broken(str(error)) from None
        if tuple(tensor.shape) != shape or tensor.dtype != self._dtype:
            raise self._broken(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {self._dtype} {list(shape)}")
        return tensor

    def stack(self, parts: Any) -> Tensor:
        """Weights that share their input, one under the other: each part is (name, *shape)."""
        import torch

        return torch.cat([self.take(*part) for part in parts])

    def lora(self, name: str, size_out: int, size_in: int) -> tuple[Tensor, Tensor]:
        """The two sides of a drafter adapter, whose rank the file says."""
        rank = self._file.get_slice(f"{name}.lora_A.weight").get_shape()[0]
        return self.take(f"{name}.lora_A", rank, size_in), self.take(f"{name}.lora_B", size_out, rank)

    def _broken(self, reason: str) -> EngineError:
        return EngineError(
            f"{self._path}: not the weights of this engine ({reason}); build it again: nemodiff build CHECKPOINT -o "
            f"{self._path.parent} --backend torch"
        )
