"""The network in PyTorch over flat tokens, with the inputs and outputs of `flat.py` and K/V pages written in place.

With `kernels`, as on a GPU, everything between two matrix products is one of the project's Triton kernels, and so is
the head; otherwise the same steps are plain torch (`plain.py`). Nothing reads a value back to the host, so that a
forward over fixed tensors can be captured and replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....engine_folder import TENSORS_FILE, EngineInfo
from ....plugins.op import Arg, Op, run
from ....plugins.ops import (
    confidence_commit,
    head_commit,
    low_bit_linear,
    paged_attention,
    residual_norm,
    rope_write,
    rotation,
    swiglu,
    token_quantise,
)
from ..pages import PAGE
from . import plain
from .quantized import CHUNK, Matrix, Quantized, by_8_bits, check_by_8_bits, quantised
from .stored import Pool, Stored
from .weights import Share, WeightsFile

if TYPE_CHECKING:
    from torch import Tensor

    from .plain import View
    from .ranks import Ranks


@dataclasses.dataclass(frozen=True)
class Turns:
    """What rotates the heads of a pass, the same in every layer."""

    cos: Tensor  # (N, D / 2) compute
    sin: Tensor
    scale: Tensor | None  # of queries, (N,) compute


class TorchModel:
    """The weights on a device, and the forward over them.

    Args:
        folder: the engine folder.
        info: its description.
        device: torch's name of the device.
        kernels: run the project's Triton kernels.
        ranks: that hold the model together; every layer's heads, inner size and the head's vocabulary are split.
        pdl: let kernels begin while those before them end; for cards from SM 90 on.

    Raises:
        EngineError: the weights file is not what the description says.
    """

    def __init__(
        self,
        folder: Path,
        info: EngineInfo,
        device: str,
        kernels: bool,
        ranks: Ranks | None = None,
        pdl: bool = False,
    ) -> None:
        import torch

        model = info.model
        share = Share() if ranks is None else Share(ranks.rank, ranks.size)
        self.config = share.of_model(model)
        self.kernels = kernels
        self.ranks = ranks
        self.pdl = pdl
        self._vocab_size = model.vocab_size
        self._vocabulary = share.of(model.vocab_size)
        weights = WeightsFile(folder / TENSORS_FILE, device, info.build, kernels, share)
        self.dtype = weights.dtype
        self._kv_bits = info.build.kv_bits
        if kernels and info.build.quantization == "fp8_dynamic":
            check_by_8_bits(folder, device, self.dtype)
        self.embed = weights.take("embed_tokens", model.vocab_size, model.hidden_size)
        self.layers = [weights.layer(number, model, info.has_adapter) for number in range(model.num_layers)]
        self.norm = weights.take("norm", model.hidden_size)
        self.head = weights.head(model)
        self._inv_freq = torch.from_numpy(model.rope.inv_freq(model.head_dim)).to(device)  # (D/2,) f32

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        pool: Pool,
        table: Tensor,
        views: Sequence[View] | None,
        logits: bool,
    ) -> Tensor | None:
        """Run one forward.

        Args:
            inputs: those of `flat.py`, on the device.
            outputs: token, confidence and next_ids, which are written.
            pool: K and V of all pages, updated in place.
            table: the pages of every row, (B, M) i32.
            views: for plain torch, which tokens look at which pages; None looks at the whole pool.
            logits: give the logits too; every token is chosen in the same way with them and without.

        Returns:
            Logits (R, V) f32, or None without `logits`.
        """
        from torch.nn import functional

        turns = self._turns(inputs["pos"])
        gate = inputs["adapter"][:, None].to(self.dtype) if "adapter" in inputs else None  # (N, 1) compute
        if self.kernels:
            plan = {"page_table": table, "visible": inputs["visible"], **self._plan(inputs, table)}
        else:
            sights = plain.sights(inputs, table, len(pool), views, self.dtype)
        x, total = self._embedded(inputs, self.layers[0].input_norm)
        norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        for layer, norm, (keys, values) in zip(self.layers, norms, pool.layers(), strict=True):
            q = self._rotated(self._projected(x, layer.qkv), turns, inputs["slot"], keys, values)  # (N, H, D)
            if self.kernels:
                merged = self._attend(q, keys, values, plan)  # (N, H D)
            else:
                merged = plain.attend(q, keys, values, sights)
            out = self._projected(merged, layer.o)
            if layer.lora is not None and gate is not None:
                a, b = layer.lora
                out.addmm_(functional.linear(merged, a) * gate, b.t())  # a gate of 0 adds exactly 0
            x, total = self._added(self._summed(out), total, layer.post_norm)
            inner = self._activated(self._projected(x, layer.gate_up))
            x, total = self._added(self._summed(self._projected(inner, layer.down)), total, norm)
        if self.kernels and self.ranks is None:
            head_logits = self._choose(x, inputs, outputs, logits)
            return head_logits if logits else None
        index = inputs["index"].long()  # (R,)
        head_logits = self._logits(x[index])  # (R, V), or with ranks (R, V / ranks)
        ids, mask = inputs["ids"][index], self.config.mask_id
        if self.ranks is None:
            plain.commit(plain.best(head_logits, mask), ids, inputs, outputs, mask)
            return head_logits if logits else None
        best = self._best_of_ranks(plain.best(head_logits, mask - self._vocabulary.start))
        plain.commit(best, ids, inputs, outputs, mask)
        return self._whole(head_logits) if logits else None

    def _given(self, index: Tensor, embeddings: Tensor, own: Tensor) -> Tensor:
        """The tokens' own embeddings (N, E), or where `index` is not negative the given one of that number."""
        import torch

        given = embeddings.to(self.dtype)[index.clamp(min=0).long()]
        return torch.where((index >= 0)[:, None], given, own)

    def _logits(self, x: Tensor) -> Tensor:
        """Logits of the head in plain torch, (R, V) f32."""
        from torch.nn import functional

        if not isinstance(self.head, Quantized):
            return functional.linear(x, self.head).float()
        if not self.kernels:
            return functional.linear(x, self.head.tensors["values"]).float() * self.head.tensors["scale"]
        return self._projected(x, self.head).float()

    def _summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return x if self.ranks is None else self.ranks.add(x)

    def _best_of_ranks(self, own: plain.Best) -> plain.Best:
        """The best of the whole vocabulary from that of each rank's part, three numbers per prediction."""
        import torch

        assert self.ranks is not None
        token = own.token + self._vocabulary.start
        # In f64, which holds a token's id and every f32 exactly.
        bests = self.ranks.gather(torch.stack([own.logit.double(), own.total.double(), token.double()]))  # (ranks, 3, R)
        logit, rank = bests[:, 0].max(0)  # the first rank of equals has the lower ids
        total = (bests[:, 1] * (bests[:, 0] - logit).exp()).sum(0)
        return plain.Best(bests[:, 2].gather(0, rank[None])[0].long(), logit.float(), total.float())

    def _whole(self, logits: Tensor) -> Tensor:
        """The logits of the whole vocabulary, (R, V), from each rank's part."""
        from torch.nn import functional

        assert self.ranks is not None
        own = -(-self._vocab_size // self.ranks.size)
        padded = functional.pad(logits, (0, own - logits.shape[1]))
        return self.ranks.gather(padded).transpose(0, 1).flatten(1)[:, : self._vocab_size]

    def _turns(self, pos: Tensor) -> Turns:
        """What rotates the heads at positions (N,) i32; the kernels need a query scale of a model without it, too."""
        if self.kernels:
            return Turns(*self._run(rotation.OP, {"pos": pos, "inv_freq": self._inv_freq}, self._new(pos)))
        rope = self.config.rope
        angle = pos[:, None].float() * self._inv_freq
        cos, sin = ((turn * rope.attention_factor).to(self.dtype) for turn in (angle.cos(), angle.sin()))
        if not rope.llama_4_scaling_beta:
            return Turns(cos, sin, None)
        periods = (pos.float() / rope.original_max_position).floor()
        return Turns(cos, sin, (1 + rope.llama_4_scaling_beta * (1 + periods).log()).to(self.dtype))

    def _embedded(self, inputs: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """The first norm of the tokens' embeddings, and those; both (N, E) compute."""
        from torch.nn import functional

        ids = inputs["ids"]
        if self.kernels and "embedding" not in inputs:
            given = {"ids": ids, "table": self.embed, "weight": weight}
            x, total = self._run(residual_norm.EMBEDDING, given, self._new(ids))
            return x, total
        total = functional.embedding(ids, self.embed)
        if "embedding" in inputs:
            total = self._given(inputs["embedding"], inputs["embeddings"], total)
        return self._normed(total, weight), total

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last axis."""
        from torch.nn import functional

        return functional.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _projected(self, x: Tensor, weight: Matrix) -> Tensor:
        """x weight^T: (N, in) -> (N, out) compute."""
        import torch
        from torch.nn import functional

        if isinstance(weight, tuple):
            return torch.cat([self._projected(x, part) for part in weight], -1)
        if not isinstance(weight, Quantized):
            return functional.linear(x, weight)
        if weight.kind == "fp8_dynamic":
            return self._by_8_bits(x, weight)
        if self.kernels:
            op = low_bit_linear.op(weight.kind, _tile(low_bit_linear.TILES, len(x)))
            (y,) = self._run(op, {"x": x, **weight.tensors}, self._new(x))
            return y
        values, scale = weight.tensors["values"], weight.tensors["scale"]
        return (functional.linear(x, values).float() * scale).to(self.dtype)

    def _by_8_bits(self, x: Tensor, weight: Quantized) -> Tensor:
        """The same of fp8_dynamic, which rounds every token to e4m3."""
        import torch
        from torch.nn import functional

        if not self.kernels:
            values, scale = quantised(x)
            sums = functional.linear(values, weight.tensors["values"]).float()
            return (sums * scale[:, None] * weight.tensors["scale"]).to(self.dtype)
        room = -(-len(x) // CHUNK) * CHUNK  # rows past the last token hold anything and are dropped
        values = torch.empty((room, x.shape[1]), dtype=torch.uint8, device=x.device)
        scale = torch.empty(room, dtype=torch.float32, device=x.device)
        self._run(token_quantise.OP, {"x": x}, self._new(x, {"values": values, "scale": scale}))
        return by_8_bits(values.view(torch.float8_e4m3fn), scale, weight, self.dtype)[: len(x)]

    def _added(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of a residual sum, and the sum; all (N, E) compute but weight (E,)."""
        if self.kernels:
            inputs = {"x": x[None], "residual": residual[None], "weight": weight}
            y, total = self._run(residual_norm.OP, inputs, self._new(x))
            return y[0], total[0]
        total = residual + x
        return self._normed(total, weight), total

    def _activated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, (N, F) of (N, 2 F)."""
        from torch.nn import functional

        if self.kernels:
            (y,) = self._run(swiglu.OP, {"gate_up": gate_up[None]}, self._new(gate_up))
            return y[0]
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate) * up

    def _rotated(self, qkv: Tensor, turns: Turns, slot: Tensor, keys: Stored, values: Stored) -> Tensor:
        """q (N, H, D) of qkv (N, (H + 2 G) D), rotated and scaled; K, rotated, and V go into the pages."""
        import torch

        if self.kernels:
            inputs = {"qkv": qkv, "cos": turns.cos, "sin": turns.sin, "scale": turns.scale, "slot": slot}
            op = rope_write.paged(self._kv_bits)
            (q,) = self._run(op, inputs | _cached(keys, values), self._new(qkv))
            return q
        model = self.config
        turned = model.num_heads + model.num_kv_heads
        heads = qkv.view(len(qkv), -1, model.head_dim)  # (N, H + 2 G, D)
        a, b = heads[:, :turned].chunk(2, -1)
        cos, sin = turns.cos[:, None], turns.sin[:, None]
        both = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)  # (N, H + G, D)
        page, offset = slot.long() // PAGE, slot.long() % PAGE
        keys.put(page, offset, both[:, model.num_heads :])
        values.put(page, offset, heads[:, turned:])
        q = both[:, : model.num_heads]
        return q if turns.scale is None else q * turns.scale[:, None, None]

    def _plan(self, inputs: Mapping[str, Tensor], table: Tensor) -> dict[str, Tensor]:
        """Which program of every layer's attention reads which pages for which tokens."""
        arguments = {name: inputs[name] for name in ("row", "first", "visible")}
        planned = self._run(paged_attention.PLAN, {**arguments, "page_table": table}, self._new(table))
        return dict(zip(("items", "counters"), planned, strict=True))

    def _attend(self, q: Tensor, keys: Stored, values: Stored, sight: Mapping[str, Tensor]) -> Tensor:
        """PagedAttention's kernels, (N, H D)."""
        arguments = {"q": q, **_cached(keys, values), **sight}
        (y,) = self._run(paged_attention.op(self._kv_bits), arguments, self._new(q))
        return y.flatten(1)

    def _choose(
        self, x: Tensor, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], keep: bool
    ) -> Tensor:
        """HeadCommit's kernels, which write into `outputs`; logits (R, V) f32, or (R, 0) unless kept.

        Where a row is sampled, SampledCommit's kernels take the logits and write anew.
        """
        import torch

        sampled = "seed" in inputs
        count = len(inputs["index"])
        shape = (count, self.config.vocab_size if keep or sampled else 0)
        logits = torch.empty(shape, dtype=torch.float32, device=x.device)
        new = self._new(x, outputs)
        rule = {name: inputs[name] for name in ("ids", "index", "span", "threshold")}
        weight: dict[str, Any] = {"weight": self.head}
        if isinstance(self.head, Quantized):
            weight = {name: self.head.tensors[name] for name in ("weight", "scale")}
        op = head_commit.flat_op(_tile(head_commit.TILES, count), "scale" in weight)
        self._run(op, {"x": x, **weight, **rule, "kept": logits}, new)
        if sampled:
            drawing = {name: inputs[name] for name in ("temperature", "seed", "position")}
            self._run(confidence_commit.FLAT_SAMPLED, {"logits": logits, **rule, **drawing}, new)
        return logits

    def _run(self, op: Op, inputs: Mapping[str, Any], new: Any) -> list[Tensor]:
        """An op's kernels."""
        return run(op, self.config, inputs, new, pdl=self.pdl)

    def _new(self, like: Tensor, known: Mapping[str, Tensor] | None = None) -> Any:
        """A function for `run` that gives the tensors a kernel writes: known ones by name, others new."""
        import torch

        types = {"f32": torch.float32, "i32": torch.int32, "u8": torch.uint8, "compute": self.dtype}

        def new(arg: Arg, shape: tuple[int, ...]) -> Tensor:
            if known is not None and arg.name in known:
                return known[arg.name]
            return torch.empty(shape, dtype=types[arg.dtype], device=like.device)

        return new


def _cached(keys: Stored, values: Stored) -> dict[str, Tensor]:
    """K and V as arguments of the ops."""
    pages = {"k_pages": keys.pages, "v_pages": values.pages}
    scales = {"k_scales": keys.scales, "v_scales": values.scales}
    return pages | {name: scale for name, scale in scales.items() if scale is not None}


def _tile(sizes: tuple[int, int], count: int) -> int:
    """The tile of an op that has two, for `count` positions: the smaller if it holds them all."""
    few, many = sizes
    return few if count <= few else many
