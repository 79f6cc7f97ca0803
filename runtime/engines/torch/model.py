"""The network in PyTorch over flat tokens, with the inputs and outputs of `flat.py` and K/V pages written in place.

With `kernels`, as on a GPU, everything between two matrix products is one of the project's Triton kernels, and so is
the head (`head.py`); otherwise the same steps are plain torch (`plain.py`). Nothing reads a value back to the host, so
that a forward over fixed tensors can be captured and replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....contract import PAGE
from ....engine_folder import TENSORS_FILE
from ....engine_info import EngineInfo
from ....plugins.ops import advance, arrange, paged_attention, residual_norm, rope_write, rotation
from . import plain
from .device import TorchDevice
from .head import Head
from .launcher import Launcher
from .projections import Projections, shares_of
from .quantized import Matrix, check_by_8_bits
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
        device: where it runs.
        kernels: run the project's Triton kernels.
        ranks: that hold the model together; every layer's heads, inner size and the head's vocabulary are split.
        pdl: let kernels begin while those before them end; for cards from SM 90 on.
        own: some of `projections.OWN`, which the project's kernels multiply where tokens are few.

    Raises:
        EngineError: the weights file is not what the description says.
    """

    def __init__(
        self,
        folder: Path,
        info: EngineInfo,
        device: TorchDevice,
        kernels: bool,
        ranks: Ranks | None = None,
        pdl: bool = False,
        own: Iterable[str] = (),
    ) -> None:
        import torch

        model = info.model
        share = Share() if ranks is None else Share(ranks.rank, ranks.size)
        self.config = share.of_model(model)
        self._programs = device.programs
        self.ranks = ranks
        weights = WeightsFile(folder / TENSORS_FILE, device.name, info.build, kernels, share)
        self.dtype = weights.dtype
        self._kv_bits = info.build.kv_bits
        if kernels and info.build.quantization == "fp8_dynamic":
            check_by_8_bits(folder, device.name, self.dtype)
        self.embed = weights.take("embed_tokens", model.vocab_size, model.hidden_size)
        self.layers = [weights.layer(number, model, info.has_adapter) for number in range(model.num_layers)]
        self.norm = weights.take("norm", model.hidden_size)
        self._head = weights.head(model)
        self._first_id = share.of(model.vocab_size).start  # that the head has
        self.vary(kernels, pdl, own)
        self._inv_freq = torch.from_numpy(model.rope.inv_freq(model.head_dim)).to(device.name)  # (D/2,) f32

    def vary(self, kernels: bool, pdl: bool = False, own: Iterable[str] = ()) -> None:
        """Run with the kernels from here on, or without, for comparison."""
        self.kernels = kernels
        self._launch = Launcher(self.config, self.dtype, pdl) if kernels else None
        self.project = Projections(self.dtype, self._launch, frozenset(own))
        self.head = Head(self._head, self.config, self._first_id, self.project, self._launch, self.ranks)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        pool: Pool,
        table: Tensor,
        views: Sequence[View] | None,
        place: Tensor | None,
    ) -> None:
        """Run one forward.

        Args:
            inputs: those of `flat.py`, on the device.
            outputs: token, confidence and next_ids, which are written.
            pool: K and V of all pages, updated in place.
            table: the pages of every row, (B, M) i32.
            views: for plain torch, which tokens look at which pages; None looks at the whole pool.
            place: where logits go, see `Head.choose`; every token is chosen in the same way with it and without.
        """
        from torch.nn import functional

        turns = self._turns(inputs["pos"])
        gate = inputs["adapter"][:, None].to(self.dtype) if "adapter" in inputs else None  # (N, 1) compute
        if self._launch is not None:
            plan = {"page_table": table, "visible": inputs["visible"], **self._plan(inputs, table)}
        else:
            sights = plain.sights(inputs, table, len(pool), views, self.dtype)
        x, total = self._embedded(inputs, self.layers[0].input_norm)
        norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        for layer, norm, (keys, values) in zip(self.layers, norms, pool.layers(), strict=True):
            qkv = self.project.in_shares("qkv", x, layer.qkv)
            q = self._rotated(qkv, turns, inputs["slot"], keys, values)  # (N, H, D)
            if self._launch is not None:
                merged = self._attend(q, keys, values, plan)  # (N, H D)
            else:
                merged = plain.attend(q, keys, values, sights)
            out = self._narrow("o", merged, layer.o)
            if layer.lora is not None and gate is not None:
                a, b = layer.lora
                # To the residual, as the output may be in shares; of a rank to its own part of the output.
                to = total if self.ranks is None else out
                to.addmm_(functional.linear(merged, a) * gate, b.t())  # a gate of 0 adds exactly 0
            x, total = self._added(self._summed(out), total, layer.post_norm)
            down = self._narrow("down", self.project.gated(x, layer.gate_up), layer.down)
            x, total = self._added(self._summed(down), total, norm)
        self.head.choose(x, inputs, outputs, place)

    def advance(self, inputs: Mapping[str, Tensor], results: Tensor, table: Tensor) -> None:
        """Make the inputs of passes that follow others what those have given, results (L,) i32; table (B, M) i32."""
        if self._launch is None:
            plain.advance(inputs, results, table)
            return
        names = [arg.name for arg in advance.OP.inputs if arg.name in inputs]
        known = {name: inputs[name] for name in names}
        self._launch(advance.OP, {**known, "results": results, "page_table": table})

    def arrange(self, inputs: Mapping[str, Tensor], rows: int, results: Tensor, table: Tensor) -> None:
        """Likewise of so many rows' passes of quadratic_spec, which follow others of it."""
        import torch

        known = inputs["known"][:rows]
        if self._launch is None:
            plain.arrange(inputs, known, results, table, self.config.mask_id)
            return
        names = [arg.name for arg in arrange.OP.inputs if arg.name in inputs]
        given = {name: inputs[name] for name in names} | {"known": known, "results": results, "page_table": table}
        if "adapter" not in given:  # what the op writes nobody reads
            ids = inputs["ids"]
            given["adapter"] = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
        self._launch(arrange.OP, given)

    def _given(self, index: Tensor, embeddings: Tensor, own: Tensor) -> Tensor:
        """The tokens' own embeddings (N, E), or where `index` is not negative the given one of that number."""
        import torch

        given = embeddings.to(self.dtype)[index.clamp(min=0).long()]
        return torch.where((index >= 0)[:, None], given, own)

    def _narrow(self, name: str, x: Tensor, weight: Matrix) -> Tensor:
        """The product of o or down (N, E), perhaps in shares; whole where it is summed over ranks."""
        return self.project.in_shares(name, x, weight) if self.ranks is None else self.project(x, weight)

    def _summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return x if self.ranks is None else self.ranks.add(x)

    def _turns(self, pos: Tensor) -> Turns:
        """What rotates the heads at positions (N,) i32; the kernels need a query scale of a model without it, too."""
        if self._launch is not None:
            return Turns(*self._launch(rotation.OP, {"pos": pos, "inv_freq": self._inv_freq}))
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
        if self._launch is not None and "embedding" not in inputs:
            given = {"ids": ids, "table": self.embed, "weight": weight}
            x, total = self._launch(residual_norm.EMBEDDING, given)
            return x, total
        total = functional.embedding(ids, self.embed)
        if "embedding" in inputs:
            total = self._given(inputs["embedding"], inputs["embeddings"], total)
        return self._normed(total, weight), total

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last axis."""
        from torch.nn import functional

        return functional.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _added(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of a residual sum, and the sum; all (N, E) compute but weight (E,), and x in shares."""
        if self._launch is not None:
            y, total = self._launch(residual_norm.op(shares_of(x)), {"x": x, "residual": residual, "weight": weight})
            return y, total
        total = residual + x
        return self._normed(total, weight), total

    def _rotated(self, qkv: Tensor, turns: Turns, slot: Tensor, keys: Stored, values: Stored) -> Tensor:
        """q (N, H, D) of qkv (N, (H + 2 G) D) or its shares, rotated and scaled; K, rotated, and V go into pages."""
        import torch

        if self._launch is not None:
            inputs = {"qkv": qkv, "cos": turns.cos, "sin": turns.sin, "scale": turns.scale, "slot": slot}
            op = rope_write.paged(self._kv_bits, shares_of(qkv))
            (q,) = self._launch(op, inputs | _cached(keys, values))
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
        assert self._launch is not None
        arguments = {name: inputs[name] for name in ("row", "first", "visible")}
        planned = self._launch(paged_attention.plan(self._programs), {**arguments, "page_table": table})
        return dict(zip(("items", "merges"), planned, strict=True))

    def _attend(self, q: Tensor, keys: Stored, values: Stored, sight: Mapping[str, Tensor]) -> Tensor:
        """PagedAttention's kernels, (N, H D)."""
        assert self._launch is not None
        arguments = {"q": q, **_cached(keys, values), **sight}
        (y,) = self._launch(paged_attention.op(self._kv_bits, self._programs), arguments)
        return y.flatten(1)


def _cached(keys: Stored, values: Stored) -> dict[str, Tensor]:
    """K and V as arguments of the ops."""
    pages = {"k_pages": keys.pages, "v_pages": values.pages}
    scales = {"k_scales": keys.scales, "v_scales": values.scales}
    return pages | {name: scale for name, scale in scales.items() if scale is not None}
